//! What each policy promises of address spaces, devices and readers, beyond accounts that are right.

use super::super::*;

/// A promise that was not kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// I9: somebody sees what another wrote.
    #[error("isolation: {0}")]
    Isolation(String),
    /// I8: a device, or a host writer, and the guest have different pages.
    #[error("coherence: {0}")]
    Coherence(String),
}

/// The promises that operations are held to.
pub(super) trait Promises {
    /// What is written through a pin or a hold is seen in the page it was taken through, and nowhere else;
    /// and pins and holds never show what another page's owner wrote.
    ///
    /// Where this is not promised, a device's write is seen in **every** page that is in the frame at that
    /// moment, and a hold may show anything. What vCPUs write is isolated from other vCPUs and from snapshots
    /// all the same.
    const ISOLATES_HOLDERS: bool;

    /// Whether a page may be taken from under a device or a host writer, given how its entry and its frame
    /// were before.
    fn may_lose(entry: Entry, frame: FrameState) -> bool;
}

impl Promises for Exclusive {
    const ISOLATES_HOLDERS: bool = true;

    fn may_lose(_: Entry, _: FrameState) -> bool {
        false
    }
}

impl Promises for Seed {
    const ISOLATES_HOLDERS: bool = true;

    fn may_lose(_: Entry, frame: FrameState) -> bool {
        !frame.is_exclusive()
    }
}

impl Promises for Refcount {
    const ISOLATES_HOLDERS: bool = true;

    fn may_lose(entry: Entry, _: FrameState) -> bool {
        !entry.is_writable()
    }
}

impl Promises for Mapcount {
    const ISOLATES_HOLDERS: bool = false;

    fn may_lose(entry: Entry, frame: FrameState) -> bool {
        !entry.is_present() || frame.maps() > 1
    }
}

impl Promises for MapcountForcedBreak {
    const ISOLATES_HOLDERS: bool = false;

    fn may_lose(_: Entry, frame: FrameState) -> bool {
        frame.maps() > 1
    }
}

impl<P: Promises> Promises for Biased<P> {
    const ISOLATES_HOLDERS: bool = P::ISOLATES_HOLDERS;

    fn may_lose(entry: Entry, frame: FrameState) -> bool {
        P::may_lose(entry, frame)
    }
}
