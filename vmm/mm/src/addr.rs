//! Address newtypes: guest frame numbers, frame numbers, and what pages are made of.

use std::fmt;

/// Bytes in a base page and in a frame.
pub const PAGE_SIZE: u64 = 4096;
/// Base pages in a region, and in a folio of [`Order::HUGE`].
pub const REGION_PAGES: u64 = 512;

/// Guest frame number: a guest-physical address in units of [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The frame that holds guest-physical address `gpa` (bytes).
    #[inline]
    pub const fn of_gpa(gpa: u64) -> Self {
        Self(gpa / PAGE_SIZE)
    }

    /// First guest-physical address of the frame, in bytes.
    #[inline]
    pub const fn gpa(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

/// A guest frame number beyond the end of the address space.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[error("{gfn:?} is beyond the end of guest memory, which has {pages} pages")]
pub struct OutOfRange {
    /// The page asked for.
    pub gfn: Gfn,
    /// How many there are.
    pub pages: u64,
}

/// Number of a frame in the pool; its bytes lie at `pfn * PAGE_SIZE` of the physmap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The zero frame: what never-touched memory reads as. It is not counted, not pinned, never written
    /// and never exclusive, like the kernel's zero page (PROTOCOL.md 4.15; `mm/gup.c`, c8070b787519).
    pub const ZERO: Self = Self(0);

    /// Offset of its first byte in the physmap.
    #[inline]
    pub const fn offset(self) -> u64 {
        self.0 * PAGE_SIZE
    }

    /// The `count` frames from this one on.
    #[inline]
    pub(super) fn run(self, count: u64) -> impl Iterator<Item = Self> + use<> {
        (self.0..self.0 + count).map(Self)
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// Size of a folio: 2^order base pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Order(u8);

impl Order {
    /// One page of 4 KiB.
    pub const BASE: Self = Self(0);
    /// 512 pages, 2 MiB.
    pub const HUGE: Self = Self(9);

    /// 2^`order` pages.
    ///
    /// # Panics
    /// If that is more than a huge folio has.
    pub const fn new(order: u8) -> Self {
        assert!(order <= Self::HUGE.0);
        Self(order)
    }

    /// Number of base pages.
    #[inline]
    pub const fn pages(self) -> u64 {
        1 << self.0
    }

    /// The pieces that snapshots have a folio's pages in, when these are mapped one by one: as many pieces as
    /// each has pages, or about, so that neither to look through all pieces nor through all pages of some
    /// costs much.
    pub(super) const fn chunk(self) -> Self {
        Self(self.0 / 2)
    }

    /// `number` rounded down to a multiple of the number of pages.
    #[inline]
    pub(super) const fn floor(self, number: u64) -> u64 {
        number & !(self.pages() - 1)
    }

    /// Which run of so many pages `number` lies in.
    #[inline]
    pub(super) const fn index(self, number: u64) -> usize {
        (number >> self.0) as usize
    }
}

/// What a mapping lets vCPUs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Reads only: a write leaves the guest and becomes a fault.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// What a pin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The holder only reads.
    Read,
    /// The holder writes, and may read.
    Write,
}
