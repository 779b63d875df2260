//! Huge folios: frames that are mapped, shared and written as one.
//!
//! A huge folio is a run of frames, 512 of them and aligned, that some address space maps by **one** huge
//! entry. A word of its own then says what the frames' words would have to say 512 times:
//!
//! | word | counts | decides |
//! |---|---|---|
//! | of the folio | huge entries; the exclusive bit | may it be shared, written, pinned |
//! | of each frame | small entries; readers and devices; that it is part of a folio | which *pages* are held |
//!
//! Holds are counted **by page**, where the kernel counts a large folio's together (`folio->_pincount`): a
//! fork that meets a pinned folio copies the pinned pages and no others. What that costs is that a question
//! about the whole folio ("is any page pinned?") is not answered by one word. Who asks it and who takes a
//! hold meet in the store-buffering pair of PROTOCOL.md 5.2 instead:
//! ```text
//!   hold (a pin through a huge entry)          share (fork), reuse (write fault)
//!   1 folio: still allowed? mark "by page"     1 folio: clear the bit       (share)
//!   2 frame: count the hold                    2 full barrier
//!   3 full barrier                             3 frames: any hold? undo
//!   4 folio: still allowed? else undo
//! ```
//! Either the hold is seen in 3, or the change is seen in 4. A hold that is undone may be seen as well: a
//! copy too many.
//!
//! Holds on several pages of a folio do step 2 for each page and the others once. The pair is the same for
//! each of the pages: its count comes before the one barrier, and the look at the folio after.
//!
//! "By page" says that a hold on a page may have been granted: a folio without it is not looked through.
//!
//! A folio may end between steps 1 and 2, and its frames may be another folio by step 2: the hold is counted
//! there, and step 4 finds no mark and takes it back. So a page's count may be other than zero for a moment
//! whatever the folio's word says, and the word of a frame that is part of a folio is only ever changed by
//! compare-and-swap. A frame that is not part of one, and that nothing maps, nobody can count on.
//!
//! # One table maps it by a huge entry, another page by page
//! Splitting a mapping is the business of one table: its 512 small entries are counted in the frames' words,
//! and there is one huge entry less in the folio's. While any huge entry is left the frames stay *part* of
//! the folio, which makes a small entry's page possibly shared whatever else is counted. When the last goes,
//! the folio dissolves: nothing but 512 frames is left. Nothing is copied and no hold is touched by any of
//! this.

use super::addr::{Access, Pfn};
use super::frame::{FrameTable, Released};
use super::frame_state::{Field, FrameState, GETS, MAPS, PINS};
use super::policy::CowPolicy;
use super::safeguard::{Safeguard, is_left_out};
use super::sync::{Ordering, fence};

const HUGE_MAPS: Field = MAPS;
const EXCLUSIVE: Field = Field::after(&HUGE_MAPS, 1);
const BY_PAGE: Field = Field::after(&EXCLUSIVE, 1);

/// What a folio's word says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FolioState(u64);

impl FolioState {
    const NONE: Self = Self(0);

    /// Huge entries that map it. None: there is no such folio just now.
    #[inline]
    pub(super) const fn maps(self) -> u64 {
        HUGE_MAPS.of(self.0)
    }
    #[inline]
    pub(super) const fn is_exclusive(self) -> bool {
        EXCLUSIVE.of(self.0) != 0
    }
    /// Whether its pages may be held, or mapped one by one.
    #[inline]
    const fn is_by_page(self) -> bool {
        BY_PAGE.of(self.0) != 0
    }
    #[inline]
    const fn exclusive(self) -> Self {
        Self(self.0 | EXCLUSIVE.one())
    }
    #[inline]
    const fn possibly_shared(self) -> Self {
        Self(self.0 & !EXCLUSIVE.one())
    }
    #[inline]
    const fn by_page(self) -> Self {
        Self(self.0 | BY_PAGE.one())
    }
    #[inline]
    fn plus_map(self) -> Option<Self> {
        (self.maps() < HUGE_MAPS.max()).then(|| Self(self.0 + HUGE_MAPS.one()))
    }
    /// One huge entry less. What is left of a folio without any is nothing.
    #[inline]
    fn minus_map(self) -> Self {
        debug_assert!(self.maps() > 0);
        match self.maps() {
            0 | 1 => Self::NONE,
            _ => Self(self.0 - HUGE_MAPS.one()),
        }
    }
    /// The state of one of its pages, whose own word is `own`.
    #[inline]
    fn page(self, own: FrameState) -> FrameState {
        own.in_folio(self.maps(), self.is_exclusive())
    }
}

/// What is left of a huge folio when its last huge entry is gone.
#[derive(Debug)]
#[must_use = "frames without holders must go back to the allocator"]
pub(super) enum Dissolved {
    /// It is not: others map it still.
    No,
    /// All of its frames are free.
    Free,
    /// These are free; the others go with their last holder.
    InPart(Vec<Pfn>),
}

impl FrameTable {
    /// The folio's word; of the folio that `pfn` is in.
    #[inline]
    pub(super) fn folio_state(&self, pfn: Pfn) -> FolioState {
        FolioState(self.folios[self.huge.index(pfn.0)].load(Ordering::Acquire))
    }

    /// As if so many huge entries mapped the folio that `pfn` is in.
    #[cfg(test)]
    pub(super) fn set_folio_maps(&self, pfn: Pfn, maps: u64) {
        let rest = self.folio_state(pfn).0 & !HUGE_MAPS.max();
        self.folios[self.huge.index(pfn.0)].store(rest | maps, Ordering::Release);
    }

    /// The first frame of the folio that `pfn` is in.
    #[inline]
    pub(super) fn head(&self, pfn: Pfn) -> Pfn {
        Pfn(self.huge.floor(pfn.0))
    }

    #[inline]
    pub(super) fn pages_of(&self, head: Pfn) -> impl Iterator<Item = Pfn> + use<> {
        debug_assert_eq!(head, self.head(head));
        head.run(self.huge.pages())
    }

    /// As [`FrameTable::update`] for a folio's word.
    #[inline]
    fn update_folio(
        &self,
        head: Pfn,
        next: impl Fn(FolioState) -> Option<FolioState>,
    ) -> Result<FolioState, FolioState> {
        let word = &self.folios[self.huge.index(head.0)];
        let mut seen = word.load(Ordering::Acquire);
        loop {
            let before = FolioState(seen);
            let after = next(before).ok_or(before)?;
            if after == before {
                return Ok(before);
            }
            match word.compare_exchange_weak(seen, after.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(before),
                Err(now) => seen = now,
            }
        }
    }

    /// The first mapping, by a huge entry, of frames that were just allocated and that nothing holds:
    /// exclusive.
    pub(super) fn map_fresh_huge(&self, head: Pfn) {
        for pfn in self.pages_of(head) {
            debug_assert_eq!(
                self.own_state(pfn),
                FrameState::FREE,
                "{pfn:?} is not fresh"
            );
            // Nobody counts a hold on a frame that nothing maps, so nothing is lost by a plain store.
            self.set_own(pfn, FrameState::FOLIO_PART);
        }
        let result = self.update_folio(head, |f| f.plus_map().map(FolioState::exclusive));
        debug_assert_eq!(result, Ok(FolioState::NONE));
    }

    /// Shares the folio with one more huge entry, if `policy` allows that for each of its pages. Refused,
    /// with nothing changed, if not: with the state of the first page that stands in the way (PROTOCOL.md
    /// 4.3, 4.9).
    ///
    /// The caller keeps every entry that maps it from changing; holds come and go.
    pub(super) fn try_share_huge<P: CowPolicy>(
        &self,
        head: Pfn,
        policy: &P,
    ) -> Result<(), FrameState> {
        let unheld = FrameState::FREE;
        let before = self
            .update_folio(head, |f| {
                (f.maps() > 0 && policy.may_share(f.page(unheld)))
                    .then(|| f.possibly_shared().plus_map())
                    .flatten()
            })
            .map_err(|f| f.page(unheld))?;
        match self.page_in_the_way(head, before, |page| policy.may_share(page)) {
            None => Ok(()),
            Some(page) => {
                // Nobody has looked at the child's entry yet, and nobody may write through the parent's.
                let undone = self.update_folio(head, |f| {
                    let f = f.minus_map();
                    Some(if before.is_exclusive() {
                        f.exclusive()
                    } else {
                        f
                    })
                });
                debug_assert!(undone.is_ok());
                Err(page)
            }
        }
    }

    /// Makes the folio exclusive to the one huge entry that the caller has, if `policy` says that each page
    /// may be written in place (PROTOCOL.md 3.3).
    ///
    /// Who held one of its pages through another's entry did so before that entry went, so before the count
    /// fell to one: the word is looked at first, then the pages, and the word must not have changed since.
    pub(super) fn try_reuse_huge<P: CowPolicy>(
        &self,
        head: Pfn,
        policy: &P,
    ) -> Result<(), FrameState> {
        loop {
            let seen = self.folio_state(head);
            let page = seen.page(FrameState::FREE);
            if seen.maps() == 0 || !policy.may_reuse(page) {
                return Err(page);
            }
            if let Some(page) = self.page_in_the_way(head, seen, |page| policy.may_reuse(page)) {
                return Err(page);
            }
            let unchanged = |f: FolioState| (f == seen).then(|| f.exclusive());
            if self.update_folio(head, unchanged).is_ok() {
                return Ok(());
            }
        }
    }

    /// One more huge entry, possibly shared, for a folio that the caller maps by one. Refused if the counter
    /// is full.
    pub(super) fn try_map_again_huge(&self, head: Pfn) -> Result<(), FrameState> {
        self.update_folio(head, |f| {
            debug_assert!(f.maps() > 0, "{head:?} is not held");
            f.possibly_shared().plus_map()
        })
        .map(drop)
        .map_err(|f| f.page(FrameState::FREE))
    }

    /// Whether nothing but `huge` huge entries has any page of a folio: nobody holds one or maps it by a
    /// small entry.
    pub(super) fn is_mapped_huge_only(&self, head: Pfn, huge: u64) -> bool {
        let folio = self.folio_state(head);
        let only = |page: FrameState| page.refs() == huge;
        folio.maps() == huge && self.page_in_the_way(head, folio, only).is_none()
    }

    /// Whether [`FrameTable::try_share_huge`] would share it just now.
    pub(super) fn may_share_huge<P: CowPolicy>(&self, head: Pfn, policy: &P) -> bool {
        let folio = self.folio_state(head);
        let may = |page: FrameState| policy.may_share(page);
        may(folio.page(FrameState::FREE)) && self.page_in_the_way(head, folio, may).is_none()
    }

    /// Says that pages of a folio may be mapped one by one, beside huge entries.
    pub(super) fn mark_by_page(&self, head: Pfn) {
        let result = self.update_folio(head, |f| Some(f.by_page()));
        debug_assert!(result.is_ok_and(|f| f.maps() > 0));
    }

    /// The state of the first page of a folio, in state `folio`, with which `is_fine` does not agree.
    fn page_in_the_way(
        &self,
        head: Pfn,
        folio: FolioState,
        is_fine: impl Fn(FrameState) -> bool,
    ) -> Option<FrameState> {
        if !folio.is_by_page() || is_left_out(Safeguard::FolioPagesLookedAt) {
            return None;
        }
        // Step 2 of the pair: partner is `are_pages_held`.
        if !is_left_out(Safeguard::FolioBarrier) {
            fence(Ordering::SeqCst);
        }
        self.pages_of(head)
            .map(|pfn| folio.page(self.own_state(pfn)))
            .find(|&page| !is_fine(page))
    }

    /// Steps 1 and 2 of holds through a huge entry, on `count` pages of a folio from `first` on. Counts the
    /// holds of as many, up to the first that can't be held, and says how many. Whoever gets any counted must
    /// ask [`FrameTable::are_pages_held`], and give them back if the answer is no.
    #[inline]
    pub(super) fn hold_pages(
        &self,
        first: Pfn,
        count: u64,
        hold: Hold,
        may: impl Fn(FrameState) -> bool,
    ) -> u64 {
        debug_assert_eq!(self.head(first), self.head(Pfn(first.0 + count - 1)));
        let allowed = self.update_folio(first, |f| {
            (f.maps() > 0 && may(f.page(FrameState::FREE))).then(|| f.by_page())
        });
        if allowed.is_err() {
            return 0;
        }
        let count_one = |pfn| self.update(pfn, |s| s.is_part().then(|| s.plus(hold.field()))?);
        let held = first.run(count).take_while(|&pfn| count_one(pfn).is_ok());
        held.count() as u64
    }

    /// Steps 3 and 4: once for all pages of the folio that were counted before.
    #[inline]
    pub(super) fn are_pages_held(&self, first: Pfn, may: impl Fn(FrameState) -> bool) -> bool {
        if is_left_out(Safeguard::FolioLookedAtAgain) {
            return true;
        }
        // Partner: `page_in_the_way`.
        fence(Ordering::SeqCst);
        let folio = self.folio_state(first);
        folio.maps() > 0 && folio.is_by_page() && may(folio.page(FrameState::FREE))
    }

    /// Gives a huge entry's mapping back.
    pub(super) fn unmap_huge(&self, head: Pfn) -> Dissolved {
        let result = self.update_folio(head, |f| Some(f.minus_map()));
        match result {
            // Nothing maps its pages but small entries of others: they are exclusive to nobody.
            Ok(before) if before.maps() == 1 => self.dissolve(head, before, |_| false),
            _ => Dissolved::No,
        }
    }

    /// Turns the caller's huge entry into small ones: of each page one. Holds are not touched. If it was the
    /// last huge entry, `is_exclusive` says of each page, with the folio's bit for its own, whether it has
    /// the bit: the bit spreads (PROTOCOL.md 4.10, [`CowPolicy::is_exclusive_after_split`]).
    pub(super) fn split_mapping(&self, head: Pfn, is_exclusive: impl Fn(FrameState) -> bool) {
        // Frames are part of the folio until it dissolves: till then nobody takes a small entry for the only
        // one.
        self.mark_by_page(head);
        let count = || {
            for pfn in self.pages_of(head) {
                let result = self.update(pfn, |s| s.plus(&MAPS));
                debug_assert!(result.is_ok(), "fewer entries than the counter holds");
            }
        };
        let too_late = is_left_out(Safeguard::SplitCountsPagesFirst);
        if !too_late {
            count();
        }
        let before = self.update_folio(head, |f| Some(f.minus_map()));
        if too_late {
            count();
        }
        if let Ok(before) = before
            && before.maps() == 1
        {
            // Mapped by the caller at least: nothing is free.
            let _ = self.dissolve(head, before, is_exclusive);
        }
    }

    /// The last huge entry is gone, and with it the word: no hold is granted through it any more.
    /// `is_exclusive` says which pages have the bit now.
    fn dissolve(
        &self,
        head: Pfn,
        before: FolioState,
        is_exclusive: impl Fn(FrameState) -> bool,
    ) -> Dissolved {
        if is_left_out(Safeguard::DissolvedInTheWord) && !before.is_by_page() {
            self.pages_of(head)
                .for_each(|pfn| self.set_own(pfn, FrameState::FREE));
            return Dissolved::Free;
        }
        // Also of a folio that was never marked "by page": who marked the one that was here before may count
        // its hold only now, to take it back when it has looked again.
        let free: Vec<Pfn> = self
            .pages_of(head)
            .filter(|&pfn| {
                self.give_back(pfn, |s| {
                    let page = s.whole();
                    let with_bit = page.exclusive();
                    let spread = if before.is_exclusive() {
                        with_bit
                    } else {
                        page
                    };
                    if is_exclusive(spread) { with_bit } else { page }
                }) == Released::Last
            })
            .collect();
        if free.len() as u64 == self.huge.pages() {
            Dissolved::Free
        } else {
            Dissolved::InPart(free)
        }
    }

    /// Makes a folio of frames each of which is exclusive to the caller's one small entry, and maps it by the
    /// huge entry that the caller puts in their place. Holds stay what they are: no frame moves (the kernel's
    /// collapse moves all, and so must refuse them). Refused, with nothing changed, if a frame is not so.
    pub(super) fn try_form_huge(&self, head: Pfn) -> Result<(), FrameState> {
        let alone = |s: FrameState| s.is_exclusive() && s.maps() == 1 && !s.is_part();
        for pfn in self.pages_of(head) {
            let own = self.own_state(pfn);
            if !alone(own) {
                return Err(own);
            }
        }
        // An exclusive frame stays so while its entry is not changed, which is the caller's to keep from
        // happening.
        let result = self.update_folio(head, |f| f.plus_map().map(FolioState::exclusive));
        debug_assert_eq!(result, Ok(FolioState::NONE));
        let mut is_held = false;
        for pfn in self.pages_of(head) {
            // From here on no hold is granted through a small entry that somebody read a while ago: there is
            // no bit.
            let result = self.update(pfn, |s| Some(s.minus(&MAPS).possibly_shared().part()));
            is_held |= result.is_ok_and(|change| !change.before.is_idle());
        }
        if is_held {
            let result = self.update_folio(head, |f| Some(f.by_page()));
            debug_assert!(result.is_ok());
        }
        Ok(())
    }
}

/// A kind of hold on a page.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hold {
    /// A reader's (`FOLL_GET`).
    Get,
    /// A device's (`FOLL_PIN`).
    Pin,
}

impl Hold {
    #[inline]
    fn field(self) -> &'static Field {
        match self {
            Self::Get => &GETS,
            Self::Pin => &PINS,
        }
    }
}

/// Whether a pin may be taken, as a question about a page's state.
pub(super) fn may_pin<P: CowPolicy>(policy: &P, access: Access) -> impl Fn(FrameState) -> bool {
    move |page| policy.may_pin(page, access)
}
