//! Migration: a page moves to another frame, for compaction (PROTOCOL.md T19, T20, 4.9).
//!
//! ```text
//!   before            isolated, copied                      after
//!   -----------       --------------------------------      -----------------
//!   rw, frame A  -->  vCPUs may read; A is nobody's,   -->  rw, frame B
//!                     pins and holds wait                   (A is free)
//! ```

use super::addr::{Gfn, Pfn};
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
        let busy = |state| RearrangeError::Busy { gfn, state };
        let state = self.pool.state(pfn);
        if state.refs() != 1 {
            return Err(busy(state));
        }
        let fresh = self.allocate_near(region, gfn)?;
        let stops_writers =
            entry.is_writable() && !is_left_out(Safeguard::WritersStoppedBeforeCopy);
        if stops_writers {
            self.mapped.suspend_writes(region, gfn)?;
        }
        let go_on = |region: &mut RegionGuard<'_>| {
            if entry.is_writable() {
                self.mapped.resume_writes(region, gfn);
            }
        };
        let isolated = if is_left_out(Safeguard::IsolatedBeforeCopy) {
            None
        } else {
            match self.pool.isolate(pfn, |s| s.refs() == 1) {
                Ok(isolated) => Some(isolated),
                Err(state) => {
                    go_on(region);
                    return Err(busy(state));
                }
            }
        };
        let moved = fresh.pfn();
        self.pool.memory().copy(pfn, moved);
        // The only holder: exclusive from here on, if it was not before (T4).
        let to = entry.in_frame(moved);
        if let Err(error) = self.mapped.map(region, gfn, 1, to, fresh) {
            if let Some(isolated) = isolated {
                isolated.put_back();
            }
            go_on(region);
            return Err(error.into());
        }
        match isolated {
            Some(isolated) => drop(isolated),
            None => self.pool.unmap(pfn),
        }
        Ok(moved)
    }
}
