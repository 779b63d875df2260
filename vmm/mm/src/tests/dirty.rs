//! Dirty tracking: `take_dirty` names every page that changed, once, and costs no page anything.

use super::*;

fn taken(w: &World) -> Vec<u64> {
    let pages = w.vm.space.take_dirty().unwrap();
    pages.iter().map(|gfn| gfn.0).collect()
}

#[test]
fn a_written_page_is_in_one_answer() {
    let w = world();
    assert_eq!(taken(&w), [] as [u64; 0]);
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Gfn(3), 6).unwrap();
    w.vm.cpu_write(Gfn(3), 7).unwrap();
    assert_eq!(taken(&w), [0, 3]);
    assert_eq!(taken(&w), [] as [u64; 0]);
    w.vm.cpu_write(Gfn(3), 8).unwrap();
    assert_eq!(taken(&w), [3]);
    assert_eq!(taken(&w), [] as [u64; 0]);
}

/// PROTOCOL.md T21: the pages are read-only and exclusive, and the next write copies nothing (T3).
#[test]
fn t21_to_ask_never_takes_the_bit_and_never_copies() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 6).unwrap();
    let pin = w.vm.space.pin(Q, Access::Write).unwrap();
    let (frames, stats) = (w.pool.usage(), w.stats());
    let before = [P, Q].map(|gfn| (w.entry(gfn).pfn(), w.state(gfn)));
    assert_eq!(taken(&w), [0, 1]);
    assert_eq!([P, Q].map(|gfn| (w.entry(gfn).pfn(), w.state(gfn))), before);
    assert_eq!((w.slot(P), w.slot(Q)), ("RX", "RX"));
    assert_eq!(w.vm.mmu.page(P).1, Protection::ReadOnly);
    assert_eq!(w.vm.mmu.page(Q).1, Protection::ReadOnly);
    assert_eq!((w.pool.usage(), w.stats()), (frames, stats));
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::Reused);
    w.vm.cpu_write(Q, 7).unwrap();
    assert_eq!(
        w.vm.dma_read(&pin),
        7,
        "C1: the device has not lost the page"
    );
    assert_eq!(w.pool.usage(), frames);
}

#[test]
fn to_be_writable_is_to_be_written() {
    let w = world();
    w.vm.space.write_fault(P).unwrap();
    drop(w.vm.space.pin(Q, Access::Write).unwrap());
    drop(w.vm.space.get(Gfn(2), Access::Write).unwrap());
    assert_eq!(taken(&w), [0, 1, 2], "a write leaves no other trace");
}

#[test]
fn what_only_looks_at_a_page_does_not_mark_it() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    assert_eq!(taken(&w), [0]);
    w.vm.space.unshare(P).unwrap();
    w.vm.space.unshare(Q).unwrap();
    let pin = w.vm.space.pin(Gfn(2), Access::Read).unwrap();
    let get = w.vm.space.get(P, Access::Read).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    w.vm.space.unshare(P).unwrap();
    assert_eq!(w.slot(P), "RX");
    assert_eq!(taken(&w), [] as [u64; 0]);
    drop((pin, get, frozen));
}

#[test]
fn a_pinned_page_stays_marked_until_one_answer_after_the_pin() {
    for access in [Access::Read, Access::Write] {
        let w = world();
        w.vm.cpu_write(P, 5).unwrap();
        let pin = w.vm.space.pin(P, access).unwrap();
        for _ in 0..3 {
            assert_eq!(taken(&w), [0]);
            w.vm.dma_write(&pin, 6);
            assert!(w.entry(P).is_dirty() && !w.entry(P).is_writable());
        }
        drop(pin);
        assert_eq!(taken(&w), [0]);
        assert_eq!(taken(&w), [] as [u64; 0]);
        drop(w.vm.space.pin(P, Access::Read).unwrap());
        assert_eq!(taken(&w), [] as [u64; 0], "a reading pin of a clean page");
    }
}

/// In the kernel who holds a page marks it when he is done. Here he need not: his hold is seen.
#[test]
fn what_a_host_writer_writes_after_the_answer_is_in_the_next() {
    let w = world();
    let get = w.vm.space.get(P, Access::Write).unwrap();
    assert_eq!(taken(&w), [0]);
    w.memory.store(get.pfn(), 5);
    assert_eq!(taken(&w), [0]);
    w.memory.store(get.pfn(), 6);
    drop(get);
    assert_eq!(taken(&w), [0], "one answer after the hold");
    assert_eq!(w.vm.cpu_read(P), 6);
    assert_eq!(taken(&w), [] as [u64; 0]);
}

#[test]
fn a_forced_write_a_discard_and_a_restore_change_pages() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 6).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!(taken(&w), [0, 1]);
    w.vm.space.force_write(P, 0, &[1]).unwrap();
    assert_eq!(taken(&w), [0]);
    w.vm.space.restore(&frozen).unwrap();
    assert_eq!(taken(&w), [0], "the other is the snapshot's still");
    w.vm.space.discard(P, 3).unwrap();
    assert_eq!(taken(&w), [0, 1], "the third had nothing to lose");
    assert_eq!(taken(&w), [] as [u64; 0]);
    w.vm.space.restore(&frozen).unwrap();
    assert_eq!(taken(&w), [0, 1]);
}

#[test]
fn a_discarded_page_that_is_touched_before_the_answer_is_in_it() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    assert_eq!(taken(&w), [0]);
    w.vm.space.discard(P, 1).unwrap();
    w.vm.space.unshare(P).unwrap();
    assert_eq!(taken(&w), [0], "it reads as zeros, and did not before");
}

#[test]
fn marks_survive_a_fork_and_a_break() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 6).unwrap();
    let pin = w.vm.space.pin(Q, Access::Write).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    assert!(w.entry(P).is_dirty() && w.entry(Q).is_dirty());
    // An unshare that moves the writer keeps its mark as it was.
    let get = frozen.get(P).unwrap();
    w.vm.space.unshare(P).unwrap();
    assert_eq!(w.stats().unshared, 1);
    assert_eq!(taken(&w), [0, 1]);
    drop((pin, get));
    assert_eq!(taken(&w), [1]);
    drop(w.vm.space.fork().unwrap());
    w.vm.space.unshare(P).unwrap();
    assert_eq!(taken(&w), [] as [u64; 0]);
}

#[test]
fn a_clone_starts_clean() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 6).unwrap();
    let pin = w.vm.space.pin(Q, Access::Write).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let clone = SoftVm::clone_of(&frozen, &w.memory, right()).unwrap();
    assert!(clone.space.take_dirty().unwrap().is_empty());
    clone.cpu_write(Q, 7).unwrap();
    assert_eq!(clone.space.take_dirty().unwrap().len(), 1);
    assert_eq!(taken(&w), [0, 1], "and takes no mark from its parent");
    drop(pin);
}

#[test]
fn to_move_a_page_is_not_to_change_it() {
    let w = world();
    for gfn in [P, Q] {
        w.vm.cpu_write(gfn, 5).unwrap();
    }
    assert_eq!(taken(&w), [0, 1]);
    w.vm.space.migrate(P).unwrap();
    w.vm.space.merge(P, &w.vm.space, Q).unwrap();
    assert_eq!(taken(&w), [] as [u64; 0]);
    w.vm.cpu_write(P, 6).unwrap();
    w.vm.cpu_write(Q, 6).unwrap();
    w.vm.space.migrate(P).unwrap();
    assert_eq!(w.slot(P), "WX");
    w.vm.space.merge(P, &w.vm.space, Q).unwrap();
    assert_eq!(taken(&w), [0, 1]);
}

/// Of each region the MMU is asked once, and not at all where nothing is writable.
#[test]
fn an_answer_costs_one_call_a_region() {
    let w = world_of(4 * REGION_PAGES, 5 * REGION_PAGES);
    for page in [3, 7, 9, 511, 512, 1600] {
        w.vm.cpu_write(Gfn(page), 5).unwrap();
    }
    w.vm.space.unshare(Gfn(1100)).unwrap();
    w.mmu.never();
    assert_eq!(taken(&w), [3, 7, 9, 511, 512, 1600]);
    assert_eq!(w.mmu.calls(), 3);
    for page in [3, 7, 9, 511, 512, 1600] {
        assert_eq!(w.slot(Gfn(page)), "RX");
        assert_eq!(w.vm.mmu.page(Gfn(page)).1, Protection::ReadOnly);
    }
    w.mmu.never();
    assert_eq!(taken(&w), [] as [u64; 0]);
    assert_eq!(w.mmu.calls(), 0);
}

#[test]
fn an_answer_that_the_mmu_refuses_is_in_the_next() {
    for nth in 0..3 {
        let w = world_of(4 * REGION_PAGES, 5 * REGION_PAGES);
        let pages = [3, 7, 512, 700, 1024, 1025, 1600];
        for page in pages {
            w.vm.cpu_write(Gfn(page), 5).unwrap();
        }
        w.vm.space.discard(Gfn(7), 1).unwrap();
        w.vm.space.discard(Gfn(1024), 512).unwrap();
        let frames = pages.map(|page| (w.entry(Gfn(page)).pfn(), w.state(Gfn(page))));
        w.mmu.at(nth);
        let error = w.vm.space.take_dirty().unwrap_err();
        assert!(error.to_string().starts_with("cannot protect"), "{error}");
        for page in pages {
            let (entry, shown) = (w.entry(Gfn(page)), w.vm.mmu.page(Gfn(page)));
            assert_eq!(
                (entry.pfn(), entry.is_writable()),
                (shown.0, shown.1 == Protection::ReadWrite)
            );
        }
        assert_eq!(
            pages.map(|page| (w.entry(Gfn(page)).pfn(), w.state(Gfn(page)))),
            frames
        );
        assert_eq!(taken(&w), pages);
        assert_eq!(taken(&w), [] as [u64; 0]);
    }
}

#[test]
fn a_set_of_pages_knows_its_pages() {
    let w = world_of(200, 256);
    let none = w.vm.space.take_dirty().unwrap();
    assert!(none.is_empty() && !none.contains(P));
    let pages = [0, 1, 62, 63, 64, 65, 127, 128, 199];
    for page in pages.into_iter().rev() {
        w.vm.cpu_write(Gfn(page), 5).unwrap();
    }
    let set = w.vm.space.take_dirty().unwrap();
    assert!(set.iter().eq(pages.map(Gfn)), "in order");
    assert_eq!((set.len(), set.is_empty()), (9, false));
    for page in 0..1000 {
        assert_eq!(set.contains(Gfn(page)), pages.contains(&page), "{page}");
    }
}

/// Regions without a trace of a page are passed over: an answer, a fork or a drop costs what was touched.
#[test]
fn a_region_is_untouched_again_once_it_was_said_that_its_pages_are() {
    let w = world_of(2 * REGION_PAGES, 4 * REGION_PAGES);
    let untouched = || [0, 1].map(|index| w.vm.space.mapped.table.lock(index).is_untouched());
    assert_eq!(untouched(), [true, true]);
    let far = Gfn(REGION_PAGES + 1);
    for gfn in [P, Q, far] {
        w.vm.cpu_write(gfn, 5).unwrap();
    }
    assert_eq!(untouched(), [false, false]);
    w.vm.space.discard(P, REGION_PAGES).unwrap();
    assert_eq!(untouched(), [false, false], "zeros are news");
    assert_eq!(taken(&w), [0, 1, far.0]);
    assert_eq!(untouched(), [true, false]);
    w.vm.cpu_write(Q, 6).unwrap();
    assert_eq!((untouched(), taken(&w)), ([false, false], vec![1]));
}
