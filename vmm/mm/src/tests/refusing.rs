//! An MMU and frame memory that refuse when they are told to, and remember what they were asked.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::super::soft::{SoftMemory, SoftMmu};
use super::super::*;

/// How much of what it was asked an MMU does before it refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) enum Manner {
    /// Nothing, and it says so.
    #[default]
    Clean,
    /// Nothing of it, which nobody knows.
    Nothing,
    /// The first pages: all but so many.
    AllBut(u64),
    /// The last pages: all but so many.
    AllButFirst(u64),
    /// All of it.
    All,
}

impl Manner {
    /// The pages of `count` that are changed: which is the first, and how many.
    fn part(self, count: u64) -> (u64, u64) {
        match self {
            Self::Clean | Self::Nothing => (0, 0),
            Self::AllBut(n) => (0, count.saturating_sub(n)),
            Self::AllButFirst(n) => (n.min(count), count.saturating_sub(n)),
            Self::All => (0, count),
        }
    }
}

/// When to refuse, and how often somebody asked.
#[derive(Debug, Default)]
pub(in super::super) struct Refusals {
    calls: AtomicU64,
    from: AtomicU64,
    until: AtomicU64,
    /// Of those that are refused, in order; the last is that of all that follow.
    manners: Mutex<Vec<Manner>>,
    pub(in super::super) crowded: AtomicU64,
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
    pub(in super::super) fn never(&self) {
        self.between(0, 0);
    }

    /// Has an MMU refuse in this manner from now on, and `count` calls from the `nth` on.
    pub(in super::super) fn refuse(&self, manner: Manner, nth: u64, count: u64) {
        *self.manners.lock().unwrap() = vec![manner];
        self.between(nth, nth.saturating_add(count));
    }

    /// Has an MMU refuse calls from the `nth` on, each in its manner.
    pub(super) fn refuse_each(&self, nth: u64, manners: &[Manner]) {
        *self.manners.lock().unwrap() = manners.to_vec();
        self.between(nth, nth + manners.len() as u64);
    }

    /// How call `nth` is refused.
    fn manner(&self, nth: u64) -> Manner {
        let refused = nth - self.from.load(Ordering::Relaxed);
        let manners = self.manners.lock().unwrap();
        let manner = manners.get(refused as usize).or(manners.last());
        manner.copied().unwrap_or_default()
    }

    fn between(&self, from: u64, until: u64) {
        self.calls.store(0, Ordering::Relaxed);
        self.from.store(from, Ordering::Relaxed);
        self.until.store(until, Ordering::Relaxed);
    }

    /// Counts calls anew.
    pub(super) fn calls_from_now(&self) {
        self.calls.store(0, Ordering::Relaxed);
    }

    /// Calls since it was last told what to do.
    pub(in super::super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Which call this is, if it is refused.
    fn ask(&self) -> Result<(), u64> {
        let nth = self.calls.fetch_add(1, Ordering::Relaxed);
        let refused = self.from.load(Ordering::Relaxed)..self.until.load(Ordering::Relaxed);
        if refused.contains(&nth) {
            return Err(nth);
        }
        Ok(())
    }
}

fn refused() -> io::Error {
    io::Error::other("told to refuse")
}

pub(in super::super) struct RefusingMmu {
    pub(in super::super) inner: Arc<SoftMmu>,
    pub(in super::super) refusals: Arc<Refusals>,
}

impl RefusingMmu {
    /// Asks for a change of `count` pages from `first` on; `change` makes some of it, given the first page
    /// and how many.
    fn ask(
        &self,
        what: &'static str,
        first: Gfn,
        count: u64,
        change: impl Fn(u64, u64) -> Result<(), MmuError>,
    ) -> Result<(), MmuError> {
        let Err(nth) = self.refusals.ask() else {
            return change(0, count);
        };
        let (source, manner) = (refused(), self.refusals.manner(nth));
        let (skipped, part) = manner.part(count);
        if part > 0 {
            change(skipped, part)?;
        }
        Err(match manner {
            Manner::Clean => MmuError::Host {
                what,
                first,
                count,
                source,
            },
            _ => MmuError::Torn {
                what,
                first,
                count,
                source,
            },
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
        self.ask("map", first, count, |skipped, part| {
            let frame = match frame {
                Pfn::ZERO => Pfn::ZERO,
                Pfn(n) => Pfn(n + skipped),
            };
            self.inner
                .map(Gfn(first.0 + skipped), frame, part, protection)
        })
    }
    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        self.ask("protect", first, count, |skipped, part| {
            self.inner.protect(Gfn(first.0 + skipped), part, protection)
        })
    }
    fn hide(&self, first: Gfn, count: u64) -> Result<(), MmuError> {
        self.ask("hide", first, count, |skipped, part| {
            self.inner.hide(Gfn(first.0 + skipped), part)
        })
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
    /// The first frames of those that were committed in base pages.
    pub(super) in_base_pages: Mutex<Vec<u64>>,
}

impl RefusingMemory {
    pub(super) fn new(frames: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: SoftMemory::new(frames),
            refusals: Refusals::default(),
            committed: Mutex::default(),
            uncommitted: Mutex::default(),
            in_base_pages: Mutex::default(),
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
        self.refusals.ask().map_err(|_| refused())?;
        self.committed.lock().unwrap().push((first.0, count));
        Ok(())
    }
    fn commit_base_pages(&self, first: Pfn, count: u64) -> io::Result<()> {
        self.in_base_pages.lock().unwrap().push(first.0);
        self.commit(first, count)
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
        self.refusals.ask().map_err(|_| refused())?;
        self.uncommitted.lock().unwrap().push((first.0, count));
        self.inner.uncommit(first, count)
    }
}
