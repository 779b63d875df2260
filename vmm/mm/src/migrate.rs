//! Migration: a page moves to another frame, for compaction (PROTOCOL.md T19, T20, 4.9).
//!
//! ```text
//!   before            isolated, copied                      after
//!   -----------       --------------------------------      -----------------
//!   rw, frame A  -->  vCPUs may read; A is nobody's,   -->  rw, frame B
//!                     pins and holds wait                   (A is free)
//! ```

use super::addr::{Gfn, Pfn};
use super::entry::Entry;
use super::fresh::Isolated;
use super::mapped::table::RegionGuard;
use super::policy::CowPolicy;
use super::rearrange::RearrangeError;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;

impl<P: CowPolicy> AddressSpace<P> {
    /// Moves page `gfn` to another frame and says which: its home if that is free, so that the page and its
    /// neighbours need one mapping again, else any. A page that was never touched stays so.
    ///
    /// # Errors
    /// [`RearrangeError::Busy`] if anybody but this page's entry holds the frame, a device, a reader or a
    /// snapshot; or if there is no frame, or the MMU refuses. Nothing has changed then.
    pub fn migrate(&self, gfn: Gfn) -> Result<Pfn, RearrangeError> {
        self.mapped.table.in_range(gfn)?;
        let _no_fork = self.mapped.enter()?;
        let mut region = self.lock_of(gfn)?;
        if !region.get(gfn).is_present() {
            return Ok(Pfn::ZERO);
        }
        self.open(&mut region, gfn);
        self.split(&mut region);
        self.migrate_page(&mut region, gfn)
    }

    /// The same for a page with a frame, whose region is open and in small entries.
    pub(super) fn migrate_page(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
    ) -> Result<Pfn, RearrangeError> {
        let entry = region.get(gfn);
        let pfn = entry.pfn();
        let state = self.pool.state(pfn);
        if state.refs() != 1 {
            return Err(RearrangeError::Busy { gfn, state });
        }
        let fresh = self.allocate_near(region, gfn)?;
        let page = self.take_out(region, gfn)?;
        let moved = fresh.pfn();
        self.pool.memory().copy(pfn, moved);
        // The only holder: exclusive from here on, if it was not before (T4).
        let to = entry.in_frame(moved);
        if let Err(error) = self.mapped.map(region, gfn, 1, to, fresh) {
            self.put_back(region, page);
            return Err(error.into());
        }
        self.has_moved(page);
        Ok(moved)
    }

    /// Makes a page ready to be copied: vCPUs may read it, and its frame is nobody's. Its region is open and
    /// in small entries.
    ///
    /// # Errors
    /// If anybody but the page's entry holds the frame, or the MMU refuses. Nothing has changed then.
    pub(super) fn take_out(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
    ) -> Result<Moving, RearrangeError> {
        let entry = region.get(gfn);
        let mut page = Moving {
            gfn,
            entry,
            isolated: None,
        };
        if entry.is_writable() && !is_left_out(Safeguard::WritersStoppedBeforeCopy) {
            self.mapped.suspend_writes(region, gfn)?;
        }
        if !is_left_out(Safeguard::IsolatedBeforeCopy) {
            match self.pool.isolate(entry.pfn(), |s| s.refs() == 1) {
                Ok(isolated) => page.isolated = Some(isolated),
                Err(state) => {
                    self.put_back(region, page);
                    return Err(RearrangeError::Busy { gfn, state });
                }
            }
        }
        Ok(page)
    }

    /// The page stays where it is.
    pub(super) fn put_back(&self, region: &mut RegionGuard<'_>, page: Moving) {
        if let Some(isolated) = page.isolated {
            isolated.put_back();
        }
        if page.entry.is_writable() {
            self.mapped.resume_writes(region, page.gfn);
        }
    }

    /// The page is mapped to another frame: the one that it was in goes.
    pub(super) fn has_moved(&self, page: Moving) {
        match page.isolated {
            Some(isolated) => drop(isolated),
            None => self.pool.unmap(page.entry.pfn()),
        }
    }
}

/// A page on its way to another frame.
#[must_use = "a page is put back, or has moved"]
pub(super) struct Moving {
    gfn: Gfn,
    entry: Entry,
    /// Not if a model checker wants it so.
    isolated: Option<Isolated>,
}
