//! The shadow page table: for each guest page the frame it is in and whether vCPUs may write it.
//!
//! An entry is one atomic word. It is **changed only under the lock of its 2 MiB region** and may be read
//! without one (the fast path of a pin does).

use std::fmt;

use super::addr::{Gfn, Pfn, Protection, REGION_PAGES};
use super::sync::{AtomicU64, Mutex, MutexGuard, Ordering, lock, zeroed};

/// One entry, laid out as an x86 page-table entry is: bit 0 present, bit 1 writable, bit 6 dirty, the frame number
/// from bit 12 on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const DIRTY: u64 = 1 << 6;
const FRAME_SHIFT: u32 = 12;

impl Entry {
    /// Memory nobody ever wrote: reads as zeros, owns no frame (states `NONE` and `ZERO` of PROTOCOL.md 3.1 in one,
    /// since a window shows zeros without a fault).
    pub const UNTOUCHED: Self = Self(0);

    /// Memory that was given back: untouched again, and reading differently than before.
    pub(super) const DISCARDED: Self = Self(DIRTY);

    pub(super) const fn read_only(pfn: Pfn) -> Self {
        Self(pfn.0 << FRAME_SHIFT | PRESENT)
    }
    /// What may be written counts as written: a write leaves no other trace.
    pub(super) const fn writable(pfn: Pfn) -> Self {
        Self(pfn.0 << FRAME_SHIFT | PRESENT | WRITABLE | DIRTY)
    }
    /// The same page in another frame, mapped and present as this one is or may be.
    pub(super) const fn in_frame(self, pfn: Pfn) -> Self {
        Self(pfn.0 << FRAME_SHIFT | PRESENT | self.0 & (WRITABLE | DIRTY))
    }
    pub(super) const fn write_protected(self) -> Self {
        Self(self.0 & !WRITABLE)
    }
    /// Write-protected, with nothing to report of the past.
    pub(super) const fn cleaned(self) -> Self {
        Self(self.0 & !(WRITABLE | DIRTY))
    }
    pub(super) const fn dirtied(self) -> Self {
        Self(self.0 | DIRTY)
    }
    /// Whether the page has a frame of its own or shares one with other address spaces.
    pub const fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }
    /// Whether vCPUs may write it without a fault. Implies that the frame is exclusive (I1).
    pub const fn is_writable(self) -> bool {
        self.0 & WRITABLE != 0
    }
    /// Whether the page may have been written since [`AddressSpace::take_dirty`](super::AddressSpace::take_dirty)
    /// last looked. A writable page always may have been.
    pub const fn is_dirty(self) -> bool {
        self.0 & DIRTY != 0
    }
    pub(super) const fn protection(self) -> Protection {
        if self.is_writable() {
            Protection::ReadWrite
        } else {
            Protection::ReadOnly
        }
    }
    /// The frame its bytes are in: [`Pfn::ZERO`] for memory that was never touched.
    pub const fn pfn(self) -> Pfn {
        Pfn(self.0 >> FRAME_SHIFT)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_present() {
            return f.write_str("untouched");
        }
        let right = if self.is_writable() { "rw" } else { "ro" };
        let dirty = if self.is_dirty() { "" } else { " clean" };
        write!(f, "{:?} {right}{dirty}", self.pfn())
    }
}

/// The entries of one address space.
pub(super) struct Table {
    entries: Box<[AtomicU64]>,
    /// Per region its lock, and under it the number of entries that are not [`Entry::UNTOUCHED`].
    regions: Box<[Mutex<usize>]>,
}

impl Table {
    pub(super) fn new(pages: u64) -> Self {
        Self {
            entries: zeroed(pages as usize),
            regions: (0..pages.div_ceil(REGION_PAGES))
                .map(|_| Mutex::new(0))
                .collect(),
        }
    }

    pub(super) fn pages(&self) -> u64 {
        self.entries.len() as u64
    }

    pub(super) fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Reads an entry without a lock: a hint, until something pins it down.
    ///
    /// Acquire pairs with the release in [`RegionGuard::set`]: who sees an entry sees its frame initialised
    /// and mapped.
    pub(super) fn peek(&self, gfn: Gfn) -> Entry {
        Entry(self.entries[gfn.0 as usize].load(Ordering::Acquire))
    }

    pub(super) fn lock(&self, region: usize) -> RegionGuard<'_> {
        let first = region * REGION_PAGES as usize;
        let last = self.entries.len().min(first + REGION_PAGES as usize);
        RegionGuard {
            touched: lock(&self.regions[region]),
            entries: &self.entries[first..last],
            first: Gfn(first as u64),
        }
    }
}

/// The right to change the entries of one region.
pub(super) struct RegionGuard<'a> {
    touched: MutexGuard<'a, usize>,
    entries: &'a [AtomicU64],
    first: Gfn,
}

impl RegionGuard<'_> {
    /// Whether no page of the region was ever touched.
    pub(super) fn is_untouched(&self) -> bool {
        *self.touched == 0
    }

    /// The pages of the region, in order.
    pub(super) fn pages(&self) -> impl Iterator<Item = Gfn> + use<> {
        let first = self.first.0;
        (first..first + self.entries.len() as u64).map(Gfn)
    }

    pub(super) fn get(&self, gfn: Gfn) -> Entry {
        // The lock orders this against every store.
        Entry(self.slot(gfn).load(Ordering::Relaxed))
    }

    /// Publishes an entry.
    ///
    /// Release pairs with the acquire in [`Table::peek`]. It is also the store that a pin's re-read looks for:
    /// it comes before the old frame's mapping is given back (`FrameTable::update`, second partner).
    pub(super) fn set(&mut self, gfn: Gfn, entry: Entry) {
        let before = self.get(gfn);
        self.slot(gfn).store(entry.0, Ordering::Release);
        *self.touched = *self.touched + usize::from(entry != Entry::UNTOUCHED)
            - usize::from(before != Entry::UNTOUCHED);
    }

    fn slot(&self, gfn: Gfn) -> &AtomicU64 {
        &self.entries[(gfn.0 - self.first.0) as usize]
    }
}
