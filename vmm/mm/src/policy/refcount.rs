use super::super::addr::Access;
use super::super::frame_state::FrameState;
use super::CowPolicy;

/// Linux v5.9 to v5.18: one reference or a copy (09854ba94c6a), pinned pages copied at fork (70e806e4e645).
///
/// Nobody but the guest can see what is shared, so nothing leaks. But any reference makes a write copy: a
/// page that a device holds and that became read-only for another reason is taken from under the device
/// (**wrong COW**).
#[derive(Clone, Copy, Debug, Default)]
pub struct Refcount;

impl CowPolicy for Refcount {
    fn name(&self) -> &'static str {
        "refcount"
    }

    fn may_share(&self, frame: FrameState) -> bool {
        frame.pins() == 0
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        frame.refs() == 1
    }

    fn may_pin(&self, _frame: FrameState, _access: Access) -> bool {
        true
    }
}
