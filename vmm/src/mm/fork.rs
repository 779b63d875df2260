//! Fork: a frozen copy of an address space that shares its frames (PROTOCOL.md T10 to T12, 4.1, 4.2, 4.5).
//!
//! Two passes, each of which leaves a legal state wherever it stops:
//! 1. **Write-protect.** Every writable page that may be shared becomes read-only in the MMU, then in its
//!    entry. The bit stays: read-only and exclusive is a normal state, and a fork that fails here costs
//!    the guest a few faults that copy nothing.
//! 2. **Share.** For every page that is read-only now: clear the bit and add the child's mapping, in one
//!    step. A page that is writable still (a device holds it), or whose frame refuses (it was pinned since), is
//!    copied for the child at once, and the parent's entry is not touched.
//!
//! Protecting before sharing is what J. Horn proposed for Linux in June 2025: a writer that was not
//! stopped cannot tear the child's pages, since no frame is shared while anybody may write it.

use std::sync::Arc;

use super::addr::{Gfn, Pfn, Protection};
use super::mmu::{Mmu, MmuError};
use super::policy::{CowPolicy, without};
use super::pool::AllocError;
use super::safeguard::Safeguard;
use super::space::{AddressSpace, Counters, Frozen};
use super::sync::{lock, write};
use super::table::{Entry, RegionGuard, Table};

/// Why a fork failed. The parent is whole and runs on; nothing was leaked.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// No frame for the copy of a pinned page.
    #[error("cannot copy {gfn:?}, which a device holds")]
    EagerCopy {
        /// The pinned page.
        gfn: Gfn,
        /// Why.
        source: AllocError,
    },
    /// The window could not be write-protected.
    #[error("cannot write-protect guest memory")]
    WriteProtect(#[source] MmuError),
    /// The child's own MMU or home could not be set up.
    #[error("cannot map the clone's memory")]
    Map(#[source] MmuError),
    /// The pool has no room for the clone.
    #[error("cannot make room for the clone")]
    Home(#[source] AllocError),
}

impl<P: CowPolicy> AddressSpace<P> {
    /// Forks the address space into a snapshot.
    ///
    /// Pins may be taken meanwhile: each page is either shared and not pinned, or pinned and copied. For
    /// the result to be the state at *one* instant the caller has parked the vCPUs and stopped the devices.
    ///
    /// # Errors
    /// If there is no memory for the copy of a pinned page, or the MMU refuses.
    pub fn fork(&self) -> Result<Arc<Frozen>, ForkError> {
        let _alone = write(&self.fork_lock);
        let too_late = without::<P>(Safeguard::ProtectedBeforeShared);
        if !too_late {
            self.write_protect().map_err(ForkError::WriteProtect)?;
        }
        // Dropping it gives back what was shared so far.
        let child = Frozen {
            pool: Arc::clone(&self.pool),
            table: Table::new(self.table.pages()),
        };
        for index in 0..self.table.regions() {
            let parents = self.table.lock(index);
            if parents.is_untouched() {
                continue;
            }
            let mut childs = child.table.lock(index);
            for gfn in parents.pages() {
                let entry = parents.get(gfn);
                if !entry.is_present() {
                    continue;
                }
                let childs_pfn = if entry.is_writable() && !too_late {
                    self.copy_for_child(gfn, entry.pfn())?
                } else {
                    self.share_or_copy(gfn, entry.pfn())?
                };
                childs.set(gfn, Entry::read_only(childs_pfn));
            }
        }
        if too_late {
            self.write_protect().map_err(ForkError::WriteProtect)?;
        }
        let child = Arc::new(child);
        let mut snapshots = lock(&self.snapshots);
        snapshots.retain(|s| s.strong_count() > 0);
        snapshots.push(Arc::downgrade(&child));
        Ok(child)
    }

    /// One more mapping of `pfn` for another address space, or of a copy of it if it can't be shared.
    fn share_or_copy(&self, gfn: Gfn, pfn: Pfn) -> Result<Pfn, ForkError> {
        match self.pool.frames().try_share(pfn, &self.policy) {
            Ok(()) => Ok(pfn),
            Err(_) => self.copy_for_child(gfn, pfn),
        }
    }

    /// T11: a mapped copy of `pfn` for the child.
    fn copy_for_child(&self, gfn: Gfn, pfn: Pfn) -> Result<Pfn, ForkError> {
        let fresh = self
            .pool
            .allocate()
            .map_err(|source| ForkError::EagerCopy { gfn, source })?;
        self.pool.memory().copy(pfn, fresh.pfn());
        Counters::add(&self.counters.eager_copied);
        Ok(fresh.into_mapped())
    }

    /// Pass 1: protects runs of pages with one call each. A run ends where a page must stay writable, so
    /// pages that are read-only already, or untouched, do not break it.
    ///
    /// The caller holds `fork_lock` alone: no entry changes between the look at it and its protection.
    fn write_protect(&self) -> Result<(), MmuError> {
        let mut run = None;
        for index in 0..self.table.regions() {
            let region = self.table.lock(index);
            if region.is_untouched() {
                continue;
            }
            let pages = region.pages();
            // A run is protected under the locks of its own regions, one at a time.
            drop(region);
            for gfn in pages {
                let entry = self.table.peek(gfn);
                if !entry.is_writable() {
                    continue;
                }
                if self.policy.may_share(self.pool.state(entry.pfn())) {
                    run = Some((run.map_or(gfn, |(first, _)| first), gfn));
                } else if let Some((first, last)) = run.take() {
                    self.protect_run(first, last)?;
                }
            }
        }
        run.map_or(Ok(()), |(first, last)| self.protect_run(first, last))
    }

    fn protect_run(&self, first: Gfn, last: Gfn) -> Result<(), MmuError> {
        let count = last.0 - first.0 + 1;
        self.mmu.protect(first, count, Protection::ReadOnly)?;
        for index in first.region()..=last.region() {
            let mut region = self.table.lock(index);
            for gfn in region.pages().filter(|g| (first..=last).contains(g)) {
                let entry = region.get(gfn);
                if entry.is_writable() {
                    region.set(gfn, entry.write_protected());
                }
            }
        }
        Ok(())
    }

    /// A running clone of a snapshot: a live address space that shares the snapshot's frames. `mmu` shows zeros, read-only,
    /// everywhere.
    ///
    /// # Errors
    /// If the pool has no room for the clone's home, or `mmu` refuses.
    pub fn from_frozen(frozen: &Frozen, policy: P, mmu: Box<dyn Mmu>) -> Result<Self, ForkError> {
        let pool = Arc::clone(&frozen.pool);
        let clone = Self::new(pool, policy, mmu, frozen.pages()).map_err(ForkError::Home)?;
        for index in 0..frozen.table.regions() {
            let from = frozen.table.lock(index);
            if from.is_untouched() {
                continue;
            }
            let pages = from.pages();
            // A break must not move the snapshot between the look and the share: the frame would be the writer's.
            let _stays = (!without::<P>(Safeguard::CloneUnderLock)).then_some(from);
            let mut to = clone.table.lock(index);
            for gfn in pages {
                let entry = frozen.table.peek(gfn);
                if entry.is_present() {
                    clone.adopt(&mut to, gfn, entry.pfn())?;
                }
            }
        }
        Ok(clone)
    }

    /// Maps the frame of a snapshot's page, or a copy if it cannot be shared, at the same page of this
    /// space, read-only. The page was untouched.
    fn adopt(&self, region: &mut RegionGuard<'_>, gfn: Gfn, pfn: Pfn) -> Result<(), ForkError> {
        let pfn = self.share_or_copy(gfn, pfn)?;
        if let Err(error) = self.mmu.map(gfn, pfn, 1, Protection::ReadOnly) {
            self.pool.unmap(pfn);
            return Err(ForkError::Map(error));
        }
        region.set(gfn, Entry::read_only(pfn));
        Ok(())
    }
}
