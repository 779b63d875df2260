//! What a shadow page table says of one page, or of a region: the frame, and what vCPUs may do with it.

use std::fmt;

use super::addr::{Pfn, Protection};

/// One entry, laid out as an x86 page-table entry is: bit 0 present, bit 1 writable, bit 6 dirty, bit 7 part
/// of a huge entry, the frame number from bit 12 on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const DIRTY: u64 = 1 << 6;
const HUGE: u64 = 1 << 7;
const FRAME_SHIFT: u32 = 12;

impl Entry {
    /// Memory nobody ever wrote: reads as zeros, owns no frame (states `NONE` and `ZERO` of PROTOCOL.md 3.1
    /// in one, since a window shows zeros without a fault).
    pub const UNTOUCHED: Self = Self(0);

    /// Memory that was given back: untouched again, and reading differently than before.
    pub(super) const DISCARDED: Self = Self(DIRTY);

    pub(super) const fn of_word(word: u64) -> Self {
        Self(word)
    }
    pub(super) const fn word(self) -> u64 {
        self.0
    }

    pub(super) const fn read_only(pfn: Pfn) -> Self {
        Self(pfn.0 << FRAME_SHIFT | PRESENT)
    }
    /// What may be written counts as written: a write leaves no other trace.
    pub(super) const fn writable(pfn: Pfn) -> Self {
        Self(pfn.0 << FRAME_SHIFT | PRESENT | WRITABLE | DIRTY)
    }
    /// As [`Entry::read_only`], of a whole region; the folio begins at `head`.
    pub(super) const fn huge_read_only(head: Pfn) -> Self {
        Self(Self::read_only(head).0 | HUGE)
    }
    /// As [`Entry::writable`], of a whole region; the folio begins at `head`.
    pub(super) const fn huge_writable(head: Pfn) -> Self {
        Self(Self::writable(head).0 | HUGE)
    }
    /// What a huge entry says of the page `index` pages further on; what a small one of that page would say,
    /// if it were alike and in the frame as many further on.
    pub(super) const fn page(self, index: u64) -> Self {
        Self(self.0 + (index << FRAME_SHIFT))
    }
    /// The same, as a small entry.
    pub(super) const fn small(self) -> Self {
        Self(self.0 & !HUGE)
    }
    /// Whether a huge entry maps the page, and the pages beside it.
    pub const fn is_huge(self) -> bool {
        self.0 & HUGE != 0
    }
    /// The same page in another frame, mapped and present as this one is or may be.
    pub(super) const fn in_frame(self, pfn: Pfn) -> Self {
        Self(pfn.0 << FRAME_SHIFT | PRESENT | self.0 & (WRITABLE | DIRTY))
    }
    /// The same page, as vCPUs may write it or not.
    pub(super) const fn protected(self, to: Protection) -> Self {
        match to {
            Protection::ReadOnly => self.write_protected(),
            // What may be written counts as written.
            Protection::ReadWrite => Self(self.0 | WRITABLE | DIRTY),
        }
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
    /// Whether the page may have been written since
    /// [`AddressSpace::take_dirty`](super::AddressSpace::take_dirty) last looked. A writable page always
    /// may have been.
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
        let huge = if self.is_huge() { " huge" } else { "" };
        let dirty = if self.is_dirty() { "" } else { " clean" };
        write!(f, "{:?} {right}{huge}{dirty}", self.pfn())
    }
}
