use std::sync::atomic::{AtomicBool, Ordering};

use super::super::addr::Access;
use super::super::frame_state::FrameState;
use super::CowPolicy;

/// What a pin adds to the kernel's reference count (`GUP_PIN_COUNTING_BIAS`).
const BIAS: u64 = 1024;

/// A policy that counts pins as the kernel does for small folios: as 1,024 references each, in the reference
/// count itself (PROTOCOL.md 2.1). So 1,024 ordinary references look like a pin, and fork makes a copy too
/// many; unless nothing was ever pinned through the address space (`MMF_HAS_PINNED`).
///
/// For comparison only: our own pins are counted exactly, in a field of their own.
#[derive(Debug, Default)]
pub struct Biased<P> {
    policy: P,
    has_pinned: AtomicBool,
}

impl<P: CowPolicy> Biased<P> {
    /// `policy`, counting pins so. For one address space: the flag is its own and is not inherited.
    pub fn new(policy: P) -> Self {
        Self {
            policy,
            has_pinned: AtomicBool::new(false),
        }
    }
}

impl<P: CowPolicy> CowPolicy for Biased<P> {
    fn name(&self) -> &'static str {
        self.policy.name()
    }

    fn goes_by_the_bit(&self) -> bool {
        self.policy.goes_by_the_bit()
    }

    /// The order of the flag and the pin is that of the frame's word: a fork that sees the pin in it sees the
    /// flag.
    fn may_share(&self, frame: FrameState) -> bool {
        let count = frame.maps() + frame.gets() + frame.pins() * BIAS;
        let maybe_pinned = count >= BIAS && self.has_pinned.load(Ordering::Relaxed);
        self.policy.may_share(frame.with_pins(maybe_pinned.into()))
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        self.policy.may_reuse(frame)
    }

    /// Notes that somebody tried, as the kernel does, before it is known whether the pin is granted.
    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        self.has_pinned.store(true, Ordering::Relaxed);
        self.policy.may_pin(frame, access)
    }

    fn lookup(&self, access: Access) -> Access {
        self.policy.lookup(access)
    }

    fn is_exclusive_after_split(&self, page: FrameState) -> bool {
        self.policy.is_exclusive_after_split(page)
    }
}
