//! Random operations over a few address spaces, against a plain map of page contents, under every policy.
//!
//! After **every** operation, whatever the policy:
//! * each page of each live space and each snapshot reads as the model says: what a vCPU writes is seen by
//!   nobody else's;
//! * the counts of every frame are the mappings, pins and holds that are really there;
//! * a writable entry implies an exclusive frame (I1) and a mark; an exclusive frame has one mapping (I2); no
//!   frame that two pages map is writable in either (I7); the MMU shows what the table says;
//! * an answer of `take_dirty` is exactly the pages that were made writable or changed since the last, and
//!   those that were pinned or held at the last; a page that is not in it has the content it had then;
//! * discard, migrate and merge are refused exactly where a pin, a hold or a sharer is in the way.
//!
//! At the end everything is dropped, in random order, and every frame is free, and in nobody's home.
//!
//! Each frame is charged to the account of the space that allocated it, and no account beyond its limit; all
//! accounts together with what is in use (`payers.rs`). Every few operations a census adds up, and says of
//! each space and snapshot what a plain list of their frames says (`census.rs`).
//!
//! All of this holds as well where there is **not memory for everything** (`shortage.rs`), from just enough
//! down to none, with a host that refuses some of it, or with a limit for some accounts: an operation that
//! says so has changed no page. A space whose restore fails is dropped, as it must not run on.
//!
//! How many runs there are in all the tests together is what `PALIMPSEST_CASES` says, else [`CASES`].
//!
//! Beyond that each policy makes its own promises (`promises.rs`):
//!
//! | policy | a pin, or a host writer's hold until the next fork, has the page the guest sees (coherence, I8) | pins and holds see and change their own page only (isolation, I9) |
//! |---|---|---|
//! | `Exclusive` | always | always |
//! | `Seed` | if the frame was exclusive when it was taken; else until COW of the page is next broken | always |
//! | `Refcount` | until the guest writes to the page while it is read-only | always |
//! | `MapcountForcedBreak` | until the page is written while a snapshot or a clone shares it | no |
//! | `Mapcount` | as that; on untouched memory, until it is touched | no |
//!
//! `refusing.rs` has the same operations with an MMU that refuses at random.
//!
//! That a policy does *not* keep what `Exclusive` promises is shown as well: the same operations, held to the
//! promises of `Exclusive`, must fail for every other.

mod census;
mod ops;
mod payers;
mod promises;
mod refusing;
mod shortage;

use std::collections::{BTreeSet, HashMap};
use std::env;
use std::ops::Range;
use std::sync::Arc;

use proptest::strategy::{BoxedStrategy, Just, Strategy, ValueTree};
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use self::ops::{Op, Shape, run};
use self::payers::Payers;
use self::promises::{Broken, Rules};
use self::shortage::{Shortage, quotas, shortage};
use super::soft::{SoftMemory, SoftMmu, SoftVm};
use super::*;

const FRAMES: u64 = 400;
/// Live spaces at a time: clones, and clones of clones.
const MACHINES: usize = 5;
/// Random runs of operations in all tests together, unless `PALIMPSEST_CASES` says otherwise.
const CASES: u32 = 10_000;
const STEPS_BETWEEN_CENSUSES: u64 = 7;
/// A value that many pages have.
const COMMON: u64 = 1;

struct Space {
    id: u64,
    rules: Rules,
    shape: Shape,
    shortage: Shortage,
    vm: SoftVm<AnyPolicy>,
    pages: Vec<u64>,
    /// What `take_dirty` must answer.
    dirty: BTreeSet<u64>,
    /// The contents at its last answer.
    answered: Vec<u64>,
}

struct Snapshot {
    frozen: Arc<Frozen>,
    pages: Vec<u64>,
}

/// A page of a live space, and how it was before the operation.
struct Through {
    space: u64,
    gfn: Gfn,
    before: Option<(Entry, FrameState)>,
    /// Whether the page is still in the frame that is held.
    attached: bool,
}

struct Held<H> {
    handle: H,
    /// Whether its holder writes.
    writes: bool,
    through: Option<Through>,
    may_show: Vec<u64>,
}

impl<H> Held<H> {
    fn is_through(&self, space: u64, gfn: Gfn) -> bool {
        self.through
            .as_ref()
            .is_some_and(|t| (t.space, t.gfn) == (space, gfn))
    }
}

trait Handle {
    fn frame(&self) -> Pfn;
}

impl Handle for Pin {
    fn frame(&self) -> Pfn {
        self.pfn()
    }
}

impl Handle for Get {
    fn frame(&self) -> Pfn {
        self.pfn()
    }
}

/// Who really is there: mappings, pins, holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Holders {
    maps: u64,
    pins: u64,
    gets: u64,
}

impl Holders {
    fn of(state: FrameState) -> Self {
        Self {
            maps: state.maps(),
            pins: state.pins(),
            gets: state.gets(),
        }
    }
}

/// Address spaces under a policy, held to its promises.
struct Model {
    rules: Rules,
    shape: Shape,
    shortage: Shortage,
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    spaces: Vec<Space>,
    snapshots: Vec<Snapshot>,
    pins: Vec<Held<Pin>>,
    gets: Vec<Held<Get>>,
    next: u64,
    steps: u64,
    payers: Payers,
}

impl Model {
    fn new(rules: Rules, shape: Shape, shortage: Shortage) -> Self {
        let (pool, memory) = shortage.pool(shape.huge);
        let mut model = Self {
            rules,
            shape,
            shortage,
            pool,
            memory,
            spaces: vec![],
            snapshots: vec![],
            pins: vec![],
            gets: vec![],
            next: COMMON,
            steps: 0,
            payers: Payers::new(),
        };
        model.add_untouched_space();
        model
    }

    fn add_untouched_space(&mut self) {
        let pages = self.shape.pages;
        let mut vm = SoftVm::new(&self.pool, &self.memory, (self.rules.policy)(), pages).unwrap();
        let (account, shortage) = self.payers.next(&self.pool, self.shortage);
        vm.space = vm.space.with_account(account);
        self.add_space(vm, vec![0; pages as usize], shortage);
    }

    fn fresh_value(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn add_space(&mut self, vm: SoftVm<AnyPolicy>, pages: Vec<u64>, shortage: Shortage) {
        let id = self.fresh_value();
        // So that whole regions are broken, and huge entries formed again.
        vm.space.set_whole_price(2);
        vm.space.leave_to_fork(0);
        vm.space.notes_writes();
        vm.space.note_protected();
        self.spaces.push(Space {
            id,
            rules: self.rules,
            shape: self.shape,
            shortage,
            vm,
            answered: pages.clone(),
            pages,
            dirty: BTreeSet::new(),
        });
    }

    /// Who is in the way of an operation of space `s` on `pages`, whose regions it adopts.
    fn holders(&self, s: usize, pages: Range<u64>) -> HashMap<Pfn, Holders> {
        let regions =
            self.shape.region(pages.start)..=self.shape.region(pages.end.saturating_sub(1));
        self.holders_and(false, |space, page| {
            space == s && regions.contains(&self.shape.region(page))
        })
    }

    /// As [`Model::holders`], with the mappings that spaces keep for their next fork, or without. What a
    /// space has borrowed, and not adopted, is counted once, for the snapshot's region, whoever has that.
    fn holders_and(
        &self,
        kept: bool,
        adopts: impl Fn(usize, u64) -> bool,
    ) -> HashMap<Pfn, Holders> {
        let mut holders = HashMap::<Pfn, Holders>::new();
        // What several snapshots have in common maps once.
        let mut regions = BTreeSet::new();
        for page in (0..self.shape.pages).map(Gfn) {
            for (s, space) in self.spaces.iter().enumerate() {
                let lender = if adopts(s, page.0) || !space.vm.space.is_borrowed(page) {
                    None
                } else {
                    space.vm.space.kept(page)
                };
                if lender.is_none_or(|(region, _)| regions.insert((region, page))) {
                    holders.entry(space.entry(page).pfn()).or_default().maps += 1;
                }
            }
            for snapshot in &self.snapshots {
                let pfn = snapshot.frozen.frame(page).unwrap();
                if regions.insert((snapshot.frozen.holder(page), page)) {
                    holders.entry(pfn).or_default().maps += 1;
                }
            }
        }
        for space in self.spaces.iter().filter(|_| kept) {
            for page in (0..self.shape.pages).map(Gfn) {
                if let Some((region, pfn)) = space.vm.space.kept(page)
                    && regions.insert((region, page))
                {
                    holders.entry(pfn).or_default().maps += 1;
                }
            }
        }
        for pin in &self.pins {
            holders.entry(pin.handle.frame()).or_default().pins += 1;
        }
        for get in &self.gets {
            holders.entry(get.handle.frame()).or_default().gets += 1;
        }
        holders.remove(&Pfn::ZERO);
        holders
    }

    /// Notes that a page of a live space has a new value.
    fn set(&mut self, space: u64, gfn: Gfn, value: u64) {
        if let Some(s) = self.spaces.iter_mut().find(|s| s.id == space) {
            s.pages[gfn.0 as usize] = value;
        }
        self.may_show(space, gfn, value);
    }

    fn may_show(&mut self, space: u64, gfn: Gfn, value: u64) {
        for held in self.gets.iter_mut().filter(|h| h.is_through(space, gfn)) {
            held.may_show.push(value);
        }
        for held in self.pins.iter_mut().filter(|h| h.is_through(space, gfn)) {
            held.may_show.push(value);
        }
    }

    /// A device or a host writer writes into the frame it holds.
    fn write_held(&mut self, frame: Pfn, space: u64, gfn: Gfn, attached: bool) {
        let value = self.fresh_value();
        self.memory.store(frame, value);
        if !self.rules.promises.isolates_holders {
            for space in &mut self.spaces {
                for page in 0..self.shape.pages {
                    if space.entry(Gfn(page)).pfn() == frame {
                        space.pages[page as usize] = value;
                    }
                }
            }
            for snapshot in &mut self.snapshots {
                for page in 0..self.shape.pages {
                    if snapshot.frozen.frame(Gfn(page)).unwrap() == frame {
                        snapshot.pages[page as usize] = value;
                    }
                }
            }
        } else if attached {
            self.set(space, gfn, value);
        } else {
            self.may_show(space, gfn, value);
        }
    }

    fn apply(&mut self, op: &Op) -> Result<(), Broken> {
        self.steps += 1;
        self.look_at_held_pages();
        let spaces = self.spaces.iter();
        let before: HashMap<_, _> = spaces.map(|space| (space.id, space.writable())).collect();
        self.payers.starts(&self.spaces, op);
        self.run(op);
        self.payers.ends(&self.pool);
        for space in &self.spaces {
            if let Some(before) = before.get(&space.id) {
                space.check_protected(before, matches!(op, Op::Restore(..)));
            }
        }
        self.find_lost_pages()
    }

    fn run(&mut self, op: &Op) {
        let pick = |n: usize, len: usize| (len > 0).then(|| n % len);
        let (spaces, snapshots) = (self.spaces.len(), self.snapshots.len());
        match *op {
            Op::Write(s, p) => {
                let value = self.fresh_value();
                self.write(s % spaces, Gfn(p), value);
            }
            Op::WriteCommon(s, p) => self.write(s % spaces, Gfn(p), COMMON),
            Op::WriteOn(s, p) => {
                for page in p..self.shape.pages {
                    let value = self.fresh_value();
                    self.write(s % spaces, Gfn(page), value);
                }
            }
            Op::ForceWrite(s, p) => {
                let value = self.fresh_value();
                let space = &mut self.spaces[s % spaces];
                let bytes = value.to_le_bytes();
                let written = space.vm.space.force_write(Gfn(p), 0, &bytes);
                if space.shortage.result(written).is_none() {
                    return space.note_marks();
                }
                space.dirty.insert(p);
                let id = space.id;
                self.set(id, Gfn(p), value);
            }
            Op::Unshare(s, p) => {
                let space = &self.spaces[s % spaces];
                space.shortage.result(space.vm.space.unshare(Gfn(p)));
            }
            Op::Pin(s, p, access) => {
                let space = &mut self.spaces[s % spaces];
                let pin = space.vm.space.pin(Gfn(p), access);
                let Some(pin) = space.shortage.result(pin) else {
                    return space.note_marks();
                };
                let held = space.held(pin, Gfn(p), access);
                self.pins.push(held);
            }
            Op::PinRange(s, p, most, access) => {
                let space = &mut self.spaces[s % spaces];
                let count = most.min(self.shape.pages - p);
                let runs = space.vm.space.pin_range(Gfn(p), count, access);
                let Some(runs) = space.shortage.result(runs) else {
                    return space.note_marks();
                };
                let pins: Vec<_> = runs.into_iter().flat_map(PinnedRun::into_pins).collect();
                assert_eq!(pins.len() as u64, count);
                for (gfn, pin) in (p..).map(Gfn).zip(pins) {
                    let held = space.held(pin, gfn, access);
                    self.pins.push(held);
                }
            }
            Op::Unpin(n) => drop(pick(n, self.pins.len()).map(|n| self.pins.swap_remove(n))),
            Op::DmaWrite(n) => {
                if let Some(pin) = pick(n, self.pins.len()).map(|n| &self.pins[n])
                    && let Some(t) = pin.through.as_ref().filter(|_| pin.writes)
                {
                    self.write_held(pin.handle.frame(), t.space, t.gfn, t.attached);
                }
            }
            Op::Get(s, p, access) => {
                let space = &mut self.spaces[s % spaces];
                let get = space.vm.space.get(Gfn(p), access);
                let Some(get) = space.shortage.result(get) else {
                    return space.note_marks();
                };
                let held = space.held(get, Gfn(p), access);
                self.gets.push(held);
            }
            Op::GetFrozen(f, p) => {
                if let Some(snapshot) = pick(f, snapshots).map(|f| &self.snapshots[f]) {
                    self.gets.push(Held {
                        handle: snapshot.frozen.get(Gfn(p)).unwrap(),
                        writes: false,
                        through: None,
                        may_show: vec![snapshot.pages[p as usize]],
                    });
                }
            }
            Op::HostWrite(n) => {
                if let Some(get) = pick(n, self.gets.len()).map(|n| &self.gets[n])
                    && let Some(t) = get.through.as_ref().filter(|_| get.writes)
                {
                    let (id, gfn) = (t.space, t.gfn);
                    self.write_held(get.handle.frame(), id, gfn, t.attached);
                }
            }
            Op::Put(n) => drop(pick(n, self.gets.len()).map(|n| self.gets.swap_remove(n))),
            Op::Fork(s) if snapshots < 6 => {
                let space = &self.spaces[s % spaces];
                if let Some(frozen) = space.shortage.result(space.vm.space.fork()) {
                    self.snapshots.push(Snapshot {
                        frozen,
                        pages: space.pages.clone(),
                    });
                }
                let id = space.id;
                self.end_host_writes(|through| through.space == id);
            }
            Op::PrepareFork(s) => self.spaces[s % spaces].vm.space.prepare_fork(),
            Op::BreakAhead(s) => {
                let space = &mut self.spaces[s % spaces];
                while space.vm.space.break_ahead() {}
                // As if the guest had written it, which nobody knows better.
                let writable = |&page: &u64| space.entry(Gfn(page)).is_writable();
                let pages = (0..self.shape.pages).filter(writable).collect::<Vec<_>>();
                space.dirty.extend(pages);
            }
            Op::Clone(f) if spaces < MACHINES => {
                let Some(snapshot) = pick(f, snapshots).map(|f| &self.snapshots[f]) else {
                    return;
                };
                let (account, shortage) = self.payers.next(&self.pool, self.shortage);
                let (mmu, policy) = (SoftMmu::new(self.shape.pages), (self.rules.policy)());
                let clone = AddressSpace::from_frozen_with_account(
                    &snapshot.frozen,
                    policy,
                    Box::new(Arc::clone(&mmu)),
                    account,
                );
                if let Some(space) = shortage.result(clone) {
                    let pages = snapshot.pages.clone();
                    let vm = SoftVm::over(space, mmu, &self.memory);
                    self.add_space(vm, pages, shortage);
                }
            }
            Op::Fork(_) | Op::Clone(_) => {}
            Op::Restore(s, f) => {
                if let Some(f) = pick(f, snapshots) {
                    self.restore(s % spaces, f);
                }
            }
            Op::TakeDirty(s) => self.take_dirty(s % spaces),
            Op::Discard(s, first, count) => self.discard(s % spaces, first, count),
            Op::Migrate(s, p) => self.migrate(s % spaces, Gfn(p)),
            Op::Merge(s, p, t, q) => self.merge((s % spaces, Gfn(p)), (t % spaces, Gfn(q))),
            Op::DropSpace(s) if spaces > 1 => drop(self.spaces.swap_remove(s % spaces)),
            Op::DropSpace(_) => {}
            Op::DropFrozen(f) => drop(pick(f, snapshots).map(|f| self.snapshots.swap_remove(f))),
        }
    }

    fn write(&mut self, s: usize, gfn: Gfn, value: u64) {
        let space = &mut self.spaces[s];
        if space
            .shortage
            .result(space.vm.cpu_write(gfn, value))
            .is_none()
        {
            return space.note_marks();
        }
        space.dirty.insert(gfn.0);
        let id = space.id;
        self.set(id, gfn, value);
    }

    fn restore(&mut self, s: usize, f: usize) {
        let (space, snapshot) = (&mut self.spaces[s], &self.snapshots[f]);
        for gfn in (0..self.shape.pages).map(Gfn) {
            let at = gfn.0 as usize;
            // A region that is known not to have changed is not looked at.
            let may_be_left = self.shape.has_huge() && space.pages[at] == snapshot.pages[at];
            if space.entry(gfn).pfn() != snapshot.frozen.frame(gfn).unwrap() && !may_be_left {
                space.dirty.insert(gfn.0);
            }
        }
        let restored = space.vm.space.restore(&snapshot.frozen);
        let is_whole = space.shortage.result(restored).is_some();
        let (id, pages) = (space.id, snapshot.pages.clone());
        for (page, value) in pages.into_iter().enumerate() {
            self.set(id, Gfn(page as u64), value);
        }
        if !is_whole {
            // Part old, part new: whoever holds a page of it may see either.
            self.spaces.swap_remove(s);
            if self.spaces.is_empty() {
                self.add_untouched_space();
            }
        }
    }

    fn take_dirty(&mut self, s: usize) {
        let holders = self.holders(s, 0..self.shape.pages);
        let space = &mut self.spaces[s];
        let before: Vec<_> = (0..self.shape.pages)
            .map(|p| space.entry(Gfn(p)).pfn())
            .collect();
        let (stats, usage) = (space.vm.space.stats(), self.pool.usage());
        let states: Vec<_> = before.iter().map(|&pfn| self.pool.state(pfn)).collect();

        let answer = space.vm.space.take_dirty().unwrap();

        let answer: BTreeSet<_> = answer.iter().map(|gfn| gfn.0).collect();
        if self.shape.has_huge() {
            // Of what was written before anybody asked, the region.
            assert!(answer.is_superset(&space.dirty), "{answer:?}");
        } else {
            assert_eq!(answer, space.dirty, "exactly what was written");
        }
        for page in 0..self.shape.pages {
            let (at, now) = (page as usize, space.entry(Gfn(page)));
            assert!(
                answer.contains(&page)
                    || space.pages[at] == space.answered[at]
                    || !self.rules.promises.isolates_holders
            );
            assert!(!now.is_writable());
            assert_eq!(
                (now.pfn(), self.pool.state(now.pfn())),
                (before[at], states[at])
            );
        }
        let now = MmStats {
            split: stats.split,
            ..space.vm.space.stats()
        };
        assert_eq!((now, self.pool.usage()), (stats, usage), "no copies");
        space.answered.clone_from(&space.pages);
        space.dirty.retain(|&page| {
            let pfn = before[page as usize];
            holders.get(&pfn).is_some_and(|h| h.pins + h.gets > 0)
        });
    }

    /// `state` is of a frame that `there` hold. Other spaces may keep mappings of it for their next fork
    /// besides.
    fn in_the_way(&self, state: FrameState, there: Holders) {
        let now = Holders::of(state);
        assert_eq!((now.pins, now.gets), (there.pins, there.gets));
        assert!(now.maps == there.maps || now.maps > there.maps && self.shape.has_huge());
    }

    fn discard(&mut self, s: usize, first: u64, count: u64) {
        let holders = self.holders(s, first..first + count);
        let space = &self.spaces[s];
        let range = first..(first + count).min(self.shape.pages);
        let touched: Vec<_> = range
            .clone()
            .filter(|&page| space.entry(Gfn(page)).is_present())
            .collect();
        let pinned = touched.iter().copied().find(|&page| {
            let pfn = space.entry(Gfn(page)).pfn();
            holders[&pfn].pins > 0
        });
        let result = space.vm.space.discard(Gfn(first), count);
        match result {
            Err(RearrangeError::OutOfRange(_)) => assert!(first + count > self.shape.pages),
            Err(RearrangeError::Busy { gfn, state }) => {
                assert_eq!(Some(gfn.0), pinned);
                self.in_the_way(state, holders[&space.entry(gfn).pfn()]);
            }
            Err(error) => panic!("{error}"),
            Ok(discarded) => {
                assert_eq!((pinned, discarded), (None, touched.len() as u64));
                let space = &mut self.spaces[s];
                space.dirty.extend(&touched);
                let id = space.id;
                for page in touched {
                    assert_eq!(self.spaces[s].entry(Gfn(page)).pfn(), Pfn::ZERO);
                    self.set(id, Gfn(page), 0);
                }
                self.end_host_writes(|t| t.space == id && range.contains(&t.gfn.0));
            }
        }
    }

    fn migrate(&mut self, s: usize, gfn: Gfn) {
        let (holders, space) = (self.holders(s, gfn.0..gfn.0 + 1), &self.spaces[s]);
        let before = space.entry(gfn);
        let result = space.vm.space.migrate(gfn);
        let after = space.entry(gfn);
        if !before.is_present() {
            assert_eq!((result.unwrap(), after), (Pfn::ZERO, before));
            return;
        }
        let there = holders[&before.pfn()];
        let alone = Holders {
            maps: 1,
            ..Holders::default()
        };
        match result {
            Ok(pfn) => {
                assert_eq!(there, alone);
                assert!(pfn != before.pfn() && self.pool.state(pfn).is_exclusive());
                assert_eq!(after, before.in_frame(pfn));
            }
            Err(RearrangeError::Busy { gfn: busy, state }) => {
                assert_eq!((busy, after), (gfn, before));
                self.in_the_way(state, there);
                assert_ne!(there, alone);
            }
            Err(error) => {
                assert_eq!(after, before);
                space.shortage.result(Err::<(), _>(error));
            }
        }
    }

    fn merge(&mut self, (s, gfn): (usize, Gfn), (t, other_gfn): (usize, Gfn)) {
        let (holders, one, other) = (
            self.holders(s, 0..self.shape.pages),
            &self.spaces[s],
            &self.spaces[t],
        );
        let entries = || (one.entry(gfn), other.entry(other_gfn));
        let before = entries();
        let (kept, freed) = (before.0.pfn(), before.1.pfn());
        let is_equal = one.pages[gfn.0 as usize] == other.pages[other_gfn.0 as usize];
        let is_idle = |pfn| holders[&pfn].pins == 0 && holders[&pfn].gets == 0;
        let result = one.vm.space.merge(gfn, &other.vm.space, other_gfn);
        match result {
            Ok(()) => {
                assert!(kept != Pfn::ZERO && freed != Pfn::ZERO && is_equal);
                if kept == freed {
                    assert_eq!(entries(), before);
                } else {
                    assert!(is_idle(kept) && is_idle(freed));
                    let merged = before.1.write_protected().in_frame(kept);
                    assert_eq!(entries(), (before.0.write_protected(), merged));
                    assert!(!self.pool.state(kept).is_exclusive());
                }
                return;
            }
            Err(RearrangeError::Untouched { gfn: untouched }) => {
                assert_eq!(untouched, if kept == Pfn::ZERO { gfn } else { other_gfn })
            }
            Err(RearrangeError::Different { .. }) => assert!(!is_equal && kept != freed),
            Err(RearrangeError::Busy { gfn: busy, state }) => {
                assert!(is_equal && kept != freed);
                let (page, pfn) = if is_idle(kept) {
                    (other_gfn, freed)
                } else {
                    (gfn, kept)
                };
                assert!(busy == page && !is_idle(pfn));
                assert_eq!(
                    (state.pins(), state.gets()),
                    (holders[&pfn].pins, holders[&pfn].gets)
                );
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(entries(), before);
    }

    /// What host writers write from now on is theirs alone, or a snapshot's too: the hold no longer promises
    /// anything.
    fn end_host_writes(&mut self, over: impl Fn(&Through) -> bool) {
        for get in &mut self.gets {
            if get.through.as_ref().is_some_and(&over) {
                get.writes = false;
            }
        }
    }

    fn look_at_held_pages(&mut self) {
        let (spaces, pool) = (&self.spaces, &self.pool);
        let pins = self.pins.iter_mut().filter_map(|h| h.through.as_mut());
        let gets = self.gets.iter_mut().filter_map(|h| h.through.as_mut());
        for through in pins.chain(gets) {
            through.before = spaces.iter().find(|s| s.id == through.space).map(|s| {
                let entry = s.entry(through.gfn);
                (entry, pool.state(entry.pfn()))
            });
        }
    }

    /// A page that left a frame which a device or a host writer holds.
    fn find_lost_pages(&mut self) -> Result<(), Broken> {
        let spaces = &self.spaces;
        let pins = self
            .pins
            .iter_mut()
            .map(|h| (h.handle.frame(), h.through.as_mut()));
        let gets = self.gets.iter_mut().filter(|h| h.writes);
        let gets = gets.map(|h| (h.handle.frame(), h.through.as_mut()));
        for (frame, through) in pins.chain(gets) {
            let Some(t) = through.filter(|t| t.attached) else {
                continue;
            };
            let space = spaces.iter().find(|s| s.id == t.space);
            let Some(space) = space else {
                t.attached = false;
                continue;
            };
            if space.entry(t.gfn).pfn() != frame {
                t.attached = false;
                if !t
                    .before
                    .is_some_and(|(entry, state)| (self.rules.promises.may_lose)(entry, state))
                {
                    return Err(Broken::Coherence(format!("{:?} lost {frame:?}", t.gfn)));
                }
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Broken> {
        let holders = self.holders_and(true, |_, _| false);
        let mut writable = HashMap::<Pfn, u64>::new();
        for space in &self.spaces {
            for gfn in (0..self.shape.pages).map(Gfn) {
                let (reads, expected) = (space.vm.cpu_read(gfn), space.pages[gfn.0 as usize]);
                if reads != expected {
                    let page = format!("{gfn:?} of space {}: {reads}, not {expected}", space.id);
                    return Err(Broken::Isolation(page));
                }
                let entry = space.entry(gfn);
                assert_eq!(
                    space.vm.mmu.page(gfn),
                    (entry.pfn(), entry.protection()),
                    "the MMU mirrors"
                );
                let (is_dirty, must) = (entry.is_dirty(), space.dirty.contains(&gfn.0));
                assert!(
                    is_dirty == must || is_dirty && self.shape.has_huge(),
                    "{gfn:?}"
                );
                if entry.is_writable() {
                    *writable.entry(entry.pfn()).or_default() += 1;
                    assert!(self.pool.state(entry.pfn()).is_exclusive(), "I1: {entry:?}");
                }
            }
        }
        for snapshot in &self.snapshots {
            for page in 0..self.shape.pages {
                let reads = self.memory.load(snapshot.frozen.frame(Gfn(page)).unwrap());
                let expected = snapshot.pages[page as usize];
                if reads != expected {
                    let page = format!("page {page} of a snapshot: {reads}, not {expected}");
                    return Err(Broken::Isolation(page));
                }
            }
        }
        for pfn in (0..FRAMES).map(Pfn) {
            let state = self.pool.state(pfn);
            let there = holders.get(&pfn).copied().unwrap_or_default();
            assert_eq!(Holders::of(state), there, "{pfn:?}");
            if state.is_exclusive() {
                assert_eq!(there.maps, 1, "I2: {pfn:?}");
            }
            if writable.contains_key(&pfn) {
                assert_eq!(there.maps, 1, "I7: {pfn:?}");
            }
        }
        self.payers.add_up(&self.pool, &self.spaces);
        if self.steps.is_multiple_of(STEPS_BETWEEN_CENSUSES) {
            census::check(
                &self.pool,
                (&self.spaces, &self.snapshots),
                (&self.pins, &self.gets),
                self.steps as usize,
            );
        }
        self.check_holds()
    }

    fn check_holds(&self) -> Result<(), Broken> {
        for pin in &self.pins {
            let Some(t) = pin.through.as_ref().filter(|t| t.attached) else {
                continue;
            };
            let space = self.spaces.iter().find(|s| s.id == t.space);
            let (entry, frame) = (space.unwrap().entry(t.gfn), pin.handle.frame());
            // A device that writes may have written just now.
            assert!(!pin.writes || entry.is_dirty(), "{:?}: missed", t.gfn);
            let state = self.pool.state(frame);
            assert!(
                !(self.rules.policy)().goes_by_the_bit() || state.is_exclusive(),
                "I3: {frame:?}"
            );
        }
        if !self.rules.promises.isolates_holders {
            return Ok(());
        }
        let pins = self.pins.iter().map(|h| (h.handle.frame(), &h.may_show));
        let gets = self.gets.iter().map(|h| (h.handle.frame(), &h.may_show));
        for (frame, may_show) in pins.chain(gets) {
            let now = self.memory.load(frame);
            if !may_show.contains(&now) {
                let hold = format!("a hold on {frame:?} shows {now}, none of {may_show:?}");
                return Err(Broken::Isolation(hold));
            }
        }
        Ok(())
    }

    fn drop_all(mut self, order: &[u8]) {
        for n in order.iter().map(|&n| usize::from(n)) {
            match n % 4 {
                0 if !self.pins.is_empty() => drop(self.pins.swap_remove(n % self.pins.len())),
                1 if !self.gets.is_empty() => drop(self.gets.swap_remove(n % self.gets.len())),
                2 if !self.snapshots.is_empty() => {
                    drop(self.snapshots.swap_remove(n % self.snapshots.len()));
                }
                3 if !self.spaces.is_empty() => {
                    drop(self.spaces.swap_remove(n % self.spaces.len()));
                }
                _ => {}
            }
        }
        let (pool, has_huge) = (Arc::clone(&self.pool), self.shape.has_huge());
        drop(self);
        assert_eq!(pool.leftovers(16), []);
        assert_eq!(pool.usage().in_use, 0);
        assert_eq!(pool.charges(), Charges::default());
        // The zero frame is nobody's, and long homes begin with a folio.
        let first = if has_huge { pool.huge().pages() } else { 1 };
        assert!(pool.reserve(FRAMES - first).is_ok(), "a home is left");
    }
}

impl Space {
    /// What is said of a page, by whatever entry.
    fn entry(&self, gfn: Gfn) -> Entry {
        debug_assert!(gfn.0 < self.shape.pages);
        self.vm.space.entry(gfn).unwrap().small()
    }

    /// Its pages: what each reads, and whether vCPUs may write it.
    fn writable(&self) -> Vec<(u64, bool)> {
        let pages = (0..self.shape.pages).map(Gfn);
        pages
            .map(|gfn| (self.vm.cpu_read(gfn), self.entry(gfn).is_writable()))
            .collect()
    }

    /// That what vCPUs may write no more is told, and what a restore has changed.
    fn check_protected(&self, before: &[(u64, bool)], has_restored: bool) {
        let told = self.vm.space.take_protected().unwrap();
        for (gfn, (&(read, was_writable), (reads, is_writable))) in
            (0..).map(Gfn).zip(before.iter().zip(self.writable()))
        {
            let must_be = was_writable || has_restored && read != reads;
            let may_be_missing = is_writable || !self.entry(gfn).is_present();
            assert!(!must_be || may_be_missing || told.contains(gfn), "{gfn:?}");
        }
    }

    /// After an operation that failed: which pages it had marked by then, nobody knows better.
    fn note_marks(&mut self) {
        let is_marked = |&page: &u64| self.entry(Gfn(page)).is_dirty();
        let marked: Vec<_> = (0..self.shape.pages).filter(is_marked).collect();
        self.dirty.extend(marked);
    }

    /// A hold that was just taken through page `gfn`. To be looked up for writing is to be marked.
    fn held<H: Handle>(&mut self, handle: H, gfn: Gfn, access: Access) -> Held<H> {
        if (self.rules.policy)().lookup(access) == Access::Write {
            assert_ne!(handle.frame(), Pfn::ZERO);
            self.dirty.insert(gfn.0);
        }
        Held {
            handle,
            writes: access == Access::Write,
            through: Some(Through {
                space: self.id,
                gfn,
                before: None,
                attached: true,
            }),
            may_show: vec![self.pages[gfn.0 as usize]],
        }
    }
}

/// Runs `ops` under `rules`.
fn follow(rules: Rules, shape: Shape, ops: &[Op], order: &[u8]) -> Result<(), Broken> {
    follow_in(rules, shape, Shortage::NONE, ops, order)
}

/// The same with less memory.
fn follow_in(
    rules: Rules,
    shape: Shape,
    shortage: Shortage,
    ops: &[Op],
    order: &[u8],
) -> Result<(), Broken> {
    let mut model = Model::new(rules, shape, shortage);
    for op in ops {
        model.apply(op)?;
        model.check()?;
    }
    model.drop_all(order);
    Ok(())
}

/// So many of each ten thousand random runs that there are to be.
pub(super) fn cases(of_ten_thousand: u32) -> u32 {
    let all = env::var("PALIMPSEST_CASES").map_or(CASES, |cases| {
        cases.parse().expect("PALIMPSEST_CASES is a number")
    });
    (u64::from(all) * u64::from(of_ten_thousand)).div_ceil(10_000) as u32
}

/// Half of the runs on each shape.
fn random_operations(rules: Rules, of_ten_thousand: u32) {
    random_operations_in(rules, of_ten_thousand, |_| Just(Shortage::NONE).boxed());
}

fn random_operations_in(
    rules: Rules,
    of_ten_thousand: u32,
    shortage: fn(u64) -> BoxedStrategy<Shortage>,
) {
    for shape in [Shape::BASE, Shape::HUGE] {
        let mut runner = TestRunner::new(Config {
            cases: cases(of_ten_thousand / 2),
            failure_persistence: None,
            ..Config::default()
        });
        let runs = (shortage(shape.pages), run(shape));
        let result = runner.run(&runs, |(shortage, (ops, order))| {
            follow_in(rules, shape, shortage, &ops, &order)
                .map_err(|broken| TestCaseError::fail(broken.to_string()))
        });
        if let Err(error) = result {
            panic!("{}, {shape:?}: {error}", (rules.policy)().name());
        }
    }
}

#[test]
fn random_operations_under_exclusive() {
    random_operations(Rules::EXCLUSIVE, 2000);
}

#[test]
fn random_operations_under_a_biased_count() {
    random_operations(Rules::BIASED, 200);
}

#[test]
fn random_operations_under_seed() {
    random_operations(Rules::SEED, 600);
}

#[test]
fn random_operations_under_refcount() {
    random_operations(Rules::REFCOUNT, 600);
}

#[test]
fn random_operations_under_mapcount() {
    random_operations(Rules::MAPCOUNT, 600);
    random_operations(Rules::MAPCOUNT_FORCED_BREAK, 600);
}

#[test]
fn random_operations_where_memory_is_short() {
    random_operations_in(Rules::EXCLUSIVE, 5000, shortage);
}

#[test]
fn random_operations_under_other_policies_where_memory_is_short() {
    random_operations_in(Rules::SEED, 200, shortage);
    random_operations_in(Rules::REFCOUNT, 100, shortage);
    random_operations_in(Rules::MAPCOUNT, 100, shortage);
}

/// A space whose account has no limit never notices that another's has.
#[test]
fn random_operations_at_the_limits_of_accounts() {
    random_operations_in(Rules::EXCLUSIVE, 2000, quotas);
    random_operations_in(Rules::REFCOUNT, 200, quotas);
}

/// Which of the promises of `Exclusive` random operations break: isolation, coherence.
fn broken_promises(rules: Rules, shape: Shape) -> [bool; 2] {
    let mut broken = [false; 2];
    let mut runner = TestRunner::deterministic();
    for _ in 0..100 {
        let (ops, order) = run(shape).new_tree(&mut runner).unwrap().current();
        match follow(rules.as_exclusive(), shape, &ops, &order) {
            Ok(()) => {}
            Err(Broken::Isolation(_)) => broken[0] = true,
            Err(Broken::Coherence(_)) => broken[1] = true,
        }
    }
    broken
}

/// The oracle must be able to fail.
#[test]
fn random_operations_show_what_each_policy_lacks() {
    for shape in [Shape::BASE, Shape::HUGE] {
        let mapcount = broken_promises(Rules::MAPCOUNT, shape);
        assert_eq!(mapcount, [true, true], "mapcount");
        let forced = broken_promises(Rules::MAPCOUNT_FORCED_BREAK, shape);
        assert_eq!(forced, [true, true], "forced break");
        let refcount = broken_promises(Rules::REFCOUNT, shape);
        assert_eq!(refcount, [false, true], "refcount");
        assert_eq!(broken_promises(Rules::SEED, shape), [false, true], "seed");
        let exclusive = broken_promises(Rules::EXCLUSIVE, shape);
        assert_eq!(exclusive, [false, false], "exclusive");
    }
}

/// The shortest way to each broken promise, PROTOCOL.md 8: the policies that take it, and that the right one
/// does not.
#[test]
fn the_shortest_way_to_each_broken_promise() {
    use Access::{Read, Write};
    let is_leak = |result| matches!(result, Err(Broken::Isolation(_)));
    let is_divergence = |result| matches!(result, Err(Broken::Coherence(_)));

    let b1 = [
        Op::Write(0, 0),
        Op::Fork(0),
        Op::GetFrozen(0, 0),
        Op::DropFrozen(0),
        Op::Write(0, 0),
    ];
    assert!(is_leak(follow(
        Rules::MAPCOUNT.as_exclusive(),
        Shape::BASE,
        &b1,
        &[]
    )));
    assert!(is_leak(follow(
        Rules::MAPCOUNT_FORCED_BREAK.as_exclusive(),
        Shape::BASE,
        &b1,
        &[]
    )));
    let d2 = [Op::Pin(0, 0, Write), Op::Fork(0), Op::DmaWrite(0)];
    assert!(is_leak(follow(
        Rules::MAPCOUNT.as_exclusive(),
        Shape::BASE,
        &d2,
        &[]
    )));
    assert!(is_leak(follow(
        Rules::MAPCOUNT_FORCED_BREAK.as_exclusive(),
        Shape::BASE,
        &d2,
        &[]
    )));
    let d1 = [Op::Pin(0, 0, Write), Op::Fork(0), Op::Write(0, 0)];
    assert!(is_divergence(follow(
        Rules::MAPCOUNT.as_exclusive(),
        Shape::BASE,
        &d1,
        &[]
    )));
    assert!(is_divergence(follow(
        Rules::MAPCOUNT_FORCED_BREAK.as_exclusive(),
        Shape::BASE,
        &d1,
        &[]
    )));
    let c1 = [Op::Pin(0, 0, Write), Op::TakeDirty(0), Op::Write(0, 0)];
    assert!(is_divergence(follow(
        Rules::REFCOUNT.as_exclusive(),
        Shape::BASE,
        &c1,
        &[]
    )));
    let e1 = [
        Op::Write(0, 0),
        Op::Fork(0),
        Op::Pin(0, 0, Read),
        Op::Write(0, 0),
    ];
    assert!(is_divergence(follow(
        Rules::SEED.as_exclusive(),
        Shape::BASE,
        &e1,
        &[]
    )));
    for ops in [&b1[..], &d2, &d1, &c1, &e1] {
        follow(Rules::EXCLUSIVE, Shape::BASE, ops, &[]).unwrap();
    }
}

/// A clone's page that had to be copied, since a reader's pin kept it from being shared, is not what the
/// snapshot has.
#[test]
fn what_a_clone_has_of_its_own_is_in_its_forks() {
    let ops = [
        Op::WriteCommon(0, 0),
        Op::Fork(0),
        Op::Pin(0, 0, Access::Read),
        Op::Clone(0),
        Op::ForceWrite(1, 0),
        Op::Fork(1),
    ];
    follow(Rules::REFCOUNT, Shape::HUGE, &ops, &[]).unwrap();
}
