//! Bytes of guest memory that are pinned until their value is dropped.

use std::fmt;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::pages::pages;
use crate::host::physmap::PhysMap;
use crate::mm::PinnedRun;

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

    /// The bytes, in order: one slice a page.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        pages(self.gpa, self.len)
            .zip(self.runs.iter().flat_map(PinnedRun::pfns))
            .map(|(part, pfn)| self.physmap.slice(pfn, part.offset, part.len))
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
