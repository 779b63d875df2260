//! Memory that is somewhere else still: who has it brought, what of it is seen when, and what if it cannot be.

use super::super::soft::{SoftBacking, soft_pool_of};
use super::folio::{NEXT, REGION};
use super::refusing::Manner;
use super::*;

const REGIONS: u64 = 4;
const PAGES: u64 = REGIONS * REGION;
/// The first page of the region that is zeros, and in no backing.
const ZEROS: Gfn = Gfn(2 * REGION);
/// The first page of the last region, most of which is zeros.
const SPARSE: Gfn = Gfn(3 * REGION);

/// A snapshot that is backed, and what backs it.
struct Outside {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    backing: Arc<SoftBacking>,
    frozen: Arc<Frozen>,
    uses_huge: bool,
}

/// What page `n` holds.
fn word(n: u64) -> u64 {
    match n {
        _ if (ZEROS.0..SPARSE.0).contains(&n) || n > SPARSE.0 => 0,
        n => 100 + n,
    }
}

fn outside(uses_huge: bool) -> Outside {
    outside_of(uses_huge, PAGES, 64)
}

fn outside_of(uses_huge: bool, pages: u64, frames: u64) -> Outside {
    let (pool, memory) = soft_pool_of(Order::new(2), frames).unwrap();
    let words = (0..pages).map(word).collect();
    let backing = SoftBacking::new(&pool, &memory, words);
    let frozen = backing.frozen(&pool, uses_huge);
    Outside {
        pool,
        memory,
        backing,
        frozen,
        uses_huge,
    }
}

impl Outside {
    fn clone_of(&self, frozen: &Frozen) -> SoftVm<AnyPolicy> {
        let clone = SoftVm::clone_of(frozen, &self.memory, right()).unwrap();
        if self.uses_huge {
            clone
        } else {
            clone.with_base_pages()
        }
    }

    /// With an MMU that may be told to refuse.
    fn refusing_clone(&self) -> (SoftVm<AnyPolicy>, Arc<Refusals>) {
        let (inner, refusals) = (SoftMmu::new(PAGES), Arc::new(Refusals::default()));
        let mmu = Box::new(RefusingMmu {
            inner: Arc::clone(&inner),
            refusals: Arc::clone(&refusals),
        });
        let space = AddressSpace::from_frozen(&self.frozen, right(), mmu).unwrap();
        (SoftVm::over(space, inner, &self.memory), refusals)
    }

    fn brought(&self) -> Vec<usize> {
        let brought = self.backing.brought().into_iter();
        brought.map(|(region, _)| region).collect()
    }

    fn read_frozen(&self, frozen: &Frozen, gfn: Gfn) -> u64 {
        frozen.with_frame(gfn, |pfn| self.memory.load(pfn)).unwrap()
    }

    fn settle(self) {
        let Self { pool, frozen, .. } = self;
        drop(frozen);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
        assert_eq!(pool.charges(), Charges::default());
    }
}

#[test]
fn what_nobody_touches_is_never_brought() {
    for uses_huge in [true, false] {
        let w = outside(uses_huge);
        let clone = w.clone_of(&w.frozen);
        for n in 0..PAGES {
            let is_zeros = (ZEROS.0..SPARSE.0).contains(&n);
            assert_eq!(clone.mmu.is_hidden(Gfn(n)), !is_zeros, "page {n}");
            assert_eq!(clone.space.is_hidden(Gfn(n)).unwrap(), !is_zeros);
            assert!(!clone.space.entry(Gfn(n)).unwrap().is_present());
        }
        assert_eq!(clone.space.hidden(), 3);
        let first_hidden = |from| clone.space.first_hidden(from);
        assert_eq!(
            [P, Q, NEXT, ZEROS, Gfn(PAGES)].map(first_hidden),
            [Some(P), Some(P), Some(NEXT), Some(SPARSE), None]
        );
        // Zeros are there.
        assert_eq!(clone.cpu_read(ZEROS), 0);
        assert!(w.frozen.is_untouched(ZEROS).unwrap() && !w.frozen.is_untouched(P).unwrap());
        // None of this looks at what is in it.
        let (its, twin) = (clone.space.fork().unwrap(), w.clone_of(&w.frozen));
        let grandchild = w.clone_of(&its);
        assert!(its.has_in_common(&w.frozen, P).unwrap());
        clone.space.restore(&its).unwrap();
        clone.space.restore(&w.frozen).unwrap();
        assert!(clone.space.take_dirty().unwrap().is_empty());
        clone.space.prepare_fork();
        assert_eq!((w.brought(), w.pool.usage().in_use), (vec![], 0));
        assert_eq!(
            w.frozen.backed_regions().iter().collect::<Vec<_>>(),
            [0, 1, 3]
        );
        drop((clone, its, twin, grandchild));
        w.settle();
    }
}

/// Whoever wants a page has all of its region brought, and everybody finds the same there.
#[test]
fn whatever_wants_a_page_brings_its_region() {
    type Want = fn(&Outside, &SoftVm<AnyPolicy>, Gfn) -> u64;
    let wants: [(Want, Toucher); 8] = [
        (|_, vm, gfn| vm.cpu_read(gfn), Toucher::Vcpu),
        (
            |_, vm, gfn| {
                let before = word(gfn.0);
                vm.cpu_write(gfn, 7).unwrap();
                assert_eq!(vm.cpu_read(gfn), 7);
                vm.cpu_write(gfn, before).unwrap();
                before
            },
            Toucher::Vcpu,
        ),
        (
            |_, vm, gfn| vm.dma_read(&vm.space.pin(gfn, Access::Read).unwrap()),
            Toucher::Host,
        ),
        (
            |_, vm, gfn| vm.dma_read(&vm.space.pin(gfn, Access::Write).unwrap()),
            Toucher::Host,
        ),
        (
            |_, vm, gfn| {
                let runs = vm.space.pin_range(gfn, 1, Access::Read).unwrap();
                assert_eq!(runs[0].count(), 1);
                vm.cpu_read(gfn)
            },
            Toucher::Host,
        ),
        (
            |_, vm, gfn| vm.read_held(&vm.space.get(gfn, Access::Read).unwrap()),
            Toucher::Host,
        ),
        (|w, _, gfn| w.read_frozen(&w.frozen, gfn), Toucher::Reader),
        (
            |w, vm, gfn| vm.read_held(&w.frozen.get(gfn).unwrap()),
            Toucher::Reader,
        ),
    ];
    for uses_huge in [true, false] {
        for (n, (want, toucher)) in wants.into_iter().enumerate() {
            let w = outside(uses_huge);
            let (clone, twin) = (w.clone_of(&w.frozen), w.clone_of(&w.frozen));
            let gfn = Gfn(NEXT.0 + 1);
            assert_eq!(want(&w, &clone, gfn), word(gfn.0), "{n}");
            assert_eq!(w.backing.brought(), [(1, toucher)], "{n}");
            assert!(w.pool.usage().in_use >= REGION);
            // The twin's vCPUs see nothing of it until they touch it, and then it is there.
            assert!(twin.mmu.is_hidden(gfn));
            for n in NEXT.0..ZEROS.0 {
                assert_eq!(twin.cpu_read(Gfn(n)), word(n));
                assert_eq!(clone.cpu_read(Gfn(n)), word(n));
                assert_eq!(w.read_frozen(&w.frozen, Gfn(n)), word(n));
            }
            // A clone that is made now shows it.
            let later = w.clone_of(&w.frozen);
            assert!(!later.mmu.is_hidden(gfn) && later.mmu.is_hidden(P));
            assert_eq!(w.brought(), [1], "{n}");
            drop((clone, twin, later));
            w.settle();
        }
    }
}

/// A page of zeros of what was brought takes no frame, where pages have frames of their own.
#[test]
fn zeros_of_what_is_brought_take_no_frame() {
    let w = outside(false);
    let clone = w.clone_of(&w.frozen);
    assert_eq!(clone.cpu_read(Gfn(SPARSE.0 + 2)), 0);
    assert_eq!(w.pool.usage().in_use, 1);
    assert_eq!(clone.cpu_read(SPARSE), word(SPARSE.0));
    clone.cpu_write(Gfn(SPARSE.0 + 2), 5).unwrap();
    assert_eq!(w.read_frozen(&w.frozen, Gfn(SPARSE.0 + 2)), 0);
    drop(clone);
    w.settle();
}

/// Nobody is left who shares with the clone: what it writes it writes in place.
#[test]
fn the_last_to_have_what_was_brought_copies_nothing() {
    for uses_huge in [true, false] {
        let w = outside(uses_huge);
        let clone = w.clone_of(&w.frozen);
        let Outside { pool, frozen, .. } = w;
        drop(frozen);
        assert_eq!(clone.space.first_hidden(P), Some(P));
        for n in [0, 1, NEXT.0] {
            clone.cpu_write(Gfn(n), 7).unwrap();
        }
        let stats = clone.space.stats();
        assert_eq!(
            (stats.copied, stats.writer_moved, stats.sharers_moved),
            (0, 0, 0)
        );
        assert_eq!(clone.cpu_read(Gfn(2)), word(2));
        assert_eq!(
            (clone.space.hidden(), clone.space.first_hidden(P)),
            (1, Some(SPARSE))
        );
        drop(clone);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
    }
}

/// Each has what it has written, the snapshots what was there, and one copy of the rest is enough for all.
#[test]
fn clones_share_what_one_of_them_has_brought() {
    for uses_huge in [true, false] {
        let w = outside(uses_huge);
        let clones: Vec<_> = (0..5).map(|_| w.clone_of(&w.frozen)).collect();
        for clone in &clones {
            (0..PAGES).for_each(|n| assert_eq!(clone.cpu_read(Gfn(n)), word(n)));
        }
        let shared = w.pool.usage().in_use;
        assert!(shared <= 3 * REGION, "{shared} frames");
        for (own, clone) in (1..).zip(&clones) {
            clone.cpu_write(P, own).unwrap();
        }
        let snapshots: Vec<_> = clones.iter().map(|c| c.space.fork().unwrap()).collect();
        for ((own, clone), snapshot) in (1..).zip(&clones).zip(&snapshots) {
            assert_eq!((clone.cpu_read(P), w.read_frozen(snapshot, P)), (own, own));
            assert_eq!(w.read_frozen(snapshot, Q), word(1));
        }
        assert_eq!(w.read_frozen(&w.frozen, P), word(0));
        assert_eq!(w.brought(), [0, 1, 3]);
        drop((clones, snapshots));
        w.settle();
    }
}

/// The snapshot of a space that has touched little has the rest in common with what it came from: it is all
/// there, whoever comes for it and when.
#[test]
fn a_snapshot_of_what_was_not_brought_is_whole() {
    for uses_huge in [true, false] {
        let w = outside(uses_huge);
        let clone = w.clone_of(&w.frozen);
        clone.cpu_write(P, 7).unwrap();
        let second = clone.space.fork().unwrap();
        clone.cpu_write(NEXT, 8).unwrap();
        drop(clone);
        assert_eq!(w.brought(), [0, 1]);
        assert!(!second.has_in_common(&w.frozen, P).unwrap());
        assert!(second.has_in_common(&w.frozen, NEXT).unwrap());
        assert!(second.has_in_common(&w.frozen, SPARSE).unwrap());
        let Outside {
            pool,
            memory,
            frozen,
            ..
        } = w;
        drop(frozen);
        for n in 0..PAGES {
            let expected = if n == 0 { 7 } else { word(n) };
            let found = second.with_frame(Gfn(n), |pfn| memory.load(pfn)).unwrap();
            assert_eq!(found, expected, "page {n}");
        }
        drop(second);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
    }
}

/// A fork protects runs of pages across regions that are hidden between them: they stay hidden.
#[test]
fn what_is_hidden_between_pages_that_are_protected_stays_hidden() {
    let w = outside(true);
    let clone = w.clone_of(&w.frozen);
    let Outside {
        pool,
        memory,
        frozen,
        backing,
        ..
    } = w;
    drop(frozen);
    clone.cpu_write(P, 7).unwrap();
    clone.cpu_write(SPARSE, 7).unwrap();
    let snapshot = clone.space.fork().unwrap();
    assert!(clone.mmu.is_hidden(NEXT));
    assert_eq!(clone.cpu_read(NEXT), word(NEXT.0));
    assert_eq!(backing.brought().len(), 3);
    let found = snapshot.with_frame(SPARSE, |pfn| memory.load(pfn)).unwrap();
    assert_eq!(found, 7);
    drop((clone, snapshot));
    assert_eq!(pool.leftovers(9), []);
}

/// To go back to what is backed, of another space, it is brought first; if it cannot be, nothing has changed.
#[test]
fn a_restore_brings_what_it_needs_before_it_changes_anything() {
    let w = outside(true);
    let vm = SoftVm::new(&w.pool, &w.memory, right(), PAGES).unwrap();
    (0..PAGES).for_each(|n| vm.cpu_write(Gfn(n), 1).unwrap());
    w.backing.spoil(&[3]);
    let error = vm.space.restore(&w.frozen).unwrap_err();
    assert!(matches!(
        error,
        RestoreError::Fault(FaultError::Bring(BringError::Backing { first: SPARSE, .. }))
    ));
    (0..PAGES).for_each(|n| assert_eq!(vm.cpu_read(Gfn(n)), 1, "page {n}"));
    // What can be is brought before the guest is stopped, and changes nothing yet.
    vm.space.prepare_restore(&w.frozen);
    (0..PAGES).for_each(|n| assert_eq!(vm.cpu_read(Gfn(n)), 1, "page {n}"));
    w.backing.spoil(&[]);
    vm.space.prepare_restore(&w.frozen);
    assert_eq!(w.brought(), [0, 1, 3]);
    vm.space.restore(&w.frozen).unwrap();
    (0..PAGES).for_each(|n| assert_eq!(vm.cpu_read(Gfn(n)), word(n), "page {n}"));
    drop(vm);
    w.settle();
}

/// Nobody sees anything of what is bad; the rest goes on; and if it is mended, it is there.
#[test]
fn what_cannot_be_brought_is_an_error_and_seen_by_nobody() {
    for uses_huge in [true, false] {
        let w = outside(uses_huge);
        let (clone, twin) = (w.clone_of(&w.frozen), w.clone_of(&w.frozen));
        let before = w.pool.usage().in_use;
        w.backing.spoil(&[1]);
        let is_bad = |error: &FaultError| {
            matches!(error, FaultError::Bring(BringError::Backing { first, source })
                if *first == NEXT && source.to_string() == "region 1 is bad")
        };
        let fault = clone.try_cpu_read(NEXT).unwrap_err();
        assert!(is_bad(&fault), "{fault}");
        let fault = clone.cpu_write(NEXT, 1).unwrap_err();
        assert!(is_bad(&fault), "{fault}");
        let PinError::Fault(fault) = clone.space.pin(NEXT, Access::Read).unwrap_err() else {
            panic!("a pin of what is bad is a fault");
        };
        assert!(is_bad(&fault), "{fault}");
        assert!(
            clone
                .space
                .get(NEXT, Access::Read)
                .is_err_and(|e| is_bad(&e))
        );
        assert!(matches!(
            clone.space.merge(NEXT, &clone.space, NEXT),
            Err(RearrangeError::Bring(_))
        ));
        assert!(matches!(w.frozen.get(NEXT), Err(FrozenError::Bring(_))));
        assert!(matches!(
            w.frozen.with_frame(NEXT, |_| ()),
            Err(FrozenError::Bring(_))
        ));
        assert!(
            w.frozen
                .backed_regions()
                .bring(1, Toucher::Prefetch)
                .is_err()
        );
        for vm in [&clone, &twin] {
            assert!(vm.mmu.is_hidden(NEXT) && vm.space.is_hidden(NEXT).unwrap());
            assert_eq!(vm.cpu_read(P), word(0));
        }
        assert_eq!(w.pool.leftovers(99).len() as u64, before + REGION);
        w.backing.spoil(&[]);
        assert_eq!(twin.cpu_read(NEXT), word(NEXT.0));
        assert_eq!(clone.cpu_read(NEXT), word(NEXT.0));
        drop((clone, twin));
        w.settle();
    }
}

/// The template's account pays: who may have no more does not get it, and others do not notice.
#[test]
fn without_a_frame_there_is_an_error_that_says_so() {
    for uses_huge in [true, false] {
        let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
        let words = (0..PAGES).map(word).collect();
        let backing = SoftBacking::new(&pool, &memory, words);
        let account = pool.open_account(Some(REGION));
        let frozen = Frozen::backed(
            &pool,
            account.clone(),
            PAGES,
            uses_huge,
            [0, 1, 3],
            Arc::clone(&backing) as _,
        );
        let clone = SoftVm::clone_of(&frozen, &memory, right()).unwrap();
        assert_eq!(clone.cpu_read(P), word(0));
        assert_eq!(account.usage().charged, REGION);
        let fault = clone.try_cpu_read(NEXT).unwrap_err();
        let quota = matches!(
            fault,
            FaultError::Bring(BringError::Alloc {
                first: NEXT,
                source: AllocError::Quota { limit: REGION }
            })
        );
        assert!(quota, "{fault}");
        assert_eq!(
            (backing.brought().len(), account.usage().charged),
            (1, REGION)
        );
        assert!(clone.mmu.is_hidden(NEXT));
        drop((clone, frozen));
        assert_eq!(pool.leftovers(9), []);
    }
}

/// Refused before, in the middle or after: what was hidden is hidden, or shown and right.
#[test]
fn an_mmu_that_cannot_show_what_was_brought_leaves_it_hidden() {
    let manners = [
        Manner::Clean,
        Manner::Nothing,
        Manner::AllBut(1),
        Manner::AllButFirst(1),
        Manner::All,
    ];
    for uses_huge in [true, false] {
        for manner in manners {
            let w = outside(uses_huge);
            let (clone, refusals) = w.refusing_clone();
            refusals.refuse(manner, 0, 1);
            assert!(matches!(clone.try_cpu_read(NEXT), Err(FaultError::Mmu(_))));
            refusals.never();
            assert!(clone.mmu.is_hidden(NEXT) && clone.space.is_hidden(NEXT).unwrap());
            assert_eq!(w.brought(), [1]);
            assert_eq!(clone.cpu_read(NEXT), word(NEXT.0), "{manner:?}");
            assert_eq!(w.brought(), [1]);
            // Neither hidden nor shown: the space is broken, and what may be seen is right and stays.
            refusals.refuse(manner, 0, 3);
            let fault = clone.try_cpu_read(P).unwrap_err();
            refusals.never();
            assert!(
                matches!(fault, FaultError::Mmu(MmuError::Broken { .. })),
                "{manner:?}: {fault}"
            );
            assert!(clone.space.check().is_err());
            for n in 0..REGION {
                let (pfn, _) = clone.mmu.page(Gfn(n));
                assert!(clone.mmu.is_hidden(Gfn(n)) || w.memory.load(pfn) == word(n));
            }
            drop(clone);
            w.settle();
        }
    }
}

/// A clone that cannot hide what is backed is not made.
#[test]
fn a_clone_whose_mmu_cannot_hide_is_refused() {
    struct Plain(Arc<SoftMmu>);
    impl Mmu for Plain {
        fn map(&self, a: Gfn, b: Pfn, c: u64, d: Protection) -> Result<(), MmuError> {
            self.0.map(a, b, c, d)
        }
        fn protect(&self, a: Gfn, b: u64, c: Protection) -> Result<(), MmuError> {
            self.0.protect(a, b, c)
        }
    }
    let w = outside(true);
    let mmu = Box::new(Plain(SoftMmu::new(PAGES)));
    let error = AddressSpace::from_frozen(&w.frozen, right(), mmu).unwrap_err();
    assert!(matches!(
        error,
        ForkError::Map(MmuError::Host { what: "hide", .. })
    ));
    assert_eq!(w.brought(), []);
    w.settle();
}

/// What cannot be borrowed is brought when the clone is made: the rest at the end, and all of it under a policy that
/// is asked about each page.
#[test]
fn what_cannot_be_borrowed_is_brought_at_once() {
    let w = outside_of(true, REGION + 2, 64);
    let clone = w.clone_of(&w.frozen);
    assert_eq!(w.backing.brought(), [(1, Toucher::Reader)]);
    (0..REGION + 2).for_each(|n| assert_eq!(clone.cpu_read(Gfn(n)), word(n)));
    drop(clone);
    w.settle();

    let w = outside(true);
    w.backing.spoil(&[3]);
    let policy = || Box::new(Refcount) as AnyPolicy;
    let error = SoftVm::clone_of(&w.frozen, &w.memory, policy())
        .err()
        .unwrap();
    assert!(matches!(error, ForkError::Bring(_)), "{error}");
    w.backing.spoil(&[]);
    let clone = SoftVm::clone_of(&w.frozen, &w.memory, policy()).unwrap();
    (0..PAGES).for_each(|n| assert_eq!(clone.cpu_read(Gfn(n)), word(n)));
    drop(clone);
    w.settle();
}

/// Whoever prefetches keeps nothing alive, and shows nothing.
#[test]
fn what_is_prefetched_is_there_when_it_is_touched() {
    let w = outside(true);
    let clone = w.clone_of(&w.frozen);
    let regions = w.frozen.backed_regions();
    assert_eq!((regions.len(), regions.is_empty()), (3, false));
    regions.bring(3, Toucher::Prefetch).unwrap();
    regions.bring(3, Toucher::Prefetch).unwrap();
    // None of them.
    regions.bring(2, Toucher::Prefetch).unwrap();
    regions.bring(99, Toucher::Prefetch).unwrap();
    assert_eq!(w.backing.brought(), [(3, Toucher::Prefetch)]);
    // It is the snapshot's, as what a fork has shared is.
    let state = w.pool.state(w.frozen.frame(SPARSE).unwrap());
    assert_eq!(
        (state.maps(), state.refs(), state.is_exclusive()),
        (1, 1, false)
    );
    assert!(clone.mmu.is_hidden(SPARSE));
    assert_eq!(clone.space.touch(SPARSE).unwrap(), Touch::Shown);
    assert_eq!(clone.space.touch(SPARSE).unwrap(), Touch::WasShown);
    assert_eq!(clone.cpu_read(SPARSE), word(SPARSE.0));
    assert_eq!(w.brought(), [3]);
    let Outside {
        pool,
        frozen,
        backing,
        ..
    } = w;
    drop((clone, frozen));
    assert_eq!(pool.leftovers(9), []);
    regions.bring(0, Toucher::Prefetch).unwrap();
    assert_eq!(backing.brought().len(), 1);
}

#[test]
fn there_is_no_touch_beyond_the_end() {
    let w = outside(true);
    let clone = w.clone_of(&w.frozen);
    let beyond = Gfn(PAGES);
    assert!(matches!(
        clone.space.touch(beyond),
        Err(FaultError::OutOfRange(_))
    ));
    assert!(clone.space.is_hidden(beyond).is_err());
    assert!(matches!(
        w.frozen.with_frame(beyond, |_| ()),
        Err(FrozenError::OutOfRange(_))
    ));
    drop(clone);
    w.settle();
}

/// Many at once: each region is brought once, whoever comes first.
#[test]
fn a_region_that_many_want_at_once_is_brought_once() {
    let w = outside_of(true, PAGES, 256);
    let clones: Vec<_> = (0..4).map(|_| w.clone_of(&w.frozen)).collect();
    let regions = w.frozen.backed_regions();
    std::thread::scope(|scope| {
        for clone in &clones {
            for _ in 0..2 {
                scope
                    .spawn(|| (0..PAGES).for_each(|n| assert_eq!(clone.cpu_read(Gfn(n)), word(n))));
            }
            scope.spawn(|| {
                for n in (0..PAGES).rev() {
                    let pin = clone.space.pin(Gfn(n), Access::Read).unwrap();
                    assert_eq!(clone.dma_read(&pin), word(n));
                }
            });
            scope.spawn(|| drop(clone.space.fork().unwrap()));
        }
        scope.spawn(|| {
            regions
                .iter()
                .for_each(|region| regions.bring(region, Toucher::Prefetch).unwrap())
        });
    });
    let mut brought = w.brought();
    brought.sort_unstable();
    assert_eq!(brought, [0, 1, 3]);
    drop(clones);
    w.settle();
}
