//! Homes: the frames that the regions of an address space have for their own.
//!
//! The frame for a page is the frame of its region's home that is as far on, for as long as nothing forces
//! the page elsewhere. Neighbouring guest pages are then neighbours in the physmap, one mapping of the window
//! covers them, and a first touch finds its frame by arithmetic. Frames of a home that were never touched
//! have no memory.
//!
//! ```text
//!   a new space     | region 0 | region 1 | region 2 | region 3 |    one run, a part of it for each region
//!   region 1 moves  | region 0 |          | region 2 | region 3 |    ...    | region 1 |
//!   a clone           none, till a region needs a frame of its own:  ...    | region 1 | ...
//! ```
//! A space that was never cloned has one run. A clone has none at first: it shares frames, and a region of it
//! gets its home when it needs a frame. And a region *moves house* (`house.rs`) when others run on in the
//! frames of its home. Where a new home is, is chosen so that the regions of a space come to lie side by side
//! again ([`Place`]).
//!
//! Whoever is the last to have a folio takes over the home with it, if that was given up.
//!
//! A home ends when its region moves or its address space goes. Its frames are anybody's then, those that
//! others still have when the last of them lets go; and where all are free there may be another home.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::addr::{Order, Pfn};
use super::commit::{AllocError, Supply};

/// A run of frames reserved for one region, or for all of a space; frame `first + i` is for page `i`.
pub(super) struct Home {
    supply: Arc<Supply>,
    first: Pfn,
    /// None: it has ended, or was handed on.
    pages: u64,
    /// Where the run ends that it was reserved with. What follows it up to there is the same space's.
    end: Pfn,
}

impl Home {
    /// Reserves `pages` of the frames that `supply` has.
    pub(super) fn reserve(supply: &Arc<Supply>, pages: u64) -> Result<Self, AllocError> {
        let first = supply.make_home(pages)?;
        Ok(Self::of_reserved(supply, first, pages))
    }

    /// Reserves the frames of a folio for region number `index` of a space of `regions`, at its place there
    /// if they are free. `None` if no folio's worth of frames is free.
    pub(super) fn reserve_folio(
        supply: &Arc<Supply>,
        order: Order,
        place: &Place,
        index: usize,
        regions: usize,
    ) -> Option<Self> {
        let (index, regions) = (index as u64, regions as u64);
        let first = supply
            .lock()
            .make_home_of_folio(place.of(index), index, regions)?;
        place.note(index, order.index(first.0) as u64);
        Some(Self::of_reserved(supply, first, order.pages()))
    }

    /// Makes a home of a folio all of whose frames the caller has, unless it is somebody's home already.
    pub(super) fn of_folio(supply: &Arc<Supply>, order: Order, head: Pfn) -> Option<Self> {
        let is_free = supply.lock().make_home_at(head);
        is_free.then(|| Self::of_reserved(supply, head, order.pages()))
    }

    fn of_reserved(supply: &Arc<Supply>, first: Pfn, pages: u64) -> Self {
        Self {
            supply: Arc::clone(supply),
            first,
            pages,
            end: Pfn(first.0 + pages),
        }
    }

    /// Makes a home of its own of the first `pages` pages.
    pub(super) fn split_front(&mut self, pages: u64) -> Self {
        debug_assert!(pages <= self.pages);
        let front = Self {
            supply: Arc::clone(&self.supply),
            first: self.first,
            pages,
            end: self.end,
        };
        self.first = Pfn(self.first.0 + pages);
        self.pages -= pages;
        front
    }

    /// The frame for page `index`.
    pub(super) fn frame(&self, index: u64) -> Pfn {
        debug_assert!(index < self.pages);
        Pfn(self.first.0 + index)
    }

    /// How many frames there are from that of page `index` on, of this home and of those that were reserved
    /// with it.
    pub(super) fn rest(&self, index: u64) -> u64 {
        self.end.0 - self.first.0 - index
    }

    /// Whether the host may have its memory in small pages: it was not asked for all of it at a time. Of a
    /// home as long as a folio.
    pub(super) fn is_in_pieces(&self) -> bool {
        self.supply.lock().is_in_pieces(self.first)
    }

    /// Whether somebody has one of its frames.
    pub(super) fn is_taken(&self) -> bool {
        let allocator = self.supply.lock();
        self.first
            .run(self.pages)
            .any(|pfn| allocator.is_allocated(pfn))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if self.pages > 0 {
            self.supply.lock().end_home(self.first, self.pages);
        }
    }
}

/// Where a space would have its regions lie: those that get homes one after the other lie as they do in the
/// guest, as long as nobody else is there. A hint.
pub(super) struct Place {
    /// Which run of frames region 0 would have; nowhere yet, if that is [`Place::NOWHERE`].
    first: AtomicI64,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            first: AtomicI64::new(Self::NOWHERE),
        }
    }
}

/// The places of a space: where it has its regions lie that were given a home in one piece, and where those
/// that were given one for a page. The latter are in pieces, and most are given up for one of the former
/// (`gather.rs`): between those they would leave gaps.
#[derive(Default)]
pub(super) struct Places {
    pub(super) whole: Place,
    pub(super) pages: Place,
}

impl Place {
    const NOWHERE: i64 = i64::MIN;

    /// The run of frames at region `index`, if there is one.
    fn of(&self, index: u64) -> Option<u64> {
        let first = self.first.load(Ordering::Relaxed);
        first.checked_add_unsigned(index)?.try_into().ok()
    }

    /// Region `index` has got run number `run`.
    fn note(&self, index: u64, run: u64) {
        let first = (run as i64).saturating_sub_unsigned(index);
        self.first.store(first, Ordering::Relaxed);
    }
}
