//! Where frames come from, and what happens at the limit.

use super::super::frame::Released;
use super::super::fresh::{Fresh, FreshFolio};
use super::super::home::Home;
use super::super::soft::soft_pool_of;
use super::super::stock::COMMIT_FOLIOS;
use super::refusing::RefusingMemory;
use super::*;

/// At the limit a free frame that has memory must be found behind one that has none.
#[test]
fn at_the_limit_a_free_frame_with_memory_is_used() {
    let (frames, limit) = (4096, 2);
    let memory = RefusingMemory::new(frames);
    let pool = memory.pool(frames, limit);
    let (a, b) = (
        pool.allocate(&pool.payer()).unwrap(),
        pool.allocate(&pool.payer()).unwrap(),
    );
    assert!(matches!(
        pool.allocate(&pool.payer()),
        Err(AllocError::Limit { limit: 2 })
    ));
    let with_memory = b.pfn();
    drop(b);
    // A home that was never touched leaves frames without memory, freed last.
    drop(pool.reserve(8).unwrap());
    let again = pool.allocate(&pool.payer()).unwrap();
    assert_eq!(again.pfn(), with_memory);
    assert!(matches!(
        pool.allocate(&pool.payer()),
        Err(AllocError::Limit { limit: 2 })
    ));
    drop((a, again));
    assert_eq!(
        (
            pool.usage().in_use,
            pool.usage().committed,
            pool.usage().peak
        ),
        (0, 2, 2)
    );
}

/// Any of them, wherever it is.
#[test]
fn at_the_limit_every_free_frame_is_found() {
    let (frames, limit) = (4096, 70);
    let pool = RefusingMemory::new(frames).pool(frames, limit);
    let mut held: Vec<_> = (0..limit)
        .map(|_| pool.allocate(&pool.payer()).unwrap())
        .collect();
    for n in 0..limit as usize {
        let free = held[n].pfn();
        drop(held.swap_remove(n));
        let again = pool.allocate(&pool.payer()).unwrap();
        assert_eq!(again.pfn(), free);
        held.push(again);
    }
    assert!(pool.allocate(&pool.payer()).is_err());
}

/// A home without memory must not keep a page from the memory that others have given back.
#[test]
fn at_the_limit_a_page_is_filled_away_from_home() {
    let (frames, limit) = (4096, 3);
    let memory = RefusingMemory::new(frames);
    let w = world_in(
        memory.pool(frames, limit),
        Arc::clone(&memory.inner),
        right(),
        4,
    );
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 6).unwrap();
    let error = w.vm.cpu_write(Gfn(2), 7).unwrap_err();
    assert!(error.to_string().contains("out of memory"), "{error}");
    drop(frozen);
    w.vm.space.write_fault(Gfn(2)).unwrap();
    assert_eq!((w.slot(Gfn(2)), w.vm.cpu_read(Gfn(2))), ("WX", 0));
    assert_eq!((w.pool.usage().in_use, w.pool.usage().committed), (3, 3));
    assert!(w.vm.cpu_write(Gfn(3), 7).is_err());
}

fn zeroed(pool: &FramePool, home: &Home, index: u64) -> Fresh {
    let fresh = pool.allocate_near(&pool.payer(), home, index).unwrap();
    fresh.zero();
    fresh
}

#[test]
fn a_frame_that_was_used_before_is_zeroed() {
    let (pool, memory) = soft_pool(8).unwrap();
    let home = pool.reserve(1).unwrap();
    let used = pool.allocate_near(&pool.payer(), &home, 0).unwrap().pfn();
    memory.store(used, 7);
    let fresh = zeroed(&pool, &home, 0);
    assert_eq!((fresh.pfn(), memory.load(used)), (used, 0));
    let elsewhere = pool.allocate(&pool.payer()).unwrap().pfn();
    memory.store(elsewhere, 7);
    let other = zeroed(&pool, &home, 0);
    assert_eq!((other.pfn(), memory.load(elsewhere)), (elsewhere, 0));
}

/// New memory is zeros already.
#[test]
fn a_frame_that_is_new_is_not_zeroed_again() {
    let (pool, memory) = soft_pool(8).unwrap();
    let home = pool.reserve(2).unwrap();
    let first = zeroed(&pool, &home, 0);
    memory.store(Pfn(first.pfn().0 + 1), 7);
    let second = zeroed(&pool, &home, 1);
    assert_eq!(
        (second.pfn().0, memory.load(second.pfn())),
        (first.pfn().0 + 1, 7)
    );
}

#[test]
fn memory_is_committed_in_batches_outside_homes_and_singly_inside() {
    let memory = RefusingMemory::new(1024);
    let pool = memory.pool(1024, 1000);
    let home = pool.reserve(3).unwrap();
    let runs = || memory.committed.lock().unwrap().clone();
    let mut held = vec![pool.allocate_near(&pool.payer(), &home, 1).unwrap()];
    assert_eq!((runs(), pool.usage().committed), (vec![(2, 1)], 1));
    for _ in 4..512 {
        held.push(pool.allocate(&pool.payer()).unwrap());
    }
    assert_eq!(
        (runs(), pool.usage().committed),
        (vec![(2, 1), (4, 508)], 509),
        "to the end of a huge folio"
    );
    held.push(pool.allocate(&pool.payer()).unwrap());
    assert_eq!(runs()[2..], [(512, 491)], "to the limit");
    assert_eq!((pool.usage().in_use, pool.usage().peak), (510, 510));
    drop(held);
    assert_eq!((pool.usage().in_use, pool.usage().peak), (0, 510));
}

/// A batch ends before a home, before what has memory, at the limit and at the end of the pool.
#[test]
fn a_batch_ends_where_others_begin() {
    let memory = RefusingMemory::new(40);
    let pool = memory.pool(40, 30);
    let runs = || memory.committed.lock().unwrap().clone();
    let skipped = pool.reserve(10).unwrap();
    let home = pool.reserve(5).unwrap();
    let early = pool.allocate_near(&pool.payer(), &skipped, 3).unwrap();
    drop(skipped);
    let a = pool.allocate(&pool.payer()).unwrap();
    assert_eq!(
        (a.pfn(), runs()[1..].to_vec()),
        (Pfn(1), vec![(1, 3)]),
        "4 has memory"
    );
    let mut held: Vec<_> = (2..4)
        .map(|_| pool.allocate(&pool.payer()).unwrap())
        .collect();
    let b = pool.allocate(&pool.payer()).unwrap();
    assert_eq!(
        (b.pfn(), runs()[2..].to_vec()),
        (Pfn(5), vec![(5, 6)]),
        "the home"
    );
    let near = pool.allocate_near(&pool.payer(), &home, 0).unwrap();
    assert_eq!((near.pfn(), runs()[3..].to_vec()), (Pfn(11), vec![(11, 1)]));
    held.extend((6..11).map(|_| pool.allocate(&pool.payer()).unwrap()));
    assert_eq!(pool.usage().committed, 11);
    held.push(pool.allocate(&pool.payer()).unwrap());
    assert_eq!(
        (runs().last().copied(), pool.usage().committed),
        (Some((16, 19)), 30),
        "the limit"
    );
    for _ in 0..18 {
        held.push(pool.allocate(&pool.payer()).unwrap());
    }
    assert!(pool.allocate(&pool.payer()).is_err());
    assert_eq!(pool.usage().in_use, 30);
    drop(early);
}

#[test]
fn a_batch_ends_with_the_pool() {
    let memory = RefusingMemory::new(4);
    let pool = memory.pool(4, 100);
    let held: Vec<_> = (0..3)
        .map(|_| pool.allocate(&pool.payer()).unwrap().into_held())
        .collect();
    assert_eq!(*memory.committed.lock().unwrap(), [(1, 3)]);
    assert!(matches!(
        pool.allocate(&pool.payer()),
        Err(AllocError::Limit { limit: 100 })
    ));
    let mut pfns: Vec<_> = held.iter().map(Get::pfn).collect();
    pfns.sort_unstable();
    assert_eq!(pfns, [Pfn(1), Pfn(2), Pfn(3)]);
}

#[test]
fn memory_that_the_host_refuses_is_an_error_and_not_a_leak() {
    let memory = RefusingMemory::new(1024);
    let pool = memory.pool(1024, 1000);
    let home = pool.reserve(3).unwrap();
    memory.refusals.from(0);
    let Err(error) = pool.allocate(&pool.payer()) else {
        panic!("the host refused");
    };
    assert!(
        matches!(error, AllocError::Host { count: 1, .. }),
        "{error}"
    );
    let Err(error) = pool.allocate_near(&pool.payer(), &home, 0) else {
        panic!("the host refused");
    };
    assert!(
        matches!(error, AllocError::Host { count: 1, .. }),
        "{error}"
    );
    assert_eq!((pool.usage().in_use, pool.usage().committed), (0, 0));
    memory.refusals.never();
    assert_eq!(
        pool.allocate(&pool.payer()).unwrap().pfn(),
        Pfn(4),
        "it is the first again"
    );
    assert_eq!(
        pool.allocate_near(&pool.payer(), &home, 0).unwrap().pfn(),
        Pfn(1)
    );
    memory.refusals.from(0);
    assert!(
        FramePool::new(memory, 1, 1).is_err(),
        "not even the zero frame"
    );
}

#[test]
#[should_panic(expected = "at least the zero frame")]
fn a_pool_of_no_frames_is_a_bug() {
    drop(soft_pool(0));
}

#[test]
fn homes_lie_apart_and_large_ones_are_aligned() {
    let (pool, _) = soft_pool(2048).unwrap();
    let first = |pages| {
        let home = pool.reserve(pages).unwrap();
        (
            pool.allocate_near(&pool.payer(), &home, 0).unwrap().pfn().0,
            home,
        )
    };
    let (small, _small) = first(511);
    let (large, _large) = first(512);
    let (next, _next) = first(2);
    assert_eq!((small, large, next), (1, 512, 1024));
    let error = pool.reserve(513).map(drop).unwrap_err();
    assert!(matches!(error, AllocError::Home { pages: 513 }));
    assert_eq!(
        error.to_string(),
        "the frame pool has no room for a home of 513 pages"
    );
    let (last, _last) = first(512);
    assert_eq!(last, 1536);
}

#[test]
fn a_home_may_reach_to_the_end_of_the_pool() {
    let (pool, _) = soft_pool(5).unwrap();
    assert!(pool.reserve(5).is_err());
    let home = pool.reserve(4).unwrap();
    assert_eq!(
        pool.allocate_near(&pool.payer(), &home, 3).unwrap().pfn(),
        Pfn(4)
    );
}

/// Frames that alignment skips are not lost, and neither is a home that is given up.
#[test]
fn every_frame_but_the_zero_frame_can_be_had() {
    let (pool, _) = soft_pool(1024).unwrap();
    let home = pool.reserve(512).unwrap();
    let orphan = pool.allocate_near(&pool.payer(), &home, 3).unwrap();
    let mut held: Vec<_> = (1..512)
        .map(|_| pool.allocate(&pool.payer()).unwrap())
        .collect();
    assert!(
        pool.allocate(&pool.payer()).is_err(),
        "what is reserved is for its page alone"
    );
    drop(home);
    for _ in 0..511 {
        held.push(pool.allocate(&pool.payer()).unwrap());
    }
    assert!(pool.allocate(&pool.payer()).is_err());
    drop(orphan);
    held.push(pool.allocate(&pool.payer()).unwrap());
    assert!(pool.allocate(&pool.payer()).is_err());
    let mut pfns: Vec<_> = held.iter().map(|f| f.pfn().0).collect();
    pfns.sort_unstable();
    assert!(pfns.into_iter().eq(1..1024));
    assert_eq!(pool.usage().in_use, 1023);
}

#[test]
fn a_freed_frame_of_a_home_is_for_its_page_alone() {
    let (pool, _) = soft_pool(8).unwrap();
    let home = pool.reserve(6).unwrap();
    drop(pool.allocate_near(&pool.payer(), &home, 0).unwrap());
    let only = pool.allocate(&pool.payer()).unwrap();
    assert_eq!(only.pfn(), Pfn(7));
    assert!(pool.allocate(&pool.payer()).is_err());
    assert_eq!(
        pool.allocate_near(&pool.payer(), &home, 0).unwrap().pfn(),
        Pfn(1)
    );
}

#[test]
fn leftovers_are_what_is_allocated_or_held() {
    let (pool, _) = soft_pool(64).unwrap();
    let a = pool.allocate(&pool.payer()).unwrap();
    let b = pool.allocate(&pool.payer()).unwrap().into_held();
    assert_eq!(
        pool.leftovers(9).iter().map(|l| l.0).collect::<Vec<_>>(),
        [a.pfn(), b.pfn()]
    );
    assert_eq!(pool.leftovers(1).len(), 1);
    assert_eq!(pool.leftovers(0), []);
    let (pfn, state) = pool.leftovers(9)[1];
    assert_eq!((pfn, state.gets(), state.maps()), (b.pfn(), 1, 0));
    drop((a, b));
    assert_eq!(pool.leftovers(9), []);
}

/// What nobody maps can neither be pinned nor held: its owner is about to hand it out or has just let it go.
#[test]
fn a_frame_that_nothing_maps_is_nobodys() {
    let (pool, _) = soft_pool(8).unwrap();
    let held = pool.allocate(&pool.payer()).unwrap().into_held();
    assert!(pool.try_get(Entry::read_only(held.pfn())).is_err());
    assert!(
        pool.try_pin(Entry::read_only(held.pfn()), 1, Access::Read, &Mapcount)
            .is_err()
    );
    assert!(
        pool.try_get(Entry::UNTOUCHED).is_ok(),
        "zeros are always there"
    );
}

#[test]
fn a_frame_has_room_for_so_many_holds() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let entry = w.entry(P);
    let gets: Vec<_> = (0..0xffff)
        .map(|_| w.pool.try_get(entry).unwrap())
        .collect();
    let full = w.pool.try_get(entry).unwrap_err();
    assert_eq!((full.gets(), full.maps(), full.pins()), (0xffff, 1, 0));
    assert!(
        w.vm.space.discard(P, 1).is_err(),
        "there is no room for the hold of a discard"
    );
    assert_eq!(w.slot(P), "WX");
    drop(gets);
    assert_eq!(w.state(P).refs(), 1);
}

#[test]
fn a_full_pin_counter_is_an_error() {
    let w = world();
    let pins: Vec<_> = (0..0xf_ffff)
        .map(|_| w.vm.space.pin(P, Access::Write).unwrap())
        .collect();
    let error = w.vm.space.pin(P, Access::Write).unwrap_err();
    assert!(matches!(error, PinError::TooMany { gfn: P }));
    assert_eq!(
        (w.state(P).pins(), w.state(P).gets(), w.slot(P)),
        (0xf_ffff, 0, "WX")
    );
    drop(pins);
    assert_eq!(w.state(P).refs(), 1);
}

#[test]
fn the_pool_says_how_full_it_is() {
    let (pool, _) = soft_pool(64).unwrap();
    let frame = pool.allocate(&pool.payer()).unwrap();
    let usage = PoolUsage {
        in_use: 1,
        peak: 1,
        committed: 63,
        committed_peak: 63,
        limit: 64,
    };
    assert_eq!(pool.usage(), usage);
    assert_eq!(
        format!("{pool:?}"),
        format!("FramePool {{ usage: {usage:?} }}")
    );
    drop(frame);
}

/// A hold that was not given back shows, whatever the allocator thinks of its frame.
#[test]
fn a_free_frame_that_somebody_holds_is_a_leftover() {
    let (pool, _) = soft_pool(64).unwrap();
    let pfn = pool
        .allocate(&pool.payer())
        .map(|fresh| fresh.pfn())
        .unwrap();
    assert_eq!(pool.leftovers(9), []);
    pool.frames().hold_fresh(pfn);
    assert_eq!(pool.leftovers(9), [(pfn, pool.state(pfn))]);
    assert_eq!(pool.frames().put(pfn), Released::Last);
    assert_eq!(pool.leftovers(9), []);
}

/// Frames come from runs that are in use already, so that whole runs are left for folios, and are whole again
/// when all are back.
#[test]
fn a_run_whose_frames_are_all_back_is_a_folio_again() {
    let (pool, _) = soft_pool_of(Order::new(2), 40).unwrap();
    let allocate = || pool.allocate(&pool.payer()).unwrap();
    let folio = || pool.allocate_folio(&pool.payer()).unwrap();
    let first = folio().unwrap();
    assert_eq!(first.head(), Pfn(4), "0 to 3 have the zero frame");
    let singles: Vec<_> = (0..5).map(|_| allocate()).collect();
    let pfns: Vec<_> = singles.iter().map(|fresh| fresh.pfn().0).collect();
    assert_eq!(pfns, [1, 2, 3, 8, 9]);
    assert_eq!(folio().unwrap().head(), Pfn(12));
    drop(first);
    // One of 8 to 11 is left: it is not taken for a folio, and the next single ones are its neighbours.
    let mut singles = singles;
    drop(singles.swap_remove(3));
    assert_eq!(allocate().pfn(), Pfn(8));
    drop(singles);
    let mut heads: Vec<_> = std::iter::from_fn(|| folio().map(FreshFolio::into_mapped)).collect();
    heads.sort_unstable();
    let all: Vec<_> = (4..40).step_by(4).map(Pfn).collect();
    assert_eq!(heads, all);
    let last: Vec<_> = (0..3).map(|_| allocate().pfn().0).collect();
    assert_eq!(last, [1, 1, 1]);
    heads.into_iter().for_each(|head| pool.unmap_huge(head));
    assert_eq!(pool.usage().in_use, 0);
}

#[test]
fn at_the_limit_folios_are_of_memory_that_is_there() {
    let memory = RefusingMemory::new(40);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 40, 10).unwrap();
    let folio = || pool.allocate_folio(&pool.payer()).unwrap();
    let (one, two) = (folio().unwrap(), folio().unwrap());
    assert_eq!(pool.usage().committed, 8);
    assert!(folio().is_none(), "memory for two frames");
    let single = pool.allocate(&pool.payer()).unwrap();
    let head = one.head();
    drop(one);
    assert_eq!(folio().unwrap().head(), head);
    let held: Vec<_> = (0..5)
        .map(|_| pool.allocate(&pool.payer()).unwrap())
        .collect();
    assert_eq!(pool.usage().committed, 10);
    assert!(pool.allocate(&pool.payer()).is_err());
    let of_the_folio = held.iter().filter(|fresh| {
        fresh
            .pfn()
            .run(1)
            .all(|p| (head..Pfn(head.0 + 4)).contains(&p))
    });
    assert_eq!(of_the_folio.count(), 4);
    drop((two, single));
    assert!(folio().is_some());
}

/// A single frame that is taken out of a free folio takes that folio off the free ones, and no other.
#[test]
fn at_the_limit_a_folio_with_a_frame_in_use_is_not_handed_out() {
    let (pool, _) = soft_pool_of(Order::new(2), 40).unwrap();
    let memory = RefusingMemory::new(40);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let limited = FramePool::with_folios_of(Order::new(2), bytes, 40, 8).unwrap();
    for pool in [limited, pool] {
        let folios = [(); 2].map(|()| pool.allocate_folio(&pool.payer()).unwrap().unwrap());
        let heads = folios.each_ref().map(|folio| folio.head());
        assert_eq!(heads, [Pfn(4), Pfn(8)]);
        drop(folios);
        let single = pool.allocate(&pool.payer()).unwrap();
        let folio = pool.allocate_folio(&pool.payer()).unwrap().unwrap();
        let frames = folio.head()..Pfn(folio.head().0 + 4);
        assert!(!frames.contains(&single.pfn()), "{frames:?}");
        assert!(heads.contains(&folio.head()));
    }
}

#[test]
fn a_folio_that_the_host_refuses_memory_is_free_still() {
    let memory = RefusingMemory::new(12);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 12, 12).unwrap();
    memory.refusals.from(0);
    for _ in 0..3 {
        assert!(pool.allocate_folio(&pool.payer()).is_err());
    }
    memory.refusals.never();
    assert!(pool.allocate_folio(&pool.payer()).unwrap().is_some());
    assert_eq!(pool.usage().in_use, 0);
}

/// To the end of its home, and not into the next one.
#[test]
fn a_folio_of_a_home_is_given_memory_with_those_that_follow_it() {
    let memory = RefusingMemory::new(256);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 256, 200).unwrap();
    let committed = || memory.committed.lock().unwrap().last().copied().unwrap();
    let (home, _next) = (pool.reserve(12).unwrap(), pool.reserve(12).unwrap());
    let folio = pool
        .allocate_huge(&pool.payer(), &home, 4)
        .unwrap()
        .unwrap();
    assert_eq!((folio.head(), committed()), (Pfn(8), (8, 8)));
    let long = pool.reserve(64).unwrap();
    let folio = pool
        .allocate_huge(&pool.payer(), &long, 0)
        .unwrap()
        .unwrap();
    assert_eq!(committed(), (folio.head().0, 4 * COMMIT_FOLIOS));
}

#[test]
fn a_region_gets_its_folio_up_to_the_limit() {
    let memory = RefusingMemory::new(64);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 9).unwrap();
    let homes = [4, 4, 4].map(|pages| pool.reserve(pages).unwrap());
    let folio = |n: usize| pool.allocate_huge(&pool.payer(), &homes[n], 0).unwrap();
    let held = (folio(0).unwrap(), folio(1).unwrap());
    assert_eq!(pool.usage().committed, 8);
    assert!(folio(2).is_none(), "there is memory for one frame");
    drop(held);
    // That of the first is there still: nothing is missing.
    assert!(folio(0).is_some());

    let memory = RefusingMemory::new(64);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 4).unwrap();
    let home = pool.reserve(4).unwrap();
    assert!(
        pool.allocate_huge(&pool.payer(), &home, 0)
            .unwrap()
            .is_some(),
        "just so"
    );
}

/// So much as is made ready at a time.
#[test]
fn memory_is_provided_for_folios_to_come() {
    let memory = RefusingMemory::new(256);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 256, 200).unwrap();
    pool.provide();
    let runs = memory.committed.lock().unwrap().clone();
    assert_eq!(runs[runs.len() - 2..], [(1, 3), (4, 4 * COMMIT_FOLIOS)]);
    // To the end of the pool, if that is nearer.
    let memory = RefusingMemory::new(12);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 12, 12).unwrap();
    pool.provide();
    assert_eq!(memory.committed.lock().unwrap().last(), Some(&(4, 8)));
}

#[test]
fn memory_is_ready_once_it_was_provided() {
    let memory = RefusingMemory::new(64);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 60).unwrap();
    let commits = || memory.committed.lock().unwrap().len();
    pool.provide();
    assert_eq!(pool.usage().in_use, 0);
    let before = commits();
    let held = (
        [
            pool.allocate(&pool.payer()).unwrap(),
            pool.allocate(&pool.payer()).unwrap(),
        ],
        pool.allocate_folio(&pool.payer()).unwrap().unwrap(),
    );
    assert_eq!(commits(), before, "no waiting");
    pool.provide();
    drop(held);
    // Where there is none, nothing is lost.
    memory.refusals.from(0);
    let held: Vec<_> =
        std::iter::from_fn(|| pool.allocate_folio(&pool.payer()).ok().flatten()).collect();
    pool.provide();
    drop(held);
    memory.refusals.never();
    let all: Vec<_> = std::iter::from_fn(|| pool.allocate(&pool.payer()).ok()).collect();
    assert_eq!(all.len(), 60);
    drop(all);
    assert_eq!(pool.usage().in_use, 0);
}

/// What was made ready ahead, and taken at the limit as what there is, was taken a second time once there was
/// room again: two snapshots, or a snapshot and a guest, had one frame.
#[test]
fn no_frame_is_handed_out_twice_at_the_limit() {
    let memory = SoftMemory::new(200);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 200, 30).unwrap();
    let vm = SoftVm::new(&pool, &memory, right(), 12).unwrap();
    let zero = vm.space.fork().unwrap();
    vm.cpu_write(Gfn(1), 101).unwrap();
    vm.cpu_write(Gfn(8), 102).unwrap();
    vm.space.prepare_fork();
    vm.cpu_write(Gfn(6), 103).unwrap();
    let second = vm.space.fork().unwrap();
    let _ = vm.cpu_write(Gfn(6), 104);
    let _ = vm.space.restore(&zero);
    assert_eq!(vm.read_frozen(&second, Gfn(7)), 0);
    drop((zero, second, vm));
    assert_eq!((pool.leftovers(9), pool.usage().in_use), (vec![], 0));
}

/// All that was ever committed can be had at the limit, each frame once, whatever it was committed for.
#[test]
fn what_was_made_ready_is_handed_out_once() {
    let memory = RefusingMemory::new(64);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 20).unwrap();
    pool.provide();
    assert_eq!(pool.usage().committed, 20);
    let mut singles: Vec<_> = std::iter::from_fn(|| pool.allocate(&pool.payer()).ok()).collect();
    assert_eq!(singles.len(), 20);
    let folio_of = |fresh: &super::super::fresh::Fresh| fresh.pfn().0 / 4;
    singles.retain(|fresh| folio_of(fresh) != 2);
    let folio = pool.allocate_folio(&pool.payer()).unwrap().unwrap();
    assert_eq!(folio.head(), Pfn(8));
    assert!(singles.iter().all(|fresh| folio_of(fresh) != 2));
    assert_eq!((pool.usage().in_use, pool.leftovers(99).len()), (20, 20));
}

/// A frame is looked at wherever it is, also where none was ever handed out.
#[test]
fn leftovers_are_looked_for_everywhere() {
    let (pool, _) = soft_pool(2048).unwrap();
    pool.frames().hold_fresh(Pfn(2047));
    assert_eq!(pool.leftovers(9), [(Pfn(2047), pool.state(Pfn(2047)))]);
    assert_eq!(pool.frames().put(Pfn(2047)), Released::Last);
}

/// The memory of frames that only their own pages could use makes room for others.
#[test]
fn at_the_limit_what_a_home_does_not_use_makes_room() {
    let memory = RefusingMemory::new(64);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 10).unwrap();
    let home = pool.reserve(32).unwrap();
    let folio = pool
        .allocate_huge(&pool.payer(), &home, 0)
        .unwrap()
        .unwrap();
    assert_eq!(pool.usage().committed, 10, "as far as there is room");
    let mut held: Vec<_> = (0..6)
        .map(|_| pool.allocate(&pool.payer()).unwrap())
        .collect();
    assert!(matches!(
        pool.allocate(&pool.payer()),
        Err(AllocError::Limit { .. })
    ));
    assert_eq!((pool.usage().in_use, pool.usage().committed), (10, 10));
    drop(folio);
    held.extend((0..4).map(|_| pool.allocate(&pool.payer()).unwrap()));
    assert!(pool.allocate(&pool.payer()).is_err());
}

/// And stays where it is if the host will not have it back.
#[test]
fn room_that_the_host_does_not_help_to_make_is_an_error_and_not_a_leak() {
    let memory = RefusingMemory::new(64);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 10).unwrap();
    let home = pool.reserve(32).unwrap();
    drop(
        pool.allocate_huge(&pool.payer(), &home, 0)
            .unwrap()
            .unwrap(),
    );
    memory.refusals.from(0);
    assert!(matches!(
        pool.allocate(&pool.payer()),
        Err(AllocError::Host { .. })
    ));
    let usage = pool.usage();
    assert_eq!((usage.in_use, usage.committed), (0, 10));
    assert!(
        pool.allocate_huge(&pool.payer(), &home, 0)
            .unwrap()
            .is_some(),
        "it is there"
    );
    memory.refusals.never();
    let held: Vec<_> = std::iter::from_fn(|| pool.allocate(&pool.payer()).ok()).collect();
    assert_eq!(held.len(), 10);
}

/// Their records are more than any host has addresses for.
#[test]
fn frames_whose_records_have_no_room_are_refused() {
    for frames in [1 << 50, u64::MAX] {
        let memory = RefusingMemory::new(1);
        let error = FramePool::new(memory, frames, 1).unwrap_err();
        assert!(matches!(error, AllocError::Host { count, .. } if count == frames));
    }
}
