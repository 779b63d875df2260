//! Random operations over a few address spaces, against a plain map of page contents.
//!
//! After **every** operation:
//! * each page of each live space and each snapshot reads as the model says (isolation, I9);
//! * each pin on a live space reads as the page it was taken through (coherence, I8), and its frame is exclusive (I3);
//! * a host reader's hold shows a value its own page had since the hold was taken, no other (I9);
//! * a writable entry implies an exclusive frame (I1); an exclusive frame has one mapping (I2); no
//!   frame that two spaces map is writable in either (I7); the MMU shows what the table says;
//! * the counts of every frame are the mappings, pins and holds that are really there.
//!
//! At the end everything is dropped, in random order, and every frame is free.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::soft::{SoftMemory, SoftVm, soft_pool};
use super::*;

const PAGES: u64 = 3;

#[derive(Clone, Debug)]
enum Op {
    Write(usize, u64),
    Read(usize, u64),
    Unshare(usize, u64),
    Pin(usize, u64, Access),
    Unpin(usize),
    DmaWrite(usize),
    Get(usize, u64),
    GetFrozen(usize, u64),
    Put(usize),
    Fork(usize),
    Clone(usize),
    Restore(usize, usize),
    DropSpace(usize),
    DropFrozen(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let (which, page) = (0..8usize, 0..PAGES);
    let access = prop_oneof![Just(Access::Read), Just(Access::Write)];
    prop_oneof![
        6 => (which.clone(), page.clone()).prop_map(|(s, p)| Op::Write(s, p)),
        1 => (which.clone(), page.clone()).prop_map(|(s, p)| Op::Read(s, p)),
        2 => (which.clone(), page.clone()).prop_map(|(s, p)| Op::Unshare(s, p)),
        4 => (which.clone(), page.clone(), access).prop_map(|(s, p, a)| Op::Pin(s, p, a)),
        3 => which.clone().prop_map(Op::Unpin),
        4 => which.clone().prop_map(Op::DmaWrite),
        2 => (which.clone(), page.clone()).prop_map(|(s, p)| Op::Get(s, p)),
        2 => (which.clone(), page).prop_map(|(s, p)| Op::GetFrozen(s, p)),
        2 => which.clone().prop_map(Op::Put),
        4 => which.clone().prop_map(Op::Fork),
        2 => which.clone().prop_map(Op::Clone),
        2 => (which.clone(), which.clone()).prop_map(|(s, f)| Op::Restore(s, f)),
        1 => which.clone().prop_map(Op::DropSpace),
        3 => which.prop_map(Op::DropFrozen),
    ]
}

struct Space {
    id: u64,
    vm: SoftVm<Exclusive>,
    pages: Vec<u64>,
}

struct Held {
    get: Get,
    /// The live space it was taken through, if it is one, and the page.
    through: Option<(u64, Gfn)>,
    may_show: Vec<u64>,
}

struct Pinned {
    pin: Pin,
    access: Access,
    space: u64,
    gfn: Gfn,
}

struct Model {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    spaces: Vec<Space>,
    frozen: Vec<(Arc<Frozen>, Vec<u64>)>,
    pins: Vec<Pinned>,
    gets: Vec<Held>,
    next: u64,
}

impl Model {
    fn new() -> Self {
        let (pool, memory) = soft_pool(400).unwrap();
        let vm = SoftVm::new(&pool, &memory, Exclusive, PAGES).unwrap();
        let first = Space {
            id: 0,
            vm,
            pages: vec![0; PAGES as usize],
        };
        Self {
            pool,
            memory,
            spaces: vec![first],
            frozen: vec![],
            pins: vec![],
            gets: vec![],
            next: 1,
        }
    }

    fn fresh_value(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Notes that a page of a live space has a new value.
    fn set(&mut self, space: u64, gfn: Gfn, value: u64) {
        if let Some(s) = self.spaces.iter_mut().find(|s| s.id == space) {
            s.pages[gfn.0 as usize] = value;
        }
        for held in &mut self.gets {
            if held.through == Some((space, gfn)) {
                held.may_show.push(value);
            }
        }
    }

    fn apply(&mut self, op: &Op) {
        let pick = |n: usize, len: usize| (len > 0).then(|| n % len);
        match *op {
            Op::Write(s, p) => {
                let Some(s) = pick(s, self.spaces.len()) else {
                    return;
                };
                let (value, gfn, id) = (self.fresh_value(), Gfn(p), self.spaces[s].id);
                self.spaces[s].vm.cpu_write(gfn, value).unwrap();
                self.set(id, gfn, value);
            }
            Op::Read(s, p) => {
                let Some(s) = pick(s, self.spaces.len()) else {
                    return;
                };
                let space = &self.spaces[s];
                assert_eq!(space.vm.cpu_read(Gfn(p)), space.pages[p as usize]);
            }
            Op::Unshare(s, p) => {
                let Some(s) = pick(s, self.spaces.len()) else {
                    return;
                };
                self.spaces[s].vm.space.unshare(Gfn(p)).unwrap();
            }
            Op::Pin(s, p, access) => {
                let Some(s) = pick(s, self.spaces.len()) else {
                    return;
                };
                let pin = self.spaces[s].vm.space.pin(Gfn(p), access).unwrap();
                self.pins.push(Pinned {
                    pin,
                    access,
                    space: self.spaces[s].id,
                    gfn: Gfn(p),
                });
            }
            Op::Unpin(n) => {
                if let Some(n) = pick(n, self.pins.len()) {
                    self.pins.swap_remove(n);
                }
            }
            Op::DmaWrite(n) => {
                let Some(n) = pick(n, self.pins.len()) else {
                    return;
                };
                if self.pins[n].access == Access::Write {
                    let value = self.fresh_value();
                    self.memory.store(self.pins[n].pin.pfn(), value);
                    let (space, gfn) = (self.pins[n].space, self.pins[n].gfn);
                    self.set(space, gfn, value);
                }
            }
            Op::Get(s, p) => {
                let Some(s) = pick(s, self.spaces.len()) else {
                    return;
                };
                let space = &self.spaces[s];
                self.gets.push(Held {
                    get: space.vm.space.get(Gfn(p), Access::Read).unwrap(),
                    through: Some((space.id, Gfn(p))),
                    may_show: vec![space.pages[p as usize]],
                });
            }
            Op::GetFrozen(f, p) => {
                let Some(f) = pick(f, self.frozen.len()) else {
                    return;
                };
                let (frozen, pages) = &self.frozen[f];
                self.gets.push(Held {
                    get: frozen.get(Gfn(p)).unwrap(),
                    through: None,
                    may_show: vec![pages[p as usize]],
                });
            }
            Op::Put(n) => {
                if let Some(n) = pick(n, self.gets.len()) {
                    self.gets.swap_remove(n);
                }
            }
            Op::Fork(s) => {
                let Some(s) = pick(s, self.spaces.len()) else {
                    return;
                };
                if self.frozen.len() < 6 {
                    let space = &self.spaces[s];
                    self.frozen
                        .push((space.vm.space.fork().unwrap(), space.pages.clone()));
                }
            }
            Op::Clone(f) => {
                let Some(f) = pick(f, self.frozen.len()) else {
                    return;
                };
                if self.spaces.len() < 4 {
                    let (frozen, pages) = &self.frozen[f];
                    let vm = SoftVm::clone_of(frozen, &self.memory, Exclusive).unwrap();
                    let pages = pages.clone();
                    let id = self.fresh_value();
                    self.spaces.push(Space { id, vm, pages });
                }
            }
            Op::Restore(s, f) => {
                let (Some(s), Some(f)) = (pick(s, self.spaces.len()), pick(f, self.frozen.len()))
                else {
                    return;
                };
                self.spaces[s].vm.space.restore(&self.frozen[f].0).unwrap();
                let (id, pages) = (self.spaces[s].id, self.frozen[f].1.clone());
                for (p, value) in pages.into_iter().enumerate() {
                    self.set(id, Gfn(p as u64), value);
                }
            }
            Op::DropSpace(s) => {
                if self.spaces.len() > 1 {
                    self.spaces.swap_remove(s % self.spaces.len());
                }
            }
            Op::DropFrozen(f) => {
                if let Some(f) = pick(f, self.frozen.len()) {
                    self.frozen.swap_remove(f);
                }
            }
        }
    }

    fn check(&self) {
        let mut maps = HashMap::<Pfn, u64>::new();
        let mut writable = HashMap::<Pfn, u64>::new();
        for space in &self.spaces {
            for p in 0..PAGES {
                let gfn = Gfn(p);
                assert_eq!(
                    space.vm.cpu_read(gfn),
                    space.pages[p as usize],
                    "I9: space {}",
                    space.id
                );
                let entry = space.vm.space.entry(gfn).unwrap();
                let protection = if entry.is_writable() {
                    Protection::ReadWrite
                } else {
                    Protection::ReadOnly
                };
                assert_eq!(
                    space.vm.mmu.page(gfn),
                    (entry.pfn(), protection),
                    "the MMU mirrors"
                );
                if entry.is_present() {
                    *maps.entry(entry.pfn()).or_default() += 1;
                }
                if entry.is_writable() {
                    *writable.entry(entry.pfn()).or_default() += 1;
                    assert!(self.pool.state(entry.pfn()).is_exclusive(), "I1: {entry:?}");
                }
            }
        }
        for (frozen, pages) in &self.frozen {
            for p in 0..PAGES {
                let pfn = frozen.frame(Gfn(p)).unwrap();
                assert_eq!(self.memory.load(pfn), pages[p as usize], "I9: snapshot");
                if pfn != Pfn::ZERO {
                    *maps.entry(pfn).or_default() += 1;
                }
            }
        }
        for pinned in &self.pins {
            if let Some(space) = self.spaces.iter().find(|s| s.id == pinned.space) {
                let now = self.memory.load(pinned.pin.pfn());
                assert_eq!(now, space.pages[pinned.gfn.0 as usize], "I8");
                assert!(self.pool.state(pinned.pin.pfn()).is_exclusive(), "I3");
            }
        }
        for held in &self.gets {
            let now = self.memory.load(held.get.pfn());
            assert!(
                held.may_show.contains(&now),
                "I9: {now} in {:?}",
                held.may_show
            );
        }
        for pfn in (1..400).map(Pfn) {
            let state = self.pool.state(pfn);
            let pins = self.pins.iter().filter(|p| p.pin.pfn() == pfn).count() as u64;
            let gets = self.gets.iter().filter(|g| g.get.pfn() == pfn).count() as u64;
            let mapped = maps.get(&pfn).copied().unwrap_or(0);
            assert_eq!(
                (state.maps(), state.pins(), state.gets()),
                (mapped, pins, gets),
                "{pfn:?}"
            );
            if state.is_exclusive() {
                assert_eq!(mapped, 1, "I2: {pfn:?}");
            }
            if writable.contains_key(&pfn) {
                assert_eq!(mapped, 1, "I7: {pfn:?}");
            }
        }
    }

    fn drop_all(mut self, order: &[u8]) {
        for n in order.iter().map(|&n| usize::from(n)) {
            match n % 4 {
                0 if !self.pins.is_empty() => drop(self.pins.swap_remove(n % self.pins.len())),
                1 if !self.gets.is_empty() => drop(self.gets.swap_remove(n % self.gets.len())),
                2 if !self.frozen.is_empty() => {
                    drop(self.frozen.swap_remove(n % self.frozen.len()));
                }
                3 if !self.spaces.is_empty() => {
                    drop(self.spaces.swap_remove(n % self.spaces.len()));
                }
                _ => {}
            }
        }
        let Self {
            pool,
            spaces,
            frozen,
            pins,
            gets,
            ..
        } = self;
        drop((spaces, frozen, pins, gets));
        assert_eq!(pool.leftovers(16), []);
        assert_eq!(pool.usage().in_use, 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_follow_the_model(
        ops in prop::collection::vec(op(), 1..80),
        order in prop::collection::vec(any::<u8>(), 40),
    ) {
        let mut model = Model::new();
        for op in &ops {
            model.apply(op);
            model.check();
        }
        model.drop_all(&order);
    }
}
