//! A window whose host refuses: each system call in turn, at random, and for want of mappings that are really
//! used up.
//!
//! After whatever was refused, **the kernel maps each page as its entry says**, its bytes and those of every
//! snapshot are what they were or were to be, and everything can be done again; or the space is broken and
//! says so.
#![expect(unsafe_code, reason = "uses up the mappings of a process")]

use std::env;
use std::process::Command;
use std::ptr;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

use super::super::maps;
use super::super::refusals::{Done, RefusalPlan, by_plan};
use super::*;
use crate::mm::{ForkError, Frozen, Order, Pin};

/// Two regions and a bit.
const PAGES: u64 = 2 * REGION_PAGES + 5;

struct Scene {
    window: Arc<Window>,
    budget: Arc<MappingBudget>,
    physmap: Arc<PhysMap>,
    pool: Arc<FramePool>,
    space: AddressSpace<Exclusive>,
    /// What the first word of each page is.
    pages: Vec<u64>,
    snapshots: Vec<(Arc<Frozen>, Vec<u64>)>,
    pins: Vec<(Gfn, Pin)>,
    next: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64),
    Unshare(u64),
    Pin(u64),
    Unpin,
    Fork,
    PrepareFork,
    BreakAhead,
    TakeDirty,
    Discard(u64, u64),
    Migrate(u64),
    Merge(u64, u64),
    Restore,
    DropSnapshot,
}

impl Scene {
    fn new() -> Self {
        let frames = 16 * REGION_PAGES;
        let physmap = physmap(frames);
        let bytes = Arc::clone(&physmap) as _;
        let pool = FramePool::with_folios_of(Order::HUGE, bytes, frames, frames).unwrap();
        let budget = Arc::new(MappingBudget::with_limit(1 << 40));
        let window = Window::new(Arc::clone(&physmap), Arc::clone(&budget), PAGES).unwrap();
        let window = Arc::new(window);
        let mmu = Box::new(Arc::clone(&window));
        let space = AddressSpace::new(Arc::clone(&pool), Exclusive, mmu, PAGES).unwrap();
        space.notes_writes();
        space.leave_to_fork(0);
        space.set_whole_price(5);
        Self {
            window,
            budget,
            physmap,
            pool,
            space,
            pages: vec![0; PAGES as usize],
            snapshots: Vec::new(),
            pins: Vec::new(),
            next: 0,
        }
    }

    /// In runs of different kinds, with snapshots.
    fn worn() -> Self {
        let mut scene = Self::new();
        for op in [
            Op::Write(3),
            Op::Write(700),
            Op::Write(1026),
            Op::Fork,
            Op::Write(5),
            Op::Write(6),
            Op::Write(900),
            Op::Migrate(6),
            Op::Fork,
            Op::Write(5),
            Op::Write(9),
            Op::Write(701),
            Op::Discard(7, 1),
            Op::Pin(8),
            Op::Write(1025),
        ] {
            assert!(scene.run(&op), "{op:?}");
        }
        scene
    }

    fn load(&self, pfn: Pfn) -> u64 {
        match pfn {
            Pfn::ZERO => 0,
            pfn => self.physmap.slice(pfn, 0, 8).read_obj(0).unwrap(),
        }
    }

    /// Says whether it was done.
    fn run(&mut self, op: &Op) -> bool {
        let space = &self.space;
        match *op {
            Op::Write(page) => {
                let gfn = Gfn(page);
                let written = space.write_fault(gfn);
                if written.is_ok() {
                    self.next += 1;
                    let slice = self.physmap.slice(space.entry(gfn).unwrap().pfn(), 0, 8);
                    slice.write_obj(self.next, 0).unwrap();
                    self.pages[page as usize] = self.next;
                }
                written.is_ok()
            }
            Op::Unshare(page) => space.unshare(Gfn(page)).is_ok(),
            Op::Pin(page) => space
                .pin(Gfn(page), Access::Write)
                .map(|pin| self.pins.push((Gfn(page), pin)))
                .is_ok(),
            Op::Unpin => {
                self.pins.pop();
                true
            }
            Op::Fork => space
                .fork()
                .map(|frozen| self.snapshots.push((frozen, self.pages.clone())))
                .is_ok(),
            Op::PrepareFork => {
                space.prepare_fork();
                true
            }
            Op::BreakAhead => {
                while space.break_ahead() {}
                true
            }
            Op::TakeDirty => space.take_dirty().is_ok(),
            Op::Discard(first, count) => {
                let discarded = space.discard(Gfn(first), count).is_ok();
                if discarded {
                    let pages = first as usize..(first + count) as usize;
                    self.pages[pages].fill(0);
                }
                discarded
            }
            Op::Migrate(page) => space.migrate(Gfn(page)).is_ok(),
            Op::Merge(page, other) => space.merge(Gfn(page), space, Gfn(other)).is_ok(),
            Op::Restore => {
                let Some((frozen, pages)) = self.snapshots.last() else {
                    return true;
                };
                let restored = space.restore(frozen).is_ok();
                if restored {
                    self.pages.clone_from(pages);
                } else {
                    // Part old, part new.
                    for (page, value) in (0..).zip(&mut self.pages) {
                        *value = match space.entry(Gfn(page)).unwrap().pfn() {
                            Pfn::ZERO => 0,
                            pfn => self.physmap.slice(pfn, 0, 8).read_obj(0).unwrap(),
                        };
                    }
                }
                restored
            }
            Op::DropSnapshot => {
                if !self.snapshots.is_empty() {
                    self.snapshots.remove(0);
                }
                true
            }
        }
    }

    fn is_broken(&self) -> bool {
        self.space.check().is_err()
    }

    /// Of a space that is whole.
    fn check_window(&self) {
        for (page, shown) in (0..).zip(self.window.pages_by_kernel()) {
            let entry = self.space.entry(Gfn(page)).unwrap();
            let rights = if entry.is_writable() {
                Protection::ReadWrite
            } else {
                Protection::ReadOnly
            };
            assert_eq!(shown, Some((entry.pfn(), rights)), "page {page}");
            assert!(!entry.is_writable() || self.pool.state(entry.pfn()).is_exclusive());
            assert_eq!(
                self.load(entry.pfn()),
                self.pages[page as usize],
                "page {page}"
            );
        }
        for (gfn, pin) in &self.pins {
            assert_eq!(self.space.entry(*gfn).unwrap().pfn(), pin.pfn());
        }
    }

    fn check_snapshots(&self) {
        for (frozen, pages) in &self.snapshots {
            for (page, &value) in (0..).zip(pages) {
                let found = frozen.with_frame(Gfn(page), |pfn| self.load(pfn)).unwrap();
                assert_eq!(found, value, "page {page} of a snapshot");
            }
        }
    }

    fn check(&self) {
        if !self.is_broken() {
            self.check_window();
        }
        self.check_snapshots();
    }

    /// Nothing is refused any more: everything can be done, and nothing shows in a snapshot.
    fn go_on(mut self) {
        if !self.is_broken() {
            for op in [
                Op::Fork,
                Op::Write(3),
                Op::Write(5),
                Op::Write(8),
                Op::Write(701),
                Op::Write(1025),
                Op::PrepareFork,
                Op::Restore,
                Op::Write(5),
            ] {
                assert!(self.run(&op), "{op:?}");
                self.check_snapshots();
            }
            self.check_window();
            let start = self.window.host_address();
            let mapped = maps::within(start..start + self.window.len()).unwrap();
            let (kernel, used) = (mapped.len() as u64, self.budget.used());
            assert!(
                (used..=used + 4).contains(&kernel),
                "{used} booked, {kernel} there"
            );
        }
        let (pool, budget) = (Arc::clone(&self.pool), Arc::clone(&self.budget));
        drop(self);
        assert_eq!(pool.leftovers(16), []);
        assert_eq!((pool.usage().in_use, budget.used()), (0, 0));
    }
}

const DONE: [Done; 5] = [
    Done::Nothing,
    Done::FirstPage,
    Done::Half,
    Done::AllButOnePage,
    Done::All,
];

#[test]
fn every_operation_with_each_of_its_system_calls_refused() {
    let ops = [
        Op::Write(5),
        Op::Write(6),
        Op::Write(20),
        Op::Write(600),
        Op::Write(1027),
        Op::Unshare(6),
        Op::Unshare(1028),
        Op::Pin(701),
        Op::Fork,
        Op::PrepareFork,
        Op::BreakAhead,
        Op::TakeDirty,
        Op::Discard(2, 1000),
        Op::Migrate(9),
        Op::Merge(510, 511),
        Op::Restore,
    ];
    let (mut refused, mut broken) = (0, 0);
    for op in ops {
        for done in DONE {
            for count in [1, u64::MAX] {
                for after in 0.. {
                    let mut scene = Scene::worn();
                    let plan = RefusalPlan {
                        after,
                        count,
                        done,
                        calls: 0,
                    };
                    let (_, calls) = by_plan(plan, || scene.run(&op));
                    broken += u64::from(scene.is_broken());
                    scene.check();
                    scene.go_on();
                    if calls <= after {
                        break;
                    }
                    refused += 1;
                }
            }
        }
    }
    assert!(
        refused > 100 && broken > 0,
        "{refused} refused, {broken} broken"
    );
}

fn op() -> impl Strategy<Value = Op> {
    // Few pages, in all regions, that neighbours meet.
    let page = || {
        prop_oneof![
            0..12u64,
            REGION_PAGES - 3..REGION_PAGES + 3,
            2 * REGION_PAGES..PAGES
        ]
    };
    prop_oneof![
        6 => page().prop_map(Op::Write),
        1 => page().prop_map(Op::Unshare),
        2 => page().prop_map(Op::Pin),
        2 => Just(Op::Unpin),
        3 => Just(Op::Fork),
        1 => Just(Op::PrepareFork),
        1 => Just(Op::BreakAhead),
        1 => Just(Op::TakeDirty),
        1 => (page(), 1..600u64).prop_map(|(first, count)| Op::Discard(first, count.min(PAGES - first))),
        2 => page().prop_map(Op::Migrate),
        1 => (page(), page()).prop_map(|(page, other)| Op::Merge(page, other)),
        1 => Just(Op::Restore),
        2 => Just(Op::DropSnapshot),
    ]
}

fn plan() -> impl Strategy<Value = RefusalPlan> {
    let done = prop::sample::select(&DONE[..]);
    // Most operations make few calls.
    (0..8u64, 0..4u64, done).prop_map(|(after, count, done)| RefusalPlan {
        after,
        count,
        done,
        calls: 0,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_with_random_refusals(
        ops in prop::collection::vec((op(), plan()), 1..40)
    ) {
        let mut scene = Scene::new();
        for (op, plan) in ops {
            by_plan(plan, || scene.run(&op));
            scene.check();
            if scene.is_broken() {
                break;
            }
        }
        scene.go_on();
    }
}

/// A huge page that is refused where there are some is one that was not to be had just then; where there is
/// none yet, there are none.
#[test]
fn one_huge_page_that_is_refused_is_not_the_last() {
    if PhysMap::try_huge().is_err() {
        // A host of base pages: the other half of this is all there is to see.
        let physmap = physmap(2 * REGION_PAGES);
        physmap.commit(Pfn(0), REGION_PAGES).unwrap();
        assert!(!physmap.is_huge());
        return;
    }
    // The first call gives the page that a huge one is made of.
    let refuse = RefusalPlan {
        after: 1,
        count: 1,
        done: Done::Nothing,
        calls: 0,
    };
    for given_before in [true, false] {
        let physmap = physmap(2 * REGION_PAGES);
        if given_before {
            physmap.commit(Pfn(0), REGION_PAGES).unwrap();
        }
        let second = Pfn(REGION_PAGES);
        let (committed, calls) = by_plan(refuse, || physmap.commit(second, REGION_PAGES));
        committed.unwrap();
        assert_eq!(calls, 3, "a page, a huge one, and base pages in its place");
        physmap.zero(Pfn(2 * REGION_PAGES - 1));
        assert_eq!(physmap.is_huge(), given_before);
    }
}

/// Set for the process whose mappings are used up.
const CHILD: &str = "PALIMPSEST_TEST_NO_MAPPINGS";

/// The limit is the process's, and its tests are not alone: a process of its own uses them up.
#[test]
fn with_all_mappings_really_used_up_the_window_shows_what_the_entries_say() {
    if env::var_os(CHILD).is_some() {
        return;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--test-threads=1", "--nocapture"])
        .arg("host::tests::refused::in_a_process_without_mappings")
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{output:?}"
    );
}

/// Mappings that are in the way.
struct Crowd {
    base: *mut std::ffi::c_void,
    /// How many pages stick out of the one mapping that it would be; each makes two more.
    pages: usize,
}

impl Crowd {
    fn new() -> Self {
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            let len = 1 << 33;
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), flags)
        };
        Self {
            base: base.unwrap(),
            pages: 0,
        }
    }

    fn protect(&self, page: usize, flags: MprotectFlags) -> bool {
        let (at, len) = ((2 * page + 1) << 12, 1 << 12);
        // SAFETY: a page of its own mapping, which nobody uses.
        unsafe { mprotect(self.base.byte_add(at), len, flags) }.is_ok()
    }

    /// Leaves room for at most `free` mappings, or one more.
    fn fill_but(&mut self, free: usize) {
        while self.protect(self.pages, MprotectFlags::READ) {
            self.pages += 1;
        }
        self.leave(free.div_ceil(2));
    }

    fn leave(&mut self, pages: usize) {
        for _ in 0..pages.min(self.pages) {
            self.pages -= 1;
            assert!(self.protect(self.pages, MprotectFlags::empty()));
        }
    }
}

/// `mprotect` changes two mappings, and has no room to split the third, whose last page is pinned and to stay
/// writable.
fn a_fork_that_the_host_refuses_half_way(crowd: &mut Crowd) {
    let mut scene = Scene::new();
    for op in [Op::Write(0), Op::Migrate(50), Op::Pin(100)] {
        assert!(scene.run(&op));
    }
    crowd.fill_but(0);
    let error = scene.space.fork().unwrap_err();
    let ForkError::WriteProtect(source) = error else {
        panic!("{error}");
    };
    assert!(source.is_torn(), "{source}");
    assert!(!scene.is_broken());
    scene.check();
    crowd.leave(50);
    scene.go_on();
}

#[test]
#[ignore = "uses up the mappings of its process: started by the test above"]
fn in_a_process_without_mappings() {
    if env::var_os(CHILD).is_none() {
        return;
    }
    // First, and so above the windows: who looks for them need not read past it.
    let mut crowd = Crowd::new();
    a_fork_that_the_host_refuses_half_way(&mut crowd);
    let mut refused = 0;
    for free in [0, 2] {
        for op in [
            Op::Fork,
            Op::Write(20),
            Op::Write(601),
            Op::TakeDirty,
            Op::Discard(3, 700),
            Op::Migrate(9),
            Op::Unshare(1028),
            Op::Restore,
        ] {
            let mut scene = Scene::worn();
            // Runs that end in the middle of mappings.
            for op in [Op::Write(12), Op::Migrate(12), Op::Write(14), Op::Pin(16)] {
                assert!(scene.run(&op));
            }
            crowd.fill_but(free);
            refused += u64::from(!scene.run(&op));
            // On the host's word that it was at its limit, nothing is broken.
            assert!(!scene.is_broken(), "{op:?} with {free} free");
            scene.check();
            crowd.leave(50);
            scene.go_on();
        }
    }
    assert!(refused > 2, "{refused} refused");
    // It did use up what there was.
    assert!(crowd.pages > 1000);
}
