//! Homes: the run of frames that each address space has for its own.
//!
//! The frame for guest page `gfn` is `home + gfn` for as long as nothing forces it elsewhere. Neighbouring
//! guest pages are then neighbours in the physmap, one mapping of the window covers them, and a first touch
//! finds its frame by arithmetic. Frames of a home that were never touched have no memory.
//!
//! A home ends with its address space. Its frames are anybody's then, those that snapshots still share when
//! the last of them lets go; and where all are free there may be another home.

use std::sync::Arc;

use super::addr::Pfn;
use super::commit::{AllocError, Supply};

/// A run of frames reserved for one address space; frame `first + i` is for page `i`.
pub(super) struct Home {
    supply: Arc<Supply>,
    first: Pfn,
    pages: u64,
}

impl Home {
    /// Reserves `pages` of the frames that `supply` has.
    pub(super) fn reserve(supply: &Arc<Supply>, pages: u64) -> Result<Self, AllocError> {
        Ok(Self {
            first: supply.make_home(pages)?,
            supply: Arc::clone(supply),
            pages,
        })
    }

    /// The frame for page `index`.
    pub(super) fn frame(&self, index: u64) -> Pfn {
        debug_assert!(index < self.pages);
        Pfn(self.first.0 + index)
    }

    /// How many frames there are from that of page `index` on.
    pub(super) fn rest(&self, index: u64) -> u64 {
        self.pages - index
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.supply.lock().end_home(self.first, self.pages);
    }
}
