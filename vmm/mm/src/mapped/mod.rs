//! A shadow page table and the MMU that mirrors it: two sides of one thing, changed as one.
//!
//! **Guarantee.** Whoever gets past [`Mapped::enter`] or [`Mapped::enter_alone`] and has a region's lock
//! finds that the MMU shows just what the region's entries say; or, as long as the region is borrowed, what
//! the snapshot's region says that it is borrowed of, and nothing if it is hidden. Nobody else can change either side: the entries' setters
//! and the MMU are this module's own.
//!
//! A change asks the MMU first and then publishes the entries, all under the locks of the regions it is in.
//! What if the MMU refuses?
//! ```text
//!   the MMU says           it has changed       what is done                                     the caller gets
//!   --------------------   ------------------   ----------------------------------------------   ---------------
//!   Ok                     all                  entries are published                            Ok
//!   refused                nothing              nothing                                          the error
//!   refused half-way       some of it,          undone, or finished: of rights, run by run       the error, or Ok
//!   (`MmuError::Torn`)     nobody knows which   neither: the space is **broken**                 MmuError::Broken
//! ```
//! - **Rights** can go either way for any page: the frame stays, it is this space's alone if the page is or
//!   was to be writable, and read-only and exclusive is a normal state. A page whose right to write was taken
//!   back after all is marked: a vCPU may have used it.
//! - **A writable page in a new frame** is only ever finished. A vCPU may have written to that frame already,
//!   and to go back would lose what it wrote.
//! - Everything else is undone, or else finished.
//!
//! **Broken** is for good: nothing is changed any more and every operation answers the cause, so no vCPU has
//! another fault resolved (only what takes no lock goes on: a pin of a page that it may pin as it is), and
//! who drives them is to stop them ([`AddressSpace::check`](super::AddressSpace::check)). Until it does,
//! nothing gets worse. What vCPUs may write through the MMU is exclusive, nothing shares it any more, and
//! frames that the MMU may show live as long as the MMU.

pub(super) mod table;

use std::mem;
use std::ops::RangeInclusive;
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::addr::{Gfn, Pfn, Protection};
use super::entry::Entry;
use super::fresh::{Fresh, FreshFolio};
use super::mmu::{Mmu, MmuError};
use super::page_set::PageSet;
use super::sync::{
    ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard, read_sharded, write_sharded,
};
use table::{RegionGuard, Stretch, Table};

/// The two sides.
pub(super) struct Mapped {
    /// To be looked at and locked by everybody; changed here.
    pub(super) table: Table,
    mmu: Box<dyn Mmu>,
    /// Shared by whatever changes one region at a time, alone by fork and restore.
    fork_lock: ShardedLock<()>,
    /// Why the two no longer agree.
    broken: OnceLock<Arc<MmuError>>,
    /// Frames without an entry that a broken MMU may show. Dropped after it.
    stranded: Mutex<Vec<Box<dyn Send>>>,
    /// Pages that have become read-only, or have changed while they were, if somebody wants to know.
    protected: OnceLock<Mutex<PageSet>>,
}

/// Frames that are mapped for the first time, or were mapped before.
pub(super) trait Incoming: Send + Sized + 'static {
    /// Counts the mapping that is about to be published.
    fn arrive(self);
}

impl Incoming for Fresh {
    fn arrive(self) {
        self.into_mapped();
    }
}

impl Incoming for Vec<Fresh> {
    fn arrive(self) {
        self.into_iter().for_each(Fresh::arrive);
    }
}

impl Incoming for FreshFolio {
    fn arrive(self) {
        self.into_mapped();
    }
}

/// Frames whose mapping is counted already.
pub(super) struct Counted;

impl Incoming for Counted {
    fn arrive(self) {}
}

/// Pages that follow each other and are alike, or those of a huge entry.
#[derive(Clone, Copy)]
struct Run {
    /// Which of the regions of the change.
    region: usize,
    first: Gfn,
    count: u64,
    is_huge: bool,
}

impl Run {
    fn pages(self) -> RangeInclusive<Gfn> {
        self.first..=Gfn(self.first.0 + self.count - 1)
    }

    fn each(self) -> impl Iterator<Item = Gfn> {
        (self.first.0..self.first.0 + self.count).map(Gfn)
    }

    fn halves(self) -> Option<[Self; 2]> {
        if self.is_huge || self.count == 1 {
            return None;
        }
        let count = self.count / 2;
        let rest = Self {
            first: Gfn(self.first.0 + count),
            count: self.count - count,
            ..self
        };
        Some([Self { count, ..self }, rest])
    }
}

impl Mapped {
    /// Both sides of a space none of whose pages was touched: `mmu` shows zeros, read-only, everywhere.
    pub(super) fn new(table: Table, mmu: Box<dyn Mmu>) -> Self {
        Self {
            table,
            mmu,
            fork_lock: ShardedLock::new(()),
            broken: OnceLock::new(),
            stranded: Mutex::default(),
            protected: OnceLock::new(),
        }
    }

    /// Has pages noted that become read-only from now on.
    pub(super) fn note_protected(&self) {
        let none = || Mutex::new(PageSet::new(self.table.pages()));
        self.protected.get_or_init(none);
    }

    /// What was noted since this was last called, if anything is.
    pub(super) fn take_protected(&self) -> Option<PageSet> {
        let mut noted = self.noted()?;
        Some(mem::replace(&mut *noted, PageSet::new(self.table.pages())))
    }

    /// Notes that the bytes of a page are others, without a write by a vCPU.
    pub(super) fn has_changed(&self, region: &RegionGuard<'_>, gfn: Gfn) {
        if let Some(mut noted) = self.noted()
            && !region.get(gfn).is_writable()
        {
            noted.insert(gfn);
        }
    }

    fn noted(&self) -> Option<MutexGuard<'_, PageSet>> {
        let noted = self.protected.get()?;
        Some(noted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// For an operation on single regions: keeps forks and restores out.
    ///
    /// # Errors
    /// If the two sides no longer agree.
    pub(super) fn enter(&self) -> Result<ShardedLockReadGuard<'_, ()>, MmuError> {
        let guard = read_sharded(&self.fork_lock);
        self.check().map(|()| guard)
    }

    /// For a fork or a restore: keeps everybody else out.
    ///
    /// # Errors
    /// As [`Mapped::enter`].
    pub(super) fn enter_alone(&self) -> Result<ShardedLockWriteGuard<'_, ()>, MmuError> {
        let guard = write_sharded(&self.fork_lock);
        self.check().map(|()| guard)
    }

    /// Whether the two sides agree.
    pub(super) fn check(&self) -> Result<(), MmuError> {
        match self.broken.get() {
            None => Ok(()),
            Some(cause) => Err(MmuError::Broken {
                cause: Arc::clone(cause),
            }),
        }
    }

    /// Whether mappings are running short.
    pub(super) fn is_crowded(&self) -> bool {
        self.mmu.is_crowded()
    }

    /// Makes pages of one region writable. Those that are not yet are exclusive, and none was never touched.
    pub(super) fn allow_writes(
        &self,
        region: &mut RegionGuard<'_>,
        pages: RangeInclusive<Gfn>,
    ) -> Result<(), MmuError> {
        let regions = slice::from_mut(region);
        self.protect(regions, pages, Protection::ReadWrite, |_, _| ())
    }

    /// Makes pages read-only. `regions` are in order, and have all pages of the range that are writable;
    /// `was_writable` is told of those, with the entry each had: of a huge entry of the first page alone.
    ///
    /// Fails for all pages or for some: see the entries.
    pub(super) fn write_protect(
        &self,
        regions: &mut [RegionGuard<'_>],
        pages: RangeInclusive<Gfn>,
        was_writable: impl FnMut(Gfn, Entry),
    ) -> Result<(), MmuError> {
        self.protect(regions, pages, Protection::ReadOnly, was_writable)
    }

    /// Has the MMU keep vCPUs from writing a page that is writable, for a moment: its entry stays as it is
    /// until the page is mapped anew, or [`Mapped::resume_writes`] is called. The caller keeps the region
    /// locked.
    pub(super) fn suspend_writes(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
    ) -> Result<(), MmuError> {
        self.check()?;
        let to = Protection::ReadOnly;
        self.mmu
            .protect(gfn, 1, to)
            .map_err(|error| match error.is_torn() {
                true => self.settle(slice::from_mut(region), &(gfn..=gfn), to, error),
                false => error,
            })
    }

    /// Undoes [`Mapped::suspend_writes`]. Should the MMU refuse, the page stays read-only, which costs a
    /// fault.
    pub(super) fn resume_writes(&self, region: &mut RegionGuard<'_>, gfn: Gfn) {
        if self.check().is_err() {
            return;
        }
        let (pages, to) = (gfn..=gfn, Protection::ReadOnly);
        match self.mmu.protect(gfn, 1, Protection::ReadWrite) {
            Ok(()) => {}
            // Read-only or writable, whichever can be had.
            Err(error) if error.is_torn() => {
                self.settle(slice::from_mut(region), &pages, to, error);
            }
            Err(_) => self.publish(region, &pages, to, &mut |_, _| ()),
        }
    }

    fn protect(
        &self,
        regions: &mut [RegionGuard<'_>],
        pages: RangeInclusive<Gfn>,
        to: Protection,
        mut changed: impl FnMut(Gfn, Entry),
    ) -> Result<(), MmuError> {
        self.check()?;
        let (first, count) = (*pages.start(), pages.end().0 - pages.start().0 + 1);
        match self.mmu.protect(first, count, to) {
            Ok(()) => {
                for region in regions {
                    self.publish(region, &pages, to, &mut changed);
                }
                Ok(())
            }
            Err(error) if error.is_torn() => Err(self.settle(regions, &pages, to, error)),
            Err(error) => Err(error),
        }
    }

    /// Some of `pages` may have got the protection `to`. Takes it back from, or else gives it to, each run
    /// of them that was to get it.
    fn settle(
        &self,
        regions: &mut [RegionGuard<'_>],
        pages: &RangeInclusive<Gfn>,
        to: Protection,
        cause: MmuError,
    ) -> MmuError {
        let back = match to {
            Protection::ReadOnly => Protection::ReadWrite,
            Protection::ReadWrite => Protection::ReadOnly,
        };
        let all = regions.iter().enumerate();
        let mut unknown: Vec<Run> = all
            .flat_map(|(index, region)| runs_to_change(index, region, pages, to))
            .collect();
        while let Some(run) = unknown.pop() {
            let protect = |to| self.mmu.protect(run.first, run.count, to);
            let region = &mut regions[run.region];
            if protect(back).is_ok() {
                if back == Protection::ReadOnly {
                    mark(region, run);
                }
            } else if protect(to).is_ok() {
                self.publish(region, &run.pages(), to, &mut |_, _| ());
            } else if let Some(halves) = run.halves() {
                unknown.extend(halves);
            } else {
                return self.break_for_good(cause);
            }
        }
        cause
    }

    /// Publishes the protection `to` for pages that have a frame, and says which it was news to.
    fn publish(
        &self,
        region: &mut RegionGuard<'_>,
        pages: &RangeInclusive<Gfn>,
        to: Protection,
        changed: &mut impl FnMut(Gfn, Entry),
    ) {
        let note = |first: Gfn, count| {
            if to == Protection::ReadOnly
                && let Some(mut noted) = self.noted()
            {
                (first.0..first.0 + count).for_each(|gfn| noted.insert(Gfn(gfn)));
            }
        };
        if let Some(huge) = region.huge() {
            // It is in the run with all of its pages.
            if pages.contains(&region.first()) && huge.protection() != to {
                changed(region.first(), huge);
                region.set_huge(huge.protected(to));
                note(region.first(), region.len());
            }
            return;
        }
        for chunk in region.chunks_within(pages) {
            if !region.is_open(chunk) {
                continue;
            }
            for gfn in region.pages_of_within(chunk, pages) {
                let entry = region.get(gfn);
                if entry.is_present() && entry.protection() != to {
                    changed(gfn, entry);
                    region.set(gfn, entry.protected(to));
                    note(gfn, 1);
                }
            }
        }
    }

    /// Maps `count` pages from `first` on as `to` says, whose frame is that of the first page: all of the
    /// region if it is a huge entry. The frames are `frames`.
    pub(super) fn map(
        &self,
        region: &mut RegionGuard<'_>,
        first: Gfn,
        count: u64,
        to: Entry,
        frames: impl Incoming,
    ) -> Result<(), MmuError> {
        self.check()?;
        debug_assert!(!to.is_huge() || (first, count) == (region.first(), region.len()));
        let map = || self.mmu.map(first, to.pfn(), count, to.protection());
        if let Err(error) = map()
            && let Err(error) = self.finish(error, map, || {
                !to.is_writable() && self.map_back(slice::from_ref(region), first, count)
            })
        {
            if matches!(error, MmuError::Broken { .. }) {
                let mut stranded = self.stranded.lock().unwrap_or_else(PoisonError::into_inner);
                stranded.push(Box::new(frames));
            }
            return Err(error);
        }
        frames.arrive();
        if to.is_huge() {
            region.set_huge(to);
        } else {
            (0..count).for_each(|n| region.set(Gfn(first.0 + n), to.page(n)));
        }
        Ok(())
    }

    /// Maps what was never touched, of a space that nobody else has yet: `run`, each stretch of which follows
    /// the one before it, in pages and in frames, read-only and with one call. Its mappings are counted, or
    /// what it is borrowed of is lent.
    ///
    /// # Errors
    /// The MMU's. What it shows then nobody knows: the space goes, and the MMU with it.
    pub(super) fn map_first(&self, run: &[Stretch]) -> Result<(), MmuError> {
        let Some(&Stretch { first, frame, .. }) = run.first() else {
            return Ok(());
        };
        let count = run.iter().map(|stretch| stretch.count).sum();
        self.mmu.map(first, frame, count, Protection::ReadOnly)?;
        run.iter().for_each(|stretch| self.table.publish(stretch));
        Ok(())
    }

    /// Hides pages of whole regions that are borrowed and backed, of a space that nobody else has yet.
    ///
    /// # Errors
    /// As [`Mapped::map_first`].
    pub(super) fn hide_first(&self, first: Gfn, count: u64) -> Result<(), MmuError> {
        self.mmu.hide(first, count)
    }

    /// Shows a hidden region: each of its pages as the region's entries are to say, which `frames` has in order,
    /// [`Pfn::ZERO`] for zeros; all of them in one run if it `is_huge`. A mapping of each is counted. The entries
    /// are published with it.
    ///
    /// If the MMU refuses the region is hidden as it was, and nothing published; or else the space is broken, and
    /// the entries are there, so that the frames stay.
    pub(super) fn show(
        &self,
        region: &mut RegionGuard<'_>,
        frames: &[Pfn],
        is_huge: bool,
    ) -> Result<(), MmuError> {
        self.check()?;
        let (first, count) = (region.first(), region.len());
        let show = || {
            let pages: Vec<(Gfn, Pfn)> = region.pages().zip(frames.iter().copied()).collect();
            let follows = |&(gfn, pfn): &(Gfn, Pfn), &(next, after): &(Gfn, Pfn)| {
                gfn.0 + 1 == next.0
                    && match pfn {
                        Pfn::ZERO => after == Pfn::ZERO,
                        Pfn(n) => after == Pfn(n + 1),
                    }
            };
            let mut runs = pages.chunk_by(follows);
            runs.try_for_each(|run| {
                let (gfn, pfn) = run[0];
                self.mmu
                    .map(gfn, pfn, run.len() as u64, Protection::ReadOnly)
            })
        };
        let shown = show().or_else(|error| {
            // Some of it may be shown. A vCPU may have read that, and it was right.
            if self.mmu.hide(first, count).is_ok() {
                return Err(error);
            }
            show().map_err(|_| self.break_for_good(error))
        });
        if shown.is_ok() || matches!(shown, Err(MmuError::Broken { .. })) {
            if is_huge {
                region.adopt_huge(frames[0]);
            } else {
                for (gfn, &pfn) in region.pages().zip(frames) {
                    if pfn != Pfn::ZERO {
                        region.adopt_page(gfn, pfn);
                    }
                }
            }
            region.show();
        }
        shown
    }

    /// Has `count` pages from `first` on show zeros again, in small entries. `regions` are all those that
    /// they are in.
    pub(super) fn discard(
        &self,
        regions: &mut [RegionGuard<'_>],
        first: Gfn,
        count: u64,
    ) -> Result<(), MmuError> {
        self.check()?;
        let map = || self.mmu.map(first, Pfn::ZERO, count, Protection::ReadOnly);
        if let Err(error) = map() {
            // A vCPU may have read zeros and reads its bytes again: it has given them up, and could not
            // write.
            self.finish(error, map, || self.map_back(regions, first, count))?;
        }
        let pages = first..=Gfn(first.0 + count - 1);
        for region in regions {
            for gfn in region.pages().filter(|gfn| pages.contains(gfn)) {
                if region.get(gfn).is_present() {
                    region.set(gfn, Entry::DISCARDED);
                }
            }
        }
        Ok(())
    }

    /// What becomes of a change that failed with `error`: undone if that may be (then it is the answer), else
    /// done by trying it again.
    fn finish(
        &self,
        error: MmuError,
        again: impl FnOnce() -> Result<(), MmuError>,
        undo: impl FnOnce() -> bool,
    ) -> Result<(), MmuError> {
        if !error.is_torn() || undo() {
            return Err(error);
        }
        again().map_err(|_| self.break_for_good(error))
    }

    /// Has the MMU show what the entries of these pages say, run by run. Says whether it does.
    fn map_back(&self, regions: &[RegionGuard<'_>], first: Gfn, count: u64) -> bool {
        let end = first.0 + count;
        let pages = regions
            .iter()
            .flat_map(|region| region.pages().map(|gfn| (gfn, region.get(gfn).small())))
            .filter(|(gfn, _)| (first.0..end).contains(&gfn.0))
            .collect::<Vec<_>>();
        let follows = |(gfn, entry): &(Gfn, Entry), (next, after): &(Gfn, Entry)| {
            let frame = if entry.is_present() {
                entry.page(next.0 - gfn.0).pfn()
            } else {
                Pfn::ZERO
            };
            (frame, entry.protection()) == (after.pfn(), after.protection())
        };
        pages.chunk_by(follows).all(|run| {
            let (gfn, entry) = run[0];
            let count = run.len() as u64;
            let mapped = self.mmu.map(gfn, entry.pfn(), count, entry.protection());
            mapped.is_ok()
        })
    }

    fn break_for_good(&self, cause: MmuError) -> MmuError {
        let cause = self.broken.get_or_init(|| Arc::new(cause));
        MmuError::Broken {
            cause: Arc::clone(cause),
        }
    }

    /// Takes all entries away, and hands them over to have their frames given back. Nobody looks through the
    /// MMU any more: it is not changed.
    pub(super) fn dismantle(&mut self, give_back: impl FnMut(Entry)) {
        self.table.clear(give_back);
    }

    /// For model checkers: one half of [`Mapped::map`] of one page, by itself.
    pub(super) fn switch_alone(&self, gfn: Gfn, to: Entry) -> Result<(), MmuError> {
        self.mmu.map(gfn, to.pfn(), 1, to.protection())
    }

    /// For model checkers: the other half.
    pub(super) fn publish_alone(&self, region: &mut RegionGuard<'_>, gfn: Gfn, to: Entry) {
        region.set(gfn, to);
    }
}

/// What [`Mapped::publish`] would change, run by run.
fn runs_to_change(
    index: usize,
    region: &RegionGuard<'_>,
    pages: &RangeInclusive<Gfn>,
    to: Protection,
) -> Vec<Run> {
    let run = |first, count, is_huge| Run {
        region: index,
        first,
        count,
        is_huge,
    };
    let differs = |entry: Entry| entry.is_present() && entry.protection() != to;
    if let Some(huge) = region.huge() {
        let is_in = pages.contains(&region.first()) && differs(huge);
        return is_in
            .then(|| run(region.first(), region.len(), true))
            .into_iter()
            .collect();
    }
    let changed: Vec<Gfn> = region
        .pages()
        .filter(|gfn| pages.contains(gfn) && differs(region.get(*gfn)))
        .collect();
    let runs = changed.chunk_by(|a, b| a.0 + 1 == b.0);
    runs.map(|pages| run(pages[0], pages.len() as u64, false))
        .collect()
}

/// Notes that the pages of a run may have been written.
fn mark(region: &mut RegionGuard<'_>, run: Run) {
    match region.huge() {
        Some(huge) => region.set_huge(huge.dirtied()),
        None => run.each().for_each(|gfn| region.mark(gfn)),
    }
}
