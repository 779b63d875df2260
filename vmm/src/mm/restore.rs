//! Restore: an address space goes back to what one of its snapshots holds.
//!
//! Page by page, the cheapest that is right:
//! | the page now | what happens |
//! |---|---|
//! | same frame as in the snapshot | nothing: a shared frame was not written |
//! | exclusive, or its holder the last | the snapshot's bytes are copied into the frame. Nothing is remapped, a writable page stays writable, and **a device that holds a pin on the frame sees what the guest sees** |
//! | shared with other snapshots, or untouched | the snapshot's frame is shared, read-only |
//!
//! Copying into pinned frames is what keeps invariant I8: a pin taken through a page that is still mapped is that page,
//! before the restore and after.

use super::addr::{Gfn, Pfn, Protection};
use super::fault::Intent;
use super::fork::ForkError;
use super::policy::CowPolicy;
use super::space::{AddressSpace, FaultError, Frozen};
use super::sync::write;
use super::table::{Entry, RegionGuard};

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
    /// The snapshot's frame could not be shared.
    #[error(transparent)]
    Share(#[from] ForkError),
    /// A page could not be made exclusive.
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
    ) -> Result<(), RestoreError> {
        let entry = region.get(gfn);
        if entry.is_present() && self.mmu.is_crowded() {
            // Sharing the snapshot's frame costs up to two mappings; a frame of the page's own costs none.
            self.resolve(region, gfn, Intent::Unshare)?;
        }
        let entry = region.get(gfn);
        let old = entry.pfn();
        // No break moves the snapshot's page meanwhile: breaks take this space's region lock first.
        let target = snapshot.table.peek(gfn);
        let in_place =
            entry.is_present() && self.pool.frames().try_reuse(old, &self.policy).is_ok();
        if in_place {
            match target.pfn() {
                Pfn::ZERO => self.pool.memory().zero(old),
                pfn => self.pool.memory().copy(pfn, old),
            }
            return Ok(());
        }
        if target.is_present() {
            self.adopt(region, gfn, target.pfn())?;
        } else {
            self.mmu
                .map(gfn, Pfn::ZERO, 1, Protection::ReadOnly)
                .map_err(FaultError::from)?;
            region.set(gfn, Entry::UNTOUCHED);
        }
        if entry.is_present() {
            self.pool.unmap(old);
        }
        Ok(())
    }
}
