use super::super::addr::Access;
use super::super::frame_state::FrameState;
use super::{CowPolicy, Exclusive};

/// The sketch this project started from (J. Gunthorpe, December 2021): the exclusive bit, and pins that do
/// not look at it.
///
/// A device that reads may be given a shared page, and loses it to the guest's next write: its author found
/// that acceptable; what landed in Linux made reading pins reliable too (PROTOCOL.md 1).
#[derive(Clone, Copy, Debug, Default)]
pub struct Seed;

impl CowPolicy for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

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

/// [`Seed`], with the split of a huge folio as the sketch has it: the bit of the small pages is **computed
/// from their reference counts**, "take the lock, compute the value, diffuse it to the tails".
///
/// A device's pin is a reference, so the page it holds loses the bit that the pin was granted by, and the
/// guest's next write fault takes the page from under it (**wrong COW**, PROTOCOL.md F4). If its entry is
/// writable there is a state that must never be, and the next fork shares the pinned page. What landed in
/// Linux spreads the bit as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct SeedRecompute;

impl CowPolicy for SeedRecompute {
    fn name(&self) -> &'static str {
        "seed-recompute"
    }

    fn may_share(&self, frame: FrameState) -> bool {
        Seed.may_share(frame)
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        Seed.may_reuse(frame)
    }

    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        Seed.may_pin(frame, access)
    }

    fn is_exclusive_after_split(&self, page: FrameState) -> bool {
        page.refs() == 1
    }
}
