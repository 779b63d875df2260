//! Address spaces: live ones, which vCPUs run in, and frozen ones, which are snapshots.

use std::fmt;
use std::sync::atomic::{AtomicU64 as Counter, Ordering};
use std::sync::{Arc, Weak};

use super::addr::{Gfn, Pfn};
use super::mmu::{Mmu, MmuError};
use super::policy::CowPolicy;
use super::pool::{AllocError, FramePool, Home};
use super::sync::{Mutex, RwLock, lock};
use super::table::{Entry, Table};

/// The memory of a running VM: a shadow page table and the [`Mmu`] that mirrors it.
///
/// # Locks
/// In this order, each optional (a clone that is being made is nobody else's yet: its locks come last):
/// 1. `fork_lock`: shared by faults and slow pins, alone by fork and restore (the kernel's `mmap_lock`).
/// 2. the lock of one region of this space (the kernel's page-table lock).
/// 3. `snapshots`, the list of frozen children.
/// 4. the lock of the same region of one frozen child at a time.
/// 5. the pool's allocator.
///
/// Entries change only under 2; frame states change by compare-and-swap, with or without locks.
pub struct AddressSpace<P> {
    pub(super) pool: Arc<FramePool>,
    pub(super) policy: P,
    pub(super) table: Table,
    pub(super) mmu: Box<dyn Mmu>,
    pub(super) home: Home,
    pub(super) fork_lock: RwLock<()>,
    pub(super) snapshots: Mutex<Vec<Weak<Frozen>>>,
    pub(super) counters: Counters,
}

/// A snapshot of an address space: its pages as they were at one instant. It has no vCPUs and is never written.
///
/// It is not bound to frames: when a running space writes to a page that only snapshots share with it,
/// the *snapshots* are given the copy (see `fault.rs`).
pub struct Frozen {
    pub(super) pool: Arc<FramePool>,
    pub(super) table: Table,
}

/// A page number beyond the end of the address space.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[error("{gfn:?} is beyond the end of guest memory, which has {pages} pages")]
pub struct OutOfRange {
    /// The page asked for.
    pub gfn: Gfn,
    /// How many there are.
    pub pages: u64,
}

/// Why a fault, an unshare or a slow pin could not be resolved. Nothing has changed, except that a region may
/// have been resolved in part.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// No such page.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// No frame for the copy.
    #[error(transparent)]
    Alloc(#[from] AllocError),
    /// The MMU could not be changed.
    #[error(transparent)]
    Mmu(#[from] MmuError),
}

impl<P: CowPolicy> AddressSpace<P> {
    /// An address space of `pages` pages, none of them touched. `mmu` shows zeros, read-only, everywhere.
    ///
    /// # Errors
    /// If the pool has no room for a home of `pages` frames.
    pub fn new(
        pool: Arc<FramePool>,
        policy: P,
        mmu: Box<dyn Mmu>,
        pages: u64,
    ) -> Result<Self, AllocError> {
        Ok(Self {
            home: pool.reserve(pages)?,
            pool,
            policy,
            table: Table::new(pages),
            mmu,
            fork_lock: RwLock::new(()),
            snapshots: Mutex::new(Vec::new()),
            counters: Counters::default(),
        })
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.table.pages()
    }

    /// The pool its frames are from.
    pub fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    /// The entry of a page just now.
    pub fn entry(&self, gfn: Gfn) -> Result<Entry, OutOfRange> {
        in_range(&self.table, gfn).map(|()| self.table.peek(gfn))
    }

    /// What was done so far.
    pub fn stats(&self) -> MmStats {
        self.counters.read()
    }
}

impl Frozen {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.table.pages()
    }

    /// The entry of a page just now: a hint, since a break may move it to another frame.
    pub fn entry(&self, gfn: Gfn) -> Result<Entry, OutOfRange> {
        in_range(&self.table, gfn).map(|()| self.table.peek(gfn))
    }

    /// The frame a page is in just now: a hint as well.
    pub fn frame(&self, gfn: Gfn) -> Result<Pfn, OutOfRange> {
        self.entry(gfn).map(Entry::pfn)
    }

    /// Calls `look` with the frame a page is in, which stays there and as it is for the length of the call. A break of
    /// the page waits meanwhile: be short.
    pub fn with_frame<R>(&self, gfn: Gfn, look: impl FnOnce(Pfn) -> R) -> Result<R, OutOfRange> {
        in_range(&self.table, gfn)?;
        let region = self.table.lock(gfn.region());
        Ok(look(region.get(gfn).pfn()))
    }
}

pub(super) fn in_range(table: &Table, gfn: Gfn) -> Result<(), OutOfRange> {
    let pages = table.pages();
    if gfn.0 < pages {
        Ok(())
    } else {
        Err(OutOfRange { gfn, pages })
    }
}

/// Gives every mapping of `table` back to `pool`.
pub(super) fn unmap_all(pool: &FramePool, table: &Table) {
    for index in 0..table.regions() {
        let mut region = table.lock(index);
        if region.is_untouched() {
            continue;
        }
        for gfn in region.pages() {
            let entry = region.get(gfn);
            if entry.is_present() {
                region.set(gfn, Entry::UNTOUCHED);
                pool.unmap(entry.pfn());
            }
        }
    }
}

impl<P> Drop for AddressSpace<P> {
    /// Frames that are still pinned live on as orphans until their pins are dropped. The caller has stopped the
    /// vCPUs: the MMU is not changed.
    fn drop(&mut self) {
        unmap_all(&self.pool, &self.table);
        lock(&self.snapshots).clear();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        unmap_all(&self.pool, &self.table);
    }
}

impl<P> fmt::Debug for AddressSpace<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("pages", &self.table.pages())
            .field("stats", &self.counters.read())
            .finish()
    }
}

impl fmt::Debug for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frozen")
            .field("pages", &self.table.pages())
            .finish()
    }
}

/// Statistics only: nothing is ordered by them.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) reused: Counter,
    pub(super) writer_moved: Counter,
    pub(super) sharers_moved: Counter,
    pub(super) zero_filled: Counter,
    pub(super) unshared: Counter,
    pub(super) neighbours: Counter,
    pub(super) eager_copied: Counter,
    pub(super) pins_fast: Counter,
    pub(super) pins_slow: Counter,
}

impl Counters {
    pub(super) fn add(counter: &Counter) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) -> MmStats {
        let get = |c: &Counter| c.load(Ordering::Relaxed);
        MmStats {
            reused: get(&self.reused),
            writer_moved: get(&self.writer_moved),
            sharers_moved: get(&self.sharers_moved),
            zero_filled: get(&self.zero_filled),
            unshared: get(&self.unshared),
            neighbours: get(&self.neighbours),
            eager_copied: get(&self.eager_copied),
            pins_fast: get(&self.pins_fast),
            pins_slow: get(&self.pins_slow),
        }
    }
}

/// What an address space has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmStats {
    /// Write faults that found the frame exclusive, or its holder the last, and copied nothing.
    pub reused: u64,
    /// COW breaks that gave the writer the copy.
    pub writer_moved: u64,
    /// COW breaks that gave the snapshots the copy.
    pub sharers_moved: u64,
    /// First writes to memory that was never touched.
    pub zero_filled: u64,
    /// COW breaks and first touches on behalf of a reading pin.
    pub unshared: u64,
    /// Pages resolved beside one that faulted, to save mappings.
    pub neighbours: u64,
    /// Pages that fork copied because a device held them.
    pub eager_copied: u64,
    /// Pins taken without a lock.
    pub pins_fast: u64,
    /// Pins that had to take the lock.
    pub pins_slow: u64,
}
