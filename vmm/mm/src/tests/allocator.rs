//! The allocator alone, against a plain list of what each frame is.
//!
//! After every step, whatever claims are on their way:
//! * a claim is of frames that were free, of homes or not as was asked;
//! * what was asked for is refused only where there is none, or no room for its memory, and "wait" is said
//!   only while something is in transit;
//! * what is said to be blank has never been used since it got its memory;
//! * the counts are what the list says, and memory never exceeds the limit;
//! * whose account has no room is told so, before anything else; each account is charged with what was claimed
//!   for it and is not free again, and all of them, with those that are closed, with what is in use.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::addr::{Order, Pfn};
use super::super::allocator::{Allocator, Claim, Surplus, Unavailable};
use super::super::ledger::{AccountNumber, Charges};
use super::super::model::cases;

const FOLIO: Order = Order::new(2);
/// Accounts that are open at a time.
const PAYERS: usize = 2;

#[derive(Clone, Debug)]
enum Step {
    /// For which of the accounts.
    Single(usize),
    Folio(usize),
    /// Of which home, from which page on, how many, and how many more for the host's sake.
    Home(usize, usize, u64, u64, u64),
    /// Closes an account, and opens one with so many frames.
    Close(usize, u64),
    SetLimit(usize, u64),
    PrepareSingle,
    PrepareFolios,
    PrepareStock,
    /// What comes of a claim on its way.
    Finish(usize),
    Refuse(usize),
    WithoutAhead(usize),
    Release(usize),
    MakeHome(u64),
    EndHome(usize),
    TakeSurplus,
    TakeUnused,
    GiveBack(usize),
    Keep(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (which, who) = (|| 0..8usize, || 0..PAYERS);
    prop_oneof![
        6 => who().prop_map(Step::Single),
        3 => who().prop_map(Step::Folio),
        4 => (who(), which(), 0..16u64, 1..5u64, 0..12u64)
            .prop_map(|(who, h, i, n, m)| Step::Home(who, h, i, n, m)),
        1 => (who(), 0..80u64).prop_map(|(who, limit)| Step::Close(who, limit)),
        1 => (who(), 0..80u64).prop_map(|(who, limit)| Step::SetLimit(who, limit)),
        1 => Just(Step::PrepareSingle),
        1 => Just(Step::PrepareFolios),
        2 => Just(Step::PrepareStock),
        6 => which().prop_map(Step::Finish),
        2 => which().prop_map(Step::Refuse),
        1 => which().prop_map(Step::WithoutAhead),
        6 => which().prop_map(Step::Release),
        2 => (1..14u64).prop_map(Step::MakeHome),
        1 => which().prop_map(Step::EndHome),
        1 => Just(Step::TakeSurplus),
        1 => Just(Step::TakeUnused),
        2 => which().prop_map(Step::GiveBack),
        1 => which().prop_map(Step::Keep),
    ]
}

/// What a frame is.
#[derive(Clone, Copy, Debug, Default)]
struct Frame {
    is_taken: bool,
    is_in_transit: bool,
    /// Or is about to be, and counts as such.
    is_committed: bool,
    was_used: bool,
    is_home: bool,
    /// Which of all accounts there ever were pays for it.
    payer: Option<usize>,
}

struct Payer {
    number: AccountNumber,
    limit: u64,
    is_open: bool,
}

struct Model {
    allocator: Allocator,
    limit: u64,
    frames: Vec<Frame>,
    /// On their way, and which of their frames had memory before.
    claims: Vec<(Claim, u64, Vec<bool>)>,
    surplus: Vec<Surplus>,
    held: Vec<(u64, u64)>,
    homes: Vec<(u64, u64)>,
    /// The runs whose memory the host was asked for by less than all of it.
    pieces: BTreeSet<u64>,
    payers: Vec<Payer>,
    /// Those that are open.
    open: Vec<usize>,
}

impl Model {
    fn new(frames: u64, limit: u64) -> Self {
        let mut all = vec![Frame::default(); frames as usize];
        all[0].is_taken = true;
        let mut model = Self {
            allocator: Allocator::new(frames, FOLIO, limit),
            limit,
            frames: all,
            claims: vec![],
            surplus: vec![],
            held: vec![],
            homes: vec![],
            pieces: BTreeSet::new(),
            payers: vec![],
            open: vec![],
        };
        (0..PAYERS).for_each(|_| model.open_account(u64::MAX));
        model
    }

    fn open_account(&mut self, limit: u64) {
        let number = self
            .allocator
            .ledger_mut()
            .open((limit != u64::MAX).then_some(limit));
        self.open.push(self.payers.len());
        self.payers.push(Payer {
            number,
            limit,
            is_open: true,
        });
    }

    fn charged(&self, payer: usize) -> u64 {
        let paid = self.frames.iter().filter(|f| f.payer == Some(payer));
        paid.count() as u64
    }

    /// Whether an account may have `count` frames more, and what is said if not.
    fn quota(&self, payer: usize, count: u64) -> Result<(), Unavailable> {
        let limit = self.payers[payer].limit;
        if self.charged(payer).saturating_add(count) > limit {
            return Err(Unavailable::Quota { limit });
        }
        Ok(())
    }

    fn of(&mut self, first: u64, count: u64) -> &mut [Frame] {
        &mut self.frames[first as usize..(first + count) as usize]
    }

    fn committed(&self) -> u64 {
        self.frames.iter().filter(|f| f.is_committed).count() as u64
    }

    fn room(&self) -> u64 {
        self.limit - self.committed()
    }

    fn waits(&self) -> bool {
        self.frames.iter().any(|f| f.is_in_transit)
    }

    /// What may be said of something that cannot be had.
    fn no_more(&self) -> Unavailable {
        if self.waits() {
            Unavailable::InTransit
        } else {
            Unavailable::Limit
        }
    }

    /// Notes a claim of `count` frames for somebody.
    fn claimed(&mut self, claim: Claim, count: u64, is_home: bool, payer: Option<usize>) {
        let (first, total) = (claim.first().0, claim.total());
        let joins = is_home && self.joins(first, count);
        assert!(total >= count && claim.is_huge() == (is_home || count == 0));
        let frames = self.of(first, total);
        let had = frames.iter().map(|f| f.is_committed).collect::<Vec<_>>();
        assert!(
            frames.iter().all(|f| !f.is_taken && f.is_home == is_home),
            "{claim:?}"
        );
        let is_new = |f: &Frame| !f.is_committed || !f.was_used;
        assert!(
            !claim.is_blank() || frames[..count as usize].iter().all(is_new),
            "{claim:?}"
        );
        assert!(
            !had[count as usize..].contains(&true),
            "ahead of what has memory"
        );
        assert_eq!(claim.needs_memory(), had.contains(&false) || joins);
        assert_eq!(claim.is_optional(), !had.contains(&false));
        let waits = claim.needs_memory();
        for frame in frames.iter_mut() {
            frame.was_used &= frame.is_committed;
            (frame.is_taken, frame.is_committed, frame.is_in_transit) = (true, true, waits);
        }
        for frame in &mut frames[..count as usize] {
            (frame.was_used, frame.payer) = (true, payer);
        }
        if waits {
            self.claims.push((claim, count, had));
        } else {
            self.allocator.finish(&claim);
            self.held.push((first, count));
        }
    }

    /// Whether the host is to make one piece of the memory of these frames.
    fn joins(&self, first: u64, count: u64) -> bool {
        first.is_multiple_of(4) && count == 4 && self.pieces.contains(&(first / 4))
    }

    /// The frames of a claim or a surplus that are free again.
    fn free(&mut self, first: u64, count: u64) {
        for frame in self.of(first, count) {
            (frame.is_taken, frame.is_in_transit) = (false, false);
        }
    }

    /// As [`Model::free`], of frames that somebody paid for.
    fn refunded(&mut self, first: u64, count: u64) {
        self.free(first, count);
        self.of(first, count)
            .iter_mut()
            .for_each(|f| f.payer = None);
    }

    fn run(&mut self, step: Step) {
        let pick = |n: usize, len: usize| (len > 0).then(|| n % len);
        match step {
            Step::Close(who, limit) => {
                let payer = self.open.swap_remove(who);
                self.payers[payer].is_open = false;
                let number = self.payers[payer].number;
                // Who asks for frames has the account.
                let finished = |f: &Frame| f.payer != Some(payer) || !f.is_in_transit;
                if self.frames.iter().all(finished) {
                    self.allocator.ledger_mut().close(number);
                    self.open_account(limit);
                } else {
                    self.payers[payer].is_open = true;
                    self.open.push(payer);
                }
            }
            Step::SetLimit(who, limit) => {
                let payer = &mut self.payers[self.open[who]];
                payer.limit = limit;
                let ledger = self.allocator.ledger_mut();
                ledger.set_limit(payer.number, Some(limit));
            }
            Step::Single(who) => match self.claim_single(who) {
                Ok(claim) => self.claimed(claim, 1, false, Some(self.open[who])),
                Err(why @ Unavailable::Quota { .. }) => {
                    assert_eq!(self.quota(self.open[who], 1), Err(why));
                }
                Err(why) => {
                    assert_eq!(self.quota(self.open[who], 1), Ok(()));
                    let is_free = |f: &&Frame| !f.is_taken && !f.is_home;
                    let free = || self.frames.iter().filter(is_free);
                    assert!(!free().any(|f| f.is_committed));
                    assert!(self.room() == 0 || free().count() == 0);
                    assert_eq!(why, self.no_more());
                }
            },
            Step::Folio(who) => match self.claim_folio(who) {
                Ok(claim) => {
                    assert_eq!((claim.first().0 % 4, claim.total()), (0, 4));
                    self.claimed(claim, 4, false, Some(self.open[who]));
                }
                Err(why @ Unavailable::Quota { .. }) => {
                    assert_eq!(self.quota(self.open[who], 4), Err(why));
                }
                Err(why) => {
                    assert_eq!(self.quota(self.open[who], 4), Ok(()));
                    let room = self.room();
                    let could = |run: &[Frame]| {
                        run.iter().all(|f| !f.is_taken && !f.is_home)
                            && run.iter().filter(|f| !f.is_committed).count() as u64 <= room
                    };
                    assert!(!self.frames.chunks_exact(4).any(could));
                    assert_eq!(why, self.no_more());
                }
            },
            Step::Home(who, home, index, count, more) => {
                let Some(home) = pick(home, self.homes.len()).map(|n| self.homes[n]) else {
                    return;
                };
                let index = index % home.1;
                let count = count.min(home.1 - index);
                let most = (count + more).min(home.1 - index);
                let first = home.0 + index;
                let payer = self.open[who];
                let quota = self.quota(payer, count);
                let number = self.payers[payer].number;
                let result = self.allocator.claim_home(number, Pfn(first), count, most);
                let room = self.room();
                let no_more = self.no_more();
                let frames = self.of(first, count);
                let missing = frames.iter().filter(|f| !f.is_committed).count() as u64;
                let expected = if let Err(quota) = quota {
                    Err(quota)
                } else if frames.iter().any(|f| f.is_in_transit) {
                    Err(Unavailable::InTransit)
                } else if frames.iter().any(|f| f.is_taken) {
                    Err(Unavailable::Taken)
                } else if missing > room {
                    Err(no_more)
                } else {
                    Ok(Pfn(first))
                };
                assert_eq!(
                    result.as_ref().map(Claim::first),
                    expected.as_ref().copied()
                );
                if let Ok(claim) = result {
                    assert!(claim.total() <= most);
                    self.claimed(claim, count, true, Some(payer));
                }
            }
            Step::PrepareSingle => {
                if let Some(claim) = self.allocator.prepare_single() {
                    self.prepared(claim);
                }
            }
            Step::PrepareFolios => {
                if let Some(claim) = self
                    .allocator
                    .prepare_folios(super::super::MOST_FOLIOS_AT_ONCE)
                {
                    self.prepared(claim);
                }
            }
            Step::PrepareStock => {
                let spare = (self.limit / 4 * 3).saturating_sub(self.committed());
                if let Some(claim) = self.allocator.prepare_stock() {
                    assert!(claim.needs_memory() && claim.total() <= spare);
                    assert_eq!((claim.first().0 % 4, claim.total() % 4), (0, 0));
                    self.prepared(claim);
                }
            }
            Step::Finish(n) => {
                if let Some(n) = pick(n, self.claims.len()) {
                    let (claim, count, _) = self.claims.swap_remove(n);
                    self.allocator.finish(&claim);
                    let (first, total) = (claim.first().0, claim.total());
                    for run in first / 4..(first + total).div_ceil(4) {
                        let is_all = first <= 4 * run && 4 * run + 4 <= first + total;
                        match claim.is_huge() && is_all {
                            true => self.pieces.remove(&run),
                            false => self.pieces.insert(run),
                        };
                    }
                    self.free(first, total);
                    self.of(first, count)
                        .iter_mut()
                        .for_each(|f| f.is_taken = true);
                    if count > 0 {
                        self.held.push((first, count));
                    }
                }
            }
            Step::Refuse(n) => {
                if let Some(n) = pick(n, self.claims.len()) {
                    let (claim, _, had) = self.claims.swap_remove(n);
                    let (first, total) = (claim.first().0, claim.total());
                    self.allocator.refuse(claim);
                    self.refunded(first, total);
                    for (frame, had) in self.of(first, total).iter_mut().zip(had) {
                        frame.is_committed = had;
                    }
                }
            }
            Step::WithoutAhead(n) => {
                let has_ahead = |n: &usize| self.claims[*n].0.has_ahead();
                if let Some(n) = pick(n, self.claims.len()).filter(has_ahead) {
                    let (claim, count, had) = self.claims.swap_remove(n);
                    let (first, total) = (claim.first().0, claim.total());
                    let claim = self.allocator.without_ahead(claim);
                    assert_eq!((claim.total(), claim.has_ahead()), (count, false));
                    self.free(first + count, total - count);
                    for frame in self.of(first + count, total - count) {
                        frame.is_committed = false;
                    }
                    self.claims.push((claim, count, had));
                }
            }
            Step::Release(n) => {
                if let Some((first, count)) =
                    pick(n, self.held.len()).map(|n| self.held.swap_remove(n))
                {
                    self.allocator.release(Pfn(first), count);
                    self.refunded(first, count);
                }
            }
            Step::MakeHome(pages) => {
                let is_free = |f: &Frame| !f.is_taken && !f.is_home;
                match self.allocator.make_home(pages) {
                    Some(first) => {
                        assert!(pages < 4 || first.0 % 4 == 0);
                        let frames = self.of(first.0, pages);
                        assert!(frames.iter().all(is_free));
                        frames.iter_mut().for_each(|f| f.is_home = true);
                        self.homes.push((first.0, pages));
                    }
                    None => {
                        let step = if pages < 4 { 1 } else { 4 };
                        let windows = self.frames.windows(pages as usize).step_by(step);
                        assert!(!windows.into_iter().any(|w| w.iter().all(is_free)));
                    }
                }
            }
            Step::EndHome(n) => {
                // Who asks for a frame of a home has the home.
                let is_asked_for = |(first, pages): (u64, u64)| {
                    let mut frames = self.frames[first as usize..(first + pages) as usize].iter();
                    frames.any(|f| f.is_in_transit)
                };
                if let Some(n) = pick(n, self.homes.len())
                    && !is_asked_for(self.homes[n])
                {
                    let (first, pages) = self.homes.swap_remove(n);
                    self.allocator.end_home(Pfn(first), pages);
                    self.of(first, pages)
                        .iter_mut()
                        .for_each(|f| f.is_home = false);
                }
            }
            Step::TakeSurplus => {
                for surplus in self.allocator.take_surplus() {
                    assert_eq!((surplus.first.0 % 4, surplus.count % 4), (0, 0));
                    self.taken_back(surplus, false);
                }
            }
            Step::TakeUnused => match self.allocator.take_unused_of_homes() {
                Some(surplus) => self.taken_back(surplus, true),
                None => {
                    let is_unused = |f: &Frame| f.is_home && f.is_committed && !f.is_taken;
                    assert!(!self.frames.iter().any(is_unused));
                }
            },
            Step::GiveBack(n) => {
                if let Some(n) = pick(n, self.surplus.len()) {
                    let surplus = self.surplus.swap_remove(n);
                    let (first, count) = (surplus.first.0, surplus.count);
                    self.allocator.give_back(surplus);
                    self.free(first, count);
                    for frame in self.of(first, count) {
                        frame.is_committed = false;
                    }
                }
            }
            Step::Keep(n) => {
                if let Some(n) = pick(n, self.surplus.len()) {
                    let surplus = self.surplus.swap_remove(n);
                    let (first, count) = (surplus.first.0, surplus.count);
                    self.allocator.keep(surplus);
                    self.free(first, count);
                }
            }
        }
    }

    fn claim_single(&mut self, who: usize) -> Result<Claim, Unavailable> {
        self.allocator
            .claim_single(self.payers[self.open[who]].number)
    }

    fn claim_folio(&mut self, who: usize) -> Result<Claim, Unavailable> {
        self.allocator
            .claim_folio(self.payers[self.open[who]].number)
    }

    /// Memory for nobody.
    fn prepared(&mut self, claim: Claim) {
        if claim.needs_memory() {
            self.claimed(claim, 0, false, None);
        } else {
            assert_eq!(claim.total(), 0);
            self.allocator.finish(&claim);
        }
    }

    fn taken_back(&mut self, surplus: Surplus, is_home: bool) {
        let frames = self.of(surplus.first.0, surplus.count);
        assert!(frames.iter().any(|f| f.is_committed));
        assert!(frames.iter().all(|f| !f.is_taken && f.is_home == is_home));
        for frame in frames {
            (frame.is_taken, frame.is_in_transit) = (true, true);
        }
        self.surplus.push(surplus);
    }

    fn check(&self) {
        let usage = self.allocator.usage();
        let held = self.held.iter().map(|&(_, count)| count).sum::<u64>();
        let on_their_way = self.claims.iter().map(|&(_, count, _)| count).sum::<u64>();
        assert_eq!(usage.in_use, held + on_their_way);
        assert_eq!(usage.committed, self.committed());
        assert!(usage.committed <= self.limit && usage.peak >= held);
        for (n, frame) in (1..).zip(&self.frames[1..]) {
            assert_eq!(self.allocator.is_allocated(Pfn(n)), frame.is_taken, "{n}");
            let is_in_use = frame.is_taken && !frame.is_in_transit;
            assert_eq!(self.allocator.is_in_use(Pfn(n)), is_in_use, "{n}");
            assert_eq!(self.allocator.in_use().get(n), is_in_use, "{n}");
        }
        for run in 0..self.frames.len() as u64 / 4 {
            let is_in_pieces = self.pieces.contains(&run);
            assert_eq!(self.allocator.is_in_pieces(Pfn(4 * run)), is_in_pieces);
        }
        assert!(
            !self.allocator.in_use().get(0),
            "the zero frame is nobody's"
        );
        let mut charges = Charges::default();
        for (n, payer) in self.payers.iter().enumerate() {
            let charged = self.charged(n);
            if payer.is_open {
                charges.open += charged;
                let usage = self.allocator.ledger().usage(payer.number);
                assert_eq!(usage.charged, charged);
                assert_eq!(usage.limit.unwrap_or(u64::MAX), payer.limit);
            } else {
                charges.closed += charged;
            }
        }
        assert_eq!(self.allocator.ledger().charges(), charges);
        assert_eq!(charges.open + charges.closed, usage.in_use);
    }

    /// When everything has come to its end, all that there may be can be had again.
    fn end(mut self) {
        while !self.claims.is_empty() {
            self.run(Step::Finish(0));
        }
        while !self.surplus.is_empty() {
            self.run(Step::GiveBack(0));
        }
        while !self.held.is_empty() {
            self.run(Step::Release(0));
        }
        while !self.homes.is_empty() {
            self.run(Step::EndHome(0));
        }
        self.check();
        let number = self.payers[self.open[0]].number;
        self.allocator.ledger_mut().set_limit(number, None);
        let most = self.limit.min(self.frames.len() as u64 - 1);
        for _ in 0..most {
            let claim = self.claim_single(0).unwrap();
            self.allocator.finish(&claim);
        }
        assert_eq!(self.claim_single(0).err(), Some(Unavailable::Limit));
        assert_eq!(self.allocator.usage().in_use, most);
    }
}

#[test]
fn every_frame_has_one_owner() {
    let config = ProptestConfig {
        cases: cases(2000),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let steps = prop::collection::vec(step(), 1..150);
    proptest!(config, |(frames in 1..70u64, limit in 0..80u64, steps in steps)| {
        let mut model = Model::new(frames, limit);
        for step in steps {
            model.run(step);
            model.check();
        }
        model.end();
    });
}
