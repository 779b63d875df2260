//! Restore: an address space goes back to what one of its snapshots holds.
//!
//! A page whose frame the snapshot shares still was not written since: nothing is done. Any other is made
//! exclusive, as for a reading pin, and the snapshot's bytes are copied **into its frame**. So
//! * the window keeps its shape: a page that has a frame keeps it, at no cost in mappings, and if it was
//!   writable it stays so;
//! * a device that holds a pin on the frame sees what the guest sees (I8): a pin taken through a page is
//!   that page, before the restore and after;
//! * other snapshots that shared the frame are given a copy of what it held, as by any break.
//!
//! Sharing the snapshot's frames instead would save the copies, and cost a remapping that is far dearer: not
//! for itself, but for what it leaves. A guest of 256 MiB that was rewound so was in 120 mappings, not in a
//! few, and a fork protects each by itself: 2.3 ms of pause where it had been 0.25 (KVM on PVM).

use std::cell::Cell;
use std::sync::Arc;

use super::addr::Pfn;
use super::backed::Toucher;
use super::fault::{FaultError, Intent};
use super::frozen::{Frozen, FrozenRegion};
use super::mapped::table::RegionGuard;
use super::policy::CowPolicy;
use super::space::AddressSpace;
use super::sync::lock;

/// Why a restore failed. The address space is part old, part new: it must not run on.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The snapshot is of an address space of another size.
    #[error("the snapshot has {snapshot} pages, the address space {space}")]
    Size {
        /// Pages of the snapshot.
        snapshot: u64,
        /// Pages of the address space.
        space: u64,
    },
    /// The snapshot's frames are not of the address space's pool: their numbers mean other frames there.
    #[error("the snapshot's frames are of another pool")]
    Pool,
    /// A page could not be made exclusive: there was no memory for the copy, or no mapping.
    #[error(transparent)]
    Fault(#[from] FaultError),
}

impl<P: CowPolicy> AddressSpace<P> {
    /// Goes back to `snapshot`, which stays as it is and can be restored again.
    ///
    /// The caller has parked the vCPUs and stopped the devices: nobody writes to the address space or through
    /// a pin.
    ///
    /// # Errors
    /// If the sizes or pools differ, or what is backed cannot be brought (nothing has changed then), or there is no
    /// memory, or the MMU refuses.
    pub fn restore(&self, snapshot: &Frozen) -> Result<(), RestoreError> {
        let (there, here) = (snapshot.pages, self.mapped.table.pages());
        if there != here {
            return Err(RestoreError::Size {
                snapshot: there,
                space: here,
            });
        }
        if !Arc::ptr_eq(&snapshot.pool, &self.pool) {
            return Err(RestoreError::Pool);
        }
        let _alone = self.mapped.enter_alone().map_err(FaultError::from)?;
        // What can fail of it before anything has changed: bytes that are somewhere else.
        for (index, theirs) in snapshot.table.iter() {
            if theirs.lock().backed().is_some()
                && !self.shows(&self.mapped.table.lock(index), Some(theirs))
            {
                theirs.bring(Toucher::Reader).map_err(FaultError::from)?;
            }
        }
        for index in 0..self.mapped.table.regions() {
            let theirs = snapshot.table.get(index);
            if theirs.is_none() && self.mapped.table.is_vacant(index) {
                continue;
            }
            let mut region = self.mapped.table.lock(index);
            if !self.shows(&region, theirs) {
                self.adopt(&mut region).map_err(FaultError::from)?;
                self.restore_region(&mut region, theirs)?;
            }
        }
        Ok(())
    }

    /// Does what [`AddressSpace::restore`] to the same snapshot would have to do first, while the guest runs: others that
    /// share a region whose bytes will change are given their copies. It stays read-only, so no write is taken for
    /// granted.
    ///
    /// It is never needed: what it cannot do is left to the restore, and so is what the guest writes meanwhile.
    pub fn prepare_restore(&self, snapshot: &Frozen) {
        let table = &self.mapped.table;
        if snapshot.pages != table.pages() || !Arc::ptr_eq(&snapshot.pool, &self.pool) {
            return;
        }
        for index in 0..table.regions() {
            let theirs = snapshot.table.get(index);
            // What is borrowed nobody has written, and what is restored may be that.
            let stays = |region: &_| self.has_borrowed(region) || self.shows(region, theirs);
            if theirs.is_none() && table.is_vacant(index) || stays(&table.lock(index)) {
                continue;
            }
            // Without the lock: it may take a while. What cannot be brought fails when it has to be.
            if theirs.is_some_and(|theirs| theirs.bring(Toucher::Reader).is_err()) {
                return;
            }
            // A fork may come in between.
            let Ok(_no_fork) = self.mapped.enter() else {
                return;
            };
            let mut region = table.lock(index);
            if stays(&region) {
                continue;
            }
            if let Some(huge) = region.huge()
                && theirs.is_none_or(|theirs| theirs.lock().huge() != Some(huge.pfn()))
            {
                self.open_all(&mut region);
                if self.make_ours(&region, huge.pfn()).is_err() {
                    return;
                }
            }
        }
    }

    /// Makes the folio of a region exclusive, so that all of it can be written to, if that can be.
    fn make_ours(&self, region: &RegionGuard<'_>, head: Pfn) -> Result<(), FaultError> {
        let is_ours = || {
            let frames = self.pool.frames();
            frames.try_reuse_huge(head, &self.policy).is_ok()
        };
        if !is_ours() && self.move_all_sharers(region)? {
            let _ = is_ours();
        }
        Ok(())
    }

    /// Whether a region shows what a snapshot has of it because it has not changed since.
    fn shows(&self, region: &RegionGuard<'_>, theirs: Option<&Arc<FrozenRegion>>) -> bool {
        let lineage = lock(&self.lineage);
        let ours = lineage.unchanged.get(region.index());
        match (ours, theirs) {
            (Some(ours), Some(theirs)) => Arc::ptr_eq(ours, theirs),
            _ => theirs.is_none() && !self.has_borrowed(region) && region.is_untouched(),
        }
    }

    fn restore_region(
        &self,
        region: &mut RegionGuard<'_>,
        theirs: Option<&Arc<FrozenRegion>>,
    ) -> Result<(), FaultError> {
        // The snapshot may be another space's, whose breaks move its pages: not while its region is locked.
        let with_theirs = |gfn, look: &dyn Fn(Pfn)| match theirs {
            Some(theirs) => look(theirs.lock().get(gfn).pfn()),
            None => look(Pfn::ZERO),
        };
        for gfn in region.pages() {
            let ours = region.get(gfn).pfn();
            let is_same = Cell::new(false);
            with_theirs(gfn, &|pfn| is_same.set(pfn == ours));
            if is_same.get() {
                continue;
            }
            self.open(region, gfn);
            if let Some(huge) = region.huge() {
                // All of it, so that it stays one.
                self.make_ours(region, huge.pfn())?;
            }
            self.resolve(region, gfn, Intent::Unshare)?;
            let ours = region.get(gfn).pfn();
            with_theirs(gfn, &|from| match from {
                Pfn::ZERO => self.pool.memory().zero(ours),
                from => self.pool.memory().copy(from, ours),
            });
            self.mapped.has_changed(region, gfn);
            self.mark_dirty_page(region, gfn);
        }
        Ok(())
    }
}
