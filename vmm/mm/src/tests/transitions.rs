//! The transitions of PROTOCOL.md 3.2 that apply to base frames, one test each.

use std::sync::atomic::Ordering;

use super::*;

#[test]
fn t01_write_fault_on_untouched_memory_gives_a_fresh_exclusive_frame() {
    let w = world();
    assert_eq!(w.slot(P), "ZERO");
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::ZeroFilled);
    assert_eq!(w.slot(P), "WX");
    assert_eq!((w.vm.cpu_read(P), w.state(P).refs()), (0, 1));
}

#[test]
fn t02_reading_untouched_memory_costs_no_frame() {
    let w = world();
    assert_eq!(w.vm.cpu_read(P), 0);
    assert_eq!(w.pool.usage().in_use, 0);
    let get = w.vm.space.get(P, Access::Read).unwrap();
    assert_eq!(get.pfn(), Pfn::ZERO);
    assert_eq!(
        w.pool.state(Pfn::ZERO).refs(),
        0,
        "the zero frame is not counted"
    );
}

#[test]
fn t03_write_to_a_read_only_exclusive_page_copies_nothing() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.protect_without_sharing(P);
    assert_eq!(w.slot(P), "RX");
    let frame = w.entry(P).pfn();
    // Neither a pin nor a reader may cause a copy: no other check than the bit (PROTOCOL.md C1, H8).
    let pin = w.vm.space.pin(P, Access::Read).unwrap();
    let get = w.vm.space.get(P, Access::Read).unwrap();
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::Reused);
    assert_eq!((w.slot(P), w.entry(P).pfn()), ("WX", frame));
    w.vm.cpu_write(P, 6).unwrap();
    assert_eq!((w.vm.dma_read(&pin), w.vm.read_held(&get)), (6, 6));
}

#[test]
fn t04_the_last_holder_of_a_shared_frame_reuses_it() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frame = w.entry(P).pfn();
    drop(w.vm.space.fork().unwrap());
    assert_eq!(w.slot(P), "RS");
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::Reused);
    assert_eq!((w.slot(P), w.entry(P).pfn()), ("WX", frame));
}

#[test]
fn t05_a_break_gives_the_snapshots_the_copy() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let (a, frame) = (w.vm.space.fork().unwrap(), w.entry(P).pfn());
    let b = w.vm.space.fork().unwrap();
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::SharersMoved);
    w.vm.cpu_write(P, 6).unwrap();
    assert_eq!((w.slot(P), w.entry(P).pfn()), ("WX", frame));
    assert_eq!(a.frame(P), b.frame(P), "one copy serves both");
    assert_eq!(w.pool.state(a.frame(P).unwrap()).maps(), 2);
    assert_eq!((w.vm.read_frozen(&a, P), w.vm.read_frozen(&b, P)), (5, 5));
}

#[test]
fn t05_a_break_moves_the_writer_when_a_reader_holds_the_frame() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    // A reader through the snapshot must never see what the guest writes later (PROTOCOL.md B1, I9).
    let get = frozen.get(P).unwrap();
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::WriterMoved);
    w.vm.cpu_write(P, 6).unwrap();
    assert_eq!(w.vm.read_held(&get), 5);
    drop(frozen);
    assert_eq!(
        w.vm.read_held(&get),
        5,
        "the hold outlives the snapshot (B3)"
    );
}

#[test]
fn t05_a_break_moves_the_writer_when_a_clone_runs_on_the_frame() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let clone = SoftVm::clone_of(&frozen, &w.memory, right()).unwrap();
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::WriterMoved);
    w.vm.cpu_write(P, 6).unwrap();
    clone.cpu_write(P, 7).unwrap();
    assert_eq!((w.vm.cpu_read(P), clone.cpu_read(P)), (6, 7));
    assert_eq!(w.vm.read_frozen(&frozen, P), 5);
}

#[test]
fn t06_unshare_of_an_exclusive_page_does_nothing() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.protect_without_sharing(P);
    let before = (w.entry(P), w.stats());
    w.vm.space.unshare(P).unwrap();
    assert_eq!((w.entry(P), w.stats()), before);
}

#[test]
fn t07_unshare_by_the_last_holder_keeps_the_frame_and_stays_read_only() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frame = w.entry(P).pfn();
    drop(w.vm.space.fork().unwrap());
    w.vm.space.unshare(P).unwrap();
    assert_eq!((w.slot(P), w.entry(P).pfn()), ("RX", frame));
    assert_eq!(w.vm.mmu.page(P), (frame, Protection::ReadOnly), "I11");
}

#[test]
fn t08_unshare_of_a_shared_page_never_makes_it_writable() {
    for hold_it in [false, true] {
        let w = world();
        w.vm.cpu_write(P, 5).unwrap();
        let frozen = w.vm.space.fork().unwrap();
        let hold = hold_it.then(|| frozen.get(P).unwrap());
        w.vm.space.unshare(P).unwrap();
        assert_eq!(w.slot(P), "RX");
        assert_eq!(w.vm.mmu.page(P).1, Protection::ReadOnly, "I11");
        assert_ne!(frozen.frame(P).unwrap(), w.entry(P).pfn());
        assert_eq!((w.vm.cpu_read(P), w.vm.read_frozen(&frozen, P)), (5, 5));
        drop(hold);
    }
}

#[test]
fn t08_unshare_of_untouched_memory_gives_it_a_frame() {
    let w = world();
    let pin = w.vm.space.pin(P, Access::Read).unwrap();
    assert_eq!(w.slot(P), "RX");
    w.vm.cpu_write(P, 9).unwrap();
    assert_eq!(
        w.vm.dma_read(&pin),
        9,
        "E5: a pin of a zero page must not diverge"
    );
}

#[test]
fn t09_unshare_of_a_writable_page_does_nothing() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let before = (w.entry(P), w.state(P), w.stats());
    w.vm.space.unshare(P).unwrap();
    assert_eq!((w.entry(P), w.state(P), w.stats()), before);
}

#[test]
fn t10_fork_shares_what_is_not_pinned_and_protects_both_sides() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frame = w.entry(P).pfn();
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!((w.slot(P), frozen.frame(P).unwrap()), ("RS", frame));
    assert_eq!(w.state(P).maps(), 2);
    assert_eq!(w.vm.mmu.page(P).1, Protection::ReadOnly, "I7");
    assert_eq!(w.pool.usage().in_use, 1);
    assert_eq!(frozen.frame(Q).unwrap(), Pfn::ZERO);
}

#[test]
fn t11_fork_copies_a_pinned_page_and_leaves_the_parent_alone() {
    for access in [Access::Read, Access::Write] {
        let w = world();
        w.vm.cpu_write(P, 5).unwrap();
        w.vm.cpu_write(Q, 6).unwrap();
        let pin = w.vm.space.pin(P, access).unwrap();
        let before = w.entry(P);
        let frozen = w.vm.space.fork().unwrap();
        assert_eq!(
            (w.entry(P), w.slot(P)),
            (before, "WX"),
            "untouched, not even protected"
        );
        assert_eq!(w.slot(Q), "RS");
        assert_eq!(w.vm.mmu.page(P).1, Protection::ReadWrite);
        assert_eq!(w.stats().eager_copied, 1);
        w.vm.cpu_write(P, 7).unwrap();
        assert_eq!(w.vm.dma_read(&pin), 7, "D1: coherent");
        w.vm.dma_write(&pin, 8);
        assert_eq!(w.vm.cpu_read(P), 8, "D2: coherent");
        assert_eq!(w.vm.read_frozen(&frozen, P), 5, "D2: isolated");
    }
}

#[test]
fn t11_fork_copies_a_read_only_exclusive_pinned_page() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.protect_without_sharing(P);
    let pin = w.vm.space.pin(P, Access::Read).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!(w.slot(P), "RX");
    w.vm.cpu_write(P, 6).unwrap();
    assert_eq!(
        (w.vm.dma_read(&pin), w.vm.read_frozen(&frozen, P)),
        (6, 5),
        "D4b"
    );
}

#[test]
fn t12_fork_of_a_shared_page_tests_no_pins() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let a = w.vm.space.fork().unwrap();
    let get = w.vm.space.get(P, Access::Read).unwrap();
    let b = w.vm.space.fork().unwrap();
    assert_eq!(a.frame(P), b.frame(P));
    assert_eq!((w.state(P).maps(), w.stats().eager_copied), (3, 0));
    drop(get);
}

#[test]
fn t24_unpin_leaves_the_bit_and_makes_the_page_shareable_again() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    drop(w.vm.space.pin(P, Access::Write).unwrap());
    assert_eq!(w.slot(P), "WX");
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!(
        (frozen.frame(P).unwrap(), w.stats().eager_copied),
        (w.entry(P).pfn(), 0),
        "C12"
    );
}

#[test]
fn t25_a_pin_survives_its_address_space_on_an_orphan_frame() {
    let World {
        pool, memory, vm, ..
    } = world();
    vm.cpu_write(P, 5).unwrap();
    let pin = vm.space.pin(P, Access::Write).unwrap();
    drop(vm);
    let state = pool.state(pin.pfn());
    assert_eq!(
        (state.maps(), state.pins(), state.is_exclusive()),
        (0, 1, false)
    );
    assert_eq!(memory.load(pin.pfn()), 5);
    assert_eq!(pool.leftovers(9).len(), 1);
    drop(pin);
    assert_eq!(pool.leftovers(9), []);
}

#[test]
fn a_writing_pin_breaks_cow_and_makes_the_page_writable() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let pin = w.vm.space.pin(P, Access::Write).unwrap();
    w.vm.dma_write(&pin, 6);
    assert_eq!((w.slot(P), w.vm.cpu_read(P)), ("WX", 6));
    assert_eq!(w.vm.read_frozen(&frozen, P), 5);
}

#[test]
fn a_pin_takes_the_fast_path_when_nothing_is_in_the_way() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    drop(w.vm.space.pin(P, Access::Write).unwrap());
    drop(w.vm.space.pin(P, Access::Read).unwrap());
    assert_eq!((w.stats().pins_fast, w.stats().pins_slow), (2, 0));
    let frozen = w.vm.space.fork().unwrap();
    drop(w.vm.space.pin(P, Access::Read).unwrap());
    assert_eq!((w.stats().pins_fast, w.stats().pins_slow), (2, 1));
    drop(frozen);
}

#[test]
fn e1_a_reading_pin_after_fork_stays_coherent() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let pin = w.vm.space.pin(P, Access::Read).unwrap();
    w.vm.cpu_write(P, 6).unwrap();
    assert_eq!((w.vm.dma_read(&pin), w.vm.read_frozen(&frozen, P)), (6, 5));
}

#[test]
fn a7_a_fork_that_fails_half_way_leaves_the_parent_whole_and_leaks_nothing() {
    // Frames: the zero frame, a home of four, and none for an eager copy.
    let w = world_of(4, 5);
    for (gfn, value) in [(P, 5), (Q, 6), (Gfn(2), 7)] {
        w.vm.cpu_write(gfn, value).unwrap();
    }
    let pin = w.vm.space.pin(Gfn(2), Access::Write).unwrap();
    let error = w.vm.space.fork().unwrap_err();
    assert!(
        matches!(error, ForkError::EagerCopy { gfn: Gfn(2), .. }),
        "{error}"
    );
    assert_eq!(w.slot(Gfn(2)), "WX", "I10: the pinned page is as it was");
    for gfn in [P, Q, Gfn(2)] {
        assert_eq!(w.state(gfn).maps(), 1);
        w.vm.cpu_write(gfn, 9).unwrap();
    }
    assert_eq!((w.stats().writer_moved, w.stats().sharers_moved), (0, 0));
    assert_eq!(w.vm.dma_read(&pin), 9);
}

#[test]
fn a_fault_without_memory_is_an_error_and_changes_nothing() {
    let w = world_of(4, 5);
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let before = (w.entry(P), w.state(P));
    let error = w.vm.space.write_fault(P).unwrap_err();
    assert!(error.to_string().contains("out of memory"), "{error}");
    assert_eq!((w.entry(P), w.state(P)), before);
    assert_eq!(w.vm.read_frozen(&frozen, P), 5);
}

#[test]
fn a_page_beyond_the_end_is_refused_everywhere() {
    let w = world();
    let beyond = Gfn(4);
    assert!(w.vm.space.write_fault(beyond).is_err());
    assert!(w.vm.space.unshare(beyond).is_err());
    assert!(w.vm.space.pin(beyond, Access::Read).is_err());
    assert!(w.vm.space.pin_range(Gfn(3), 2, Access::Read).is_err());
    assert!(
        w.vm.space
            .pin_range(Gfn(u64::MAX), 1, Access::Read)
            .is_err()
    );
    assert!(w.vm.space.get(beyond, Access::Read).is_err());
    assert_eq!(
        w.state(Gfn(3)).pins(),
        0,
        "a range is pinned whole or not at all"
    );
}

#[test]
fn restore_copies_into_the_frames_that_are_there() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 6).unwrap();
    let first = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 7).unwrap();
    w.vm.cpu_write(Q, 8).unwrap();
    let second = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 9).unwrap();
    let frames = (w.entry(P).pfn(), w.entry(Q).pfn());
    w.vm.space.restore(&first).unwrap();
    assert_eq!((w.vm.cpu_read(P), w.vm.cpu_read(Q)), (5, 6));
    assert_eq!(
        (w.entry(P).pfn(), w.entry(Q).pfn()),
        frames,
        "no page has moved"
    );
    assert_eq!((w.slot(P), w.slot(Q)), ("WX", "RX"));
    assert_eq!(
        (w.vm.read_frozen(&second, P), w.vm.read_frozen(&second, Q)),
        (7, 8)
    );
    w.vm.cpu_write(Q, 1).unwrap();
    assert_eq!(
        (w.vm.read_frozen(&first, P), w.vm.read_frozen(&first, Q)),
        (5, 6)
    );
}

#[test]
fn restore_leaves_alone_what_the_snapshot_shares() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let before = (w.entry(P), w.state(P), w.stats());
    w.vm.space.restore(&frozen).unwrap();
    assert_eq!((w.entry(P), w.state(P), w.stats()), before);
}

#[test]
fn restore_keeps_pins_coherent() {
    let w = world();
    let empty = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 5).unwrap();
    let pin = w.vm.space.pin(P, Access::Write).unwrap();
    let full = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 6).unwrap();
    w.vm.space.restore(&full).unwrap();
    assert_eq!((w.vm.cpu_read(P), w.vm.dma_read(&pin)), (5, 5));
    w.vm.space.restore(&empty).unwrap();
    assert_eq!(
        (w.vm.cpu_read(P), w.vm.dma_read(&pin)),
        (0, 0),
        "zeros, in the pinned frame"
    );
    w.vm.dma_write(&pin, 7);
    assert_eq!(w.vm.cpu_read(P), 7);
    assert_eq!(
        (w.vm.read_frozen(&full, P), w.vm.read_frozen(&empty, P)),
        (5, 0)
    );
}

#[test]
fn restore_refuses_another_size() {
    let w = world();
    let other = world_of(3, 16);
    let frozen = other.vm.space.fork().unwrap();
    assert!(matches!(
        w.vm.space.restore(&frozen),
        Err(RestoreError::Size {
            snapshot: 3,
            space: 4
        })
    ));
}

#[test]
fn restore_refuses_frames_of_another_pool() {
    let (w, other) = (world(), world());
    w.vm.cpu_write(P, 1).unwrap();
    other.vm.cpu_write(P, 2).unwrap();
    let frozen = other.vm.space.fork().unwrap();
    let refused = w.vm.space.restore(&frozen);
    assert!(matches!(refused, Err(RestoreError::Pool)), "{refused:?}");
    assert_eq!(w.vm.cpu_read(P), 1);
}

#[test]
fn everything_is_free_at_the_end() {
    let World { pool, vm, .. } = world();
    for gfn in [P, Q] {
        vm.cpu_write(gfn, 5).unwrap();
    }
    let a = vm.space.fork().unwrap();
    vm.cpu_write(P, 6).unwrap();
    let b = vm.space.fork().unwrap();
    vm.cpu_write(Q, 7).unwrap();
    drop((a, vm, b));
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0);
}

/// The oracle must be able to fail: a rule that shares pinned frames loses coherence or isolation.
#[test]
fn a_policy_that_shares_pinned_frames_is_caught() {
    struct SharesPinned;
    impl CowPolicy for SharesPinned {
        fn name(&self) -> &'static str {
            "shares-pinned"
        }
        fn may_share(&self, _: FrameState) -> bool {
            true
        }
        fn may_reuse(&self, frame: FrameState) -> bool {
            Exclusive.may_reuse(frame)
        }
        fn may_pin(&self, frame: FrameState, access: Access) -> bool {
            Exclusive.may_pin(frame, access)
        }
    }
    let (pool, memory) = soft_pool(64).unwrap();
    let vm = SoftVm::new(&pool, &memory, SharesPinned, 4).unwrap();
    vm.cpu_write(P, 5).unwrap();
    let pin = vm.space.pin(P, Access::Write).unwrap();
    let frozen = vm.space.fork().unwrap();
    vm.dma_write(&pin, 6);
    assert_eq!(
        vm.read_frozen(&frozen, P),
        6,
        "the device writes into the snapshot"
    );
    vm.cpu_write(P, 7).unwrap();
    assert_eq!(
        vm.dma_read(&pin),
        6,
        "the device reads what the guest no longer has"
    );
}

/// While mappings are short, who writes one page of a region gets all of it: one mapping does for them.
#[test]
fn a_crowded_mmu_has_the_whole_region_resolved() {
    let w = world_of(REGION_PAGES + 1, 4 * REGION_PAGES);
    let next_region = Gfn(REGION_PAGES);
    for gfn in [P, Q, next_region] {
        w.vm.cpu_write(gfn, 5).unwrap();
    }
    let frozen = w.vm.space.fork().unwrap();
    w.mmu.crowded.store(1, Ordering::Relaxed);
    assert_eq!(w.vm.space.write_fault(Q).unwrap(), Resolution::SharersMoved);
    for page in 0..REGION_PAGES {
        let reads = if page < 2 { 5 } else { 0 };
        assert_eq!(
            (w.slot(Gfn(page)), w.vm.cpu_read(Gfn(page))),
            ("WX", reads),
            "{page}"
        );
    }
    assert_eq!(w.slot(next_region), "RS");
    let stats = w.stats();
    assert_eq!(
        (stats.sharers_moved, stats.neighbours),
        (1, REGION_PAGES - 1),
        "nobody asked for the others"
    );
    w.vm.cpu_write(P, 6).unwrap();
    assert_eq!(w.vm.read_frozen(&frozen, P), 5);
}

/// The MMU is a system call away.
#[test]
fn a_whole_region_is_made_writable_with_few_calls() {
    let crowded_write = |w: &World, expected| {
        w.mmu.crowded.store(1, Ordering::Relaxed);
        w.mmu.never();
        assert_eq!(w.vm.space.write_fault(P).unwrap(), expected);
        let all = (0..6).map(Gfn);
        assert!(all.into_iter().all(|gfn| w.slot(gfn) == "WX"));
        w.mmu.calls()
    };
    // Nothing was touched: the page, and the frames of all others at once.
    let w = world_of(6, 64);
    assert_eq!(crowded_write(&w, Resolution::ZeroFilled), 2);
    // All are there and nobody else's: the page, and the right to write all others, though one of them is
    // writable already.
    let w = world_of(6, 64);
    (0..6).for_each(|n| w.vm.cpu_write(Gfn(n), 5).unwrap());
    drop(w.vm.space.fork().unwrap());
    w.vm.cpu_write(Gfn(3), 6).unwrap();
    assert_eq!(crowded_write(&w, Resolution::Reused), 2);
    // Two runs of untouched pages around one that is there.
    let w = world_of(6, 64);
    w.vm.cpu_write(Gfn(3), 6).unwrap();
    assert_eq!(crowded_write(&w, Resolution::ZeroFilled), 3);
    assert_eq!(w.vm.cpu_read(Gfn(3)), 6);
}

#[test]
fn a_write_that_finds_nothing_to_do_leaves_its_neighbours_alone() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.mmu.crowded.store(1, Ordering::Relaxed);
    assert_eq!(
        w.vm.space.write_fault(P).unwrap(),
        Resolution::AlreadyWritable
    );
    assert_eq!((w.slot(Q), w.stats().neighbours), ("ZERO", 0));
}

/// Neighbours are a favour: there may be no memory for them.
#[test]
fn a_crowded_mmu_without_memory_has_the_page_itself_resolved() {
    let w = world_of(4, 5);
    for gfn in [P, Q] {
        w.vm.cpu_write(gfn, 5).unwrap();
    }
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(Gfn(2), 6).unwrap();
    w.mmu.crowded.store(1, Ordering::Relaxed);
    assert_eq!(
        w.vm.space.write_fault(Gfn(3)).unwrap(),
        Resolution::ZeroFilled
    );
    assert_eq!([P, Q].map(|gfn| w.slot(gfn)), ["RS", "RS"]);
    assert_eq!((w.stats().zero_filled, w.stats().neighbours), (4, 0));
    assert_eq!(w.vm.read_frozen(&frozen, P), 5);
}

/// A guest that is snapshotted for days has many behind it.
#[test]
fn snapshots_that_are_gone_are_forgotten() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let kept = w.vm.space.fork().unwrap();
    for _ in 0..9 {
        drop(w.vm.space.fork().unwrap());
    }
    let last = w.vm.space.fork().unwrap();
    let remembered = w.vm.space.mapped.table.lock_of(P).state.sharers.len();
    assert_eq!(remembered, 2);
    drop((kept, last));
}

/// What a device thread does must not wait for a fault that copies.
/// A fork stops vCPUs' writes before it says so in the entries: nobody may look in between.
#[test]
fn whatever_changes_a_page_waits_for_a_fork() {
    type Operation = fn(&World);
    let operations: [(&str, Operation); 10] = [
        ("write", |w| assert!(w.vm.space.write_fault(P).is_ok())),
        ("unshare", |w| w.vm.space.unshare(P).unwrap()),
        ("pin", |w| drop(w.vm.space.pin(P, Access::Write).unwrap())),
        ("get", |w| drop(w.vm.space.get(P, Access::Write).unwrap())),
        ("force", |w| w.vm.space.force_write(P, 0, &[1]).unwrap()),
        ("dirty", |w| drop(w.vm.space.take_dirty().unwrap())),
        ("discard", |w| assert!(w.vm.space.discard(Q, 1).is_ok())),
        ("migrate", |w| assert!(w.vm.space.migrate(Q).is_ok())),
        ("merge", |w| w.vm.space.merge(P, &w.vm.space, Q).unwrap()),
        ("ahead", |w| assert!(!w.vm.space.break_ahead())),
    ];
    for (name, operation) in operations {
        let w = world();
        w.vm.cpu_write(P, 5).unwrap();
        w.vm.cpu_write(Q, 5).unwrap();
        drop(w.vm.space.fork().unwrap());
        // Of its own, and read-only.
        w.vm.space.unshare(Q).unwrap();
        std::thread::scope(|scope| {
            let fork = w.vm.space.mapped.enter_alone().unwrap();
            let operation = scope.spawn(|| operation(&w));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!operation.is_finished(), "{name} does not wait");
            drop(fork);
            operation.join().unwrap();
        });
    }
}

#[test]
fn a_pin_of_an_exclusive_page_waits_for_no_lock() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let locks = (
        w.vm.space.mapped.enter_alone().unwrap(),
        w.vm.space.mapped.table.lock_of(P),
    );
    let pins = beside(locks, || {
        [Access::Read, Access::Write].map(|access| w.vm.space.pin(P, access).unwrap())
    });
    assert_eq!((w.state(P).pins(), w.stats().pins_fast), (2, 2));
    drop(pins);
}
