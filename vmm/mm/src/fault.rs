//! Write faults and unshares: how a page becomes exclusive (PROTOCOL.md T1, T3 to T8).
//!
//! ```text
//!   entry        frame           write fault                          unshare (for a reading pin)
//!   ----------   -------------   ----------------------------------   ---------------------------
//!   untouched    zero frame      fresh frame, writable           T1   fresh frame, read-only   T8
//!   rw           exclusive       nothing to do                        nothing to do            T6
//!   ro           exclusive       writable, same frame            T3   nothing to do            T6
//!   ro           last holder     exclusive, writable, same frame T4   exclusive, same frame    T7
//!   ro           shared          break, writable                 T5   break, read-only         T8
//! ```
//!
//! A *break* needs a copy, and somebody gets it:
//! * **sharers move**: if all others that share the frame are snapshots, which have no vCPUs, and are not lent
//!   to who has, *they* are pointed at the copy. The writer keeps its frame, and its window keeps its shape;
//!   one `mprotect` at most.
//! * **writer moves** otherwise (what Linux does): the writer's page is pointed at the copy.

use std::sync::Weak;
use std::sync::atomic::Ordering;

use super::addr::{Gfn, OutOfRange, Pfn};
use super::adopt::{AdoptError, TooManyMappings};
use super::backed::{BringError, Toucher};
use super::commit::AllocError;
use super::entry::Entry;
use super::fresh::Fresh;
use super::house::Ahead;
use super::mapped::table::RegionGuard;
use super::mmu::MmuError;
use super::policy::CowPolicy;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;
use super::stats::Counters;

/// How a write fault was resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// Somebody else had resolved it already.
    AlreadyWritable,
    /// Unshare only: the page was exclusive (T6).
    AlreadyExclusive,
    /// First touch: a frame of zeros (T1).
    ZeroFilled,
    /// The same frame, made writable (T3, T4).
    Reused,
    /// The same frame, made writable; the snapshots that shared it have the copy (T5).
    SharersMoved,
    /// Another frame with a copy of the bytes (T5).
    WriterMoved,
}

/// How a write fault was resolved, and how much of the region with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultOutcome {
    /// The page.
    pub resolution: Resolution,
    /// Whether the rest of the region was made writable, too, at the cost of copies.
    pub is_whole: bool,
}

/// Why a fault, an unshare or a slow pin could not be resolved. Nothing has changed, except that a region may
/// have been resolved in part.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// No such page.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// No frame for the copy.
    #[error(transparent)]
    Alloc(#[from] AllocError),
    /// The MMU could not be changed.
    #[error(transparent)]
    Mmu(#[from] MmuError),
    /// The region is borrowed, and cannot be made the space's own.
    #[error(transparent)]
    TooManyMappings(#[from] TooManyMappings),
    /// The bytes of the region are somewhere else still, and cannot be had.
    #[error(transparent)]
    Bring(#[from] BringError),
}

impl From<AdoptError> for FaultError {
    fn from(error: AdoptError) -> Self {
        match error {
            AdoptError::TooManyMappings(error) => error.into(),
            AdoptError::Bring(error) => error.into(),
            AdoptError::Mmu(error) => error.into(),
        }
    }
}

/// What a break is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Intent {
    /// A write: exclusive and writable.
    Write,
    /// A reading pin: exclusive, and never writable (I11).
    Unshare,
}

impl Intent {
    /// The page of `before` in its new frame. To unshare is not to write: it leaves the page as clean or
    /// dirty as it was.
    fn entry(self, before: Entry, pfn: Pfn) -> Entry {
        match self {
            Self::Write => Entry::writable(pfn),
            Self::Unshare => before.in_frame(pfn),
        }
    }
}

impl<P: CowPolicy> AddressSpace<P> {
    /// Resolves a write to page `gfn` through a read-only mapping: on return the page is exclusive and
    /// writable, or was so already.
    ///
    /// More of its region may be made writable with it: all of it if that is as good as free (a huge entry
    /// that nobody shares), if the predictor says so (`predictor/breaks.rs`), or if the MMU is crowded, so
    /// that the region needs one mapping rather than up to 512.
    ///
    /// # Errors
    /// If there is no such page, no frame, or the MMU refuses.
    pub fn write_fault(&self, gfn: Gfn) -> Result<Resolution, FaultError> {
        self.resolve_write(gfn).map(|fault| fault.resolution)
    }

    /// [`AddressSpace::write_fault`], for those who want to know what it took.
    ///
    /// # Errors
    /// As [`AddressSpace::write_fault`].
    pub fn resolve_write(&self, gfn: Gfn) -> Result<FaultOutcome, FaultError> {
        self.mapped.table.in_range(gfn)?;
        let _no_fork = (!is_left_out(Safeguard::FaultWaitsForFork))
            .then(|| self.mapped.enter())
            .transpose()?;
        let stale =
            is_left_out(Safeguard::FaultLooksUnderLock).then(|| self.mapped.table.peek(gfn));
        let mut region = self.mapped.table.lock_of(gfn);
        self.adopt_for(&mut region, Toucher::Vcpu)?;
        let entry = stale.unwrap_or_else(|| region.get(gfn));
        let resolution = self.resolve_entry(&mut region, gfn, entry, Intent::Write)?;
        self.count(Intent::Write, resolution);
        let mut is_whole = region.huge().is_some();
        if resolution != Resolution::AlreadyWritable && !is_whole {
            let is_crowded = self.mapped.is_crowded();
            is_whole = is_crowded || self.wants_whole(&region);
            if is_whole {
                self.resolve_rest(&mut region, is_crowded);
                self.mapped.check()?;
            }
        }
        Ok(FaultOutcome {
            resolution,
            is_whole,
        })
    }

    /// Whether the next break should take all of the region. Not if somebody wants to know which *pages* are
    /// written.
    pub(super) fn wants_whole(&self, region: &RegionGuard<'_>) -> bool {
        self.uses_huge
            && region.is_full()
            && !self.tracks_dirty.load(Ordering::Relaxed)
            && self
                .predictor
                .breaks_whole(region.index(), &region.state.history)
            && self.account.has_room(region.len())
    }

    /// Makes page `gfn` exclusive without making it writable, as a reading pin needs it.
    ///
    /// # Errors
    /// As [`AddressSpace::write_fault`].
    pub fn unshare(&self, gfn: Gfn) -> Result<(), FaultError> {
        self.mapped.table.in_range(gfn)?;
        let _no_fork = self.mapped.enter()?;
        let mut region = self.mapped.table.lock_of(gfn);
        self.adopt(&mut region)?;
        let resolution = self.resolve(&mut region, gfn, Intent::Unshare)?;
        self.count(Intent::Unshare, resolution);
        Ok(())
    }

    /// Counts what was done for somebody who asked for it.
    pub(super) fn count(&self, intent: Intent, resolution: Resolution) {
        Counters::add(match (intent, resolution) {
            (_, Resolution::AlreadyWritable | Resolution::AlreadyExclusive) => return,
            (Intent::Unshare, _) => &self.counters.mine().unshared,
            (Intent::Write, Resolution::ZeroFilled) => &self.counters.mine().zero_filled,
            (Intent::Write, Resolution::Reused) => &self.counters.mine().reused,
            (Intent::Write, Resolution::SharersMoved) => &self.counters.mine().sharers_moved,
            (Intent::Write, Resolution::WriterMoved) => &self.counters.mine().writer_moved,
        });
    }

    /// Resolves one page of `region`. The caller holds `fork_lock`.
    ///
    /// Each step leaves a legal state, so that a failure needs no undoing: first the frame becomes
    /// exclusive (exclusive and read-only is normal), then MMU and entry change as one.
    pub(super) fn resolve(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        intent: Intent,
    ) -> Result<Resolution, FaultError> {
        self.resolve_entry(region, gfn, region.get(gfn), intent)
    }

    fn resolve_entry(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        entry: Entry,
        intent: Intent,
    ) -> Result<Resolution, FaultError> {
        if entry.is_writable() {
            return Ok(Resolution::AlreadyWritable);
        }
        let pfn = entry.pfn();
        let is_exclusive = entry.is_present() && self.pool.state(pfn).is_exclusive();
        if intent == Intent::Unshare && is_exclusive {
            return Ok(Resolution::AlreadyExclusive);
        }
        self.open(region, gfn);
        if !entry.is_present() {
            return self.fill_zero(region, gfn, entry, intent);
        }
        if entry.is_huge() {
            if let Some(resolution) = self.resolve_huge(region, intent, false)? {
                return Ok(resolution);
            }
            self.split(region);
            let resolution = self.resolve_entry(region, gfn, region.get(gfn), intent);
            self.keep_chunks(region, gfn);
            return resolution;
        }
        let resolution = if self.pool.frames().try_reuse(pfn, &self.policy).is_ok() {
            // Others have left it, and the pages beside it, most likely: all of them could be had at once.
            if !self.is_at_home(region, gfn) {
                region.state.history.broke_page();
            }
            Resolution::Reused
        } else {
            region.state.history.broke_page();
            if self.move_sharers(region, gfn, pfn)? {
                Resolution::SharersMoved
            } else {
                self.move_writer(region, gfn, entry, intent)?;
                region.state.history.moved_writer();
                return Ok(Resolution::WriterMoved);
            }
        };
        if intent == Intent::Write {
            self.mapped.allow_writes(region, gfn..=gfn)?;
        }
        Ok(resolution)
    }

    /// T1, and T8 for memory that was never touched. The first touch of a region gets all of it a huge folio,
    /// if that can be had.
    fn fill_zero(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        entry: Entry,
        intent: Intent,
    ) -> Result<Resolution, FaultError> {
        if self.uses_huge
            && region.is_full()
            && region.is_untouched()
            && let Some(fresh) = self.allocate_region(region)?
        {
            let (first, count) = (region.first(), region.len());
            fresh.zero();
            let to = match intent {
                Intent::Write => Entry::huge_writable(fresh.head()),
                Intent::Unshare => Entry::huge_read_only(fresh.head()),
            };
            self.mapped.map(region, first, count, to, fresh)?;
            return Ok(Resolution::ZeroFilled);
        }
        let fresh = self.allocate_page(region, gfn, Ahead::Nothing)?;
        fresh.zero();
        let to = intent.entry(entry, fresh.pfn());
        self.mapped.map(region, gfn, 1, to, fresh)?;
        Ok(Resolution::ZeroFilled)
    }

    /// Points every snapshot that shares `pfn` for page `gfn` at a copy. Says whether the frame is exclusive
    /// to this space then: not if anything but a snapshot's mapping holds it, or the snapshot is lent. Of a
    /// page that a huge entry maps, only whether no snapshot is left.
    ///
    /// The bytes cannot change while they are copied: the frame is not exclusive, so no entry maps it
    /// writable and no pin on it exists.
    pub(super) fn move_sharers(
        &self,
        region: &RegionGuard<'_>,
        gfn: Gfn,
        pfn: Pfn,
    ) -> Result<bool, FaultError> {
        let alive = || region.state.sharers.iter().filter_map(Weak::upgrade);
        let sharing = || alive().filter(|s| s.lock().get(gfn).pfn() == pfn);
        let state = self.pool.state(pfn);
        // Snapshots may have it in common.
        let mut holders = Vec::new();
        let mut is_lent = false;
        for snapshot in alive() {
            let theirs = snapshot.lock();
            if theirs.get(gfn).pfn() == pfn {
                holders.push(theirs.holder(gfn));
                is_lent |= theirs.is_lent(gfn);
            }
        }
        holders.sort_unstable();
        holders.dedup();
        if state.refs() != state.maps() || holders.len() as u64 + 1 != state.maps() || is_lent {
            return Ok(false);
        }
        // Held until it is handed out to all: a snapshot that has it already may be dropped at any time.
        let copy = self.pool.allocate(&self.account)?.into_held();
        self.copy(pfn, copy.pfn());
        let copied_to = copy.pfn();
        let mut copy = Some(copy);
        let mut all_moved = true;
        for snapshot in sharing() {
            let mut theirs = snapshot.lock();
            // Only we move it, under our own region's lock, and it cannot be dropped while it is upgraded.
            // Another space that has it among its sharers, too, does not map the frame: it would have been
            // counted. Those that have it in common with one that was moved before are not here any more.
            debug_assert_eq!(theirs.get(gfn).pfn(), pfn, "{gfn:?} of a snapshot moved");
            if self.pool.frames().try_map_held(copied_to).is_ok() {
                // It may have been lent since.
                let is_moved = theirs.try_move_page(gfn, copied_to);
                if !is_moved {
                    self.pool.unmap(copied_to);
                }
                all_moved &= is_moved;
            }
            if is_left_out(Safeguard::CopyIsHeld) {
                copy = None;
            }
        }
        drop(copy);
        if region.huge().is_some() || !all_moved {
            return Ok(all_moved);
        }
        // Whoever took a hold of the frame in the meantime makes this fail; then the writer moves after all.
        let proved = self.pool.frames().try_reuse(pfn, &self.policy).is_ok();
        Ok(proved || is_left_out(Safeguard::ReuseProvedAgain))
    }

    pub(super) fn copy(&self, from: Pfn, to: Pfn) {
        self.copy_run(from, to, 1);
    }

    pub(super) fn copy_run(&self, from: Pfn, to: Pfn, count: u64) {
        self.pool.memory().copy_run(from, to, count);
        Counters::add_more(&self.counters.mine().copied, count);
    }

    /// Points this space's page at a copy of its frame.
    ///
    /// Order (PROTOCOL.md 5.4): the MMU is switched and every vCPU sees it, the entry is published, and only
    /// then is the old frame's mapping given back: the next to find itself its last holder may write it.
    fn move_writer(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        entry: Entry,
        intent: Intent,
    ) -> Result<(), FaultError> {
        let pfn = entry.pfn();
        let fresh = self.allocate_page(region, gfn, Ahead::Nothing)?;
        if goes_wrong() {
            return self.move_writer_in_wrong_order(region, gfn, entry, intent, fresh);
        }
        self.copy(pfn, fresh.pfn());
        let to = intent.entry(entry, fresh.pfn());
        self.mapped.map(region, gfn, 1, to, fresh)?;
        self.pool.unmap(pfn);
        Ok(())
    }

    /// For model checkers: [`AddressSpace::move_writer`] with one step too early, too late, or not ordered.
    fn move_writer_in_wrong_order(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        entry: Entry,
        intent: Intent,
        fresh: Fresh,
    ) -> Result<(), FaultError> {
        let (pfn, copy) = (entry.pfn(), fresh.into_mapped());
        let fill = || self.pool.memory().copy(pfn, copy);
        let to = intent.entry(entry, copy);
        let switch = || self.mapped.switch_alone(gfn, to);
        let mut publish = || self.mapped.publish_alone(region, gfn, to);
        if is_left_out(Safeguard::MmuBeforeUnmap) {
            fill();
            publish();
            self.pool.unmap(pfn);
            switch()?;
        } else if is_left_out(Safeguard::EntryBeforeUnmap) {
            fill();
            switch()?;
            self.pool.unmap(pfn);
            publish();
        } else if is_left_out(Safeguard::CopiedBeforeMapped) {
            switch()?;
            fill();
            publish();
            self.pool.unmap(pfn);
        } else {
            fill();
            switch()?;
            publish();
            self.pool.unmap_unordered(pfn);
        }
        Ok(())
    }
}

/// Whether a model checker wants [`AddressSpace::move_writer`] done wrongly.
fn goes_wrong() -> bool {
    is_left_out(Safeguard::MmuBeforeUnmap)
        || is_left_out(Safeguard::EntryBeforeUnmap)
        || is_left_out(Safeguard::CopiedBeforeMapped)
        || is_left_out(Safeguard::UnmapReleases)
}
