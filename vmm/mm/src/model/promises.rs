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
#[derive(Clone, Copy)]
pub(super) struct Promises {
    /// What is written through a pin or a hold is seen in the page it was taken through, and nowhere else;
    /// and pins and holds never show what another page's owner wrote.
    ///
    /// Where this is not promised, a device's write is seen in **every** page that is in the frame at that
    /// moment, and a hold may show anything. What vCPUs write is isolated from other vCPUs and from snapshots
    /// all the same.
    pub(super) isolates_holders: bool,

    /// Whether a page may be taken from under a device or a host writer, given how its entry and its frame
    /// were before.
    pub(super) may_lose: fn(Entry, FrameState) -> bool,
}

impl Promises {
    pub(super) const EXCLUSIVE: Self = Self {
        isolates_holders: true,
        may_lose: |_, _| false,
    };
    pub(super) const SEED: Self = Self {
        isolates_holders: true,
        may_lose: |_, frame| !frame.is_exclusive(),
    };
    pub(super) const REFCOUNT: Self = Self {
        isolates_holders: true,
        may_lose: |entry, _| !entry.is_writable(),
    };
    pub(super) const MAPCOUNT: Self = Self {
        isolates_holders: false,
        may_lose: |entry, frame| !entry.is_present() || frame.maps() > 1,
    };
    pub(super) const MAPCOUNT_FORCED_BREAK: Self = Self {
        isolates_holders: false,
        may_lose: |_, frame| frame.maps() > 1,
    };
}

/// A policy, and what it is held to.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    /// One for each address space.
    pub(super) policy: fn() -> AnyPolicy,
    pub(super) promises: Promises,
}

impl Rules {
    pub(super) const EXCLUSIVE: Self = Self {
        policy: || Box::new(Exclusive),
        promises: Promises::EXCLUSIVE,
    };
    pub(super) const BIASED: Self = Self {
        policy: || Box::new(Biased::new(Exclusive)),
        promises: Promises::EXCLUSIVE,
    };
    pub(super) const SEED: Self = Self {
        policy: || Box::new(Seed),
        promises: Promises::SEED,
    };
    pub(super) const REFCOUNT: Self = Self {
        policy: || Box::new(Refcount),
        promises: Promises::REFCOUNT,
    };
    pub(super) const MAPCOUNT: Self = Self {
        policy: || Box::new(Mapcount),
        promises: Promises::MAPCOUNT,
    };
    pub(super) const MAPCOUNT_FORCED_BREAK: Self = Self {
        policy: || Box::new(MapcountForcedBreak),
        promises: Promises::MAPCOUNT_FORCED_BREAK,
    };

    /// The same policy, held to what only the right one keeps.
    pub(super) const fn as_exclusive(self) -> Self {
        Self {
            promises: Promises::EXCLUSIVE,
            ..self
        }
    }
}
