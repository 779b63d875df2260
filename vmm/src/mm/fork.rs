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
//! Only regions that have changed since the last fork are looked at (`lineage.rs`): the others are possibly shared already, and the
//! child has them in common with the last one. A region that a huge entry maps is shared as one; if a device holds pages of it, the
//! entry is split first, and just those pages are copied. (The kernel copies all 512: it counts pins by folio.)
//!
//! Protecting before sharing is what J. Horn proposed for Linux in June 2025: a writer that was not
//! stopped cannot tear the child's pages, since no frame is shared while anybody may write it.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::addr::{Gfn, Pfn, Protection};
use super::ahead::Piece;
use super::frozen::{Frozen, FrozenFrames, FrozenRegion, FrozenTable};
use super::lineage::Lineage;
use super::mmu::{Mmu, MmuError};
use super::policy::{CowPolicy, without};
use super::pool::AllocError;
use super::safeguard::Safeguard;
use super::space::{AddressSpace, Counters};
use super::sync::{lock, write};
use super::table::{Entry, RegionGuard};

/// Regions that [`AddressSpace::prepare_fork`] looks at while faults wait.
const PREPARE_AT_ONCE: usize = 16;

/// Frames, and those they are to be copied to.
type Copies = Vec<(Pfn, Pfn)>;

/// What became of regions that were to be shared.
struct Shared {
    /// In which of them, in order, something is writable still, so that nobody will hear of it when it is written.
    kept: Vec<usize>,
    /// What was writable, in order, if anybody wants to know.
    written: Vec<Piece>,
}

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
        let (mut table, mut changed, fork) = {
            let mut lineage = lock(&self.lineage);
            let changed = mem::take(&mut lineage.changed);
            (lineage.unchanged.clone(), changed, lineage.forks + 1)
        };
        // So that neighbours are protected with one call.
        changed.sort_unstable();
        let shared = match self.share_regions(&changed, &mut table) {
            Ok(shared) => shared,
            Err(error) => {
                // They are changed still. Dropping the table gives back what was shared so far.
                lock(&self.lineage).changed = changed;
                return Err(error);
            }
        };
        let mut unchanged = table.clone();
        changed.retain(|&index| {
            let state = &mut self.table.lock(index).state;
            state.is_changed = shared.kept.binary_search(&index).is_ok();
            state.habit.note(fork);
            if state.is_changed
                && let Some(frozen) = unchanged.replace(index, None)
            {
                // As `open` does, which will not be called.
                state.breaks.begin(index, fork);
                state.sharers.retain(|s| s.strong_count() > 0);
                state.sharers.push(Arc::downgrade(&frozen));
            }
            state.is_changed
        });
        *lock(&self.lineage) = Lineage {
            unchanged,
            changed,
            forks: fork,
        };
        if self.notes_writes.load(Ordering::Relaxed) {
            lock(&self.written).note(fork, shared.written);
        }
        Ok(Arc::new(Frozen {
            pool: Arc::clone(&self.pool),
            table,
            pages: self.table.pages(),
        }))
    }

    /// Does what the next [`AddressSpace::fork`] would have to do for regions that are rarely written, while the guest runs: they lie
    /// scattered, so that each costs a call, and those that are mapped page by page as much as a hundred huge ones. They are
    /// forked here, for nobody: what was shared so is what that fork takes over if the region does not change again, and if it does,
    /// the guest finds itself alone and copies nothing (PROTOCOL.md T4).
    ///
    /// Has memory ready for the copies of pinned pages, too.
    ///
    /// It is never needed: what it cannot do is left to the fork.
    pub fn prepare_fork(&self) {
        self.pool.provide();
        let mut changed = lock(&self.lineage).changed.clone();
        changed.sort_unstable();
        changed
            .chunks(PREPARE_AT_ONCE)
            .for_each(|some| self.prepare_regions(some));
    }

    /// Forks those of `regions`, in order, that are worth it, for nobody. Faults wait meanwhile.
    fn prepare_regions(&self, regions: &[usize]) {
        let _alone = write(&self.fork_lock);
        let (mut unchanged, fork) = {
            let lineage = lock(&self.lineage);
            (lineage.unchanged.clone(), lineage.forks + 1)
        };
        let is_worth_it = |&index: &usize| {
            let region = self.table.lock(index);
            // What is pinned would be copied, for nobody; and what is written through a hold would be lost before the fork.
            let is_idle = |gfn| self.pool.state(region.get(gfn).pfn()).is_idle();
            let is_unheld = || match region.huge() {
                Some(huge) => self.pool.frames().is_mapped_huge_only::<P>(huge.pfn(), 1),
                None => region.pages().all(is_idle),
            };
            region.state.is_changed
                && region.state.habit.is_rare(fork)
                && region.is_full()
                && is_unheld()
        };
        let chosen: Vec<usize> = regions.iter().copied().filter(is_worth_it).collect();
        let mut done = Vec::new();
        // What lies between two of them is writable, and is to stay so.
        for run in chosen.chunk_by(|a, b| a + 1 == *b) {
            let shared = self.share_regions(run, &mut unchanged);
            let is_done = |index: &usize| {
                // Held since, if it was kept.
                shared
                    .as_ref()
                    .is_ok_and(|shared| !shared.kept.contains(index))
            };
            for &index in run {
                if is_done(&index) {
                    let state = &mut self.table.lock(index).state;
                    state.is_changed = false;
                    state.habit.note(fork);
                    done.push(index);
                } else {
                    unchanged.replace(index, None);
                }
            }
        }
        let mut lineage = lock(&self.lineage);
        lineage.unchanged = unchanged;
        lineage
            .changed
            .retain(|index| done.binary_search(index).is_err());
    }

    /// Both passes, for `changed` regions, in order: all that are writable, or neighbours. What the child has of them is put into `table`.
    fn share_regions(
        &self,
        changed: &[usize],
        table: &mut FrozenTable,
    ) -> Result<Shared, ForkError> {
        let (mut kept, mut written) = (Vec::new(), Vec::new());
        let mut share_all = || {
            let mut copies = Vec::new();
            changed.iter().try_for_each(|&index| {
                let (region, is_unchanged) = self.share_region(index, &mut copies)?;
                table.replace(index, region);
                if !is_unchanged {
                    kept.push(index);
                }
                Ok(())
            })?;
            // All at once: it may take more than one CPU.
            self.pool.memory().copy_all(&copies);
            Ok(())
        };
        let mut protect = || {
            self.write_protect(changed, &mut written)
                .map_err(ForkError::WriteProtect)
        };
        if without::<P>(Safeguard::ProtectedBeforeShared) {
            share_all().and_then(|()| protect())?;
        } else {
            protect().and_then(|()| share_all())?;
        }
        Ok(Shared { kept, written })
    }

    /// What a snapshot has of a region: shared, or copied where a device holds it. Nothing of a region in which there is nothing. Says also
    /// whether the next snapshot may have the same, until something changes. What is to be copied is added to `copies`.
    fn share_region(
        &self,
        index: usize,
        copies: &mut Copies,
    ) -> Result<(Option<Arc<FrozenRegion>>, bool), ForkError> {
        let mut region = self.table.lock(index);
        let first = region.first();
        // Sharing what is writable still.
        let too_early = without::<P>(Safeguard::ProtectedBeforeShared);
        let frozen = |frames| Arc::new(FrozenRegion::new(&self.pool, first, frames));
        if let Some(huge) = region.huge() {
            let head = huge.pfn();
            if (!huge.is_writable() || too_early)
                && self
                    .pool
                    .frames()
                    .try_share_huge(head, &self.policy)
                    .is_ok()
            {
                return Ok((Some(frozen(FrozenFrames::Huge(head))), true));
            }
            self.split(&mut region);
        }
        let mut frames = vec![Pfn::ZERO; region.len() as usize].into_boxed_slice();
        let shared = region
            .pages()
            .zip(&mut frames)
            .try_fold(true, |all, (gfn, to)| {
                let entry = region.get(gfn);
                if !entry.is_present() {
                    return Ok(all);
                }
                let ours = entry.pfn();
                *to = if entry.is_writable() && !too_early {
                    self.copy_for_child(gfn, ours, copies)?
                } else {
                    self.share_or_copy(gfn, ours, copies)?
                };
                Ok(all && *to == ours)
            });
        let is_empty = frames.iter().all(|&pfn| pfn == Pfn::ZERO);
        // If it failed, this gives back what was shared.
        let frozen = frozen(FrozenFrames::Small(frames));
        // A region shorter than a folio is forked anew each time: the counts of a small space are then what its entries say.
        shared.map(|all| ((!is_empty).then_some(frozen), all && region.is_full()))
    }

    /// One more mapping of `pfn` for another address space, or of a copy of it if it can't be shared.
    fn share_or_copy(&self, gfn: Gfn, pfn: Pfn, copies: &mut Copies) -> Result<Pfn, ForkError> {
        match self.pool.frames().try_share(pfn, &self.policy) {
            Ok(()) => Ok(pfn),
            Err(_) => self.copy_for_child(gfn, pfn, copies),
        }
    }

    /// T11: a mapped frame for the child, to which `pfn` is to be copied.
    fn copy_for_child(&self, gfn: Gfn, pfn: Pfn, copies: &mut Copies) -> Result<Pfn, ForkError> {
        let fresh = self
            .pool
            .allocate()
            .map_err(|source| ForkError::EagerCopy { gfn, source })?;
        copies.push((pfn, fresh.pfn()));
        Counters::add(&self.counters.eager_copied);
        Ok(fresh.into_mapped())
    }

    /// Pass 1: protects runs of pages with one call each. A run ends where a page must stay writable, so
    /// pages that are read-only already, or untouched, do not break it.
    ///
    /// The caller holds `fork_lock` alone: no entry changes between the look at it and its protection.
    ///
    /// Adds to `written` what was writable, in order.
    fn write_protect(&self, changed: &[usize], written: &mut Vec<Piece>) -> Result<(), MmuError> {
        let mut run: Option<(Gfn, Gfn)> = None;
        for &index in changed {
            let mut region = self.table.lock(index);
            let pages = region.pages();
            if let Some(huge) = region.huge() {
                let last = Gfn(region.first().0 + region.len() - 1);
                if !huge.is_writable() {
                    continue;
                }
                if self.pool.frames().may_share_huge(huge.pfn(), &self.policy) {
                    run = Some((run.map_or(region.first(), |(first, _)| first), last));
                    continue;
                }
                self.split(&mut region);
            }
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
                    self.protect_run(changed, first, last, written)?;
                }
            }
        }
        run.map_or(Ok(()), |(first, last)| {
            self.protect_run(changed, first, last, written)
        })
    }

    fn protect_run(
        &self,
        changed: &[usize],
        first: Gfn,
        last: Gfn,
        written: &mut Vec<Piece>,
    ) -> Result<(), MmuError> {
        let notes_writes = self.notes_writes.load(Ordering::Relaxed);
        let mut note = |first, is_huge| {
            if notes_writes {
                written.push(Piece { first, is_huge });
            }
        };
        let count = last.0 - first.0 + 1;
        self.mmu.protect(first, count, Protection::ReadOnly)?;
        let regions = self.table.region_of(first)..=self.table.region_of(last);
        let from = changed.partition_point(|index| index < regions.start());
        for &index in changed[from..]
            .iter()
            .take_while(|index| regions.contains(index))
        {
            let mut region = self.table.lock(index);
            // A huge entry is in the run with all of its pages.
            if let Some(huge) = region.huge() {
                if huge.is_writable() {
                    note(region.first(), true);
                }
                region.set_huge(huge.write_protected());
                continue;
            }
            for gfn in region.pages().filter(|g| (first..=last).contains(g)) {
                let entry = region.get(gfn);
                if entry.is_writable() {
                    note(gfn, false);
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
        let mut different = Vec::new();
        for (index, from) in frozen.table.iter() {
            let theirs = from.lock();
            let mut to = clone.table.lock(index);
            if let Some(head) = theirs.huge() {
                if clone.adopt_huge(&mut to, head)? == Adopted::InPart {
                    different.push(index);
                }
                continue;
            }
            let pages = to.pages();
            let mut adopted = Adopted::Shared;
            // A break must not move the snapshot between the look and the share: the frame would be the writer's.
            let stays = (!without::<P>(Safeguard::CloneUnderLock)).then_some(theirs);
            for gfn in pages {
                let entry = match &stays {
                    Some(theirs) => theirs.get(gfn),
                    None => from.lock().get(gfn),
                };
                if entry.is_present() {
                    adopted = adopted.and(clone.adopt(&mut to, gfn, entry.pfn())?);
                }
            }
            if adopted == Adopted::InPart || !to.is_full() {
                different.push(index);
            }
        }
        // Until it changes something, its own forks are what the snapshot is: where all of it is shared.
        lock(&clone.lineage).unchanged = frozen.table.clone();
        for index in different {
            clone.open(&mut clone.table.lock(index));
        }
        Ok(clone)
    }

    /// Maps the folio of a snapshot's region at the same region of this space, read-only. The region was untouched.
    fn adopt_huge(&self, region: &mut RegionGuard<'_>, head: Pfn) -> Result<Adopted, ForkError> {
        let frames = self.pool.frames();
        if frames.try_share_huge(head, &self.policy).is_err() {
            frames.mark_by_page(head);
            let mut pages = region.pages().zip(head.run(region.len()));
            return pages.try_fold(Adopted::Shared, |all, (gfn, pfn)| {
                Ok(all.and(self.adopt(region, gfn, pfn)?))
            });
        }
        let (first, count) = (region.first(), region.len());
        if let Err(error) = self.mmu.map(first, head, count, Protection::ReadOnly) {
            self.pool.unmap_huge(head);
            return Err(ForkError::Map(error));
        }
        region.set_huge(Entry::huge_read_only(head));
        Ok(Adopted::Shared)
    }

    /// Maps the frame of a snapshot's page, or a copy if it cannot be shared, at the same page of this
    /// space, read-only. The page was untouched.
    fn adopt(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        pfn: Pfn,
    ) -> Result<Adopted, ForkError> {
        let mut copies = Copies::new();
        let ours = self.share_or_copy(gfn, pfn, &mut copies)?;
        self.pool.memory().copy_all(&copies);
        if let Err(error) = self.mmu.map(gfn, ours, 1, Protection::ReadOnly) {
            self.pool.unmap(ours);
            return Err(ForkError::Map(error));
        }
        region.set(gfn, Entry::read_only(ours));
        Ok(if ours == pfn {
            Adopted::Shared
        } else {
            Adopted::InPart
        })
    }
}

/// Whether a clone has in common with its snapshot what it was to have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Adopted {
    Shared,
    /// Some page had to be copied, and so is the clone's own.
    InPart,
}

impl Adopted {
    fn and(self, other: Self) -> Self {
        if self == Self::Shared { other } else { self }
    }
}
