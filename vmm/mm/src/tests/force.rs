//! A debugger's write: breaks COW, and gives the guest no right it did not have.

use super::*;

/// PROTOCOL.md H-a.
#[test]
fn ha_a_forced_write_breaks_cow_and_leaves_the_page_read_only() {
    for hold_it in [false, true] {
        let w = world();
        w.vm.cpu_write(P, 0x0102_0304).unwrap();
        let frozen = w.vm.space.fork().unwrap();
        let hold = hold_it.then(|| frozen.get(P).unwrap());
        w.vm.space.force_write(P, 1, &[0xaa, 0xbb]).unwrap();
        assert_eq!(
            (w.slot(P), w.vm.mmu.page(P).1),
            ("RX", Protection::ReadOnly)
        );
        assert_eq!(w.vm.cpu_read(P), 0x01bb_aa04);
        assert_eq!(w.vm.read_frozen(&frozen, P), 0x0102_0304);
        assert_eq!(w.stats().unshared, 1);
        assert!(w.entry(P).is_dirty());
        assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::Reused);
        drop(hold);
    }
}

#[test]
fn a_forced_write_into_a_page_of_ones_own_changes_only_the_bytes() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let pin = w.vm.space.pin(P, Access::Write).unwrap();
    let (entry, state, stats) = (w.entry(P), w.state(P), w.stats());
    w.vm.space.force_write(P, 0, &[7]).unwrap();
    assert_eq!((w.entry(P), w.state(P), w.stats()), (entry, state, stats));
    assert_eq!((w.vm.cpu_read(P), w.vm.dma_read(&pin)), (7, 7));
}

#[test]
fn a_forced_write_into_untouched_memory_gives_it_a_frame() {
    let w = world();
    w.vm.space.force_write(P, 1, &[1]).unwrap();
    assert_eq!((w.slot(P), w.vm.cpu_read(P)), ("RX", 0x100));
    assert_eq!(w.vm.mmu.page(P), (w.entry(P).pfn(), Protection::ReadOnly));
}

#[test]
fn a_forced_write_may_reach_to_the_end_of_the_page() {
    let w = world();
    w.vm.space.force_write(P, PAGE_SIZE - 2, &[1, 2]).unwrap();
    w.vm.space
        .force_write(P, 0, &[0; PAGE_SIZE as usize])
        .unwrap();
    w.vm.space.force_write(P, PAGE_SIZE, &[]).unwrap();
}

#[test]
#[should_panic(expected = "2 bytes at offset 4095 are not in a page")]
fn a_forced_write_beyond_the_page_is_a_bug() {
    let _ = world().vm.space.force_write(P, PAGE_SIZE - 1, &[1, 2]);
}

#[test]
#[should_panic(expected = "0 bytes at offset 4097 are not in a page")]
fn a_forced_write_from_beyond_the_page_is_a_bug() {
    let _ = world().vm.space.force_write(P, PAGE_SIZE + 1, &[]);
}

#[test]
fn a_forced_write_that_fails_changes_nothing() {
    let w = world_of(4, 5);
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let before = w.picture();
    let error = w.vm.space.force_write(P, 0, &[1]).unwrap_err();
    assert!(matches!(error, FaultError::Alloc(AllocError::Limit { .. })));
    let error = w.vm.space.force_write(Gfn(4), 0, &[1]).unwrap_err();
    assert!(matches!(
        error,
        FaultError::OutOfRange(OutOfRange { gfn: Gfn(4), .. })
    ));
    assert_eq!((w.picture(), w.vm.read_frozen(&frozen, P)), (before, 5));

    let failed = refused_at_each_call(
        world,
        |w| &*w.mmu,
        World::picture,
        |w| w.vm.space.force_write(P, 0, &[1]),
    );
    assert_eq!(failed, 1);
}
