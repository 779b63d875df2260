//! Random operations with an MMU that refuses some of what it is asked, before it has done anything,
//! half-way, or when all is done.
//!
//! After every operation, whatever was refused:
//! * the MMU of a space that is whole shows what its entries say, and what may be written is exclusive;
//! * each page of it reads as it did, or as the operation was to leave it, and so does each page of each
//!   snapshot, for ever;
//! * a pinned page is the page that its space sees;
//! * a space that is broken says so whatever it is asked. It is dropped then, as a VM is that must not run
//!   on: nobody else notices.
//!
//! In the end each page of each space can be written, which no snapshot notices; and when all is dropped,
//! nothing is left.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::super::soft::{SoftMemory, SoftMmu, SoftVm, soft_pool_of};
use super::super::tests::refusing::{Manner, Refusals, RefusingMmu};
use super::super::tests::right;
use super::super::*;
use super::ops::{Op, Shape, run};
use super::{FRAMES, MACHINES, cases};

struct Space {
    id: u64,
    vm: SoftVm<AnyPolicy>,
    pages: Vec<u64>,
}

struct HeldPin {
    pin: Pin,
    space: u64,
    gfn: Gfn,
    writes: bool,
}

struct World {
    shape: Shape,
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    /// Of all MMUs.
    mmu: Arc<Refusals>,
    spaces: Vec<Space>,
    snapshots: Vec<(Arc<Frozen>, Vec<u64>)>,
    pins: Vec<HeldPin>,
    gets: Vec<Get>,
    next: u64,
    broken: u64,
}

impl World {
    fn new(shape: Shape) -> Self {
        let (pool, memory) = soft_pool_of(shape.huge, FRAMES).unwrap();
        let mut world = Self {
            shape,
            pool,
            memory,
            mmu: Arc::default(),
            spaces: Vec::new(),
            snapshots: Vec::new(),
            pins: Vec::new(),
            gets: Vec::new(),
            next: 1,
            broken: 0,
        };
        world.add_untouched();
        world
    }

    fn mmu(&self) -> (Arc<SoftMmu>, Box<dyn Mmu>) {
        let inner = SoftMmu::new(self.shape.pages);
        let refusing = RefusingMmu {
            inner: Arc::clone(&inner),
            refusals: Arc::clone(&self.mmu),
        };
        (inner, Box::new(refusing))
    }

    fn add_untouched(&mut self) {
        let (inner, mmu) = self.mmu();
        let (pool, pages) = (Arc::clone(&self.pool), self.shape.pages);
        let space = AddressSpace::new(pool, right(), mmu, pages).unwrap();
        self.add(space, inner, vec![0; pages as usize]);
    }

    fn add(&mut self, space: AddressSpace<AnyPolicy>, mmu: Arc<SoftMmu>, pages: Vec<u64>) {
        space.set_whole_price(2);
        space.leave_to_fork(0);
        space.notes_writes();
        let id = self.fresh_value();
        let vm = SoftVm::over(space, mmu, &self.memory);
        self.spaces.push(Space { id, vm, pages });
    }

    fn fresh_value(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn apply(&mut self, op: &Op, (manner, nth, count): (Manner, u64, u64)) {
        self.mmu.refuse(manner, nth, count);
        self.run(op);
        self.mmu.never();
        self.bury_broken();
        self.check();
    }

    fn run(&mut self, op: &Op) {
        let pick = |n: usize, len: usize| (len > 0).then(|| n % len);
        let (spaces, snapshots) = (self.spaces.len(), self.snapshots.len());
        match *op {
            Op::Write(s, p) | Op::WriteCommon(s, p) => {
                let value = match op {
                    Op::WriteCommon(..) => super::COMMON,
                    _ => self.fresh_value(),
                };
                let space = &mut self.spaces[s % spaces];
                if space.vm.cpu_write(Gfn(p), value).is_ok() {
                    space.pages[p as usize] = value;
                }
            }
            Op::WriteOn(s, p) => {
                for page in p..self.shape.pages {
                    let value = self.fresh_value();
                    let space = &mut self.spaces[s % spaces];
                    if space.vm.cpu_write(Gfn(page), value).is_ok() {
                        space.pages[page as usize] = value;
                    }
                }
            }
            Op::ForceWrite(s, p) => {
                let value = self.fresh_value();
                let space = &mut self.spaces[s % spaces];
                let bytes = value.to_le_bytes();
                if space.vm.space.force_write(Gfn(p), 0, &bytes).is_ok() {
                    space.pages[p as usize] = value;
                }
            }
            Op::Unshare(s, p) => drop(self.spaces[s % spaces].vm.space.unshare(Gfn(p))),
            Op::Pin(s, p, access) => self.pin(s % spaces, Gfn(p), 1, access),
            Op::PinRange(s, p, most, access) => {
                self.pin(s % spaces, Gfn(p), most.min(self.shape.pages - p), access);
            }
            Op::Unpin(n) => drop(pick(n, self.pins.len()).map(|n| self.pins.swap_remove(n))),
            Op::DmaWrite(n) => {
                let value = self.fresh_value();
                if let Some(held) = pick(n, self.pins.len()).map(|n| &self.pins[n])
                    && held.writes
                {
                    self.memory.store(held.pin.pfn(), value);
                    let of = |s: &&mut Space| s.id == held.space;
                    if let Some(space) = self.spaces.iter_mut().find(of) {
                        space.pages[held.gfn.0 as usize] = value;
                    }
                }
            }
            Op::Get(s, p, access) => {
                let get = self.spaces[s % spaces].vm.space.get(Gfn(p), access);
                self.gets.extend(get);
            }
            Op::GetFrozen(f, p) => {
                if let Some(f) = pick(f, snapshots) {
                    self.gets.push(self.snapshots[f].0.get(Gfn(p)).unwrap());
                }
            }
            Op::Put(n) => drop(pick(n, self.gets.len()).map(|n| self.gets.swap_remove(n))),
            Op::Fork(s) if snapshots < 6 => {
                let space = &self.spaces[s % spaces];
                let forked = space.vm.space.fork();
                self.snapshots
                    .extend(forked.map(|frozen| (frozen, space.pages.clone())));
            }
            Op::PrepareFork(s) => self.spaces[s % spaces].vm.space.prepare_fork(),
            Op::BreakAhead(s) => while self.spaces[s % spaces].vm.space.break_ahead() {},
            Op::Clone(f) if spaces < MACHINES => {
                if let Some(f) = pick(f, snapshots) {
                    let (inner, mmu) = self.mmu();
                    let (frozen, pages) = &self.snapshots[f];
                    let pages = pages.clone();
                    if let Ok(space) = AddressSpace::from_frozen(frozen, right(), mmu) {
                        self.add(space, inner, pages);
                    }
                }
            }
            Op::Restore(s, f) => {
                if let Some(f) = pick(f, snapshots) {
                    self.restore(s % spaces, f);
                }
            }
            Op::TakeDirty(s) => drop(self.spaces[s % spaces].vm.space.take_dirty()),
            Op::Discard(s, first, count) => {
                let count = count.min(self.shape.pages - first);
                let space = &mut self.spaces[s % spaces];
                if space.vm.space.discard(Gfn(first), count).is_ok() {
                    space.pages[first as usize..(first + count) as usize].fill(0);
                }
            }
            Op::Migrate(s, p) => drop(self.spaces[s % spaces].vm.space.migrate(Gfn(p))),
            Op::Merge(s, p, t, q) => {
                let (one, other) = (&self.spaces[s % spaces], &self.spaces[t % spaces]);
                let _ = one.vm.space.merge(Gfn(p), &other.vm.space, Gfn(q));
            }
            Op::DropSpace(s) if spaces > 1 => {
                let gone = self.spaces.swap_remove(s % spaces);
                self.let_go(gone.id);
            }
            Op::DropFrozen(f) => drop(pick(f, snapshots).map(|f| self.snapshots.swap_remove(f))),
            // What a host writer may do says the model without refusals.
            Op::HostWrite(_) | Op::Fork(_) | Op::Clone(_) | Op::DropSpace(_) => {}
        }
    }

    fn pin(&mut self, s: usize, first: Gfn, count: u64, access: Access) {
        let space = &self.spaces[s];
        let Ok(runs) = space.vm.space.pin_range(first, count, access) else {
            return;
        };
        let pins = runs.into_iter().flat_map(PinnedRun::into_pins);
        let held = pins.zip(first.0..).map(|(pin, page)| HeldPin {
            pin,
            space: space.id,
            gfn: Gfn(page),
            writes: access == Access::Write,
        });
        self.pins.extend(held);
    }

    /// One that fails leaves each page old or new.
    fn restore(&mut self, s: usize, f: usize) {
        let (space, (frozen, pages)) = (&mut self.spaces[s], &self.snapshots[f]);
        let restored = space.vm.space.restore(frozen).is_ok();
        for (page, (ours, &theirs)) in (0..).zip(space.pages.iter_mut().zip(pages)) {
            if restored || space.vm.cpu_read(Gfn(page)) == theirs {
                *ours = theirs;
            }
        }
    }

    /// Devices of a space that is gone have their pins, and nobody sees what they do.
    fn let_go(&mut self, space: u64) {
        self.pins.retain(|held| held.space != space);
    }

    fn bury_broken(&mut self) {
        while let Some(s) = self.spaces.iter().position(|s| s.vm.space.check().is_err()) {
            let Space { id, vm, .. } = self.spaces.swap_remove(s);
            for gfn in (0..self.shape.pages).map(Gfn) {
                assert!(vm.space.write_fault(gfn).is_err());
                // What its vCPUs can write yet is theirs.
                let (pfn, protection) = vm.mmu.page(gfn);
                if protection == Protection::ReadWrite {
                    let state = self.pool.state(pfn);
                    assert!(state.is_exclusive() || state.refs() == 0, "{state:?}");
                    self.memory.store(pfn, u64::MAX);
                }
            }
            assert!(vm.space.fork().is_err());
            self.let_go(id);
            self.broken += 1;
        }
        if self.spaces.is_empty() {
            self.add_untouched();
        }
    }

    fn check(&self) {
        for space in &self.spaces {
            for gfn in (0..self.shape.pages).map(Gfn) {
                let entry = space.vm.space.entry(gfn).unwrap().small();
                let shown = space.vm.mmu.page(gfn);
                assert_eq!(shown, (entry.pfn(), entry.protection()), "{gfn:?}");
                let reads = space.vm.cpu_read(gfn);
                assert_eq!(reads, space.pages[gfn.0 as usize], "{gfn:?}");
                let state = self.pool.state(entry.pfn());
                assert!(!entry.is_writable() || state.is_exclusive(), "{gfn:?}");
            }
        }
        for (frozen, pages) in &self.snapshots {
            for (page, &value) in (0..).zip(pages) {
                let reads = self.memory.load(frozen.frame(Gfn(page)).unwrap());
                assert_eq!(reads, value, "page {page} of a snapshot");
            }
        }
        for held in &self.pins {
            let space = self.spaces.iter().find(|s| s.id == held.space).unwrap();
            let entry = space.vm.space.entry(held.gfn).unwrap().small();
            assert_eq!(
                entry.pfn(),
                held.pin.pfn(),
                "{:?} left its device",
                held.gfn
            );
        }
    }

    /// Nobody is stuck, and nothing was leaked. Says how many spaces were broken.
    fn end(mut self) -> u64 {
        for s in 0..self.spaces.len() {
            for gfn in (0..self.shape.pages).map(Gfn) {
                let value = self.fresh_value();
                let space = &mut self.spaces[s];
                space.vm.cpu_write(gfn, value).unwrap();
                space.pages[gfn.0 as usize] = value;
            }
        }
        self.check();
        let (pool, broken) = (Arc::clone(&self.pool), self.broken);
        drop(self);
        assert_eq!(pool.leftovers(16), []);
        assert_eq!(pool.usage().in_use, 0);
        assert_eq!(pool.charges(), Charges::default());
        broken
    }
}

/// What is refused of an operation: nothing of every other one.
fn refusal() -> impl Strategy<Value = (Manner, u64, u64)> {
    let manner = prop_oneof![
        2 => Just(Manner::Clean),
        1 => Just(Manner::Nothing),
        2 => (1..4u64).prop_map(Manner::AllBut),
        2 => (1..4u64).prop_map(Manner::AllButFirst),
        1 => Just(Manner::All),
    ];
    let count = prop_oneof![4 => Just(0), 3 => Just(1), 1 => Just(2), 1 => Just(9)];
    (manner, 0..4u64, count)
}

#[test]
fn random_operations_under_refusals() {
    let broken = std::cell::Cell::new(0);
    for shape in [Shape::BASE, Shape::HUGE] {
        let mut runner = TestRunner::new(Config {
            cases: cases(5_000),
            failure_persistence: None,
            ..Config::default()
        });
        let refusals = prop::collection::vec(refusal(), 80);
        let result = runner.run(&(run(shape), refusals), |((ops, _), refusals)| {
            let mut world = World::new(shape);
            for (op, refusal) in ops.iter().zip(refusals) {
                world.apply(op, refusal);
            }
            broken.set(broken.get() + world.end());
            Ok(())
        });
        if let Err(error) = result {
            panic!("{shape:?}: {error}");
        }
    }
    assert!(
        broken.get() > 0 || cases(5_000) < 500,
        "no space was ever broken"
    );
}
