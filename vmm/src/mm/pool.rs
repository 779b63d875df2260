//! The frame pool: which frames are free, and the handles by which frames are held.
//!
//! An address space *reserves* a run of frames as long as itself, its **home**: the frame for guest page
//! `gfn` is `home + gfn` for as long as nothing forces it elsewhere. Neighbouring guest pages are then
//! neighbours in the physmap, one mapping of the window covers them, and a first touch finds its frame by
//! arithmetic. Reserved frames that were never touched have no memory behind them. All other frames
//! (copies for snapshots, mostly) come from the rest of the pool, last freed first used.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::addr::{Access, Order, PAGE_SIZE, Pfn};
use super::frame::{FrameState, FrameTable, Released};
use super::mmu::FrameMemory;
use super::policy::{CowPolicy, without};
use super::safeguard::Safeguard;
use super::sync::{Mutex, lock};

/// Frames committed at a time outside homes, so that not every copy pays for a call to the host.
const COMMIT_BATCH: u64 = 64;

/// Why there was no frame.
#[derive(Debug, thiserror::Error)]
pub enum AllocError {
    /// The pool's own limit.
    #[error("out of memory: all {} MiB of the frame pool are in use", (limit * PAGE_SIZE) >> 20)]
    Limit {
        /// Frames the pool may commit.
        limit: u64,
    },
    /// The pool has no run of frame numbers that long.
    #[error("the frame pool has no room for a home of {pages} pages")]
    Home {
        /// Pages asked for.
        pages: u64,
    },
    /// The host has no memory left.
    #[error("out of memory: the host gave no memory for {count} more frames")]
    Host {
        /// Frames asked for.
        count: u64,
        /// The host's reason.
        source: io::Error,
    },
}

/// All frames of a process.
pub struct FramePool {
    frames: FrameTable,
    memory: Arc<dyn FrameMemory>,
    allocator: Mutex<Allocator>,
}

/// How many frames are in which condition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Allocated now.
    pub in_use: u64,
    /// Allocated at the worst moment.
    pub peak: u64,
    /// With memory behind them.
    pub committed: u64,
    /// The most that may have memory behind them.
    pub limit: u64,
}

struct Allocator {
    allocated: BitSet,
    committed: BitSet,
    /// Frames of somebody's home: handed out for their page alone.
    reserved: BitSet,
    /// Freed frames outside homes.
    free: Vec<Pfn>,
    /// From here on no frame was ever used.
    fresh: u64,
    usage: PoolUsage,
}

impl FramePool {
    /// A pool of `frames` frame numbers, of which at most `limit` have memory behind them at a time. Frame 0
    /// is the zero frame.
    ///
    /// # Panics
    /// If `frames` is 0.
    pub fn new(
        memory: Arc<dyn FrameMemory>,
        frames: u64,
        limit: u64,
    ) -> Result<Arc<Self>, AllocError> {
        assert!(frames > 0, "a pool has at least the zero frame");
        memory
            .commit(Pfn::ZERO, 1)
            .map_err(|source| AllocError::Host { count: 1, source })?;
        Ok(Arc::new(Self {
            frames: FrameTable::new(frames),
            memory,
            allocator: Mutex::new(Allocator {
                allocated: BitSet::new(frames),
                committed: BitSet::new(frames),
                reserved: BitSet::new(frames),
                free: Vec::new(),
                fresh: 1,
                usage: PoolUsage {
                    limit,
                    ..PoolUsage::default()
                },
            }),
        }))
    }

    /// What is known of a frame just now.
    pub fn state(&self, pfn: Pfn) -> FrameState {
        self.frames.state(pfn)
    }

    /// How full the pool is.
    pub fn usage(&self) -> PoolUsage {
        lock(&self.allocator).usage
    }

    /// Frames that are allocated or held though everybody is gone: what is left when no address space,
    /// snapshot or pin should be. Empty when the accounts are right. At most `most` of them.
    pub fn leftovers(&self, most: usize) -> Vec<(Pfn, FrameState)> {
        let allocator = lock(&self.allocator);
        (1..self.frames.len().min(allocator.fresh))
            .map(|n| (Pfn(n), self.frames.state(Pfn(n))))
            .filter(|&(pfn, state)| allocator.allocated.get(pfn) || state.refs() > 0)
            .take(most)
            .collect()
    }

    pub(super) fn frames(&self) -> &FrameTable {
        &self.frames
    }

    pub(super) fn memory(&self) -> &dyn FrameMemory {
        &*self.memory
    }

    /// Reserves a home of `pages` frames.
    pub(super) fn reserve(self: &Arc<Self>, pages: u64) -> Result<Home, AllocError> {
        let mut a = lock(&self.allocator);
        // Huge folios want the same offset in both: PLATFORM.md, "Huge frames without privilege".
        let first = if pages >= Order::HUGE.pages() {
            a.fresh.next_multiple_of(Order::HUGE.pages())
        } else {
            a.fresh
        };
        if first + pages > self.frames.len() {
            return Err(AllocError::Home { pages });
        }
        let skipped = a.fresh..first;
        a.free.extend(skipped.map(Pfn));
        a.fresh = first + pages;
        (first..first + pages).for_each(|n| a.reserved.set(Pfn(n), true));
        Ok(Home {
            pool: Arc::clone(self),
            first: Pfn(first),
            pages,
        })
    }

    /// A frame for anything: not zeroed.
    pub(super) fn allocate(self: &Arc<Self>) -> Result<Fresh, AllocError> {
        let mut a = lock(&self.allocator);
        let Some(pfn) = a.pick(self.frames.len()) else {
            return Err(AllocError::Limit {
                limit: a.usage.limit,
            });
        };
        if let Err(error) = a.take(pfn, self.frames.len(), COMMIT_BATCH, &*self.memory) {
            a.free.push(pfn);
            return Err(error);
        }
        Ok(Fresh::new(self, pfn))
    }

    /// A frame for page `index` that is filled with zeros: its home if that is free, so that neighbours stay neighbours, else any.
    pub(super) fn allocate_zeroed(
        self: &Arc<Self>,
        home: &Home,
        index: u64,
    ) -> Result<Fresh, AllocError> {
        let (fresh, is_zero) = self.allocate_home(home, index)?;
        if !is_zero {
            self.memory.zero(fresh.pfn);
        }
        Ok(fresh)
    }

    /// As [`FramePool::allocate_zeroed`], with whatever is in it.
    pub(super) fn allocate_near(
        self: &Arc<Self>,
        home: &Home,
        index: u64,
    ) -> Result<Fresh, AllocError> {
        self.allocate_home(home, index).map(|(fresh, _)| fresh)
    }

    /// Says also whether the frame is known to be all zeros: its memory is new.
    fn allocate_home(
        self: &Arc<Self>,
        home: &Home,
        index: u64,
    ) -> Result<(Fresh, bool), AllocError> {
        let pfn = Pfn(home.first.0 + index);
        let mut a = lock(&self.allocator);
        if a.allocated.get(pfn) || !a.can_back(pfn) {
            drop(a);
            return Ok((self.allocate()?, false));
        }
        let is_new = !a.committed.get(pfn);
        a.take(pfn, self.frames.len(), 1, &*self.memory)?;
        Ok((Fresh::new(self, pfn), is_new))
    }

    fn free(&self, pfn: Pfn) {
        lock(&self.allocator).release(pfn);
    }

    /// Gives back a mapping of `pfn`.
    pub(super) fn unmap(&self, pfn: Pfn) {
        if self.frames.unmap(pfn) == Released::Last {
            self.free(pfn);
        }
    }

    /// For model checkers: as [`FramePool::unmap`], without an order.
    pub(super) fn unmap_unordered(&self, pfn: Pfn) {
        if self.frames.unmap_unordered(pfn) == Released::Last {
            self.free(pfn);
        }
    }

    /// Takes the caller's mapping of `pfn` away if `may` agrees, and holds the frame: nobody can pin or hold it then if
    /// that was its only mapping.
    pub(super) fn isolate<P: CowPolicy>(
        self: &Arc<Self>,
        pfn: Pfn,
        may: impl Fn(FrameState) -> bool,
    ) -> Result<Isolated, FrameState> {
        let was_exclusive = self.frames.try_isolate::<P>(pfn, may)?;
        Ok(Isolated {
            pool: Arc::clone(self),
            pfn,
            was_exclusive,
            owned_elsewhere: false,
        })
    }

    /// Lets go of isolated frames. The memory of those that nobody else has goes back to the host.
    pub(super) fn give_to_host<P: CowPolicy>(&self, isolated: Vec<Isolated>) {
        let mut free: Vec<Pfn> = isolated
            .into_iter()
            .filter_map(Isolated::into_last)
            .collect();
        free.sort_unstable();
        // Still allocated, so that nobody takes them while their memory goes.
        for run in free.chunk_by(|a, b| a.0 + 1 == b.0) {
            let (first, count) = (run[0], run.len() as u64);
            let too_early = without::<P>(Safeguard::UncommittedBeforeFree);
            if too_early {
                run.iter().for_each(|&pfn| self.free(pfn));
            }
            let uncommitted = self.memory.uncommit(first, count).is_ok();
            let mut a = lock(&self.allocator);
            for &pfn in run {
                if !too_early {
                    a.release(pfn);
                }
                if uncommitted {
                    a.committed.set(pfn, false);
                    a.usage.committed -= 1;
                }
            }
        }
    }

    /// Takes a pin on `pfn` if `policy` grants it. The zero frame's pins are not counted (PROTOCOL.md 4.15).
    pub(super) fn try_pin(
        self: &Arc<Self>,
        pfn: Pfn,
        access: Access,
        policy: &impl CowPolicy,
    ) -> Result<Pin, FrameState> {
        if pfn != Pfn::ZERO {
            self.frames.try_pin(pfn, access, policy)?;
        } else if !policy.may_pin(self.frames.state(pfn), access) {
            return Err(self.frames.state(pfn));
        }
        Ok(Pin {
            pool: Arc::clone(self),
            pfn,
        })
    }

    /// Takes a transient hold on `pfn`. The zero frame is held by nobody and always there.
    pub(super) fn try_get<P: CowPolicy>(self: &Arc<Self>, pfn: Pfn) -> Result<Get, FrameState> {
        if pfn != Pfn::ZERO {
            self.frames.try_get::<P>(pfn)?;
        }
        Ok(Get {
            pool: Arc::clone(self),
            pfn,
        })
    }
}

impl fmt::Debug for FramePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FramePool")
            .field("usage", &self.usage())
            .finish()
    }
}

impl Allocator {
    /// Takes a frame outside homes off the free ones: the last that was freed. At the limit, one that has memory already.
    fn pick(&mut self, frames: u64) -> Option<Pfn> {
        if let Some(at) = self.free.iter().rposition(|&pfn| self.can_back(pfn)) {
            return Some(self.free.swap_remove(at));
        }
        let pfn = Pfn(self.fresh);
        (pfn.0 < frames && self.can_back(pfn)).then(|| {
            self.fresh += 1;
            pfn
        })
    }

    /// Whether there is memory for `pfn`, or may be.
    fn can_back(&self, pfn: Pfn) -> bool {
        self.usage.committed < self.usage.limit || self.committed.get(pfn)
    }

    /// Marks `pfn` allocated, with memory behind it: `batch` frames are committed at a time. There can be memory for it.
    fn take(
        &mut self,
        pfn: Pfn,
        frames: u64,
        batch: u64,
        memory: &dyn FrameMemory,
    ) -> Result<(), AllocError> {
        if !self.committed.get(pfn) {
            let room = self.usage.limit - self.usage.committed;
            let count = (pfn.0..frames)
                .take(batch.min(room) as usize)
                .take_while(|&n| !self.committed.get(Pfn(n)) && !self.reserved_apart(pfn, Pfn(n)))
                .count() as u64;
            memory
                .commit(pfn, count)
                .map_err(|source| AllocError::Host { count, source })?;
            (pfn.0..pfn.0 + count).for_each(|n| self.committed.set(Pfn(n), true));
            self.usage.committed += count;
        }
        self.allocated.set(pfn, true);
        self.usage.in_use += 1;
        self.usage.peak = self.usage.peak.max(self.usage.in_use);
        Ok(())
    }

    /// Marks `pfn` free.
    fn release(&mut self, pfn: Pfn) {
        debug_assert!(self.allocated.get(pfn), "{pfn:?} freed twice");
        self.allocated.set(pfn, false);
        self.usage.in_use -= 1;
        if !self.reserved.get(pfn) {
            self.free.push(pfn);
        }
    }

    /// Whether one of two frames belongs to a home and the other does not.
    fn reserved_apart(&self, a: Pfn, b: Pfn) -> bool {
        self.reserved.get(a) != self.reserved.get(b)
    }
}

/// A run of frames reserved for one address space; frame `first + i` is for page `i`.
pub(super) struct Home {
    pool: Arc<FramePool>,
    first: Pfn,
    pages: u64,
}

impl Drop for Home {
    fn drop(&mut self) {
        let mut a = lock(&self.pool.allocator);
        for pfn in (self.first.0..self.first.0 + self.pages).map(Pfn) {
            a.reserved.set(pfn, false);
            if !a.allocated.get(pfn) {
                a.free.push(pfn);
            }
        }
    }
}

/// A frame that was allocated and belongs to nobody yet. Dropping it frees it.
pub(super) struct Fresh {
    pool: Arc<FramePool>,
    pfn: Pfn,
    owned_elsewhere: bool,
}

impl Fresh {
    fn new(pool: &Arc<FramePool>, pfn: Pfn) -> Self {
        Self {
            pool: Arc::clone(pool),
            pfn,
            owned_elsewhere: false,
        }
    }

    pub(super) fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Gives it its first mapping, which the caller must put into an entry: exclusive.
    pub(super) fn into_mapped(mut self) -> Pfn {
        self.pool.frames.map_fresh(self.pfn);
        self.owned_elsewhere = true;
        self.pfn
    }

    /// Turns it into a hold, as a reader has one: the frame is freed with the last of its holders.
    pub(super) fn into_held(mut self) -> Get {
        self.pool.frames.hold_fresh(self.pfn);
        self.owned_elsewhere = true;
        Get {
            pool: Arc::clone(&self.pool),
            pfn: self.pfn,
        }
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if !self.owned_elsewhere {
            self.pool.free(self.pfn);
        }
    }
}

/// A device's hold on a frame (`FOLL_PIN`): the frame stays this page of its address space, whatever forks and
/// faults do, until the handle is dropped.
#[derive(Debug)]
pub struct Pin {
    pool: Arc<FramePool>,
    pfn: Pfn,
}

impl Pin {
    /// The pinned frame.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if self.pfn != Pfn::ZERO && self.pool.frames.unpin(self.pfn) == Released::Last {
            self.pool.free(self.pfn);
        }
    }
}

/// A transient reader's hold on a frame (`FOLL_GET`): the bytes stay those of the address space it was
/// taken through *or older*, never another's. It does not keep the frame in its place.
#[derive(Debug)]
pub struct Get {
    pool: Arc<FramePool>,
    pfn: Pfn,
}

impl Get {
    /// The held frame.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }
}

impl Drop for Get {
    fn drop(&mut self) {
        if self.pfn != Pfn::ZERO && self.pool.frames.put(self.pfn) == Released::Last {
            self.pool.free(self.pfn);
        }
    }
}

/// A frame that was taken out of its page and is not in another yet. Dropping it lets it go.
pub(super) struct Isolated {
    pool: Arc<FramePool>,
    pfn: Pfn,
    was_exclusive: bool,
    owned_elsewhere: bool,
}

impl Isolated {
    /// Maps it again, for the page it was taken out of, as it was.
    pub(super) fn put_back(mut self) {
        self.pool.frames.put_back(self.pfn, self.was_exclusive);
        self.owned_elsewhere = true;
    }

    /// Lets it go. If nobody else has it, it is the caller's to free.
    fn into_last(mut self) -> Option<Pfn> {
        self.owned_elsewhere = true;
        (self.pool.frames.put(self.pfn) == Released::Last).then_some(self.pfn)
    }
}

impl Drop for Isolated {
    fn drop(&mut self) {
        if !self.owned_elsewhere && self.pool.frames.put(self.pfn) == Released::Last {
            self.pool.free(self.pfn);
        }
    }
}

struct BitSet(Vec<u64>);

impl BitSet {
    fn new(bits: u64) -> Self {
        Self(vec![0; bits.div_ceil(64) as usize])
    }
    fn get(&self, pfn: Pfn) -> bool {
        self.0[(pfn.0 / 64) as usize] >> (pfn.0 % 64) & 1 != 0
    }
    fn set(&mut self, pfn: Pfn, value: bool) {
        let word = &mut self.0[(pfn.0 / 64) as usize];
        *word = *word & !(1 << (pfn.0 % 64)) | u64::from(value) << (pfn.0 % 64);
    }
}
