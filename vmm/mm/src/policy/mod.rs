//! The copy-on-write rules: who may be shared, written in place, pinned.
//!
//! Two questions are kept apart, as Linus asked for in December 2021 (PROTOCOL.md 1): "may I write here?"
//! ([`CowPolicy::may_reuse`]) must never be wrong; "may I share this?" ([`CowPolicy::may_share`]) may
//! say no too often, which costs a copy.
//!
//! | policy | Linux | write in place | share at fork | pin for reading |
//! |---|---|---|---|---|
//! | [`Mapcount`] | to v5.7 | one mapping | always | as it is |
//! | [`MapcountForcedBreak`] | v5.7.3, v5.8 | one mapping | always | as for writing |
//! | [`Refcount`] | v5.9 to v5.18 | one reference | not pinned | as it is |
//! | [`Seed`] | a sketch of December 2021 | exclusive, or one reference | not exclusive, or not pinned | as it is |
//! | [`SeedRecompute`] | the same, to the letter | the same; a split of a huge folio counts references anew | the same | as it is |
//! | [`Exclusive`] | v5.19 on | exclusive, or one reference | not exclusive, or not pinned | only exclusive |
//!
//! Only the last is right. The others are here to fail as the kernel did (PROTOCOL.md 6); nothing outside
//! these files knows which one runs.

mod biased;
mod exclusive;
mod mapcount;
mod refcount;
mod seed;

pub use biased::Biased;
pub use exclusive::Exclusive;
pub use mapcount::{Mapcount, MapcountForcedBreak};
pub use refcount::Refcount;
pub use seed::{Seed, SeedRecompute};

use super::addr::Access;
use super::frame_state::FrameState;

/// The decisions of a copy-on-write scheme, each a function of one frame's state.
///
/// They are asked inside a compare-and-swap and may be asked again: they must have no side effects that
/// matter.
pub trait CowPolicy: Send + Sync + 'static {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// Whether the exclusive bit means anything to it. Nothing is decided by this: it says what may be
    /// asserted, and shown.
    fn goes_by_the_bit(&self) -> bool {
        false
    }

    /// May a mapping of this frame be duplicated? If not, the caller copies, or gives up.
    fn may_share(&self, frame: FrameState) -> bool;

    /// May the holder of a read-only mapping of this frame write it in place?
    fn may_reuse(&self, frame: FrameState) -> bool;

    /// May a device pin this frame as it is? If not, the caller breaks COW first. The zero frame is asked
    /// about too: it is never exclusive.
    fn may_pin(&self, frame: FrameState, access: Access) -> bool;

    /// How a page is looked up for a pin or a hold that wants `access`: a scheme may treat readers as
    /// writers.
    fn lookup(&self, access: Access) -> Access {
        access
    }

    /// Is this page exclusive, now that the last huge entry of its folio became small ones? `page` says what
    /// holds it now, and as its bit what the folio's said. The bit spreads as it is (PROTOCOL.md 4.10):
    /// whoever holds the page was granted that by it.
    fn is_exclusive_after_split(&self, page: FrameState) -> bool {
        page.is_exclusive()
    }
}

/// A policy that is chosen when the program runs: all of them by code that is compiled once.
pub type AnyPolicy = Box<dyn CowPolicy>;

impl CowPolicy for AnyPolicy {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn goes_by_the_bit(&self) -> bool {
        (**self).goes_by_the_bit()
    }

    fn may_share(&self, frame: FrameState) -> bool {
        (**self).may_share(frame)
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        (**self).may_reuse(frame)
    }

    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        (**self).may_pin(frame, access)
    }

    fn lookup(&self, access: Access) -> Access {
        (**self).lookup(access)
    }

    fn is_exclusive_after_split(&self, page: FrameState) -> bool {
        (**self).is_exclusive_after_split(page)
    }
}
