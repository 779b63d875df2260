use super::super::addr::Access;
use super::super::frame::FrameState;
use super::{CowPolicy, Exclusive};

/// The sketch this project started from (J. Gunthorpe, December 2021): the exclusive bit, and pins that do
/// not look at it.
///
/// A device that reads may be given a shared page, and loses it to the guest's next write: its author found that
/// acceptable; what landed in Linux made reading pins reliable too (PROTOCOL.md 1).
#[derive(Clone, Copy, Debug, Default)]
pub struct Seed;

impl CowPolicy for Seed {
    const NAME: &'static str = "seed";

    fn may_share(&self, frame: FrameState) -> bool {
        Exclusive.may_share(frame)
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        Exclusive.may_reuse(frame)
    }

    fn may_pin(&self, _frame: FrameState, _access: Access) -> bool {
        true
    }
}
