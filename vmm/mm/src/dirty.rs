//! Dirty tracking: which pages were written since one last asked (PROTOCOL.md T21, 4.14).
//!
//! Pages are write-protected **without intent to copy**: the exclusive bit stays, so the next write finds it
//! and copies nothing (T3), and a device that holds the page keeps it. Whoever makes a page writable, or
//! changes its content behind the guest's back, marks its entry.
//!
//! ```text
//!   entry        frame       take_dirty()             next write
//!   ----------   ---------   ----------------------   -------------------------------
//!   rw           exclusive   reported; ro             rw, same frame, no copy   T21, T3
//!   ro, marked   any         reported; ro             as any write
//!   ro           any         not reported             as any write
//! ```
//!
//! A device writes through its pin and not through the entry, as does a host writer through its hold. So a
//! page whose frame is pinned or held is reported **and stays marked**: it is reported once more after they
//! have let go. Who only reads is not told apart from who writes: such a page is reported though nobody wrote
//! it, and never the other way round.
//!
//! Answers are by page. What was written before anybody asked is told by region where a huge entry maps it:
//! all of it counts as written. From the first answer on regions that are written are split, and stay so.

use std::slice;
use std::sync::atomic::Ordering;

use super::addr::Gfn;
use super::entry::Entry;
use super::mapped::table::RegionGuard;
use super::mmu::MmuError;
use super::page_set::PageSet;
use super::policy::CowPolicy;
use super::space::AddressSpace;

impl<P: CowPolicy> AddressSpace<P> {
    /// The pages written since this was last called, or ever; and arms itself for the next call.
    ///
    /// A write by a vCPU is in exactly one answer. A page that was pinned or held is in one answer too many
    /// rather than in none. May run beside vCPUs and devices: faults in one region at a time wait.
    ///
    /// # Errors
    /// If the MMU refuses. What would have been answered is in the next answer.
    pub fn take_dirty(&self) -> Result<PageSet, MmuError> {
        let _no_fork = self.mapped.enter()?;
        self.tracks_dirty.store(true, Ordering::Relaxed);
        let mut dirty = PageSet::new(self.mapped.table.pages());
        for index in 0..self.mapped.table.regions() {
            if self.mapped.table.is_vacant(index) {
                continue;
            }
            if !self.borrowed.is_nothing() && self.mapped.table.is_borrowed(index) {
                // Whoever writes it first adopts it.
                continue;
            }
            let mut region = self.mapped.table.lock(index);
            if region.is_untouched() {
                continue;
            }
            if region.huge().is_some_and(Entry::is_dirty) {
                self.split(&mut region);
            }
            if let Err(error) = self.write_protect_region(&mut region) {
                drop(region);
                self.mark_dirty(&dirty);
                return Err(error);
            }
            for gfn in region.pages().filter(|&gfn| region.get(gfn).is_dirty()) {
                dirty.insert(gfn);
            }
            for gfn in region.pages() {
                self.clean(&mut region, gfn);
            }
        }
        Ok(dirty)
    }

    /// From the first writable page to the last, in one call: pages between them are read-only already, or
    /// untouched and stay so.
    fn write_protect_region(&self, region: &mut RegionGuard<'_>) -> Result<(), MmuError> {
        let is_writable = |gfn: &Gfn| region.get(*gfn).is_writable();
        let mut writable = region.pages().filter(is_writable);
        let Some(first) = writable.next() else {
            return Ok(());
        };
        let last = writable.last().unwrap_or(first);
        let region = slice::from_mut(region);
        self.mapped.write_protect(region, first..=last, |_, _| ())
    }

    fn clean(&self, region: &mut RegionGuard<'_>, gfn: Gfn) {
        let entry = region.get(gfn);
        if !entry.is_dirty() {
            return;
        }
        region.unmark(gfn);
        // A pin taken without a lock either is counted here or finds the entry changed. A hold for writing
        // was taken under the region's lock, and is counted if it is still there.
        if entry.is_present() && !self.pool.frames().settled(entry.pfn()).is_idle() {
            region.mark(gfn);
        }
    }

    fn mark_dirty(&self, pages: &PageSet) {
        for gfn in pages.iter() {
            self.mark_dirty_page(&mut self.mapped.table.lock_of(gfn), gfn);
        }
    }

    /// Notes that a page has changed behind the guest's back.
    pub(super) fn mark_dirty_page(&self, region: &mut RegionGuard<'_>, gfn: Gfn) {
        if !region.get(gfn).is_dirty() {
            // Of this page alone.
            self.split(region);
            region.mark(gfn);
        }
    }
}
