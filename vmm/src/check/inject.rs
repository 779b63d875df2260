//! Faults of the memory protocol, put in on purpose.
//!
//! The protocol has no switch for doing wrong. A fault is a policy, or an MMU, that lies to it.

use crate::mm::{Access, CowPolicy, Exclusive, FrameState, Gfn, Mmu, MmuError, Pfn, Protection};

/// What a [`Faulty`] policy decides wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyFault {
    /// A fork shares frames that devices hold.
    SharePinned,
    /// A write takes a shared frame over.
    ReuseShared,
}

/// The exclusive policy, wrong in one way.
#[derive(Clone, Copy, Debug)]
pub struct Faulty(pub PolicyFault);

impl CowPolicy for Faulty {
    const NAME: &'static str = Exclusive::NAME;

    fn may_share(&self, frame: FrameState) -> bool {
        self.0 == PolicyFault::SharePinned || Exclusive.may_share(frame)
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        self.0 == PolicyFault::ReuseShared || Exclusive.may_reuse(frame)
    }

    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        Exclusive.may_pin(frame, access)
    }
}

/// An MMU that leaves one page writable each time pages are to be write-protected: the first of them.
#[derive(Debug)]
pub struct LeakyMmu<M>(pub M);

impl<M: Mmu> Mmu for LeakyMmu<M> {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        self.0.map(first, frame, count, protection)
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        match (protection, count) {
            (Protection::ReadOnly, 1) => Ok(()),
            (Protection::ReadOnly, _) => self.0.protect(Gfn(first.0 + 1), count - 1, protection),
            (Protection::ReadWrite, _) => self.0.protect(first, count, protection),
        }
    }

    fn is_crowded(&self) -> bool {
        self.0.is_crowded()
    }
}
