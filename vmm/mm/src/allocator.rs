//! Who has which frame, and which frames have memory.
//!
//! **Invariant.** Each frame is in exactly one state:
//!
//! | state | memory | handed out |
//! |---|---|---|
//! | free | none | after the host has given it memory |
//! | free and committed | yes | at once |
//! | allocated | yes, or the host is being asked | no |
//!
//! [`Allocator::claim`] is the only way from free to allocated, and looks at the bits of the frames it takes.
//! What chooses frames (the sets of runs) only proposes: a wrong proposal is refused there, so no frame has
//! two owners.
//!
//! **The host is asked by somebody else** (`commit.rs`), without the lock that this is behind. So a frame
//! that needs the host is *in transit* meanwhile: allocated for everybody else, and the memory for it counted
//! as if it were there.
//!
//! ```text
//!   claim ──> in transit ──> finish: what was asked for is its owner's; what was committed ahead is free and committed
//!                       └──> refuse: all of it is free, and nothing is counted
//!   give back: free and committed ──> in transit ──> free
//! ```
//!
//! A *run* is as many frames as a huge folio has, and begins at a multiple of that. A frame of a *home* is
//! for its page alone. Single frames come from runs that are in use already, if there is one, so that whole
//! runs are left for folios; and everything comes from the lowest place there is, so that what is used lies
//! together.

use super::addr::{Order, Pfn};
use super::bits::{BitSet, words_of};
use super::ledger::{AccountNumber, Exhausted, Ledger};
use super::stock::{FILL_FOLIOS, Stock};

/// How many frames are in which condition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Allocated now.
    pub in_use: u64,
    /// Allocated at the worst moment.
    pub peak: u64,
    /// With memory behind them, or about to get it.
    pub committed: u64,
    /// The same at the worst moment.
    pub committed_peak: u64,
    /// The most that may have memory behind them.
    pub limit: u64,
}

pub(super) struct Allocator {
    frames: u64,
    folio: Order,
    allocated: BitSet,
    /// With memory.
    committed: BitSet,
    /// With memory that nobody has used yet: zeros.
    blank: BitSet,
    /// The runs that were given memory otherwise than all of it at a time: the host may have it in small
    /// pages.
    pieces: BitSet,
    /// Of somebody's home.
    homes: BitSet,
    /// Of those that are allocated: the host is being asked about them.
    in_transit: BitSet,
    transits: u64,
    /// The runs all of whose frames are free and outside homes.
    whole: BitSet,
    /// The runs of whose frames outside homes some are free and some are not.
    partial: BitSet,
    /// The runs of whose frames outside homes some are free and committed.
    ready: BitSet,
    /// The runs that are whole and have memory, which they were given all at a time.
    intact: BitSet,
    /// How many runs are whole and ready.
    stock: Stock,
    usage: PoolUsage,
    /// Who pays for what is in use.
    ledger: Ledger,
}

/// Frames on their way from free to allocated, and the memory that the host has to give for it.
#[derive(Debug)]
#[must_use = "frames in transit must be finished or refused"]
pub(super) struct Claim {
    first: Pfn,
    /// For the caller.
    count: u64,
    /// Those that follow and are given memory by the way.
    ahead: u64,
    /// How many of the caller's have no memory yet.
    missing: u64,
    is_home: bool,
    is_blank: bool,
    /// Whether the caller's have memory in pieces, and are as many as the host can have in one.
    joins: bool,
    /// Who pays for the caller's.
    payer: Option<AccountNumber>,
}

/// Free frames on their way to having no memory.
#[derive(Debug)]
#[must_use = "frames in transit must be given back or kept"]
pub(super) struct Surplus {
    pub(super) first: Pfn,
    pub(super) count: u64,
}

/// Why frames cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unavailable {
    /// Somebody has one of them.
    Taken,
    /// The host is being asked: it may be otherwise when that is done.
    InTransit,
    /// There are no more frames, or there is no memory for them.
    Limit,
    /// The caller's account may have no more.
    Quota { limit: u64 },
}

impl From<Exhausted> for Unavailable {
    fn from(Exhausted { limit }: Exhausted) -> Self {
        Self::Quota { limit }
    }
}

impl Claim {
    pub(super) fn first(&self) -> Pfn {
        self.first
    }

    /// Frames to be given memory, from the first on. Some may have it.
    pub(super) fn total(&self) -> u64 {
        self.count + self.ahead
    }

    /// Whether the host has to be asked.
    pub(super) fn needs_memory(&self) -> bool {
        self.missing + self.ahead > 0 || self.joins
    }

    /// Whether it is the caller's though the host refuses: there is memory for all of it.
    pub(super) fn is_optional(&self) -> bool {
        self.missing + self.ahead == 0
    }

    pub(super) fn has_ahead(&self) -> bool {
        self.count > 0 && self.ahead > 0
    }

    /// Whether the host is to be asked for as large pages as fit: for what windows will show, and for what
    /// nobody waits for. To make huge pages of new memory is cheaper than all of their small ones, but takes
    /// the host milliseconds while all CPUs are busy (it waits for a turn of each, `lru_add_drain_all` in
    /// `mm/swap.c`).
    pub(super) fn is_huge(&self) -> bool {
        self.is_home || self.count == 0
    }

    /// Whether all of the caller's frames are zeros.
    pub(super) fn is_blank(&self) -> bool {
        self.is_blank
    }
}

impl Allocator {
    /// Of `frames` frames, all of them free but the zero frame, which is nobody's.
    pub(super) fn new(frames: u64, folio: Order, limit: u64) -> Self {
        let runs = frames.div_ceil(folio.pages());
        let mut new = Self {
            frames,
            folio,
            allocated: BitSet::new(frames),
            committed: BitSet::new(frames),
            blank: BitSet::new(frames),
            pieces: BitSet::new(runs),
            homes: BitSet::new(frames),
            in_transit: BitSet::new(frames),
            transits: 0,
            whole: BitSet::new(runs),
            partial: BitSet::new(runs),
            ready: BitSet::new(runs),
            intact: BitSet::new(runs),
            stock: Stock::default(),
            usage: PoolUsage {
                limit,
                ..PoolUsage::default()
            },
            ledger: Ledger::new(frames),
        };
        new.allocated.set(0, true);
        new.committed.set(0, true);
        new.whole.set_run(0, runs, true);
        new.look_at(0);
        new.look_at(runs - 1);
        new
    }

    pub(super) fn usage(&self) -> PoolUsage {
        self.usage
    }

    /// Whether the host is being asked about any frame: some that are not free now may be in a moment.
    pub(super) fn is_asking(&self) -> bool {
        self.transits > 0
    }

    /// Whether somebody has a frame. Nobody has the zero frame.
    pub(super) fn is_allocated(&self, pfn: Pfn) -> bool {
        pfn != Pfn::ZERO && self.allocated.get(pfn.0)
    }

    /// The frames that somebody has, but for those about which the host is being asked.
    pub(super) fn in_use(&self) -> BitSet {
        let mut in_use = self.allocated.without(&self.in_transit);
        in_use.set(0, false);
        in_use
    }

    /// Whether a frame is one of them.
    pub(super) fn is_in_use(&self, pfn: Pfn) -> bool {
        self.is_allocated(pfn) && !self.in_transit.get(pfn.0)
    }

    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    pub(super) fn ledger_mut(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    pub(super) fn stock_mut(&mut self) -> &mut Stock {
        &mut self.stock
    }

    /// A frame outside homes. Where it has none yet, memory for the rest of its run is asked for as well.
    pub(super) fn claim_single(&mut self, payer: AccountNumber) -> Result<Claim, Unavailable> {
        // Before anything else: who may have no more neither waits for memory nor has room made.
        self.ledger.may_take(payer, 1)?;
        let Some(pfn) = self.find_single() else {
            return Err(self.no_more());
        };
        self.claim(pfn, 1, self.rest_of_run(pfn), Some(payer))
    }

    /// The frames of a folio outside homes.
    pub(super) fn claim_folio(&mut self, payer: AccountNumber) -> Result<Claim, Unavailable> {
        self.ledger.may_take(payer, self.folio.pages())?;
        let Some(head) = self.find_folio() else {
            return Err(self.no_more());
        };
        self.claim(head, self.folio.pages(), self.folio.pages(), Some(payer))
    }

    /// The `count` frames from `first` on, of a home. If they have no memory, it is asked for up to the
    /// `most`th.
    pub(super) fn claim_home(
        &mut self,
        payer: AccountNumber,
        first: Pfn,
        count: u64,
        most: u64,
    ) -> Result<Claim, Unavailable> {
        self.ledger.may_take(payer, count)?;
        if self.in_transit.ones(first.0, count) > 0 {
            return Err(Unavailable::InTransit);
        }
        self.claim(first, count, most, Some(payer))
    }

    /// No frame for anybody, but memory for the one that is needed next.
    pub(super) fn prepare_single(&mut self) -> Option<Claim> {
        let pfn = self.find_single()?;
        self.claim(pfn, 0, self.rest_of_run(pfn), None).ok()
    }

    /// As [`Allocator::prepare_single`], for `count` folios if there are as many in a row.
    pub(super) fn prepare_folios(&mut self, count: u64) -> Option<Claim> {
        let head = self.find_folio()?;
        let most = (self.frames - head.0).min(count * self.folio.pages());
        self.claim(head, 0, most, None).ok()
    }

    /// No frame for anybody, but memory for what should be in stock: a part of it. Not where memory runs short:
    /// homes that have none yet need it more.
    pub(super) fn prepare_stock(&mut self) -> Option<Claim> {
        let pages = self.folio.pages();
        let wanted = self.wanted().min(FILL_FOLIOS);
        let is_bare = |&run: &u64| self.whole.get(run) && !self.ready.get(run);
        let run = self.whole.iter().find(is_bare).filter(|_| wanted > 0)?;
        let runs = self.frames / pages;
        let count = (run..runs.min(run + wanted)).take_while(is_bare).count();
        self.claim(Pfn(run * pages), 0, count as u64 * pages, None)
            .ok()
    }

    /// How many runs should be put in stock, as far as there is memory to spare for it.
    pub(super) fn wanted(&self) -> u64 {
        let pages = self.folio.pages();
        let spare = (self.usage.limit / 4 * 3).saturating_sub(self.usage.committed);
        self.stock
            .wanted(self.usage.in_use / pages)
            .min(spare / pages)
    }

    /// Takes `count` free frames from `first` on, and for the host's sake those that follow and have no
    /// memory either, up to the `most`th. `payer`, who may have as many more, is charged with the `count`.
    fn claim(
        &mut self,
        first: Pfn,
        count: u64,
        most: u64,
        payer: Option<AccountNumber>,
    ) -> Result<Claim, Unavailable> {
        debug_assert_eq!(payer.is_some(), count > 0);
        if self.allocated.ones(first.0, count) > 0 {
            return Err(Unavailable::Taken);
        }
        let (missing, room) = (self.committed.zeros(first.0, count), self.room());
        if missing > room {
            return Err(self.no_more());
        }
        let is_home = self.homes.get(first.0);
        let is_bare = |&n: &u64| {
            !self.allocated.get(n) && !self.committed.get(n) && self.homes.get(n) == is_home
        };
        let ahead = if missing > 0 || count == 0 {
            let following = first.0 + count..first.0 + most;
            (following.take_while(is_bare).count() as u64).min(room - missing)
        } else {
            0
        };
        let run = self.folio.index(first.0) as u64;
        if missing > 0 && !is_home && !(self.whole.get(run) && self.ready.get(run)) {
            self.stock.note_late(count.div_ceil(self.folio.pages()));
        }
        let is_run = count == self.folio.pages() && self.folio.floor(first.0) == first.0;
        let claim = Claim {
            first,
            count,
            ahead,
            missing,
            is_home,
            joins: is_home && is_run && self.is_in_pieces(first),
            is_blank: self.committed.ones(first.0, count) == self.blank.ones(first.0, count),
            payer,
        };
        if let Some(payer) = payer {
            self.ledger.charge(payer, first, count);
        }
        self.allocated.set_run(first.0, claim.total(), true);
        self.blank.set_run(first.0, count, false);
        self.usage.in_use += count;
        self.usage.committed += missing + ahead;
        if claim.needs_memory() {
            self.in_transit.set_run(first.0, claim.total(), true);
            self.transits += claim.total();
        }
        self.look_at_runs_of(first, claim.total());
        Ok(claim)
    }

    /// The host has given what a claim needs: the caller's frames are the caller's, and the others free.
    pub(super) fn finish(&mut self, claim: &Claim) {
        let (first, ahead) = (claim.first, Pfn(claim.first.0 + claim.count));
        if claim.needs_memory() {
            self.end_transit(first, claim.total());
            self.committed.set_run(first.0, claim.total(), true);
            self.note_pieces(claim);
            self.blank.set_run(ahead.0, claim.ahead, true);
            self.allocated.set_run(ahead.0, claim.ahead, false);
            self.look_at_new_runs_of(ahead, claim.ahead);
        }
        if let Some(payer) = claim.payer {
            self.ledger.settle(payer);
        }
        self.usage.peak = self.usage.peak.max(self.usage.in_use);
        self.usage.committed_peak = self.usage.committed_peak.max(self.usage.committed);
    }

    /// Whether the run of a frame was given memory otherwise than all of it at a time.
    pub(super) fn is_in_pieces(&self, pfn: Pfn) -> bool {
        self.pieces.get(self.folio.index(pfn.0) as u64)
    }

    /// The host was asked for the memory of a claim.
    fn note_pieces(&mut self, claim: &Claim) {
        let (first, end) = (claim.first.0, claim.first.0 + claim.total());
        let pages = self.folio.pages();
        for run in self.folio.index(first) as u64..=self.folio.index(end - 1) as u64 {
            let is_all = first <= run * pages && (run + 1) * pages <= end;
            self.pieces.set(run, !(claim.is_huge() && is_all));
        }
    }

    /// The host has refused it.
    pub(super) fn refuse(&mut self, claim: Claim) {
        let claim = self.without_ahead(claim);
        if claim.count == 0 {
            self.stock.note_refused();
        }
        let Claim { first, count, .. } = claim;
        self.end_transit(first, count);
        self.usage.committed -= claim.missing;
        self.usage.in_use -= count;
        self.ledger.refund(first, count);
        self.allocated.set_run(first.0, count, false);
        self.look_at_runs_of(first, count);
    }

    /// The same without what is only by the way.
    pub(super) fn without_ahead(&mut self, claim: Claim) -> Claim {
        let ahead = Pfn(claim.first.0 + claim.count);
        self.end_transit(ahead, claim.ahead);
        self.usage.committed -= claim.ahead;
        self.allocated.set_run(ahead.0, claim.ahead, false);
        self.look_at_runs_of(ahead, claim.ahead);
        Claim { ahead: 0, ..claim }
    }

    /// Frees `count` frames from `first` on.
    pub(super) fn release(&mut self, first: Pfn, count: u64) {
        debug_assert_eq!(
            self.allocated.zeros(first.0, count),
            0,
            "{first:?} freed twice"
        );
        self.allocated.set_run(first.0, count, false);
        self.usage.in_use -= count;
        self.ledger.refund(first, count);
        self.look_at_runs_of(first, count);
    }

    /// The host has taken the memory of allocated frames back.
    pub(super) fn uncommitted(&mut self, first: Pfn, count: u64) {
        self.usage.committed -= self.committed.ones(first.0, count);
        self.committed.set_run(first.0, count, false);
        self.blank.set_run(first.0, count, false);
    }

    /// A snapshot is about to be taken: what may go back to the host of what is in stock.
    pub(super) fn take_surplus(&mut self) -> Vec<Surplus> {
        let surplus = self.stock.look();
        // What is used next is at the other end.
        let idle: Vec<_> = self.whole.iter_common(&self.ready).collect();
        let runs = &idle[idle.len() - surplus as usize..];
        runs.chunk_by(|a, b| a + 1 == *b)
            .map(|runs| {
                let pages = self.folio.pages();
                self.take_back(Pfn(runs[0] * pages), runs.len() as u64 * pages)
            })
            .collect()
    }

    /// Frames of homes, of one run, that have memory and nobody has a use for just now.
    pub(super) fn take_unused_of_homes(&mut self) -> Option<Surplus> {
        let unused =
            |word| self.committed.word(word) & self.homes.word(word) & !self.allocated.word(word);
        let first = words_of(0, self.frames).find_map(|(word, mask)| {
            let bits = unused(word) & mask;
            (bits != 0).then(|| word as u64 * 64 + u64::from(bits.trailing_zeros()))
        })?;
        let is_unused = |&n: &u64| unused((n / 64) as usize) >> (n % 64) & 1 != 0;
        let end = first + self.rest_of_run(Pfn(first));
        let count = (first..end).take_while(is_unused).count() as u64;
        Some(self.take_back(Pfn(first), count))
    }

    /// As [`Allocator::look_at_runs_of`], where what is in stock then is not what somebody had.
    fn look_at_new_runs_of(&mut self, first: Pfn, count: u64) {
        let before = self.stock.runs();
        self.look_at_runs_of(first, count);
        self.stock.was_filled(self.stock.runs() - before);
    }

    fn take_back(&mut self, first: Pfn, count: u64) -> Surplus {
        debug_assert_eq!(self.allocated.ones(first.0, count), 0);
        self.allocated.set_run(first.0, count, true);
        self.in_transit.set_run(first.0, count, true);
        self.transits += count;
        self.look_at_runs_of(first, count);
        Surplus { first, count }
    }

    /// The host has the memory of `surplus` back.
    pub(super) fn give_back(&mut self, surplus: Surplus) {
        self.uncommitted(surplus.first, surplus.count);
        self.keep(surplus);
    }

    /// The host would not have it.
    pub(super) fn keep(&mut self, Surplus { first, count }: Surplus) {
        self.end_transit(first, count);
        self.allocated.set_run(first.0, count, false);
        self.look_at_new_runs_of(first, count);
    }

    /// Makes a home of `pages` frames, of which none is in use: of frames without memory, if it can be, so
    /// that the host can give it in one piece. One that is as long as a folio begins with one.
    pub(super) fn make_home(&mut self, pages: u64) -> Option<Pfn> {
        let is_free = |first, count| {
            self.allocated.ones(first, count) == 0 && self.homes.ones(first, count) == 0
        };
        let is_bare =
            |first, count| is_free(first, count) && self.committed.ones(first, count) == 0;
        let first = self
            .find_home(pages, is_bare)
            .or_else(|| self.find_home(pages, is_free))?;
        self.homes.set_run(first.0, pages, true);
        self.look_at_runs_of(first, pages);
        Some(first)
    }

    /// Makes a home of a whole run for region number `index` of a space of `regions`: one with memory in one
    /// piece, or with none, so that the host can give it in one piece, if there may be memory for it. It is
    /// run number `near` if that is such a run; else one that has its memory; else where there is room for
    /// all of the space, so that the homes of its other regions can lie beside it; else any.
    pub(super) fn make_home_of_folio(
        &mut self,
        near: Option<u64>,
        index: u64,
        regions: u64,
    ) -> Option<Pfn> {
        let has_room = self.room() >= self.folio.pages();
        let runs = self.frames / self.folio.pages();
        let is_bare = |&run: &u64| has_room && self.whole.get(run) && !self.ready.get(run);
        let is_fit = |run: &u64| *run < runs && (self.intact.get(*run) || is_bare(run));
        let are_bare = |&first: &u64| {
            self.whole.ones(first, regions) == regions && self.ready.ones(first, regions) == 0
        };
        let room_for_all = || {
            let firsts = (0..runs.saturating_sub(regions - 1)).step_by(regions as usize);
            firsts.filter(|_| has_room).find(are_bare)
        };
        let can_be_filled = |&run: &u64| self.missing_of(run) <= self.room();
        let run = near
            .filter(is_fit)
            .or_else(|| self.intact.iter().next())
            .or_else(|| Some(room_for_all()? + index))
            .or_else(|| self.whole.iter().find(is_bare))
            .or_else(|| self.whole.iter_common(&self.ready).find(can_be_filled))
            .or_else(|| self.whole.iter().next())?;
        let first = Pfn(run * self.folio.pages());
        self.homes.set_run(first.0, self.folio.pages(), true);
        self.look_at(run);
        Some(first)
    }

    /// Makes a home of the folio's worth of frames from `head` on, all of which the caller has. Says whether
    /// it is not somebody's home already.
    pub(super) fn make_home_at(&mut self, head: Pfn) -> bool {
        let pages = self.folio.pages();
        let is_free = self.homes.ones(head.0, pages) == 0;
        if is_free {
            self.homes.set_run(head.0, pages, true);
            self.look_at_runs_of(head, pages);
        }
        is_free
    }

    fn find_home(&self, pages: u64, fits: impl Fn(u64, u64) -> bool) -> Option<Pfn> {
        let folio = self.folio.pages();
        let step = if pages < folio { 1 } else { folio };
        let (mut first, mut found) = (0, 0);
        for at in (0..self.frames).step_by(step as usize) {
            let next = step.min(pages - found);
            if at + next <= self.frames && fits(at, next) {
                found += next;
            } else {
                (first, found) = (at + step, 0);
            }
            if found == pages {
                return Some(Pfn(first));
            }
        }
        None
    }

    /// The frames of a home are anybody's, as soon as they are free.
    pub(super) fn end_home(&mut self, first: Pfn, pages: u64) {
        self.homes.set_run(first.0, pages, false);
        self.look_at_runs_of(first, pages);
    }

    fn end_transit(&mut self, first: Pfn, count: u64) {
        self.transits -= self.in_transit.ones(first.0, count);
        self.in_transit.set_run(first.0, count, false);
    }

    /// Frames that may still be given memory.
    fn room(&self) -> u64 {
        self.usage.limit - self.usage.committed
    }

    fn no_more(&self) -> Unavailable {
        if self.transits > 0 {
            Unavailable::InTransit
        } else {
            Unavailable::Limit
        }
    }

    /// A free frame outside homes that has memory, or for which there is room.
    fn find_single(&self) -> Option<Pfn> {
        let has_room = self.room() > 0;
        let bare = |runs: &BitSet| has_room.then(|| runs.iter().next()).flatten();
        let run = self
            .partial
            .iter_common(&self.ready)
            .next()
            .or_else(|| bare(&self.partial))
            .or_else(|| self.whole.iter_common(&self.ready).next())
            .or_else(|| bare(&self.whole))?;
        let (first, count) = self.frames_of(run);
        let free = |word| !self.allocated.word(word) & !self.homes.word(word);
        let committed = |word| free(word) & self.committed.word(word);
        let lowest = |of: &dyn Fn(usize) -> u64| {
            words_of(first, count).find_map(|(word, mask)| {
                let bits = of(word) & mask;
                (bits != 0).then(|| Pfn(word as u64 * 64 + u64::from(bits.trailing_zeros())))
            })
        };
        lowest(&committed).or_else(|| lowest(&free))
    }

    /// The first frame of a whole run: of one that has memory, or else for which there is room.
    fn find_folio(&self) -> Option<Pfn> {
        let room = self.room();
        let idle = || self.whole.iter_common(&self.ready);
        let run = idle()
            .find(|&run| self.missing_of(run) == 0)
            .or_else(|| idle().find(|&run| self.missing_of(run) <= room))
            .or_else(|| self.whole.iter().find(|&run| self.missing_of(run) <= room))?;
        Some(Pfn(run * self.folio.pages()))
    }

    /// Frames of a whole run that have no memory.
    fn missing_of(&self, run: u64) -> u64 {
        let pages = self.folio.pages();
        self.committed.zeros(run * pages, pages)
    }

    /// Frames from `pfn` to the end of its run.
    fn rest_of_run(&self, pfn: Pfn) -> u64 {
        let end = self.folio.floor(pfn.0) + self.folio.pages();
        end.min(self.frames) - pfn.0
    }

    /// The first frame of a run, and how many there are: fewer at the end of the pool.
    fn frames_of(&self, run: u64) -> (u64, u64) {
        let first = run * self.folio.pages();
        (first, self.folio.pages().min(self.frames - first))
    }

    fn look_at_runs_of(&mut self, first: Pfn, count: u64) {
        if count > 0 {
            let run_of = |n| self.folio.index(n) as u64;
            (run_of(first.0)..=run_of(first.0 + count - 1)).for_each(|run| self.look_at(run));
        }
    }

    /// Lists a run by what its frames are.
    fn look_at(&mut self, run: u64) {
        let (first, count) = self.frames_of(run);
        let (mut free, mut ready) = (0, 0);
        for (word, mask) in words_of(first, count) {
            let bits = !self.allocated.word(word) & !self.homes.word(word) & mask;
            free += u64::from(bits.count_ones());
            ready |= bits & self.committed.word(word);
        }
        let is_whole = free == self.folio.pages();
        let was_in_stock = self.whole.get(run) && self.ready.get(run);
        self.stock.changed(was_in_stock, is_whole && ready != 0);
        self.whole.set(run, is_whole);
        let is_intact = is_whole && !self.pieces.get(run) && self.missing_of(run) == 0;
        self.intact.set(run, is_intact);
        self.partial.set(run, free > 0 && !is_whole);
        self.ready.set(run, ready != 0);
    }
}
