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
//! * **sharers move**: if all others that share the frame are snapshots, which have no vCPUs, *they* are
//!   pointed at the copy. The writer keeps its frame, and its window keeps its shape; one `mprotect` at most.
//! * **writer moves** otherwise (what Linux does): the writer's page is pointed at the copy.

use super::addr::{Gfn, Pfn, Protection};
use super::policy::{CowPolicy, without};
use super::pool::Fresh;
use super::safeguard::Safeguard;
use super::space::{AddressSpace, Counters, FaultError, in_range};
use super::sync::{lock, read};
use super::table::{Entry, RegionGuard};

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

/// What a break is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Intent {
    /// A write: exclusive and writable.
    Write,
    /// A reading pin: exclusive, and never writable (I11).
    Unshare,
}

impl Intent {
    fn protection(self) -> Protection {
        match self {
            Self::Write => Protection::ReadWrite,
            Self::Unshare => Protection::ReadOnly,
        }
    }

    /// The page of `before` in its new frame. To unshare is not to write: it leaves the page as clean or dirty as it was.
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
    /// While the MMU is crowded the other pages of the 2 MiB region are resolved too, so that it needs one mapping rather
    /// than up to 512.
    ///
    /// # Errors
    /// If there is no such page, no frame, or the MMU refuses.
    pub fn write_fault(&self, gfn: Gfn) -> Result<Resolution, FaultError> {
        in_range(&self.table, gfn)?;
        let _no_fork = (!without::<P>(Safeguard::FaultWaitsForFork)).then(|| read(&self.fork_lock));
        let stale = without::<P>(Safeguard::FaultLooksUnderLock).then(|| self.table.peek(gfn));
        let mut region = self.table.lock(gfn.region());
        let entry = stale.unwrap_or_else(|| region.get(gfn));
        let resolution = self.resolve_entry(&mut region, gfn, entry, Intent::Write)?;
        self.count(Intent::Write, resolution);
        if resolution != Resolution::AlreadyWritable && self.mmu.is_crowded() {
            self.resolve_neighbours(&mut region);
        }
        Ok(resolution)
    }

    /// Makes page `gfn` exclusive without making it writable, as a reading pin needs it.
    ///
    /// # Errors
    /// As [`AddressSpace::write_fault`].
    pub fn unshare(&self, gfn: Gfn) -> Result<(), FaultError> {
        in_range(&self.table, gfn)?;
        let _no_fork = read(&self.fork_lock);
        let mut region = self.table.lock(gfn.region());
        let resolution = self.resolve(&mut region, gfn, Intent::Unshare)?;
        self.count(Intent::Unshare, resolution);
        Ok(())
    }

    /// Counts what was done for somebody who asked for it.
    pub(super) fn count(&self, intent: Intent, resolution: Resolution) {
        Counters::add(match (intent, resolution) {
            (_, Resolution::AlreadyWritable | Resolution::AlreadyExclusive) => return,
            (Intent::Unshare, _) => &self.counters.unshared,
            (Intent::Write, Resolution::ZeroFilled) => &self.counters.zero_filled,
            (Intent::Write, Resolution::Reused) => &self.counters.reused,
            (Intent::Write, Resolution::SharersMoved) => &self.counters.sharers_moved,
            (Intent::Write, Resolution::WriterMoved) => &self.counters.writer_moved,
        });
    }

    /// Makes all pages of a region writable, so that one mapping does for them. It spends memory to save mappings: pages that were never
    /// touched get frames. Nobody asked for any of it, so a page for which there is no memory is left as it is.
    fn resolve_neighbours(&self, region: &mut RegionGuard<'_>) {
        for gfn in region.pages() {
            match self.resolve(region, gfn, Intent::Write) {
                Ok(Resolution::AlreadyWritable) => {}
                Ok(_) => Counters::add(&self.counters.neighbours),
                Err(_) => return,
            }
        }
    }

    /// Resolves one page of `region`. The caller holds `fork_lock`.
    ///
    /// Each step leaves a legal state, so that a failure needs no undoing: first the frame becomes
    /// exclusive (exclusive and read-only is normal), then the MMU maps it, then the entry says so.
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
        if !entry.is_present() {
            return self.fill_zero(region, gfn, entry, intent);
        }
        if entry.is_writable() {
            return Ok(Resolution::AlreadyWritable);
        }
        let pfn = entry.pfn();
        if intent == Intent::Unshare && self.pool.state(pfn).is_exclusive() {
            return Ok(Resolution::AlreadyExclusive);
        }
        let resolution = if self.pool.frames().try_reuse(pfn, &self.policy).is_ok() {
            Resolution::Reused
        } else if self.move_sharers(gfn, pfn)? {
            Resolution::SharersMoved
        } else {
            self.move_writer(region, gfn, entry, intent)?;
            Resolution::WriterMoved
        };
        if intent == Intent::Write && resolution != Resolution::WriterMoved {
            self.mmu.protect(gfn, 1, Protection::ReadWrite)?;
            region.set(gfn, Entry::writable(pfn));
        }
        Ok(resolution)
    }

    /// T1, and T8 for memory that was never touched.
    fn fill_zero(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        entry: Entry,
        intent: Intent,
    ) -> Result<Resolution, FaultError> {
        let fresh = self.pool.allocate_zeroed(&self.home, gfn.0)?;
        self.mmu.map(gfn, fresh.pfn(), 1, intent.protection())?;
        region.set(gfn, intent.entry(entry, fresh.into_mapped()));
        Ok(Resolution::ZeroFilled)
    }

    /// Points every snapshot that shares `pfn` for page `gfn` at a copy, and makes the frame exclusive to
    /// this space. Says whether that worked: not if anything but a snapshot's mapping holds the frame.
    ///
    /// The bytes cannot change while they are copied: the frame is not exclusive, so no entry maps it
    /// writable and no pin on it exists.
    fn move_sharers(&self, gfn: Gfn, pfn: Pfn) -> Result<bool, FaultError> {
        let snapshots = lock(&self.snapshots);
        let sharing = || {
            snapshots
                .iter()
                .filter_map(|s| s.upgrade())
                .filter(|s| s.table.peek(gfn).pfn() == pfn)
        };
        let state = self.pool.state(pfn);
        if state.refs() != state.maps() || sharing().count() as u64 + 1 != state.maps() {
            return Ok(false);
        }
        // Held until it is handed out to all: a snapshot that has it already may be dropped at any time.
        let copy = self.pool.allocate()?.into_held();
        self.pool.memory().copy(pfn, copy.pfn());
        let copied_to = copy.pfn();
        let mut copy = Some(copy);
        for snapshot in sharing() {
            let mut region = snapshot.table.lock(gfn.region());
            // Only we move it, under our own region's lock, and it cannot be dropped while it is upgraded.
            debug_assert_eq!(region.get(gfn).pfn(), pfn, "{gfn:?} of a snapshot moved");
            if self.pool.frames().try_map_held(copied_to).is_ok() {
                region.set(gfn, Entry::read_only(copied_to));
                self.pool.unmap(pfn);
            }
            if without::<P>(Safeguard::CopyIsHeld) {
                copy = None;
            }
        }
        drop(copy);
        // Whoever took a hold of the frame in the meantime makes this fail; then the writer moves after all.
        let proved = self.pool.frames().try_reuse(pfn, &self.policy).is_ok();
        Ok(proved || without::<P>(Safeguard::ReuseProvedAgain))
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
        let fresh = self.pool.allocate_near(&self.home, gfn.0)?;
        if const { goes_wrong::<P>() } {
            return self.move_writer_in_wrong_order(region, gfn, entry, intent, fresh);
        }
        self.pool.memory().copy(pfn, fresh.pfn());
        self.mmu.map(gfn, fresh.pfn(), 1, intent.protection())?;
        region.set(gfn, intent.entry(entry, fresh.into_mapped()));
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
        let switch = || self.mmu.map(gfn, copy, 1, intent.protection());
        let mut publish = || region.set(gfn, intent.entry(entry, copy));
        if without::<P>(Safeguard::MmuBeforeUnmap) {
            fill();
            publish();
            self.pool.unmap(pfn);
            switch()?;
        } else if without::<P>(Safeguard::EntryBeforeUnmap) {
            fill();
            switch()?;
            self.pool.unmap(pfn);
            publish();
        } else if without::<P>(Safeguard::CopiedBeforeMapped) {
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
const fn goes_wrong<P: CowPolicy>() -> bool {
    without::<P>(Safeguard::MmuBeforeUnmap)
        || without::<P>(Safeguard::EntryBeforeUnmap)
        || without::<P>(Safeguard::CopiedBeforeMapped)
        || without::<P>(Safeguard::UnmapReleases)
}
