use super::super::addr::Access;
use super::super::frame_state::FrameState;
use super::CowPolicy;

/// Linux since v5.19: the exclusive bit (6c287605fd56, a7f226604170).
#[derive(Clone, Copy, Debug, Default)]
pub struct Exclusive;

impl CowPolicy for Exclusive {
    fn name(&self) -> &'static str {
        "exclusive"
    }

    fn goes_by_the_bit(&self) -> bool {
        true
    }

    /// A frame that is possibly shared already is shared without a pin test: it cannot be pinned
    /// (PROTOCOL.md T12). An exclusive one only while no device holds it (T10, T11).
    fn may_share(&self, frame: FrameState) -> bool {
        !frame.is_exclusive() || frame.pins() == 0
    }

    /// The bit decides alone (T3: "no other check" is mandatory, a pin must not cause a copy). Without it,
    /// only a holder who is provably the last may go on (T4: 3.3 without swap cache and LRU).
    fn may_reuse(&self, frame: FrameState) -> bool {
        frame.is_exclusive() || frame.refs() == 1
    }

    /// Both for reading and for writing (PROTOCOL.md 0, item 4).
    fn may_pin(&self, frame: FrameState, _access: Access) -> bool {
        frame.is_exclusive()
    }
}
