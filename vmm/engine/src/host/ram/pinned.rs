//! Bytes of guest memory that are pinned until their value is dropped.

use std::fmt;
use std::iter;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::pages::pages;
use crate::host::physmap::PhysMap;
use crate::mm::{PAGE_SIZE, Pfn, PinnedRun};

/// Bytes of guest memory that are pinned: they stay where they are, and what the guest sees there, until this
/// is dropped.
pub struct PinnedBuffer {
    pub(super) physmap: Arc<PhysMap>,
    pub(super) runs: Vec<PinnedRun>,
    pub(super) gpa: u64,
    pub(super) len: u64,
}

impl PinnedBuffer {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, in order, in as few slices as they are runs of host addresses: what an iovec each is made
    /// of.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.part(0..self.len)
    }

    /// The same of the bytes `part`, counted from the first.
    ///
    /// # Panics
    /// If they are not all in the buffer.
    pub fn part(&self, part: Range<u64>) -> impl Iterator<Item = VolatileSlice<'_>> {
        assert!(
            part.start <= part.end && part.end <= self.len,
            "{part:?} of {} bytes",
            self.len
        );
        let gpa = self.gpa + part.start;
        let skipped = gpa / PAGE_SIZE - self.gpa / PAGE_SIZE;
        let pfns = self.runs.iter().flat_map(PinnedRun::pfns);
        let pfns = pfns.skip(skipped as usize);
        let mut pages = pages(gpa, part.end - part.start).zip(pfns).peekable();
        iter::from_fn(move || {
            let (first, pfn) = pages.next()?;
            let (mut last, mut len) = (pfn, first.len);
            // The zero frame is one frame, however many pages it is.
            let follows = |last: Pfn, next: Pfn| last != Pfn::ZERO && next.0 == last.0 + 1;
            while let Some((next, pfn)) = pages.next_if(|&(_, pfn)| follows(last, pfn)) {
                last = pfn;
                len += next.len;
            }
            Some(self.physmap.slice_run(pfn, first.offset, len))
        })
    }

    /// The pins themselves.
    pub fn into_pins(self) -> impl Iterator<Item = PinnedRun> {
        self.runs.into_iter()
    }
}

impl fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedBuffer")
            .field("gpa", &self.gpa)
            .field("len", &self.len)
            .finish()
    }
}
