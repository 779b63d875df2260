//! Faults of the memory protocol, put in on purpose.
//!
//! The protocol has no switch for doing wrong. A fault is a policy, or an MMU, that lies to it.

use std::ops::Range;

use palimpsest::mm::{
    Access, CowPolicy, Exclusive, FrameState, Gfn, Mmu, MmuError, Pfn, Protection,
};

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
    fn name(&self) -> &'static str {
        Exclusive.name()
    }

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

/// An MMU that never write-protects some pages: the guest writes to them whatever the protocol says.
///
/// A page that the protocol itself makes writable is copied first, and the fault does not show. So these are
/// all pages of a region in which no device holds anything: the guest never faults there. After the first
/// fork neither the protocol nor the copying ahead notices that they are still written.
#[derive(Debug)]
pub struct LeakyMmu<M> {
    mmu: M,
    writable: Range<u64>,
}

impl<M> LeakyMmu<M> {
    /// `mmu`, but for the pages `writable`.
    pub fn new(mmu: M, writable: Range<u64>) -> Self {
        Self { mmu, writable }
    }
}

impl<M: Mmu> Mmu for LeakyMmu<M> {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        self.mmu.map(first, frame, count, protection)
    }

    fn hide(&self, first: Gfn, count: u64) -> Result<(), MmuError> {
        self.mmu.hide(first, count)
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        let (first, end) = (first.0, first.0 + count);
        let parts = match protection {
            Protection::ReadWrite => [first..end, end..end],
            Protection::ReadOnly => [
                first..end.min(self.writable.start),
                first.max(self.writable.end)..end,
            ],
        };
        parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .try_for_each(|part| {
                let count = part.end - part.start;
                self.mmu.protect(Gfn(part.start), count, protection)
            })
    }

    fn is_crowded(&self) -> bool {
        self.mmu.is_crowded()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Notes what it is told to protect.
    #[derive(Default)]
    struct Notes(Mutex<Vec<(u64, u64)>>);

    impl Mmu for Notes {
        fn map(&self, _: Gfn, _: Pfn, _: u64, _: Protection) -> Result<(), MmuError> {
            Ok(())
        }

        fn protect(&self, first: Gfn, count: u64, _: Protection) -> Result<(), MmuError> {
            self.0.lock().unwrap().push((first.0, count));
            Ok(())
        }
    }

    #[test]
    fn a_leaky_mmu_protects_all_but_its_pages() {
        let leaky = LeakyMmu::new(Notes::default(), 10..20);
        let protected = |first, count, protection| {
            leaky.protect(Gfn(first), count, protection).unwrap();
            std::mem::take(&mut *leaky.mmu.0.lock().unwrap())
        };
        for (first, count, expected) in [
            (0, 10, vec![(0, 10)]),
            (0, 11, vec![(0, 10)]),
            (10, 10, vec![]),
            (12, 3, vec![]),
            (19, 2, vec![(20, 1)]),
            (20, 5, vec![(20, 5)]),
            (5, 20, vec![(5, 5), (20, 5)]),
        ] {
            assert_eq!(protected(first, count, Protection::ReadOnly), expected);
            assert_eq!(
                protected(first, count, Protection::ReadWrite),
                [(first, count)]
            );
        }
    }
}
