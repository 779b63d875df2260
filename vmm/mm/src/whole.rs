//! Breaks of a whole region: all of its pages are made writable at once, so that one mapping does for them
//! and nothing in it faults again.
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
use super::mapped::table::RegionGuard;
use super::policy::CowPolicy;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;
use super::stats::Counters;

/// Pages that are elsewhere are few if they are one in so many.
const FEW: u64 = 4;

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
            self.stay_in(region, huge.pfn());
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
            self.broke_whole(region);
        }
        if intent == Intent::Write && resolution != Resolution::WriterMoved {
            let last = Gfn(region.first().0 + region.len() - 1);
            let pages = region.first()..=last;
            self.mapped.allow_writes(region, pages)?;
        }
        Ok(Some(resolution))
    }

    /// Notes that a region was broken whole, or all of it that was to be.
    pub(super) fn broke_whole(&self, region: &mut RegionGuard<'_>) {
        let index = region.index();
        self.predictor.broke_whole(index, &mut region.state.history);
        Counters::add(&self.counters.mine().whole);
    }

    /// As [`AddressSpace::move_writer`], for a whole region: to its home, or to the one it moves to. Says
    /// whether there is one.
    fn move_writer_huge(
        &self,
        region: &mut RegionGuard<'_>,
        huge: Entry,
    ) -> Result<bool, FaultError> {
        let (first, count) = (region.first(), region.len());
        let Some(fresh) = self.allocate_region(region)? else {
            return Ok(false);
        };
        let too_early = is_left_out(Safeguard::FolioLeftLast);
        if too_early {
            self.pool.unmap_huge(huge.pfn());
        }
        self.copy_run(huge.pfn(), fresh.head(), count);
        let to = Entry::huge_writable(fresh.head());
        self.mapped.map(region, first, count, to, fresh)?;
        if !too_early {
            self.pool.unmap_huge(huge.pfn());
        }
        Ok(true)
    }

    /// Makes all pages of a region writable that are not, so that one mapping does for them and nothing in it
    /// faults again. If mappings are short, pages that were never touched get frames as well: that spends
    /// memory to save mappings.
    ///
    /// Nobody asked for any of it, so a page for which there is no memory is left as it is.
    pub(super) fn resolve_rest(&self, region: &mut RegionGuard<'_>, also_untouched: bool) {
        self.open_all(region);
        match self.gather(region) {
            Ok(false) => {}
            Ok(true) | Err(_) => return,
        }
        let comes_home = self.lives_at_home(region);
        let (mut in_place, mut moved) = (Vec::new(), Vec::new());
        for gfn in region.pages() {
            let entry = region.get(gfn);
            if entry.is_writable() || (!entry.is_present() && !also_untouched) {
                continue;
            }
            let resolved = if entry.is_present() {
                self.take_over(region, gfn, entry, comes_home)
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
            Counters::add(&self.counters.mine().neighbours);
        }
        let done = match self.folio_of(region, &in_place, &moved) {
            Some(head) => self.form_huge(region, head, moved),
            None => self
                .allow_writes(region, &in_place)
                .and_then(|()| self.map_moved(region, moved))
                .map(|()| self.fetch_stragglers(region))
                .and_then(|()| match self.folio_of(region, &[], &[]) {
                    Some(head) => self.form_huge(region, head, Vec::new()),
                    None => Ok(()),
                }),
        };
        if done.is_ok() {
            self.broke_whole(region);
        }
    }

    /// Makes the frame of a page exclusive, or says in which one a copy of it is. If the page `comes_home`,
    /// it does not stay elsewhere, even though that costs a copy more.
    fn take_over(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        entry: Entry,
        comes_home: bool,
    ) -> Result<Option<Fresh>, FaultError> {
        let pfn = entry.pfn();
        // Nobody pins a frame that is not exclusive, under the right policy; under others it is a matter of
        // luck.
        let state = self.pool.state(pfn);
        let may_move = comes_home && !state.is_exclusive() && state.is_idle();
        let at_home = match may_move {
            true => self.allocate_at_home(region, gfn, Ahead::Region)?,
            false => None,
        };
        let fresh = match at_home {
            Some(fresh) => fresh,
            None if self.pool.frames().try_reuse(pfn, &self.policy).is_ok() => return Ok(None),
            None if self.move_sharers(region, gfn, pfn)? => return Ok(None),
            None => self.allocate_page(region, gfn, Ahead::Region)?,
        };
        self.copy(pfn, fresh.pfn());
        Ok(Some(fresh))
    }

    /// Brings pages home that are elsewhere, if they are all that keeps the region from being huge, and are
    /// few. They were broken one by one, in frames that were the last holder's by then.
    ///
    /// Nobody asked for it: a page that cannot be moved stays where it is.
    fn fetch_stragglers(&self, region: &mut RegionGuard<'_>) {
        if !self.uses_huge || !region.is_full() {
            return;
        }
        let is_elsewhere = |&gfn: &Gfn| !self.is_at_home(region, gfn);
        let stragglers: Vec<Gfn> = region.pages().filter(is_elsewhere).collect();
        let are_few = stragglers.len() as u64 <= region.len() / FEW;
        if are_few && region.pages().all(|gfn| region.get(gfn).is_writable()) {
            for gfn in stragglers {
                if self.migrate_page(region, gfn).is_err() || !self.is_at_home(region, gfn) {
                    break;
                }
            }
        }
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
            self.leave(before);
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
    /// `in_place`, or will be where it has `moved`.
    fn folio_of(
        &self,
        region: &RegionGuard<'_>,
        in_place: &[Gfn],
        moved: &[(Gfn, Fresh)],
    ) -> Option<Pfn> {
        if !self.uses_huge || !region.is_full() {
            return None;
        }
        let mut in_place = in_place.iter().peekable();
        let mut moved = moved.iter().peekable();
        let mut frames = region.pages().map(|gfn| {
            if let Some((_, fresh)) = moved.next_if(|(page, _)| *page == gfn) {
                return Some(fresh.pfn());
            }
            let entry = region.get(gfn);
            let is_ours = in_place.next_if_eq(&&gfn).is_some() || entry.is_writable();
            is_ours.then(|| entry.pfn())
        });
        let head = frames.next()??;
        let mut rest = frames.zip(head.0 + 1..);
        let is_folio = self.pool.frames().head(head) == head
            && rest.all(|(frame, pfn)| frame == Some(Pfn(pfn)));
        is_folio.then_some(head)
    }

    /// Maps a region by a huge entry again whose pages are all exclusive, or have `moved` to frames that were
    /// filled for them, in the folio at `head`.
    ///
    /// The MMU maps it anew, though nothing but rights differ: a host that has split its own huge mapping for
    /// a page that was protected by itself does not join it again, and would have the guest fault 512 times
    /// where one would do.
    fn form_huge(
        &self,
        region: &mut RegionGuard<'_>,
        head: Pfn,
        moved: Vec<(Gfn, Fresh)>,
    ) -> Result<(), FaultError> {
        let (first, count) = (region.first(), region.len());
        let left: Vec<Entry> = moved.iter().map(|(gfn, _)| region.get(*gfn)).collect();
        let frames: Vec<Fresh> = moved.into_iter().map(|(_, fresh)| fresh).collect();
        self.mapped
            .map(region, first, count, Entry::writable(head), frames)?;
        self.leave(left);
        if self.pool.frames().try_form_huge(head).is_ok() {
            region.set_joined(head);
            self.stay_in(region, head);
            Counters::add(&self.counters.mine().formed);
        }
        Ok(())
    }

    /// Gives back the mappings that pages had before they were mapped anew.
    fn leave(&self, before: Vec<Entry>) {
        let left = before.into_iter().filter(|entry| entry.is_present());
        left.for_each(|entry| self.pool.unmap(entry.pfn()));
    }

    /// Points every snapshot that shares a page of the region at a copy, whatever that costs; says whether
    /// nobody else does. Does nothing if the account has no room for as many copies: what it has left is for
    /// pages that somebody asks for.
    pub(super) fn move_all_sharers(&self, region: &RegionGuard<'_>) -> Result<bool, FaultError> {
        if !self.account.has_room(region.len()) {
            return Ok(false);
        }
        if self.move_sharers_huge(region)? {
            return Ok(true);
        }
        for gfn in region.pages() {
            let entry = region.get(gfn);
            if !self.move_sharers(region, gfn, entry.pfn())? {
                return Ok(false);
            }
            Counters::add(&self.counters.mine().neighbours);
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
        if sharers == 0
            || !frames.is_mapped_huge_only(head, sharers + 1)
            || sharing().any(|s| s.lock().is_lent(region.first()))
        {
            return Ok(false);
        }
        let Some(copy) = self.pool.allocate_folio(&self.account)? else {
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
            // It may have been lent since: then the writer finds that he is not the last, and moves after all.
            if frames.try_map_again_huge(copied_to).is_ok() && !theirs.try_move_folio(copied_to) {
                self.pool.unmap_huge(copied_to);
            }
            if is_left_out(Safeguard::CopyIsHeld) {
                self.pool.unmap_huge(copied_to);
            }
        }
        if !is_left_out(Safeguard::CopyIsHeld) {
            self.pool.unmap_huge(copied_to);
        }
        Counters::add_more(&self.counters.mine().neighbours, region.len());
        Ok(true)
    }
}
