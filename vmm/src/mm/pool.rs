//! The frame pool: which frames are free, and the handles by which frames are held.
//!
//! An address space *reserves* a run of frames as long as itself, its **home**: the frame for guest page
//! `gfn` is `home + gfn` for as long as nothing forces it elsewhere. Neighbouring guest pages are then
//! neighbours in the physmap, one mapping of the window covers them, and a first touch finds its frame by
//! arithmetic. Reserved frames that were never touched have no memory behind them. All other frames
//! (copies for snapshots, mostly) come from the rest of the pool, last freed first used.
//!
//! Memory is asked for in whole runs as long as a huge folio, and more of them at a time in a home, so that the host can give it in
//! huge pages (PLATFORM.md, "Huge frames without privilege").

use std::fmt;
use std::io;
use std::sync::Arc;

use super::addr::{Access, Order, PAGE_SIZE, Pfn};
use super::folio::{Dissolved, Hold, may_pin};
use super::frame::{FrameState, FrameTable, Released};
use super::mmu::FrameMemory;
use super::policy::{CowPolicy, without};
use super::safeguard::Safeguard;
use super::stripe::{Apart, Striped};
use super::sync::{Mutex, lock};
use super::table::Entry;

/// Huge folios' worth of a home that are given memory at a time: most of what making host memory huge costs is for the call. Of other frames, what is made ready
/// before somebody is in a hurry.
pub(super) const COMMIT_FOLIOS: u64 = 8;

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
    frames: Arc<FrameTable>,
    memory: Arc<dyn FrameMemory>,
    allocator: Arc<Mutex<Allocator>>,
    leases: Striped<Arc<Apart<Lease>>>,
}

/// What a hold needs of its pool, and keeps for as long as it lasts, pool or no pool.
///
/// Every hold counts itself in and out of the lease that it has. Were that one count for all, it would be the one cache line that two
/// devices on different pages fight for: so there is a lease for each stripe of threads, and who drops a hold on another thread than took
/// it gives back the one it was taken with.
struct Lease {
    frames: Arc<FrameTable>,
    allocator: Arc<Mutex<Allocator>>,
    _memory: Arc<dyn FrameMemory>,
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
    /// With memory that nobody has used yet: zeros.
    blank: BitSet,
    /// Frames of somebody's home: handed out for their page alone.
    reserved: BitSet,
    /// Runs as long as a huge folio in which some frame outside homes may be free and some is not, by their first frames.
    partial: Vec<Pfn>,
    /// Which runs are in `partial`.
    is_partial: BitSet,
    /// Runs all of whose frames are free and outside homes.
    free_folios: Vec<Pfn>,
    /// From here on no frame was ever used.
    fresh: u64,
    folio: Order,
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
        Self::with_folios_of(Order::HUGE, memory, frames, limit)
    }

    /// As [`FramePool::new`], with huge folios of another size: for models, in which 512 pages are too many.
    ///
    /// # Errors
    /// As [`FramePool::new`].
    ///
    /// # Panics
    /// As [`FramePool::new`].
    pub fn with_folios_of(
        huge: Order,
        memory: Arc<dyn FrameMemory>,
        frames: u64,
        limit: u64,
    ) -> Result<Arc<Self>, AllocError> {
        assert!(frames > 0, "a pool has at least the zero frame");
        memory
            .commit(Pfn::ZERO, 1)
            .map_err(|source| AllocError::Host { count: 1, source })?;
        let frame_table = Arc::new(FrameTable::new(frames, huge));
        let allocator = Arc::new(Mutex::new(Allocator {
            allocated: BitSet::new(frames),
            committed: BitSet::new(frames),
            blank: BitSet::new(frames),
            reserved: BitSet::new(frames),
            partial: Vec::new(),
            is_partial: BitSet::new(frames.div_ceil(huge.pages())),
            free_folios: Vec::new(),
            fresh: 1,
            folio: huge,
            usage: PoolUsage {
                limit,
                ..PoolUsage::default()
            },
        }));
        let lease = || {
            Arc::new(Apart(Lease {
                frames: Arc::clone(&frame_table),
                allocator: Arc::clone(&allocator),
                _memory: Arc::clone(&memory),
            }))
        };
        Ok(Arc::new(Self {
            leases: Striped::new(lease),
            frames: frame_table,
            memory,
            allocator,
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
        let folio = self.huge().pages();
        let first = if pages >= folio {
            a.fresh.next_multiple_of(folio)
        } else {
            a.fresh
        };
        if first + pages > self.frames.len() {
            return Err(AllocError::Home { pages });
        }
        a.skip_to(first);
        a.fresh = first + pages;
        a.reserved.set_run(Pfn(first), pages, true);
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
        let batch = self.batch_of_single(pfn);
        if let Err(error) = a.take(pfn, 1, batch, &*self.memory) {
            a.note_free(pfn);
            return Err(error);
        }
        Ok(Fresh::new(self, pfn))
    }

    /// The frames of a huge folio for the pages from `index` on: their homes. `None` if one of them is in use, or there is not memory
    /// for all of them. With whatever is in them.
    pub(super) fn allocate_huge(
        self: &Arc<Self>,
        home: &Home,
        index: u64,
    ) -> Result<Option<FreshFolio>, AllocError> {
        let (head, pages) = (Pfn(home.first.0 + index), self.huge().pages());
        let mut a = lock(&self.allocator);
        let missing = a.committed.zeros(head, pages);
        if a.allocated.ones(head, pages) > 0 || missing > a.usage.limit - a.usage.committed {
            return Ok(None);
        }
        let batch = (home.pages - index).min(COMMIT_FOLIOS * pages);
        let is_blank = a.take(head, pages, batch, &*self.memory)?;
        Ok(Some(FreshFolio {
            pool: Arc::clone(self),
            head,
            is_blank,
            owned_elsewhere: false,
        }))
    }

    /// The frames of a huge folio for anything. `None` if there is no such run, or not memory for all of it. With whatever is in them.
    pub(super) fn allocate_folio(self: &Arc<Self>) -> Result<Option<FreshFolio>, AllocError> {
        let folio = self.huge();
        let mut a = lock(&self.allocator);
        let Some(head) = a.pick_folio(self.frames.len()) else {
            return Ok(None);
        };
        let is_blank = a
            .take(head, folio.pages(), folio.pages(), &*self.memory)
            .inspect_err(|_| a.free_folios.push(head))?;
        Ok(Some(FreshFolio {
            pool: Arc::clone(self),
            head,
            is_blank,
            owned_elsewhere: false,
        }))
    }

    /// Has memory ready for whoever needs a frame or a folio next, which may be in a hurry. What there is no memory for is left to them.
    pub(super) fn provide(&self) {
        let (frames, memory) = (self.frames.len(), &*self.memory);
        let mut a = lock(&self.allocator);
        if let Some(pfn) = a.pick(frames) {
            let _ = a.commit(pfn, 1, self.batch_of_single(pfn), memory);
            a.note_free(pfn);
        }
        if let Some(head) = a.pick_folio(frames) {
            let pages = self.huge().pages();
            let batch = (frames - head.0).min(COMMIT_FOLIOS * pages);
            let _ = a.commit(head, pages, batch, memory);
            a.free_folios.push(head);
        }
    }

    /// Frames outside homes that are given memory with `pfn`: to the end of the folio it would be in.
    fn batch_of_single(&self, pfn: Pfn) -> u64 {
        let end = self.huge().floor(pfn.0) + self.huge().pages();
        end.min(self.frames.len()) - pfn.0
    }

    /// How large a huge folio is.
    pub(super) fn huge(&self) -> Order {
        self.frames.huge
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
        let is_blank = a.take(pfn, 1, 1, &*self.memory)?;
        Ok((Fresh::new(self, pfn), is_blank))
    }

    fn free(&self, pfn: Pfn) {
        lock(&self.allocator).release(pfn);
    }

    /// Gives back a mapping of `pfn` by a small entry.
    pub(super) fn unmap(&self, pfn: Pfn) {
        if self.frames.unmap(pfn) == Released::Last {
            self.free(pfn);
        }
    }

    /// Gives back a mapping of the folio at `head` by a huge entry.
    pub(super) fn unmap_huge(&self, head: Pfn) {
        match self.frames.unmap_huge(head) {
            Dissolved::No => {}
            Dissolved::Free => lock(&self.allocator).release_folio(head),
            Dissolved::InPart(free) => {
                let mut a = lock(&self.allocator);
                free.into_iter().for_each(|pfn| a.release(pfn));
            }
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
                    a.blank.set(pfn, false);
                    a.usage.committed -= 1;
                }
            }
        }
    }

    /// Takes pins, if `policy` grants them, on the page of `entry`, and of a huge entry on pages that follow in its folio: on `count` in
    /// all, or on none. The zero frame's pins are not counted (PROTOCOL.md 4.15).
    pub(super) fn try_pin<P: CowPolicy>(
        &self,
        entry: Entry,
        count: u64,
        access: Access,
        policy: &P,
    ) -> Result<PinnedRun, FrameState> {
        let pfn = entry.pfn();
        let may = may_pin(policy, access);
        // Dropping it is the undo.
        let mut run = PinnedRun {
            lease: self.lease(),
            first: pfn,
            count: 0,
        };
        if entry.is_huge() {
            run.count = self.frames.hold_pages(pfn, count, Hold::Pin, &may);
            if run.count < count || !self.frames.are_pages_held::<P>(pfn, may) {
                return Err(self.frames.state(pfn));
            }
            return Ok(run);
        }
        debug_assert_eq!(count, 1);
        if pfn != Pfn::ZERO {
            self.frames.try_pin(pfn, access, policy)?;
        } else if !may(self.frames.state(pfn)) {
            return Err(self.frames.state(pfn));
        }
        run.count = 1;
        Ok(run)
    }

    /// Takes a transient hold on the page of `entry`. The zero frame is held by nobody and always there.
    pub(super) fn try_get<P: CowPolicy>(&self, entry: Entry) -> Result<Get, FrameState> {
        let pfn = entry.pfn();
        let any = |_| true;
        if entry.is_huge() {
            if self.frames.hold_pages(pfn, 1, Hold::Get, any) == 0 {
                return Err(self.frames.state(pfn));
            }
        } else if pfn != Pfn::ZERO {
            self.frames.try_get::<P>(pfn)?;
        }
        let get = Get {
            lease: self.lease(),
            pfn,
        };
        if entry.is_huge() && !self.frames.are_pages_held::<P>(pfn, any) {
            return Err(self.frames.state(pfn));
        }
        Ok(get)
    }

    #[inline]
    fn lease(&self) -> Arc<Apart<Lease>> {
        Arc::clone(self.leases.mine())
    }
}

impl Lease {
    fn free(&self, pfn: Pfn) {
        lock(&self.allocator).release(pfn);
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").finish_non_exhaustive()
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
    /// Takes a frame outside homes off the free ones: of a run that is in use already, if there is one, so that whole runs stay free.
    /// At the limit, one that has memory already.
    fn pick(&mut self, frames: u64) -> Option<Pfn> {
        if self.usage.committed >= self.usage.limit {
            return self.pick_committed();
        }
        while let Some(&head) = self.partial.last() {
            match self.free_in(head) {
                Some(pfn) if !self.is_free_folio(head) => return Some(pfn),
                // It is full, or free as a whole and listed as such.
                _ => {
                    self.partial.pop();
                    self.is_partial.set(self.run(head), false);
                }
            }
        }
        if let Some(head) = self.free_folios.pop() {
            self.list_partial(head);
            return Some(head);
        }
        (self.fresh < frames).then(|| {
            self.fresh += 1;
            Pfn(self.fresh - 1)
        })
    }

    fn pick_committed(&mut self) -> Option<Pfn> {
        let words = self.committed.0.iter().zip(&self.allocated.0);
        let free = words
            .zip(&self.reserved.0)
            .map(|((committed, allocated), reserved)| committed & !allocated & !reserved);
        // The zero frame is nobody's.
        let (word, free) = (0..)
            .zip(free)
            .map(|(n, free)| (n, if n == 0 { free & !1 } else { free }))
            .find(|&(_, free)| free != 0)?;
        let pfn = Pfn(word * 64 + u64::from(free.trailing_zeros()));
        let head = self.head(pfn);
        if let Some(at) = self.free_folios.iter().position(|&free| free == head) {
            self.free_folios.swap_remove(at);
            self.list_partial(head);
        }
        Some(pfn)
    }

    /// As [`Allocator::pick`], a huge folio: its first frame.
    fn pick_folio(&mut self, frames: u64) -> Option<Pfn> {
        let pages = self.folio.pages();
        let room = self.usage.limit - self.usage.committed;
        let fits = |pfn: Pfn| self.committed.zeros(pfn, pages) <= room;
        if let Some(at) = self.free_folios.iter().rposition(|&pfn| fits(pfn)) {
            return Some(self.free_folios.swap_remove(at));
        }
        let head = Pfn(self.fresh.next_multiple_of(pages));
        if head.0 + pages > frames || !fits(head) {
            return None;
        }
        self.skip_to(head.0);
        self.fresh = head.0 + pages;
        Some(head)
    }

    /// Leaves the frames that were never used before `first` to whoever needs a single one.
    fn skip_to(&mut self, first: u64) {
        let skipped = Pfn(self.fresh);
        self.fresh = first;
        if skipped.0 < first {
            self.note_free(skipped);
        }
    }

    fn head(&self, pfn: Pfn) -> Pfn {
        Pfn(self.folio.floor(pfn.0))
    }

    /// The number of the run that begins at `head`.
    fn run(&self, head: Pfn) -> Pfn {
        Pfn(self.folio.index(head.0) as u64)
    }

    /// A free frame of the run that begins at `head`.
    fn free_in(&self, head: Pfn) -> Option<Pfn> {
        let end = self.fresh.min(head.0 + self.folio.pages());
        // The zero frame is nobody's.
        let first = Pfn(head.0.max(1));
        words_of(first, end.saturating_sub(first.0)).find_map(|(word, mask)| {
            let free = mask & !self.allocated.0[word] & !self.reserved.0[word];
            (free != 0).then(|| Pfn(word as u64 * 64 + u64::from(free.trailing_zeros())))
        })
    }

    fn is_free_folio(&self, head: Pfn) -> bool {
        let pages = self.folio.pages();
        head != Pfn::ZERO
            && head.0 + pages <= self.fresh
            && self.allocated.ones(head, pages) == 0
            && self.reserved.ones(head, pages) == 0
    }

    /// Lists the run that `pfn`, which is free and outside homes, is in.
    fn note_free(&mut self, pfn: Pfn) {
        let head = self.head(pfn);
        if self.is_free_folio(head) {
            self.free_folios.push(head);
        } else {
            self.list_partial(head);
        }
    }

    fn list_partial(&mut self, head: Pfn) {
        let run = self.run(head);
        if !self.is_partial.get(run) {
            self.is_partial.set(run, true);
            self.partial.push(head);
        }
    }

    /// Whether there is memory for `pfn`, or may be.
    fn can_back(&self, pfn: Pfn) -> bool {
        self.usage.committed < self.usage.limit || self.committed.get(pfn)
    }

    /// Puts memory behind `count` frames from `first` on, and behind those that follow, up to `batch` from `first` on. There can be
    /// memory for `count`.
    fn commit(
        &mut self,
        first: Pfn,
        count: u64,
        batch: u64,
        memory: &dyn FrameMemory,
    ) -> Result<(), AllocError> {
        let wanted = self.committed.zeros(first, count);
        if wanted > 0 {
            let ahead = Pfn(first.0 + count)
                .run(batch.saturating_sub(count))
                .take_while(|&pfn| {
                    !self.committed.get(pfn) && self.reserved.get(pfn) == self.reserved.get(first)
                })
                .count() as u64;
            let room = self.usage.limit - self.usage.committed - wanted;
            let count = count + ahead.min(room);
            // Copies for snapshots: their sizes are a matter of the shadow page table alone.
            let committed = if self.reserved.get(first) {
                memory.commit(first, count)
            } else {
                memory.commit_base_pages(first, count)
            };
            committed.map_err(|source| AllocError::Host { count, source })?;
            self.usage.committed += self.committed.zeros(first, count);
            for pfn in first.run(count).filter(|&pfn| !self.committed.get(pfn)) {
                self.blank.set(pfn, true);
            }
            self.committed.set_run(first, count, true);
        }
        Ok(())
    }

    /// Marks `count` frames from `first` on allocated, with memory behind them as by [`Allocator::commit`]. Says whether all `count` are
    /// blank.
    fn take(
        &mut self,
        first: Pfn,
        count: u64,
        batch: u64,
        memory: &dyn FrameMemory,
    ) -> Result<bool, AllocError> {
        self.commit(first, count, batch, memory)?;
        let is_blank = self.blank.zeros(first, count) == 0;
        self.blank.set_run(first, count, false);
        self.allocated.set_run(first, count, true);
        self.usage.in_use += count;
        self.usage.peak = self.usage.peak.max(self.usage.in_use);
        Ok(is_blank)
    }

    /// Marks all frames of the folio at `head` free.
    fn release_folio(&mut self, head: Pfn) {
        let pages = self.folio.pages();
        debug_assert_eq!(self.allocated.zeros(head, pages), 0, "{head:?} freed twice");
        self.allocated.set_run(head, pages, false);
        self.usage.in_use -= pages;
        // A home begins and ends with a folio, or is shorter than one.
        if self.reserved.ones(head, pages) == 0 {
            self.note_free(head);
        }
    }

    /// Marks `pfn` free.
    fn release(&mut self, pfn: Pfn) {
        debug_assert!(self.allocated.get(pfn), "{pfn:?} freed twice");
        self.allocated.set(pfn, false);
        self.usage.in_use -= 1;
        if !self.reserved.get(pfn) {
            self.note_free(pfn);
        }
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
        a.reserved.set_run(self.first, self.pages, false);
        let end = self.first.0 + self.pages;
        let heads = a.head(self.first).0..end;
        for head in heads.step_by(self.pool.huge().pages() as usize).map(Pfn) {
            if a.free_in(head).is_some() {
                a.note_free(head);
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
            lease: self.pool.lease(),
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

/// A huge folio that was allocated and belongs to nobody yet. Dropping it frees it.
pub(super) struct FreshFolio {
    pool: Arc<FramePool>,
    head: Pfn,
    is_blank: bool,
    owned_elsewhere: bool,
}

impl FreshFolio {
    /// Fills it with zeros.
    pub(super) fn zero(&self) {
        if !self.is_blank {
            let frames = self.pool.frames.pages_of(self.head);
            frames.for_each(|pfn| self.pool.memory.zero(pfn));
        }
    }

    pub(super) fn head(&self) -> Pfn {
        self.head
    }

    /// Gives it its first mapping, by a huge entry of the caller's: exclusive.
    pub(super) fn into_mapped(mut self) -> Pfn {
        self.pool.frames.map_fresh_huge(self.head);
        self.owned_elsewhere = true;
        self.head
    }
}

impl Drop for FreshFolio {
    fn drop(&mut self) {
        if !self.owned_elsewhere {
            lock(&self.pool.allocator).release_folio(self.head);
        }
    }
}

/// A device's hold on a frame (`FOLL_PIN`): the frame stays this page of its address space, whatever forks and
/// faults do, until the handle is dropped.
#[derive(Debug)]
pub struct Pin(PinnedRun);

impl Pin {
    /// Of the one page of `run`.
    pub(super) fn new(run: PinnedRun) -> Self {
        debug_assert_eq!(run.count, 1);
        Self(run)
    }

    /// The pinned frame.
    pub fn pfn(&self) -> Pfn {
        self.0.first
    }
}

/// As [`Pin`], of neighbouring pages that are in neighbouring frames: one handle for all of them.
#[derive(Debug)]
pub struct PinnedRun {
    lease: Arc<Apart<Lease>>,
    first: Pfn,
    count: u64,
}

impl PinnedRun {
    /// The pinned frames, in the order of their pages.
    pub fn pfns(&self) -> impl Iterator<Item = Pfn> + use<> {
        self.first.run(self.count)
    }

    /// How many.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Pins the page of a small entry as well, if `policy` grants that; its frame is the next.
    pub(super) fn try_push<P: CowPolicy>(
        &mut self,
        entry: Entry,
        access: Access,
        policy: &P,
    ) -> bool {
        let next = Pfn(self.first.0 + self.count);
        debug_assert!(entry.pfn() == next && !entry.is_huge());
        let granted = self.lease.0.frames.try_pin(next, access, policy).is_ok();
        self.count += u64::from(granted);
        granted
    }

    /// A handle for each page: for a model, which lets go of them one by one.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn into_pins(mut self) -> Vec<Pin> {
        let of_one = |first| {
            Pin(Self {
                lease: Arc::clone(&self.lease),
                first,
                count: 1,
            })
        };
        let pins = self.pfns().map(of_one).collect();
        self.count = 0;
        pins
    }

    /// Takes over the pins of `next`, if its frames are the next; gives it back if not.
    pub(super) fn try_append(&mut self, mut next: Self) -> Result<(), Self> {
        if next.first.0 != self.first.0 + self.count || self.first == Pfn::ZERO {
            return Err(next);
        }
        self.count += std::mem::take(&mut next.count);
        Ok(())
    }

    /// Lets go of all pages but the first `count`.
    #[inline]
    pub(super) fn truncate(&mut self, count: u64) {
        let Lease { frames, .. } = &self.lease.0;
        for pfn in self.pfns().skip(count as usize) {
            if pfn != Pfn::ZERO && frames.unpin(pfn) == Released::Last {
                self.lease.0.free(pfn);
            }
        }
        self.count = self.count.min(count);
    }
}

impl Drop for PinnedRun {
    #[inline]
    fn drop(&mut self) {
        self.truncate(0);
    }
}

/// A transient reader's hold on a frame (`FOLL_GET`): the bytes stay those of the address space it was
/// taken through *or older*, never another's. It does not keep the frame in its place.
#[derive(Debug)]
pub struct Get {
    lease: Arc<Apart<Lease>>,
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
        let lease = &self.lease.0;
        if self.pfn != Pfn::ZERO && lease.frames.put(self.pfn) == Released::Last {
            lease.free(self.pfn);
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
        self.set_run(pfn, 1, value);
    }
    fn set_run(&mut self, first: Pfn, count: u64, value: bool) {
        for (word, mask) in words_of(first, count) {
            let word = &mut self.0[word];
            *word = if value { *word | mask } else { *word & !mask };
        }
    }
    fn ones(&self, first: Pfn, count: u64) -> u64 {
        words_of(first, count)
            .map(|(word, mask)| u64::from((self.0[word] & mask).count_ones()))
            .sum()
    }
    fn zeros(&self, first: Pfn, count: u64) -> u64 {
        count - self.ones(first, count)
    }
}

/// The words that the bits of a run lie in, and which of their bits those are.
fn words_of(first: Pfn, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = first.0 + count;
    let mut at = first.0;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let (word, bit) = (at / 64, at % 64);
            let bits = (64 - bit).min(end - at);
            at += bits;
            (word as usize, u64::MAX >> (64 - bits) << bit)
        })
    })
}
