//! The copy-on-write rules: who may be shared, written in place, pinned.
//!
//! Two questions are kept apart, as Linus asked for in December 2021 (PROTOCOL.md 1): "may I write here?"
//! ([`CowPolicy::may_reuse`]) must never be wrong; "may I share this?" ([`CowPolicy::may_share`]) may
//! say no too often, which costs a copy.

use super::addr::Access;
use super::frame::FrameState;

/// The decisions of a copy-on-write scheme, each a function of one frame's state.
///
/// They are asked inside a compare-and-swap and may be asked again: they must have no side effects that
/// matter.
pub trait CowPolicy: Send + Sync + 'static {
    /// Its name in reports.
    const NAME: &'static str;

    /// May a mapping of this frame be duplicated? If not, the caller copies, or gives up.
    fn may_share(&self, frame: FrameState) -> bool;

    /// May the holder of a read-only mapping of this frame write it in place?
    fn may_reuse(&self, frame: FrameState) -> bool;

    /// May a device pin this frame as it is? If not, the caller breaks COW first.
    fn may_pin(&self, frame: FrameState, access: Access) -> bool;
}

/// Linux since v5.19: the exclusive bit (6c287605fd56, a7f226604170).
#[derive(Clone, Copy, Debug, Default)]
pub struct Exclusive;

impl CowPolicy for Exclusive {
    const NAME: &'static str = "exclusive";

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
