//! Breaks of a whole region: all of its pages are made writable at once, so that one mapping does for them and
//! nothing in it faults again.
//!
//! Of a region that a huge entry maps, the folio is taken over, or the snapshots or the writer get a copy of
//! it in one piece. Of one in small entries each page is taken over or copied, and if all come to lie in a
//! folio, a huge entry maps it again.

use std::sync::Weak;
use std::sync::atomic::Ordering;

use super::addr::{Gfn, Pfn};
use super::entry::Entry;
use super::fault::{FaultError, Intent, Resolution};
use super::fresh::Fresh;
use super::house::Ahead;
use super::mapped::Counted;
use super::mapped::table::RegionGuard;
use super::policy::CowPolicy;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;
use super::stats::Counters;

impl<P: CowPolicy> AddressSpace<P> {
    /// A break of a region that a huge entry maps, read-only: of all of it, or of nothing (`None`), and then
    /// page by page. If `is_whole`, whatever that costs. The caller has opened the region.
    pub(super) fn resolve_huge(
        &self,
        region: &mut RegionGuard<'_>,
        intent: Intent,
        is_whole: bool,
    ) -> Result<Option<Resolution>, FaultError> {
        let Some(huge) = region.huge() else {
            return Ok(None);
        };
        let frames = self.pool.frames();
        // To make all of it writable is to count all of it as written.
        if intent == Intent::Write && self.tracks_dirty.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let resolution = if frames.try_reuse_huge(huge.pfn(), &self.policy).is_ok() {
            Resolution::Reused
        } else if intent == Intent::Write
            && (is_whole || self.mapped.is_crowded() || self.wants_whole(region))
        {
            if self.move_all_sharers(region)?
                && frames.try_reuse_huge(huge.pfn(), &self.policy).is_ok()
            {
                Resolution::SharersMoved
            } else if self.move_writer_huge(region, huge)? {
                Resolution::WriterMoved
            } else {
                return Ok(None);
            }
        } else {
            return Ok(None);
        };
        if resolution != Resolution::Reused {
            region.state.history.broke_whole();
            Counters::add(&self.counters.whole);
        }
        if intent == Intent::Write && resolution != Resolution::WriterMoved {
            let last = Gfn(region.first().0 + region.len() - 1);
            let pages = region.first()..=last;
            self.mapped.allow_writes(region, pages)?;
        }
        Ok(Some(resolution))
    }

    /// As [`AddressSpace::move_writer`], for a whole region: to its home, if that is free. Says whether it
    /// is.
    fn move_writer_huge(
        &self,
        region: &mut RegionGuard<'_>,
        huge: Entry,
    ) -> Result<bool, FaultError> {
        let (first, count) = (region.first(), region.len());
        let Some(fresh) = self.allocate_region(region)? else {
            return Ok(false);
        };
        self.copy_run(huge.pfn(), fresh.head(), count);
        let to = Entry::huge_writable(fresh.head());
        self.mapped.map(region, first, count, to, fresh)?;
        self.pool.unmap_huge(huge.pfn());
        Ok(true)
    }

    /// Makes all pages of a region writable that are not, so that one mapping does for them and nothing in it
    /// faults again. If mappings are short, pages that were never touched get frames as well: that spends
    /// memory to save mappings.
    ///
    /// Nobody asked for any of it, so a page for which there is no memory is left as it is.
    pub(super) fn resolve_rest(&self, region: &mut RegionGuard<'_>, also_untouched: bool) {
        self.open_all(region);
        let (mut in_place, mut moved) = (Vec::new(), Vec::new());
        for gfn in region.pages() {
            let entry = region.get(gfn);
            if entry.is_writable() || (!entry.is_present() && !also_untouched) {
                continue;
            }
            let resolved = if entry.is_present() {
                self.take_over(region, gfn, entry)
            } else {
                let fresh = self.allocate_page(region, gfn, Ahead::Region);
                fresh
                    .inspect(Fresh::zero)
                    .map(Some)
                    .map_err(FaultError::from)
            };
            match resolved {
                Ok(None) => in_place.push(gfn),
                Ok(Some(fresh)) => moved.push((gfn, fresh)),
                Err(_) => break,
            }
            Counters::add(&self.counters.neighbours);
        }
        let done = match self.folio_of(region, &in_place) {
            Some(head) => self.form_huge(region, head),
            None => self
                .allow_writes(region, &in_place)
                .and_then(|()| self.map_moved(region, moved))
                .and_then(|()| match self.folio_of(region, &[]) {
                    Some(head) => self.form_huge(region, head),
                    None => Ok(()),
                }),
        };
        if done.is_ok() {
            region.state.history.broke_whole();
            Counters::add(&self.counters.whole);
        }
    }

    /// Makes the frame of a page exclusive, or says in which one a copy of it is.
    fn take_over(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        entry: Entry,
    ) -> Result<Option<Fresh>, FaultError> {
        let pfn = entry.pfn();
        if self.pool.frames().try_reuse(pfn, &self.policy).is_ok()
            || self.move_sharers(region, gfn, pfn)?
        {
            return Ok(None);
        }
        let fresh = self.allocate_page(region, gfn, Ahead::Region)?;
        self.copy(pfn, fresh.pfn());
        Ok(Some(fresh))
    }

    /// Maps pages to the frames that were filled for them, writable, with few calls. In the order of
    /// [`AddressSpace::move_writer`].
    fn map_moved(
        &self,
        region: &mut RegionGuard<'_>,
        moved: Vec<(Gfn, Fresh)>,
    ) -> Result<(), FaultError> {
        let mut moved = moved.into_iter().peekable();
        while let Some((first, fresh)) = moved.next() {
            let mut run = vec![fresh];
            let follows = |(gfn, next): &(Gfn, Fresh), run: &[Fresh]| {
                let n = run.len() as u64;
                (gfn.0, next.pfn().0) == (first.0 + n, run[0].pfn().0 + n)
            };
            while let Some((_, next)) = moved.next_if(|next| follows(next, &run)) {
                run.push(next);
            }
            let count = run.len() as u64;
            let before: Vec<Entry> = (first.0..first.0 + count)
                .map(|n| region.get(Gfn(n)))
                .collect();
            let to = Entry::writable(run[0].pfn());
            self.mapped.map(region, first, count, to, run)?;
            let left = before.into_iter().filter(|entry| entry.is_present());
            left.for_each(|entry| self.pool.unmap(entry.pfn()));
        }
        Ok(())
    }

    /// Makes pages writable that are exclusive, in order, with few calls.
    fn allow_writes(&self, region: &mut RegionGuard<'_>, pages: &[Gfn]) -> Result<(), FaultError> {
        // Between two of them are pages that are writable already, or must not be.
        let one_run = |a: &Gfn, b: &Gfn| (a.0 + 1..b.0).all(|n| region.get(Gfn(n)).is_writable());
        let runs: Vec<_> = pages.chunk_by(one_run).collect();
        for run in runs {
            let (first, last) = (run[0], run[run.len() - 1]);
            self.mapped.allow_writes(region, first..=last)?;
        }
        Ok(())
    }

    /// The folio that a region is in, page by page and in order, if every page is writable or among
    /// `in_place`.
    fn folio_of(&self, region: &RegionGuard<'_>, in_place: &[Gfn]) -> Option<Pfn> {
        let head = region.get(region.first()).pfn();
        let mut in_place = in_place.iter().peekable();
        let mut in_order = || {
            region.pages().zip(head.0..).all(|(gfn, pfn)| {
                let entry = region.get(gfn);
                let is_ours = in_place.next_if_eq(&&gfn).is_some() || entry.is_writable();
                is_ours && entry.pfn() == Pfn(pfn)
            })
        };
        let is_folio = self.uses_huge
            && region.is_full()
            && self.pool.frames().head(head) == head
            && in_order();
        is_folio.then_some(head)
    }

    /// Maps a region by a huge entry again whose pages are all exclusive, in the folio at `head`.
    ///
    /// The MMU maps it anew, though nothing but rights differ: a host that has split its own huge mapping for
    /// a page that was protected by itself does not join it again, and would have the guest fault 512 times
    /// where one would do.
    fn form_huge(&self, region: &mut RegionGuard<'_>, head: Pfn) -> Result<(), FaultError> {
        let (first, count) = (region.first(), region.len());
        self.mapped
            .map(region, first, count, Entry::writable(head), Counted)?;
        if self.pool.frames().try_form_huge(head).is_ok() {
            region.set_joined(head);
            Counters::add(&self.counters.formed);
        }
        Ok(())
    }

    /// Points every snapshot that shares a page of the region at a copy, whatever that costs; says whether
    /// nobody else does.
    pub(super) fn move_all_sharers(&self, region: &RegionGuard<'_>) -> Result<bool, FaultError> {
        if self.move_sharers_huge(region)? {
            return Ok(true);
        }
        for gfn in region.pages() {
            let entry = region.get(gfn);
            if !self.move_sharers(region, gfn, entry.pfn())? {
                return Ok(false);
            }
            Counters::add(&self.counters.neighbours);
        }
        Ok(true)
    }

    /// Points every snapshot at a copy of the region's folio in one piece: a folio as well, so that they keep
    /// their shape, too. `false`, and nothing has changed, if there is no folio for it, or if anything has
    /// pages of it but huge entries of snapshots.
    fn move_sharers_huge(&self, region: &RegionGuard<'_>) -> Result<bool, FaultError> {
        let Some(head) = region.huge().map(Entry::pfn) else {
            return Ok(false);
        };
        let sharing = || {
            let alive = region.state.sharers.iter().filter_map(Weak::upgrade);
            alive.filter(|s| s.lock().huge() == Some(head))
        };
        let (frames, sharers) = (self.pool.frames(), sharing().count() as u64);
        if sharers == 0 || !frames.is_mapped_huge_only(head, sharers + 1) {
            return Ok(false);
        }
        let Some(copy) = self.pool.allocate_folio()? else {
            return Ok(false);
        };
        self.copy_run(head, copy.head(), region.len());
        // Our own mapping holds it until it is handed out to all, as in `move_sharers`.
        let copied_to = copy.into_mapped();
        for snapshot in sharing() {
            let mut theirs = snapshot.lock();
            debug_assert_eq!(
                theirs.huge(),
                Some(head),
                "{:?} of a snapshot moved",
                region.first()
            );
            if frames.try_map_again_huge(copied_to).is_ok() {
                theirs.move_folio(copied_to);
            }
            if is_left_out(Safeguard::CopyIsHeld) {
                self.pool.unmap_huge(copied_to);
            }
        }
        if !is_left_out(Safeguard::CopyIsHeld) {
            self.pool.unmap_huge(copied_to);
        }
        self.counters
            .neighbours
            .fetch_add(region.len(), Ordering::Relaxed);
        Ok(true)
    }
}
