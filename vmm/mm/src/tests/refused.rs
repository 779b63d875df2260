//! Every operation, with each call it makes of the MMU refused in turn: before anything is done, half-way, or
//! when all is done; and whatever it does about that refused as well, once or more.
//!
//! Afterwards
//! * the MMU shows what the entries say, and what may be written is exclusive;
//! * every page reads as it did, or as the operation was to leave it, and so does every snapshot;
//! * every page can be written, which no snapshot notices, neither those there are nor one taken now: nobody
//!   is stuck;
//! * nothing is left when all is dropped.
//!
//! Or the space is broken. Then every operation says so, vCPUs can write to nothing that is not this space's
//! alone, and no frame that they reach is anybody else's.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use super::super::soft::soft_pool_of;
use super::refusing::Manner;
use super::*;

/// Three regions of four pages, and one that is too short for a huge entry.
const PAGES: u64 = 13;
const FRAMES: u64 = 200;

struct Scene {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    vm: SoftVm<AnyPolicy>,
    mmu: Arc<Refusals>,
    /// What each page reads, and what it may read if the operation stops half-way.
    pages: Vec<Vec<u64>>,
    snapshots: Vec<(Arc<Frozen>, Vec<u64>)>,
    clones: Vec<SoftVm<AnyPolicy>>,
    pins: Vec<Pin>,
    next: u64,
}

impl Scene {
    /// Pages that were never touched.
    fn untouched() -> Self {
        let (pool, memory) = soft_pool_of(Order::new(2), FRAMES).unwrap();
        let mmu = Arc::new(Refusals::default());
        let between = |inner| {
            Box::new(RefusingMmu {
                inner,
                refusals: Arc::clone(&mmu),
            }) as _
        };
        let vm = SoftVm::with_mmu(&pool, &memory, right(), PAGES, between).unwrap();
        // Small breaks.
        vm.space.set_whole_price(1000);
        vm.space.leave_to_fork(0);
        vm.space.notes_writes();
        Self {
            pool,
            memory,
            vm,
            mmu,
            pages: vec![vec![0]; PAGES as usize],
            snapshots: Vec::new(),
            clones: Vec::new(),
            pins: Vec::new(),
            next: 0,
        }
    }

    /// Pages that were all written.
    fn written() -> Self {
        let mut scene = Self::untouched();
        scene.write_all();
        scene
    }

    fn write_all(&mut self) {
        (0..PAGES).for_each(|page| assert!(self.write(page)));
    }

    fn write(&mut self, page: u64) -> bool {
        self.next += 1;
        let written = self.vm.cpu_write(Gfn(page), self.next).is_ok();
        if written {
            self.pages[page as usize] = vec![self.next];
        }
        written
    }

    fn fork(&mut self) -> bool {
        let forked = self.vm.space.fork();
        let pages = self.pages.iter().map(|reads| reads[0]).collect();
        forked
            .map(|frozen| self.snapshots.push((frozen, pages)))
            .is_ok()
    }

    fn forked(mut self) -> Self {
        assert!(self.fork());
        self
    }

    /// The last snapshot runs, too: what it shares, writers leave.
    fn cloned(mut self) -> Self {
        let (frozen, _) = self.snapshots.last().unwrap();
        let clone = SoftVm::clone_of(frozen, &self.memory, right()).unwrap();
        self.clones.push(clone);
        self
    }

    /// All but one page of each region was broken by itself, and the pages are in runs of different kinds.
    fn torn_apart(mut self) -> Self {
        for page in [1, 3, 4, 7, 10] {
            assert!(self.write(page));
        }
        self.vm.space.discard(Gfn(2), 1).unwrap();
        self.pages[2] = vec![0];
        self
    }

    fn with(self, change: impl FnOnce(&Self)) -> Self {
        change(&self);
        self
    }

    fn pinned(mut self, page: u64) -> Self {
        let pin = self.vm.space.pin(Gfn(page), Access::Write).unwrap();
        self.pins.push(pin);
        self
    }

    fn is_broken(&self) -> bool {
        self.vm.space.check().is_err()
    }

    fn entry(&self, gfn: Gfn) -> Entry {
        self.vm.space.entry(gfn).unwrap().small()
    }

    fn check_snapshots(&self) {
        for (frozen, pages) in &self.snapshots {
            for (page, &value) in (0..).zip(pages) {
                assert_eq!(self.vm.read_frozen(frozen, Gfn(page)), value, "page {page}");
            }
        }
    }

    /// Who is whole: everything goes on.
    fn check_whole(mut self) {
        for gfn in (0..PAGES).map(Gfn) {
            let entry = self.entry(gfn);
            let shown = self.vm.mmu.page(gfn);
            assert_eq!(shown, (entry.pfn(), entry.protection()), "{gfn:?}");
            if entry.is_writable() {
                assert!(self.pool.state(entry.pfn()).is_exclusive(), "{gfn:?}");
            }
            let reads = self.vm.cpu_read(gfn);
            let may = &self.pages[gfn.0 as usize];
            assert!(may.contains(&reads), "{gfn:?}: {reads}, none of {may:?}");
            self.pages[gfn.0 as usize] = vec![reads];
        }
        self.check_snapshots();
        assert!(self.fork());
        self.write_all();
        self.check_snapshots();
        let pool = Arc::clone(&self.pool);
        drop(self);
        assert_eq!(pool.leftovers(16), []);
        assert_eq!(pool.usage().in_use, 0);
    }

    fn check_broken(self) {
        let space = &self.vm.space;
        assert!(matches!(
            space.check().unwrap_err(),
            MmuError::Broken { .. }
        ));
        // By the MMU, and by the entries.
        let mut shown = HashMap::new();
        for gfn in (0..PAGES).map(Gfn) {
            assert!(matches!(
                space.write_fault(gfn).unwrap_err(),
                FaultError::Mmu(MmuError::Broken { .. })
            ));
            let (pfn, protection) = self.vm.mmu.page(gfn);
            if protection == Protection::ReadWrite {
                assert_eq!(shown.insert(pfn, gfn), None, "{pfn:?} is shown twice");
                let state = self.pool.state(pfn);
                // Exclusive, or nobody's: then it is kept for as long as the MMU shows it.
                assert!(
                    state.is_exclusive() || state.refs() == 0,
                    "{gfn:?}: {state:?}"
                );
                self.memory.store(pfn, 1_000_000);
            }
        }
        assert!(space.fork().is_err());
        assert!(space.unshare(P).is_err() && space.take_dirty().is_err());
        assert!(space.discard(P, 1).is_err() && space.migrate(P).is_err());
        assert!(space.merge(P, space, Q).is_err() && space.force_write(P, 0, &[1]).is_err());
        assert!(space.get(P, Access::Write).is_err() && !space.break_ahead());
        space.prepare_fork();
        if let Some((frozen, _)) = self.snapshots.first() {
            assert!(space.restore(frozen).is_err());
        }
        // Everybody else takes all the frames that are left, and writes to them.
        let (pool, memory) = (Arc::clone(&self.pool), Arc::clone(&self.memory));
        let other = SoftVm::new(&pool, &memory, right(), PAGES).unwrap();
        for gfn in (0..PAGES).map(Gfn) {
            if other.cpu_write(gfn, 7).is_ok() {
                let frame = other.space.entry(gfn).unwrap().small().pfn();
                assert_eq!(shown.get(&frame), None, "{frame:?} is somebody else's");
            }
        }
        self.check_snapshots();
        for clone in &self.clones {
            assert!((0..PAGES).all(|page| clone.cpu_read(Gfn(page)) < 1_000_000));
        }
        drop((self, other));
        assert_eq!(pool.leftovers(16), []);
        assert_eq!(pool.usage().in_use, 0);
    }
}

type Setup = fn() -> Scene;
/// Says whether it was done.
type Operation = fn(&mut Scene) -> bool;

const OPERATIONS: [(&str, Setup, Operation); 31] = [
    ("first touch of a region", Scene::untouched, |s| s.write(5)),
    ("first touch of a page", Scene::untouched, |s| s.write(12)),
    ("first touch by a reader", Scene::untouched, |s| {
        s.vm.space.unshare(Gfn(5)).is_ok() & s.vm.space.unshare(Gfn(12)).is_ok()
    }),
    (
        "write to a region that nobody shares any more",
        || Scene::written().forked().with_no_snapshots(),
        |s| s.write(5),
    ),
    (
        "write to a page that a snapshot shares",
        || Scene::written().forked(),
        |s| s.write(5),
    ),
    (
        "write to a region that a snapshot shares",
        || {
            Scene::written()
                .forked()
                .with(|s| s.vm.space.set_whole_price(0))
        },
        |s| s.write(5),
    ),
    (
        "write to a page that a clone shares",
        || Scene::written().forked().cloned(),
        |s| s.write(5) & s.write(12),
    ),
    (
        "write to a region that a clone shares",
        || {
            let scene = Scene::written().forked().cloned();
            scene.with(|s| s.vm.space.set_whole_price(0))
        },
        |s| s.write(5),
    ),
    (
        "the rest of a region that a snapshot shares",
        || {
            let scene = Scene::written().forked().torn_apart().forked();
            scene.with(|s| s.mmu.crowded.store(1, Ordering::Relaxed))
        },
        |s| s.write(0) & s.write(5) & s.write(9) & s.write(12),
    ),
    (
        "the rest of a region that a clone shares",
        || {
            let scene = Scene::written().forked().torn_apart().forked().cloned();
            scene.with(|s| s.mmu.crowded.store(1, Ordering::Relaxed))
        },
        |s| s.write(0) & s.write(5) & s.write(9) & s.write(12),
    ),
    (
        "the rest of a region in which little was touched",
        || {
            let scene = Scene::written().with(|s| assert!(s.vm.space.discard(P, PAGES).is_ok()));
            scene
                .reading(0)
                .with(|s| s.mmu.crowded.store(1, Ordering::Relaxed))
        },
        |s| s.write(1) & s.write(12),
    ),
    (
        "the rest of a region that only this space has",
        || {
            let scene = Scene::written().forked().torn_apart().with_no_snapshots();
            scene.with(|s| s.vm.space.set_whole_price(1))
        },
        |s| s.write(0) & s.write(5) & s.write(9),
    ),
    (
        "a move page by page, and with the rest",
        || {
            let scene = Scene::written().forked().cloned();
            scene.with(|s| s.vm.space.set_whole_price(5))
        },
        |s| s.write(5) & s.write(7) & s.write(6),
    ),
    (
        "the rest of a region that others have left in part",
        || {
            let scene = Scene::written().forked().cloned().with_no_snapshots();
            for page in [5, 6] {
                scene.clones[0].cpu_write(Gfn(page), 1000).unwrap();
            }
            scene.with(|s| s.vm.space.set_whole_price(3))
        },
        |s| s.write(4) & s.write(5) & s.write(7),
    ),
    (
        "a move for a page, which goes on with all of the region in one piece",
        || {
            let scene = Scene::written().forked().cloned();
            // The first page counts as two.
            scene.with(|s| s.vm.space.set_whole_price(2))
        },
        |s| s.write(5) & s.write(9) & s.write(6) & (s.is_broken() || s.vm.space.stats().formed > 0),
    ),
    (
        "a page that was taken over elsewhere comes home",
        || {
            let mut scene = Scene::written().forked().cloned();
            assert!(scene.write(4));
            let mut scene = scene.with_no_snapshots();
            scene.clones[0].cpu_write(Gfn(5), 1000).unwrap();
            assert!(scene.write(5));
            scene.with(|s| s.vm.space.set_whole_price(0))
        },
        |s| s.write(6) & s.write(7),
    ),
    (
        "a clone that takes over what all others have left",
        || {
            let scene = Scene::written().forked().cloned().with_no_snapshots();
            for page in 0..PAGES {
                scene.clones[0].cpu_write(Gfn(page), 1000).unwrap();
            }
            scene.with(|s| s.vm.space.set_whole_price(2))
        },
        |s| s.write(5) & s.write(6) & s.write(12),
    ),
    (
        "unshare of a page that a clone shares",
        || Scene::written().forked().cloned(),
        |s| s.vm.space.unshare(Gfn(5)).is_ok(),
    ),
    (
        "pins",
        || Scene::written().forked().torn_apart(),
        |s| {
            let pins = s.vm.space.pin_range(Gfn(0), PAGES, Access::Write);
            pins.map(|runs| {
                let pins = runs.into_iter().flat_map(PinnedRun::into_pins);
                s.pins.extend(pins);
            })
            .is_ok()
        },
    ),
    (
        "a hold to write through",
        || Scene::written().forked().cloned(),
        |s| s.vm.space.get(Gfn(5), Access::Write).is_ok(),
    ),
    (
        "a debugger's write",
        || Scene::written().forked().cloned(),
        |s| {
            let bytes = 77u64.to_le_bytes();
            let written = s.vm.space.force_write(Gfn(5), 0, &bytes).is_ok();
            if written {
                s.pages[5] = vec![77];
            }
            written
        },
    ),
    ("fork", Scene::written, Scene::fork),
    (
        "fork beside pins",
        || Scene::written().pinned(6).pinned(9),
        Scene::fork,
    ),
    (
        "fork of runs",
        || Scene::written().forked().torn_apart().pinned(4),
        Scene::fork,
    ),
    (
        "fork before the fork",
        || Scene::written().forked().torn_apart(),
        |s| {
            s.vm.space.prepare_fork();
            // It does not say.
            s.fork()
        },
    ),
    (
        "breaks ahead",
        || {
            let mut scene = Scene::written().forked();
            for page in [1, 2, 5, 12] {
                scene.write(page);
            }
            let mut scene = scene.forked();
            for page in [1, 2, 5, 12] {
                scene.write(page);
            }
            scene.forked().cloned()
        },
        |s| {
            while s.vm.space.break_ahead() {}
            s.write(5) && !s.is_broken()
        },
    ),
    (
        "dirty pages",
        || Scene::written().forked().torn_apart(),
        |s| s.vm.space.take_dirty().is_ok() & s.vm.space.take_dirty().is_ok(),
    ),
    (
        "discard",
        || Scene::written().forked().torn_apart(),
        |s| {
            let discarded = s.vm.space.discard(Q, PAGES - 2).is_ok();
            if discarded {
                (1..PAGES as usize - 1).for_each(|page| s.pages[page] = vec![0]);
            }
            discarded
        },
    ),
    ("migration", Scene::written, |s| {
        s.vm.space.migrate(Gfn(5)).is_ok() & s.vm.space.migrate(Gfn(12)).is_ok()
    }),
    (
        "merge",
        || {
            let mut scene = Scene::written();
            for page in [1, 5] {
                scene.vm.cpu_write(Gfn(page), 99).unwrap();
                scene.pages[page as usize] = vec![99];
            }
            scene
        },
        |s| s.vm.space.merge(Gfn(1), &s.vm.space, Gfn(5)).is_ok(),
    ),
    (
        "restore",
        || {
            let mut scene = Scene::written().forked().torn_apart();
            scene.vm.space.unshare(Gfn(9)).unwrap();
            scene.write(12);
            scene.cloned()
        },
        |s| {
            let (frozen, pages) = &s.snapshots[0];
            let restored = s.vm.space.restore(frozen).is_ok();
            for (may, &value) in s.pages.iter_mut().zip(pages) {
                if restored {
                    may.clear();
                }
                may.push(value);
            }
            restored
        },
    ),
];

impl Scene {
    fn with_no_snapshots(mut self) -> Self {
        self.snapshots.clear();
        self
    }

    fn reading(mut self, value: u64) -> Self {
        self.pages.fill(vec![value]);
        self
    }
}

/// What is being tried, said if it goes wrong.
struct Case(&'static str, Manner, u64, u64);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self(name, manner, count, nth) = self;
            eprintln!("{name}, {manner:?}: {count} calls from number {nth} on are refused");
        }
    }
}

const MANNERS: [Manner; 7] = [
    Manner::Clean,
    Manner::Nothing,
    Manner::AllBut(1),
    Manner::AllBut(2),
    Manner::AllButFirst(1),
    Manner::AllButFirst(2),
    Manner::All,
];

/// How many calls in a row are refused.
const IN_A_ROW: [u64; 7] = [1, 2, 3, 4, 5, 9, u64::MAX];

/// Neither undone nor finished for all pages at once, it is for some and for the others.
#[test]
fn what_cannot_be_settled_at_once_is_settled_by_halves() {
    let manners = [
        Manner::Nothing,
        Manner::AllBut(1),
        Manner::AllBut(2),
        Manner::AllButFirst(3),
        Manner::All,
    ];
    for manner in manners {
        for refused in [3, 5, 7] {
            let w = world_of(7, 64);
            let pages = || (0..7).map(Gfn);
            pages().for_each(|gfn| w.vm.cpu_write(gfn, gfn.0).unwrap());
            w.mmu.refuse(manner, 0, refused);
            assert!(w.vm.space.fork().is_err(), "{manner:?}");
            w.mmu.never();
            w.vm.space.check().unwrap();
            for gfn in pages() {
                let entry = w.entry(gfn);
                let shown = (entry.pfn(), entry.protection());
                assert_eq!(w.vm.mmu.page(gfn), shown, "{manner:?} {refused} {gfn:?}");
                w.vm.cpu_write(gfn, gfn.0 + 10).unwrap();
            }
            let frozen = w.vm.space.fork().unwrap();
            pages().for_each(|gfn| assert_eq!(w.vm.read_frozen(&frozen, gfn), gfn.0 + 10));
        }
    }
}

/// That the MMU shows what the entries say.
fn assert_shown(w: &World, why: &str) {
    for gfn in (0..w.vm.space.pages()).map(Gfn) {
        let entry = w.entry(gfn);
        let shown = (entry.pfn(), entry.protection());
        assert_eq!(w.vm.mmu.page(gfn), shown, "{why}: {gfn:?}");
    }
}

/// A run of pages that are to be protected may have some that are read-only already.
#[test]
fn a_fork_that_is_undone_makes_nothing_writable_that_was_not() {
    const REGION: u64 = 4;
    let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
    let mmu = Arc::<Refusals>::default();
    let between = |inner: Arc<SoftMmu>| -> Box<dyn Mmu> {
        Box::new(RefusingMmu {
            inner,
            refusals: Arc::clone(&mmu),
        })
    };
    let vm = SoftVm::with_mmu(&pool, &memory, right(), 3 * REGION, between).unwrap();
    let pages = || (0..3 * REGION).map(Gfn);
    pages().for_each(|gfn| vm.cpu_write(gfn, gfn.0).unwrap());
    drop(vm.space.fork().unwrap());
    vm.space.unshare(Gfn(REGION)).unwrap();
    for gfn in pages().filter(|gfn| gfn.0 / REGION != 1) {
        vm.cpu_write(gfn, gfn.0).unwrap();
    }
    let entry = |gfn| vm.space.entry(gfn).unwrap();
    assert!(entry(Gfn(REGION)).is_huge() && !entry(Gfn(REGION)).is_writable());
    for manner in [Manner::Nothing, Manner::AllBut(2), Manner::All] {
        mmu.refuse(manner, 0, 1);
        assert!(vm.space.fork().is_err());
        assert!(mmu.calls() > 1, "it was undone");
        mmu.never();
        for gfn in pages() {
            let shown = (entry(gfn).pfn(), entry(gfn).protection());
            assert_eq!(vm.mmu.page(gfn), shown, "{manner:?} {gfn:?}");
            assert_eq!(entry(gfn).is_writable(), gfn.0 / REGION != 1);
        }
    }
}

/// A page whose writers were stopped, and cannot be let go on, stays read-only on both sides.
#[test]
fn writers_that_cannot_be_let_go_on_stay_out() {
    for resume in [Manner::Clean, Manner::Nothing, Manner::All] {
        let w = world();
        w.vm.cpu_write(P, 5).unwrap();
        w.mmu.refuse_each(1, &[Manner::Clean, resume]);
        w.vm.space.migrate(P).unwrap_err();
        assert_eq!(w.mmu.calls(), if resume == Manner::Clean { 3 } else { 4 });
        w.mmu.never();
        assert_shown(&w, &format!("{resume:?}"));
        w.vm.cpu_write(P, 6).unwrap();
        assert_eq!(w.vm.cpu_read(P), 6);
    }
}

/// A page that was to become writable may have been written by then: what was begun is finished. One that
/// was to be read-only is put back.
#[test]
fn what_was_mapped_in_part_is_finished_or_put_back() {
    for manner in [Manner::Nothing, Manner::All] {
        let w = world();
        w.mmu.refuse(manner, 0, 1);
        assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::ZeroFilled);
        assert_shown(&w, "finished");
        w.mmu.refuse(manner, 0, 1);
        w.vm.space.pin(Q, Access::Read).unwrap_err();
        assert_eq!((w.mmu.calls(), w.slot(Q)), (2, "ZERO"));
        assert_shown(&w, "put back");
        w.mmu.never();
        w.vm.space.check().unwrap();
    }
}

#[test]
fn pages_are_put_back_by_the_run() {
    let w = world_of(8, 64);
    let written = || (1..6).map(Gfn);
    written().for_each(|gfn| w.vm.cpu_write(gfn, gfn.0).unwrap());
    w.mmu.refuse(Manner::AllBut(2), 0, 1);
    w.vm.space.discard(Gfn(1), 5).unwrap_err();
    assert_eq!(w.mmu.calls(), 2, "asked once, and put back at once");
    assert_shown(&w, "put back");
    written().for_each(|gfn| assert_eq!(w.vm.cpu_read(gfn), gfn.0));
}

/// Who may write for a moment may have written.
#[test]
fn a_page_that_was_writable_for_a_moment_is_marked() {
    for page in [P, Q, Gfn(3)] {
        let w = world();
        w.vm.cpu_write(page, 1).unwrap();
        w.vm.space.take_dirty().unwrap();
        assert!(!w.entry(page).is_dirty() && !w.entry(page).is_writable());
        w.mmu.refuse(Manner::All, 0, 1);
        assert!(w.vm.space.write_fault(page).is_err());
        w.mmu.never();
        assert!(!w.entry(page).is_writable());
        let dirty = w.vm.space.take_dirty().unwrap();
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [page]);
        w.vm.cpu_write(page, 2).unwrap();
    }
}

#[test]
fn whatever_the_mmu_refuses_the_space_is_whole_or_broken() {
    let mut broken = 0;
    for (name, setup, operation) in OPERATIONS {
        let mut refused = 0;
        for manner in MANNERS {
            for count in IN_A_ROW {
                for nth in 0.. {
                    let mut scene = setup();
                    scene.mmu.refuse(manner, nth, count);
                    let done = operation(&mut scene);
                    let calls = scene.mmu.calls();
                    scene.mmu.never();
                    scene.mmu.crowded.store(0, Ordering::Relaxed);
                    let _case = Case(name, manner, count, nth);
                    if scene.is_broken() {
                        assert!(!done && manner != Manner::Clean);
                        broken += 1;
                        scene.check_broken();
                    } else {
                        scene.check_whole();
                    }
                    if nth >= calls {
                        assert!(done, "nothing was refused");
                        break;
                    }
                    refused += 1;
                }
            }
        }
        assert!(refused > 0, "{name} asks nothing of the MMU");
    }
    assert!(broken > 0);
}

/// A region is made writable in several runs, of which the MMU refuses one. The next fork must know which
/// were.
#[test]
fn pages_that_were_made_writable_before_a_refusal_are_protected_by_the_next_fork() {
    for nth in 0..6 {
        let memory = SoftMemory::new(174);
        let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
        let pool = FramePool::with_folios_of(Order::new(3), bytes, 174, 10_000).unwrap();
        let mmu = Arc::new(Refusals::default());
        let vm = SoftVm::with_mmu(&pool, &memory, right(), 8, |inner| {
            Box::new(RefusingMmu {
                inner,
                refusals: Arc::clone(&mmu),
            })
        })
        .unwrap();
        vm.space.notes_writes();
        let bytes = 356u64.to_le_bytes();
        vm.space.force_write(Gfn(7), 0, &bytes).unwrap();
        vm.space.prepare_fork();
        mmu.crowded.store(1, Ordering::Relaxed);
        vm.cpu_write(Gfn(5), 658).unwrap();
        mmu.crowded.store(0, Ordering::Relaxed);
        vm.space.discard(Gfn(1), 1).unwrap();
        let _first = vm.space.fork().unwrap();
        mmu.at(nth);
        let _ = vm.cpu_write(Gfn(5), 701);
        mmu.never();
        let second = vm.space.fork().unwrap();
        (0..8).for_each(|page| vm.cpu_write(Gfn(page), 1000 + page).unwrap());
        let changed = (0..8).filter(|&page| vm.read_frozen(&second, Gfn(page)) >= 1000);
        assert_eq!(changed.count(), 0, "call {nth} refused");
    }
}

/// Room is short all the while: the fault that asks for a whole region, and gets half of it, must say when
/// that broke the space.
#[test]
fn a_fault_does_not_answer_for_a_space_that_it_has_broken() {
    let setup: Setup = || {
        let scene = Scene::written().forked().torn_apart().forked().cloned();
        scene.with(|s| s.mmu.crowded.store(1, Ordering::Relaxed))
    };
    let mut broken = 0;
    for nth in 0..4 {
        let scene = setup();
        scene.mmu.refuse(Manner::AllBut(1), nth, u64::MAX);
        let answer = scene.vm.space.write_fault(Gfn(0));
        assert_eq!(answer.is_err(), nth == 0 || scene.is_broken());
        broken += u64::from(scene.is_broken());
    }
    assert!(broken > 0);
}
