//! Restore: an address space goes back to what one of its snapshots holds.
//!
//! A page whose frame the snapshot shares still was not written since: nothing is done. Any other is made exclusive, as for a
//! reading pin, and the snapshot's bytes are copied **into its frame**. So
//! * the window keeps its shape: a page that has a frame keeps it, at no cost in mappings, and if it was writable it stays so;
//! * a device that holds a pin on the frame sees what the guest sees (I8): a pin taken through a page is
//!   that page, before the restore and after;
//! * other snapshots that shared the frame are given a copy of what it held, as by any break.
//!
//! Sharing the snapshot's frame instead would save the copy, and cost a remapping that is far dearer.

use super::addr::{Gfn, Pfn};
use super::fault::Intent;
use super::policy::CowPolicy;
use super::space::{AddressSpace, FaultError, Frozen};
use super::sync::write;
use super::table::RegionGuard;

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
    /// A page could not be made exclusive: there was no memory for the copy, or no mapping.
    #[error(transparent)]
    Fault(#[from] FaultError),
}

impl<P: CowPolicy> AddressSpace<P> {
    /// Goes back to `snapshot`, which stays as it is and can be restored again.
    ///
    /// The caller has parked the vCPUs and stopped the devices: nobody writes to the address space or through a pin.
    ///
    /// # Errors
    /// If the sizes differ (nothing has changed then), or there is no memory, or the MMU refuses.
    pub fn restore(&self, snapshot: &Frozen) -> Result<(), RestoreError> {
        let (there, here) = (snapshot.table.pages(), self.table.pages());
        if there != here {
            return Err(RestoreError::Size {
                snapshot: there,
                space: here,
            });
        }
        let _alone = write(&self.fork_lock);
        for index in 0..self.table.regions() {
            let mut region = self.table.lock(index);
            for gfn in region.pages() {
                if region.get(gfn).pfn() != snapshot.table.peek(gfn).pfn() {
                    self.restore_page(&mut region, gfn, snapshot)?;
                }
            }
        }
        Ok(())
    }

    fn restore_page(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        snapshot: &Frozen,
    ) -> Result<(), FaultError> {
        self.resolve(region, gfn, Intent::Unshare)?;
        let entry = region.get(gfn).dirtied();
        // The snapshot may be another space's, whose breaks move its pages: not while its region is locked.
        match snapshot.table.lock(gfn.region()).get(gfn).pfn() {
            Pfn::ZERO => self.pool.memory().zero(entry.pfn()),
            from => self.pool.memory().copy(from, entry.pfn()),
        }
        region.set(gfn, entry);
        Ok(())
    }
}
