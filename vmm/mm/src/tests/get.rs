//! Transient holds: `get` for reading and for writing.

use super::*;

#[test]
fn a_hold_is_counted_and_ends_with_its_handle() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let a = w.vm.space.get(P, Access::Read).unwrap();
    let b = w.vm.space.get(P, Access::Write).unwrap();
    assert_eq!((a.pfn(), b.pfn()), (w.entry(P).pfn(), w.entry(P).pfn()));
    assert_eq!((w.state(P).gets(), w.state(P).pins()), (2, 0));
    drop(a);
    assert_eq!(w.state(P).gets(), 1);
    drop(b);
    assert_eq!((w.state(P).gets(), w.slot(P)), (0, "WX"));
}

#[test]
fn a_reading_hold_changes_nothing() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let before = (w.entry(P), w.slot(P), w.stats());
    let get = w.vm.space.get(P, Access::Read).unwrap();
    assert_eq!((w.entry(P), w.slot(P), w.stats()), before);
    assert_eq!(
        (get.pfn(), w.vm.read_held(&get)),
        (frozen.frame(P).unwrap(), 5)
    );
}

#[test]
fn a_writing_hold_breaks_cow_first() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let get = w.vm.space.get(P, Access::Write).unwrap();
    assert_eq!((w.slot(P), w.stats().sharers_moved), ("WX", 1));
    w.memory.store(get.pfn(), 6);
    assert_eq!((w.vm.cpu_read(P), w.vm.read_frozen(&frozen, P)), (6, 5));
    let other = w.vm.space.get(Q, Access::Write).unwrap();
    assert_eq!((w.slot(Q), w.stats().zero_filled), ("WX", 2));
    assert_eq!(other.pfn(), w.entry(Q).pfn());
}

/// PROTOCOL.md D3: documented, and the reason there are pins.
#[test]
fn d3_a_writing_hold_loses_its_page_to_a_fork_and_a_write() {
    let w = world();
    let get = w.vm.space.get(P, Access::Write).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 6).unwrap();
    assert_ne!(get.pfn(), w.entry(P).pfn());
    assert_eq!((w.vm.read_held(&get), w.vm.read_frozen(&frozen, P)), (0, 0));
}

#[test]
fn a_hold_keeps_a_writer_of_a_shared_page_off_the_frame() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    drop(w.vm.space.fork().unwrap());
    let get = w.vm.space.get(P, Access::Read).unwrap();
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::WriterMoved);
    assert_eq!(w.stats().writer_moved, 1);
    let frames = w.pool.usage().in_use;
    drop(get);
    assert_eq!(
        w.pool.usage().in_use,
        frames - 1,
        "the hold was the last of it"
    );
}

#[test]
fn holds_beyond_the_end_are_refused() {
    let w = world();
    let frozen = w.vm.space.fork().unwrap();
    let beyond = OutOfRange {
        gfn: Gfn(4),
        pages: 4,
    };
    for access in [Access::Read, Access::Write] {
        let error = w.vm.space.get(Gfn(4), access).unwrap_err();
        assert!(matches!(error, FaultError::OutOfRange(e) if e == beyond));
    }
    let is_beyond = |error| matches!(error, FrozenError::OutOfRange(error) if error == beyond);
    assert!(is_beyond(frozen.get(Gfn(4)).unwrap_err()));
    assert_eq!(frozen.frame(Gfn(4)).unwrap_err(), beyond);
    assert!(is_beyond(frozen.with_frame(Gfn(4), drop).unwrap_err()));
}

#[test]
fn a_writing_hold_without_memory_changes_nothing() {
    let w = world_of(4, 5);
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let before = w.picture();
    let error = w.vm.space.get(P, Access::Write).unwrap_err();
    assert!(matches!(
        error,
        FaultError::Alloc(AllocError::Limit { limit: 5 })
    ));
    assert_eq!((w.picture(), w.vm.read_frozen(&frozen, P)), (before, 5));
}

#[test]
fn a_writing_hold_that_the_mmu_refuses_is_not_taken() {
    for page in [P, Q] {
        let setup = || {
            let w = world();
            w.vm.cpu_write(P, 5).unwrap();
            w.protect_without_sharing(P);
            w
        };
        let failed = refused_at_each_call(
            setup,
            |w| &*w.mmu,
            World::picture,
            |w| w.vm.space.get(page, Access::Write),
        );
        assert_eq!(failed, 1);
    }
}

/// A reader of a frame that became another page's in between holds the right one all the same.
#[test]
fn a_snapshot_reader_holds_what_the_snapshot_has_now() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 6).unwrap();
    let get = frozen.get(P).unwrap();
    assert_eq!(
        (w.vm.read_held(&get), w.pool.state(get.pfn()).gets()),
        (5, 1)
    );
    assert_eq!(frozen.get(Q).unwrap().pfn(), Pfn::ZERO);
}

#[test]
fn a_reading_hold_waits_for_no_lock() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let locks = (
        w.vm.space.mapped.enter_alone().unwrap(),
        w.vm.space.mapped.table.lock_of(P),
    );
    let hold = beside(locks, || w.vm.space.get(P, Access::Read).unwrap());
    assert_eq!(w.state(P).gets(), 1);
    drop(hold);
}
