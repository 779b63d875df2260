//! An MMU and frame memory that refuse when they are told to, and remember what they were asked.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::super::soft::{SoftMemory, SoftMmu};
use super::super::*;

/// When to refuse, and how often somebody asked.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    calls: AtomicU64,
    from: AtomicU64,
    until: AtomicU64,
    pub(super) crowded: AtomicU64,
}

impl Refusals {
    /// Refuses the `nth` call from now on, counted from 0, and no other.
    pub(super) fn at(&self, nth: u64) {
        self.between(nth, nth + 1);
    }

    /// Refuses every call from the `nth` on.
    pub(super) fn from(&self, nth: u64) {
        self.between(nth, u64::MAX);
    }

    /// Refuses nothing.
    pub(super) fn never(&self) {
        self.between(0, 0);
    }

    fn between(&self, from: u64, until: u64) {
        self.calls.store(0, Ordering::Relaxed);
        self.from.store(from, Ordering::Relaxed);
        self.until.store(until, Ordering::Relaxed);
    }

    /// Calls since it was last told what to do.
    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    fn ask(&self) -> io::Result<()> {
        let nth = self.calls.fetch_add(1, Ordering::Relaxed);
        let refused = self.from.load(Ordering::Relaxed)..self.until.load(Ordering::Relaxed);
        if refused.contains(&nth) {
            return Err(io::Error::other("told to refuse"));
        }
        Ok(())
    }
}

pub(super) struct RefusingMmu {
    pub(super) inner: Arc<SoftMmu>,
    pub(super) refusals: Arc<Refusals>,
}

impl RefusingMmu {
    fn ask(&self, what: &'static str, first: Gfn, count: u64) -> Result<(), MmuError> {
        self.refusals.ask().map_err(|source| MmuError::Host {
            what,
            first,
            count,
            source,
        })
    }
}

impl Mmu for RefusingMmu {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        self.ask("map", first, count)?;
        self.inner.map(first, frame, count, protection)
    }
    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        self.ask("protect", first, count)?;
        self.inner.protect(first, count, protection)
    }
    fn is_crowded(&self) -> bool {
        self.refusals.crowded.load(Ordering::Relaxed) > 0
    }
}

/// Frames whose memory the host gives and takes back, or does not.
pub(super) struct RefusingMemory {
    pub(super) inner: Arc<SoftMemory>,
    pub(super) refusals: Refusals,
    /// The runs that were committed and uncommitted: first frame, how many.
    pub(super) committed: Mutex<Vec<(u64, u64)>>,
    pub(super) uncommitted: Mutex<Vec<(u64, u64)>>,
}

impl RefusingMemory {
    pub(super) fn new(frames: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: SoftMemory::new(frames),
            refusals: Refusals::default(),
            committed: Mutex::default(),
            uncommitted: Mutex::default(),
        })
    }

    pub(super) fn pool(self: &Arc<Self>, frames: u64, limit: u64) -> Arc<FramePool> {
        let pool = FramePool::new(Arc::clone(self) as _, frames, limit).unwrap();
        self.committed.lock().unwrap().clear();
        pool
    }
}

impl FrameMemory for RefusingMemory {
    fn commit(&self, first: Pfn, count: u64) -> io::Result<()> {
        self.refusals.ask()?;
        self.committed.lock().unwrap().push((first.0, count));
        Ok(())
    }
    fn copy(&self, from: Pfn, to: Pfn) {
        self.inner.copy(from, to);
    }
    fn zero(&self, frame: Pfn) {
        self.inner.zero(frame);
    }
    fn equal(&self, one: Pfn, other: Pfn) -> bool {
        self.inner.equal(one, other)
    }
    fn write(&self, frame: Pfn, offset: u64, bytes: &[u8]) {
        self.inner.write(frame, offset, bytes);
    }
    fn uncommit(&self, first: Pfn, count: u64) -> io::Result<()> {
        self.refusals.ask()?;
        self.uncommitted.lock().unwrap().push((first.0, count));
        self.inner.uncommit(first, count)
    }
}
