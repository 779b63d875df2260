//! A region that moves house is brought together in one piece of new memory.
//!
//! It moved for a page, and memory was given to that page alone (`house.rs`). Once the rest is to follow, the
//! host could only add small pages to it, and whoever translates for the guest would need an entry for each
//! of them, made by a fault each. So the few pages that have come are moved once more, with the rest:
//!
//! ```text
//!   before                                             after
//!   ------------------------------------------------   ---------------------------------
//!   page 3: rw, at home, in a small page of the host   all pages: rw, in one folio, which
//!   the others: ro, in frames that others run on in    is home and was given memory whole
//! ```
//! The few move as in a migration (`migrate.rs`), the others as in a break that moves the writer (`fault.rs`).

use super::addr::{Gfn, Pfn};
use super::entry::Entry;
use super::home::Home;
use super::mapped::table::RegionGuard;
use super::migrate::Moving;
use super::mmu::MmuError;
use super::policy::CowPolicy;
use super::space::AddressSpace;
use super::stats::Counters;

/// Pages that have come are few if they are one in so many, or just two: for each the MMU is asked once more.
const FEW: u64 = 32;

impl<P: CowPolicy> AddressSpace<P> {
    /// Copies all of a region into a folio that becomes its home, and says so; or changes nothing, if that is
    /// not worth while, or somebody holds one of the pages that have come, or there is no room or no memory.
    /// The caller has opened all of the region.
    ///
    /// # Errors
    /// The MMU's. Nothing has changed, or the space is broken.
    pub(super) fn gather(&self, region: &mut RegionGuard<'_>) -> Result<bool, MmuError> {
        let Some(own) = self.few_that_have_come(region) else {
            return Ok(false);
        };
        let Some(home) = self.another_home(region, &self.places.whole) else {
            return Ok(false);
        };
        // Nobody asked for it: the host's reasons are of no interest.
        let Ok(Some(folio)) = self.pool.allocate_huge(&self.account, &home, 0) else {
            return Ok(false);
        };
        let Some(moving) = self.take_out_all(region, &own) else {
            return Ok(false);
        };
        let before: Vec<Entry> = region.pages().map(|gfn| region.get(gfn)).collect();
        self.copy_runs(&before, folio.head());
        let to = Entry::huge_writable(folio.head());
        let (first, count) = (region.first(), region.len());
        if let Err(error) = self.mapped.map(region, first, count, to, folio) {
            self.put_back_all(region, moving);
            return Err(error);
        }
        let is_own = |gfn: &Gfn| own.binary_search(gfn).is_ok();
        let left = region.pages().zip(before).filter(|(gfn, _)| !is_own(gfn));
        left.for_each(|(_, entry)| self.pool.unmap(entry.pfn()));
        moving.into_iter().for_each(|page| self.has_moved(page));
        region.state.home = Some(home);
        self.broke_whole(region);
        Counters::add(&self.counters.mine().formed);
        let others = count - own.len() as u64;
        Counters::add_more(&self.counters.mine().neighbours, others);
        Ok(true)
    }

    /// The pages of a region that are the space's alone, in order, if it is to be gathered: they are few,
    /// nobody holds one, and others run on in the rest.
    fn few_that_have_come(&self, region: &RegionGuard<'_>) -> Option<Vec<Gfn>> {
        let home = region.state.home.as_ref();
        if !self.uses_huge
            || !region.is_full()
            || region.huge().is_some()
            || !home.is_some_and(Home::is_in_pieces)
        {
            return None;
        }
        let most = (region.len() / FEW).max(2);
        let mut own = Vec::new();
        for gfn in region.pages() {
            let entry = region.get(gfn);
            if !entry.is_present() {
                return None;
            }
            let state = self.pool.state(entry.pfn());
            if state.is_exclusive() {
                own.push(gfn);
                if state.refs() != 1 || own.len() as u64 > most {
                    return None;
                }
            } else if state.pins() > 0 {
                // Under the right policy there is none.
                return None;
            }
        }
        self.is_run_on_by_others(region).then_some(own)
    }

    fn take_out_all(&self, region: &mut RegionGuard<'_>, pages: &[Gfn]) -> Option<Vec<Moving>> {
        let mut moving = Vec::with_capacity(pages.len());
        for &gfn in pages {
            match self.take_out(region, gfn) {
                Ok(page) => moving.push(page),
                Err(_) => {
                    self.put_back_all(region, moving);
                    return None;
                }
            }
        }
        Some(moving)
    }

    fn put_back_all(&self, region: &mut RegionGuard<'_>, moving: Vec<Moving>) {
        for page in moving {
            self.put_back(region, page);
        }
    }

    /// Copies the frames of `pages` to those from `to` on, with few calls.
    fn copy_runs(&self, pages: &[Entry], to: Pfn) {
        let mut at = to;
        for run in pages.chunk_by(|a, b| a.pfn().0 + 1 == b.pfn().0) {
            let count = run.len() as u64;
            self.copy_run(run[0].pfn(), at, count);
            at = Pfn(at.0 + count);
        }
    }
}
