//! Discard: memory goes back to the host, all of it or none.

use super::refusing::RefusingMemory;
use super::*;

fn busy_at(result: Result<u64, RearrangeError>) -> (Gfn, FrameState) {
    match result {
        Err(RearrangeError::Busy { gfn, state }) => (gfn, state),
        other => panic!("busy was expected, not {other:?}"),
    }
}

#[test]
fn discarded_memory_is_given_back_and_reads_as_zeros() {
    let w = world();
    for gfn in [P, Q, Gfn(3)] {
        w.vm.cpu_write(gfn, 5).unwrap();
    }
    let (frame, before) = (w.entry(P).pfn(), w.pool.usage());
    assert_eq!((before.in_use, before.committed), (3, 3));
    assert_eq!(w.vm.space.discard(P, 3).unwrap(), 2, "one of them had none");
    let after = w.pool.usage();
    assert_eq!((after.in_use, after.committed), (1, 1));
    for gfn in [P, Q, Gfn(2)] {
        assert_eq!((w.slot(gfn), w.vm.cpu_read(gfn)), ("ZERO", 0));
        assert_eq!(w.vm.mmu.page(gfn), (Pfn::ZERO, Protection::ReadOnly));
    }
    assert_eq!((w.slot(Gfn(3)), w.vm.cpu_read(Gfn(3))), ("WX", 5));
    assert_eq!(
        (w.pool.state(frame).refs(), w.pool.leftovers(9).len()),
        (0, 1)
    );

    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::ZeroFilled);
    assert_eq!(
        (w.vm.cpu_read(P), w.entry(P).pfn()),
        (0, frame),
        "home again"
    );
    assert_eq!(w.pool.usage().committed, 2);
    assert_eq!(w.vm.space.discard(P, 4).unwrap(), 2);
    assert_eq!((w.pool.usage().in_use, w.pool.usage().committed), (0, 0));
}

#[test]
fn to_discard_nothing_is_nothing() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let before = w.picture();
    w.mmu.from(0);
    assert_eq!(w.vm.space.discard(P, 0).unwrap(), 0);
    assert_eq!(w.vm.space.discard(Gfn(99), 0).unwrap(), 0);
    assert_eq!(w.picture(), before);
}

#[test]
fn readers_keep_what_they_hold() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let get = w.vm.space.get(P, Access::Read).unwrap();
    assert_eq!(w.vm.space.discard(P, 1).unwrap(), 1);
    assert_eq!((w.vm.read_held(&get), w.vm.cpu_read(P)), (5, 0));
    let orphan = w.pool.state(get.pfn());
    assert_eq!(
        (orphan.refs(), orphan.gets(), orphan.is_exclusive()),
        (1, 1, false)
    );
    assert_eq!((w.pool.usage().in_use, w.pool.usage().committed), (1, 1));
    w.vm.cpu_write(P, 6).unwrap();
    assert_eq!(w.vm.read_held(&get), 5);
    drop(get);
    assert_eq!(w.pool.usage().in_use, 1);
}

#[test]
fn snapshots_and_clones_keep_what_they_share() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 6).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let clone = SoftVm::clone_of(&frozen, &w.memory, right()).unwrap();
    let usage = w.pool.usage();
    assert_eq!(w.vm.space.discard(P, 4).unwrap(), 2);
    assert_eq!(w.pool.usage(), usage);
    assert_eq!((w.vm.cpu_read(P), w.vm.cpu_read(Q)), (0, 0));
    assert_eq!((w.vm.read_frozen(&frozen, P), clone.cpu_read(Q)), (5, 6));
    drop(frozen);
    assert_eq!(clone.space.discard(P, 4).unwrap(), 2);
    assert_eq!((w.pool.usage().in_use, w.pool.usage().committed), (0, 0));
}

#[test]
fn a_frame_that_two_discarded_pages_share_goes_once() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 5).unwrap();
    w.vm.space.merge(P, &w.vm.space, Q).unwrap();
    assert_eq!((w.pool.usage().in_use, w.pool.usage().committed), (1, 2));
    assert_eq!(w.vm.space.discard(P, 2).unwrap(), 2);
    assert_eq!((w.pool.usage().in_use, w.pool.usage().committed), (0, 1));
}

/// C13 of PROTOCOL.md, decided otherwise: no device is left with an orphan.
#[test]
fn a_pinned_page_is_refused_and_the_others_stay_too() {
    for (access, gfn) in [
        (Access::Read, P),
        (Access::Write, Q),
        (Access::Read, Gfn(3)),
    ] {
        let w = world();
        for page in 0..4 {
            w.vm.cpu_write(Gfn(page), page + 5).unwrap();
        }
        w.protect_without_sharing(Gfn(2));
        let frozen = w.vm.space.fork().unwrap();
        w.vm.cpu_write(P, 9).unwrap();
        let pin = w.vm.space.pin(gfn, access).unwrap();
        let get = w.vm.space.get(P, Access::Read).unwrap();
        let before = w.picture();
        let (page, state) = busy_at(w.vm.space.discard(P, 4));
        assert_eq!((page, state.pins()), (gfn, 1));
        assert_eq!(w.picture(), before, "{access:?} {gfn:?}");
        drop((pin, get));
        assert_eq!(w.vm.space.discard(P, 4).unwrap(), 4);
        drop(frozen);
    }
}

#[test]
fn a_range_may_span_regions() {
    let w = world_of(3 * REGION_PAGES, 4 * REGION_PAGES);
    let pages = [0, 5, 511, 512, 1023, 1024, 1535];
    for page in pages {
        w.vm.cpu_write(Gfn(page), 5).unwrap();
    }
    let pin = w.vm.space.pin(Gfn(1024), Access::Write).unwrap();
    let before = w.picture();
    assert_eq!(busy_at(w.vm.space.discard(Gfn(5), 1020)).0, Gfn(1024));
    assert_eq!(w.picture(), before);
    assert_eq!(w.vm.space.discard(Gfn(5), 1019).unwrap(), 4);
    let left: Vec<_> = pages.map(|p| w.vm.cpu_read(Gfn(p)) != 0).into();
    assert_eq!(left, [true, false, false, false, false, true, true]);
    drop(pin);
    assert_eq!(w.vm.space.discard(P, 3 * REGION_PAGES).unwrap(), 3);
}

#[test]
fn a_range_beyond_the_end_is_refused_whole() {
    let w = world();
    w.vm.cpu_write(Gfn(3), 5).unwrap();
    let before = w.picture();
    for (first, count) in [(3, 2), (4, 1), (0, u64::MAX), (u64::MAX, 1), (u64::MAX, 3)] {
        let error = w.vm.space.discard(Gfn(first), count).unwrap_err();
        let RearrangeError::OutOfRange(OutOfRange { gfn, pages }) = error else {
            panic!("{error:?}");
        };
        assert!(gfn.0 >= 4 && pages == 4);
    }
    assert_eq!(w.picture(), before);
    assert_eq!(w.vm.space.discard(Gfn(3), 1).unwrap(), 1);
}

#[test]
fn a_discard_that_the_mmu_refuses_changes_nothing() {
    let setup = || {
        let w = world_of(2 * REGION_PAGES, 4 * REGION_PAGES);
        for page in [0, 1, 2, 600] {
            w.vm.cpu_write(Gfn(page), 5).unwrap();
        }
        let frozen = w.vm.space.fork().unwrap();
        w.vm.cpu_write(P, 6).unwrap();
        w.vm.space.unshare(Gfn(600)).unwrap();
        let get = w.vm.space.get(P, Access::Read).unwrap();
        (w, frozen, get)
    };
    let failed = refused_at_each_call(
        setup,
        |w| &*w.0.mmu,
        |w| w.0.picture(),
        |w| w.0.vm.space.discard(P, 2 * REGION_PAGES),
    );
    assert_eq!(failed, 1, "one call for the whole range");
}

#[test]
fn frames_that_are_neighbours_go_back_in_one_call() {
    let memory = RefusingMemory::new(64);
    let w = world_in(memory.pool(64, 64), Arc::clone(&memory.inner), right(), 8);
    for page in [0, 1, 2, 4, 6, 7] {
        w.vm.cpu_write(Gfn(page), 5).unwrap();
    }
    let home = w.entry(P).pfn().0;
    assert_eq!(w.vm.space.discard(P, 8).unwrap(), 6);
    let runs = memory.uncommitted.lock().unwrap().clone();
    assert_eq!(runs, [(home, 3), (home + 4, 1), (home + 6, 2)]);
    assert_eq!((w.pool.usage().in_use, w.pool.usage().committed), (0, 0));
}

/// The host may keep the memory: the frames are free all the same, and are zeroed before they are used again.
#[test]
fn memory_that_the_host_does_not_take_is_free_for_others() {
    let memory = RefusingMemory::new(64);
    let w = world_in(memory.pool(64, 64), Arc::clone(&memory.inner), right(), 4);
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 5).unwrap();
    memory.refusals.from(0);
    assert_eq!(w.vm.space.discard(P, 2).unwrap(), 2);
    assert_eq!((w.pool.usage().in_use, w.pool.usage().committed), (0, 2));
    w.vm.space.write_fault(P).unwrap();
    assert_eq!((w.vm.cpu_read(P), w.pool.usage().committed), (0, 2));
}
