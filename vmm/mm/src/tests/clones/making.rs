//! What it takes to make a clone, and what is left of one that cannot be made.

use std::sync::atomic::Ordering;

use super::super::refusing::RefusingMemory;
use super::*;

#[test]
fn neighbouring_folios_are_adopted_with_one_call() {
    let host = host();
    let mut parent = host.machine(PAGES);
    let frozen = parent.vm.space.fork().unwrap();
    let clone = host.clone_of(&frozen, &parent.pages);
    assert_eq!((clone.mmu.calls(), clone.mappings()), (1, 1));
    assert!(
        (0..PAGES)
            .all(|n| clone.entry(n).is_huge() && clone.entry(n).pfn() == parent.entry(n).pfn())
    );
    clone.check();
    drop((clone, frozen));
    // Nobody knows of anything in region 1, and the snapshot has region 2 elsewhere.
    parent.vm.space.discard(Gfn(REGION), REGION).unwrap();
    (REGION..2 * REGION).for_each(|n| parent.pages[n as usize] = 0);
    let frozen = parent.vm.space.fork().unwrap();
    let before = parent.pages.clone();
    parent.vm.space.set_whole_price(0);
    parent.write(2 * REGION, 1);
    let clone = host.clone_of(&frozen, &before);
    assert_eq!((clone.mmu.calls(), clone.mappings()), (3, 4));
    clone.check();
    drop((clone, frozen, parent));
    host.settle();
}

#[test]
fn an_untouched_space_is_cloned_without_a_call() {
    let host = host();
    let pool = Arc::clone(&host.pool);
    let space = AddressSpace::new(pool, right(), Box::new(SoftMmu::new(PAGES)), PAGES).unwrap();
    let mut clone = host.clone_of(&space.fork().unwrap(), &[0; PAGES as usize]);
    assert_eq!(clone.mmu.calls(), 0);
    clone.write(3, 1);
    assert!(clone.entry(0).is_huge(), "a first touch is of the region");
    clone.check();
    drop((clone, space));
    host.settle();
}

/// However the snapshot lies in memory.
#[test]
fn pages_are_adopted_by_runs_of_frames() {
    let host = host();
    for written in [vec![5], vec![4, 5], vec![5, 6, 9], (0..PAGES).collect()] {
        let mut parent = host.machine(PAGES + 1);
        let frozen = parent.vm.space.fork().unwrap();
        let before = parent.pages.clone();
        written.iter().for_each(|&n| parent.write(n, n));
        let frames: Vec<Pfn> = (0..=PAGES).map(|n| frozen.frame(Gfn(n)).unwrap()).collect();
        let runs = runs(&frames, |a, b| b.0 == a.0 + 1);
        let clone = host.clone_of(&frozen, &before);
        assert_eq!((clone.mmu.calls(), clone.mappings()), (runs as u64, runs));
        clone.check();
        parent.check();
        // Its own forks have it in common with the snapshot.
        let second = clone.vm.space.fork().unwrap();
        assert_eq!(second.region_address(P), frozen.region_address(P));
    }
    host.settle();
}

/// 200 of them would need more frame numbers than there are.
#[test]
fn clones_have_no_frames_of_their_own_until_they_write() {
    let host = host_with(REGION, 2 * PAGES + REGION);
    let parent = host.machine(PAGES);
    let frozen = parent.vm.space.fork().unwrap();
    let mut clones: Vec<_> = (0..50)
        .map(|_| host.clone_of(&frozen, &parent.pages))
        .collect();
    assert_eq!(host.pool.usage().in_use, PAGES);
    let payer = host.pool.payer();
    let free: Vec<_> = std::iter::from_fn(|| host.pool.allocate(&payer).ok()).collect();
    assert!(clones[0].vm.cpu_write(P, 1).is_err());
    drop(free);
    clones[0].write(0, 1);
    assert_eq!(host.pool.usage().in_use, PAGES + 1);
    clones.iter().for_each(Machine::check);
    drop((clones, frozen, parent));
    host.settle();
}

/// Nothing is left of a clone that could not be made: of counts, of mappings, of memory.
#[test]
fn a_clone_that_is_refused_leaves_nothing_behind() {
    let host = host();
    let mut parent = host.machine(PAGES);
    let frozen = parent.vm.space.fork().unwrap();
    let before = parent.pages.clone();
    [5, 9, 10].into_iter().for_each(|n| parent.write(n, 1));
    let state = || {
        let frames = (0..FRAMES).map(|n| host.pool.state(Pfn(n)));
        // A frame that was the snapshot's alone may be shared again for all that anybody knows.
        let counts: Vec<_> = frames.map(|s| (s.maps(), s.gets(), s.pins())).collect();
        (counts, host.pool.usage().in_use)
    };
    let (untouched, mmu) = (state(), Arc::<Refusals>::default());
    let frames: Vec<Pfn> = (0..PAGES).map(|n| frozen.frame(Gfn(n)).unwrap()).collect();
    let calls = runs(&frames, |a, b| b.0 == a.0 + 1) as u64;
    for nth in 0.. {
        mmu.at(nth);
        let result = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu);
        mmu.never();
        if let Ok(clone) = result {
            assert_eq!(nth, calls);
            clone.check();
            break;
        }
        assert!(matches!(result.err().unwrap(), ForkError::Map(_)));
        assert_eq!(state(), untouched, "refused at call {nth}");
        parent.check();
    }
    assert_eq!(state(), untouched);
    drop((frozen, parent));
    host.settle();
}

/// [`Exclusive`], but nothing can be shared.
struct NothingIsShared;

impl CowPolicy for NothingIsShared {
    fn name(&self) -> &'static str {
        "nothing is shared"
    }
    fn goes_by_the_bit(&self) -> bool {
        true
    }
    fn may_share(&self, _: FrameState) -> bool {
        false
    }
    fn may_reuse(&self, frame: FrameState) -> bool {
        Exclusive.may_reuse(frame)
    }
    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        Exclusive.may_pin(frame, access)
    }
}

#[test]
fn a_clone_for_whose_copies_there_is_no_memory_leaves_nothing_behind() {
    const FEW: u64 = 2 * PAGES;
    for limit in PAGES + 1..=FEW {
        let memory = SoftMemory::new(FRAMES);
        let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
        let pool = FramePool::with_folios_of(Order::new(2), bytes, FRAMES, limit).unwrap();
        let host = Host { pool, memory };
        let parent = host.machine(PAGES);
        let frozen = parent.vm.space.fork().unwrap();
        let policy = Box::new(NothingIsShared);
        let clone = Machine::clone_of(
            &frozen,
            policy,
            &host.memory,
            &parent.pages,
            &Arc::default(),
        );
        match clone {
            Ok(clone) => clone.check(),
            Err(error) => assert!(matches!(error, ForkError::EagerCopy { .. })),
        }
        assert_eq!(host.pool.usage().in_use, PAGES, "limit {limit}");
        parent.check();
        drop((frozen, parent));
        host.settle();
    }
}

/// A region of 512 pages in so many runs is shared, in more it is copied.
#[test]
fn a_region_that_is_scattered_is_copied_whole() {
    const HUGE: u64 = REGION_PAGES;
    for (step, is_copied) in [(32, false), (4, true)] {
        let host = host_with(HUGE, 8 * HUGE);
        let mut parent = host.machine(HUGE);
        let frozen = parent.vm.space.fork().unwrap();
        let before = parent.pages.clone();
        (0..HUGE).step_by(step).for_each(|n| parent.write(n, 1));
        let mut clone = host.clone_of(&frozen, &before);
        clone.check();
        let runs = if is_copied { 1 } else { 2 * HUGE / step as u64 };
        assert_eq!((clone.mmu.calls(), clone.mappings() as u64), (runs, runs));
        assert_eq!(clone.copied(), if is_copied { HUGE } else { 0 });
        assert_eq!(clone.entry(7).is_huge(), is_copied);
        // Read-only, so that what it writes is known; and its own.
        assert!(!clone.entry(7).is_writable());
        clone.write(7, 2);
        assert_eq!(clone.vm.space.stats().reused, u64::from(is_copied));
        let second = clone.vm.space.fork().unwrap();
        let reads = |n| clone.vm.read_frozen(&second, Gfn(n));
        assert_eq!([0, 7, 9].map(reads), [100, 2, 109]);
        drop((second, clone, frozen, parent));
        host.settle();
    }
}

#[test]
fn where_mappings_are_short_every_region_takes_one() {
    let host = host();
    let mut parent = host.machine(PAGES);
    parent.vm.space.discard(Gfn(6), 1).unwrap();
    parent.pages[6] = 0;
    let frozen = parent.vm.space.fork().unwrap();
    let before = parent.pages.clone();
    [5, 10].into_iter().for_each(|n| parent.write(n, 1));
    let mmu = Arc::<Refusals>::default();
    mmu.crowded.store(1, Ordering::Relaxed);
    let clone = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu).unwrap();
    clone.check();
    assert!([0, 5, 10, 12].map(|n| clone.entry(n).is_huge()) == [true; 4]);
    assert_eq!((clone.mmu.calls(), clone.copied()), (4, 2 * REGION - 1));
    drop(clone);
    // Each call is refused, and so is memory: what cannot be copied is shared.
    for nth in 0..4 {
        let in_use = host.pool.usage().in_use;
        mmu.at(nth);
        let refused = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu);
        assert!(matches!(refused.err(), Some(ForkError::Map(_))));
        mmu.never();
        assert_eq!(host.pool.usage().in_use, in_use);
    }
    let payer = host.pool.payer();
    let all: Vec<_> = std::iter::from_fn(|| host.pool.allocate(&payer).ok()).collect();
    let clone = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu).unwrap();
    clone.check();
    assert!(!clone.entry(5).is_huge() && clone.copied() == 0);
    drop((all, clone, frozen, parent));
    host.settle();
}

/// A host that refuses memory for the copy of a region has it shared.
#[test]
fn a_region_for_which_the_host_has_no_memory_is_shared() {
    let memory = RefusingMemory::new(FRAMES);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, FRAMES, FRAMES).unwrap();
    let host = Host {
        pool,
        memory: Arc::clone(&memory.inner),
    };
    let mut parent = host.machine(PAGES);
    let frozen = parent.vm.space.fork().unwrap();
    let before = parent.pages.clone();
    parent.write(5, 1);
    let mmu = Arc::<Refusals>::default();
    mmu.crowded.store(1, Ordering::Relaxed);
    memory.refusals.from(0);
    let clone = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu).unwrap();
    memory.refusals.never();
    assert!(!clone.entry(5).is_huge() && clone.copied() == 0);
    clone.check();
    drop((clone, frozen, parent));
    host.settle();
}
