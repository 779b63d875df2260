//! Where the pages of a region get their frames, and when the region moves house.
//!
//! A page gets its frame at home. If somebody else has that, another machine runs on in it, most often: a
//! clone, or who was cloned. Single pages go elsewhere then, and as long as there are few of them that is
//! best. But if others run on in most of a region's frames, all of what is written of it must be copied, and
//! page by page to anywhere it would be in as many mappings and never huge again. So the region gets another
//! *home*: pages go to their places in it as they break, neighbours join into one mapping, a break of the
//! whole region copies it into a folio there, and when all pages have come the region is huge again.
//!
//! The old home is given up: what others have of it is theirs, and free frames are anybody's.
//!
//! Snapshots and readers have nobody move house: those are moved (`fault.rs`), these go away.

use std::collections::HashSet;
use std::sync::{Arc, Weak};

use super::addr::{Gfn, Pfn};
use super::commit::AllocError;
use super::fresh::{Fresh, FreshFolio};
use super::frozen::FrozenRegion;
use super::home::{Home, Place};
use super::mapped::table::RegionGuard;
use super::policy::CowPolicy;
use super::space::AddressSpace;

/// How much memory is made ready with that of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ahead {
    /// None: it is not known that the next page will be written.
    Nothing,
    /// That of the pages that follow it in its region, which are needed next.
    Region,
}

impl<P: CowPolicy> AddressSpace<P> {
    /// A frame for a page, with whatever is in it: at its region's home, if that can be, or at the home that
    /// the region moves to; else anywhere.
    pub(super) fn allocate_page(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        ahead: Ahead,
    ) -> Result<Fresh, AllocError> {
        // Where it is it cannot go.
        if !self.is_at_home(region, gfn)
            && let Some(fresh) = self.allocate_at_home(region, gfn, ahead)?
        {
            return Ok(fresh);
        }
        let index = gfn.0 - region.first().0;
        let is_taken =
            |home: &Home| self.is_at_home(region, gfn) || self.pool.is_allocated(home.frame(index));
        if region.state.home.as_ref().is_some_and(is_taken) {
            self.moves_house(region, &self.places.pages);
        }
        self.allocate_near(region, gfn)
    }

    /// The same, of a region that does not move.
    pub(super) fn allocate_near(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
    ) -> Result<Fresh, AllocError> {
        self.settle(region, &self.places.pages);
        match &region.state.home {
            Some(home) => {
                let index = gfn.0 - region.first().0;
                self.pool.allocate_near(&self.account, home, index)
            }
            None => self.pool.allocate(&self.account),
        }
    }

    /// The frame of a page at home, with whatever is in it. `None` if somebody has it, or there is no memory
    /// for it, or no room for a home.
    pub(super) fn allocate_at_home(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        ahead: Ahead,
    ) -> Result<Option<Fresh>, AllocError> {
        self.settle(region, &self.places.pages);
        let index = gfn.0 - region.first().0;
        let most = match ahead {
            Ahead::Nothing => 1,
            Ahead::Region => region.len() - index,
        };
        match &region.state.home {
            Some(home) => self.pool.allocate_at(&self.account, home, index, most),
            None => Ok(None),
        }
    }

    /// Whether a page is in its frame at home.
    pub(super) fn is_at_home(&self, region: &RegionGuard<'_>, gfn: Gfn) -> bool {
        let home = region.state.home.as_ref();
        let index = gfn.0 - region.first().0;
        home.is_some_and(|home| home.frame(index) == region.get(gfn).pfn())
    }

    /// Whether any page of a region is.
    pub(super) fn lives_at_home(&self, region: &RegionGuard<'_>) -> bool {
        region.pages().any(|gfn| self.is_at_home(region, gfn))
    }

    /// The frames of a folio for all of a region, with whatever is in them: its home, or the one it moves to.
    /// `None` if it has none that nobody has a frame of, or there is no memory for it.
    pub(super) fn allocate_region(
        &self,
        region: &mut RegionGuard<'_>,
    ) -> Result<Option<FreshFolio>, AllocError> {
        self.settle(region, &self.places.whole);
        let Some(home) = &region.state.home else {
            return Ok(None);
        };
        let folio = self.pool.allocate_huge(&self.account, home, 0)?;
        if folio.is_some() || !home.is_taken() || !self.moves_house(region, &self.places.whole) {
            return Ok(folio);
        }
        match &region.state.home {
            Some(home) => self.pool.allocate_huge(&self.account, home, 0),
            None => Ok(None),
        }
    }

    /// Makes the folio at `head`, which a huge entry of the region's maps and nobody else has, the region's
    /// home, if it is not somebody's.
    pub(super) fn stay_in(&self, region: &mut RegionGuard<'_>, head: Pfn) {
        if !self.is_at_home(region, region.first())
            && let Some(home) = self.pool.home_of_folio(head)
        {
            region.state.home = Some(home);
        }
    }

    /// Gives a region a home, if it has none and there is room for one.
    fn settle(&self, region: &mut RegionGuard<'_>, place: &Place) {
        if region.state.home.is_none() {
            region.state.home = self.another_home(region, place);
        }
    }

    /// A home that a region could move to, if there is room for one.
    pub(super) fn another_home(&self, region: &RegionGuard<'_>, place: &Place) -> Option<Home> {
        let regions = self.mapped.table.regions();
        self.pool.reserve_folio(place, region.index(), regions)
    }

    /// Gives a region another home, if others run on in at least half of its pages and there is room for one.
    /// Says whether it has.
    fn moves_house(&self, region: &mut RegionGuard<'_>, place: &Place) -> bool {
        if !self.is_run_on_by_others(region) {
            return false;
        }
        match self.another_home(region, place) {
            Some(home) => {
                region.state.home = Some(home);
                true
            }
            None => false,
        }
    }

    /// Whether other live spaces map at least half of a region's pages that have a frame.
    pub(super) fn is_run_on_by_others(&self, region: &RegionGuard<'_>) -> bool {
        let alive = || region.state.sharers.iter().filter_map(Weak::upgrade);
        if let Some(head) = region.huge().map(|huge| huge.pfn()) {
            let is_ours = |s: &Arc<FrozenRegion>| {
                let theirs = s.lock();
                theirs.huge() == Some(head) && !theirs.is_lent(region.first())
            };
            let frozen = alive().filter(is_ours).count() as u64;
            if self.pool.frames().folio_state(head).maps() > frozen + 1 {
                return true;
            }
        }
        // Of each page the mappings that are ours, or of a snapshot of ours that is not lent: those would move.
        let frames: Vec<Pfn> = region.pages().map(|gfn| region.get(gfn).pfn()).collect();
        let mut known = vec![1; frames.len()];
        // Snapshots may have a mapping in common.
        let mut counted = HashSet::new();
        for snapshot in alive() {
            let theirs = snapshot.lock();
            for ((gfn, &pfn), known) in region.pages().zip(&frames).zip(&mut known) {
                if theirs.get(gfn).pfn() == pfn
                    && counted.insert((theirs.holder(gfn), gfn))
                    && !theirs.is_lent(gfn)
                {
                    *known += 1;
                }
            }
        }
        let is_present = |pfn: Pfn| pfn != Pfn::ZERO;
        let present = frames.iter().filter(|&&pfn| is_present(pfn)).count();
        let shared = frames
            .iter()
            .zip(known)
            .filter(|&(&pfn, known)| is_present(pfn) && self.pool.state(pfn).maps() > known)
            .count();
        2 * shared >= present
    }
}
