//! Migration: a page in another frame, and nothing else different.

use super::*;

fn busy(w: &World) -> FrameState {
    let before = w.picture();
    let error = w.vm.space.migrate(P).unwrap_err();
    assert_eq!(w.picture(), before, "I10");
    match error {
        RearrangeError::Busy { gfn: P, state } => state,
        other => panic!("busy was expected, not {other:?}"),
    }
}

#[test]
fn a_page_leaves_its_home_and_returns_to_it() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let home = w.entry(P).pfn();
    let away = w.vm.space.migrate(P).unwrap();
    assert_ne!(away, home);
    for frame in [away, home] {
        if frame == home {
            assert_eq!(w.vm.space.migrate(P).unwrap(), home);
        }
        assert_eq!((w.entry(P).pfn(), w.slot(P)), (frame, "WX"));
        assert_eq!(w.vm.mmu.page(P), (frame, Protection::ReadWrite));
        assert_eq!((w.vm.cpu_read(P), w.state(P).refs()), (5, 1));
        assert_eq!(w.pool.usage().in_use, 1);
    }
    assert_eq!(w.pool.state(away).refs(), 0);
    let pin = w.vm.space.pin(P, Access::Write).unwrap();
    assert_eq!((pin.pfn(), w.stats().pins_fast), (home, 1));
}

#[test]
fn a_break_of_a_page_away_from_home_brings_it_back() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let home = w.entry(P).pfn();
    w.vm.space.migrate(P).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let get = frozen.get(P).unwrap();
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::WriterMoved);
    assert_eq!((w.entry(P).pfn(), w.vm.cpu_read(P)), (home, 5));
    drop(get);
}

#[test]
fn a_read_only_page_stays_read_only_and_is_exclusive() {
    for shared_before in [false, true] {
        let w = world();
        w.vm.cpu_write(P, 5).unwrap();
        if shared_before {
            drop(w.vm.space.fork().unwrap());
            assert_eq!(w.slot(P), "RS");
        } else {
            w.protect_without_sharing(P);
        }
        let moved = w.vm.space.migrate(P).unwrap();
        assert_eq!(w.vm.mmu.page(P), (moved, Protection::ReadOnly));
        assert_eq!((w.slot(P), w.vm.cpu_read(P)), ("RX", 5), "T20");
    }
}

#[test]
fn untouched_memory_has_nowhere_to_go() {
    let w = world();
    w.vm.cpu_write(Q, 5).unwrap();
    w.vm.space.discard(Q, 1).unwrap();
    let before = w.picture();
    w.mmu.from(0);
    assert_eq!(w.vm.space.migrate(P).unwrap(), Pfn::ZERO);
    assert_eq!(w.vm.space.migrate(Q).unwrap(), Pfn::ZERO);
    assert_eq!(w.picture(), before);
}

/// C7 and C8 of PROTOCOL.md.
#[test]
fn a_page_that_anybody_else_holds_stays_where_it_is() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    for access in [Access::Read, Access::Write] {
        let pin = w.vm.space.pin(P, access).unwrap();
        assert_eq!(busy(&w).pins(), 1, "pinned");
        w.vm.cpu_write(P, 6).unwrap();
        assert_eq!(w.vm.dma_read(&pin), 6);
        drop(pin);
        let get = w.vm.space.get(P, access).unwrap();
        assert_eq!(busy(&w).gets(), 1, "held");
        drop(get);
    }
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!(busy(&w).maps(), 2, "shared with a snapshot");
    let clone = SoftVm::clone_of(&frozen, &w.memory, right()).unwrap();
    drop(frozen);
    assert_eq!(busy(&w).maps(), 2, "shared with a clone");
    drop(clone);
    w.vm.space.migrate(P).unwrap();
}

#[test]
fn a_migration_without_anywhere_to_go_changes_nothing() {
    // Frames: the zero frame, a home of four, and no other.
    let w = world_of(4, 5);
    w.vm.cpu_write(P, 5).unwrap();
    let before = w.picture();
    let error = w.vm.space.migrate(P).unwrap_err();
    assert!(
        matches!(error, RearrangeError::Alloc(AllocError::Limit { limit: 5 })),
        "{error:?}"
    );
    let error = w.vm.space.migrate(Gfn(4)).unwrap_err();
    assert!(matches!(
        error,
        RearrangeError::OutOfRange(OutOfRange {
            gfn: Gfn(4),
            pages: 4
        })
    ));
    assert_eq!(w.picture(), before);
}

#[test]
fn a_migration_that_the_mmu_refuses_changes_nothing() {
    for (writable, calls) in [(true, 2), (false, 1)] {
        let setup = || {
            let w = world();
            w.vm.cpu_write(P, 5).unwrap();
            if !writable {
                drop(w.vm.space.fork().unwrap());
            }
            w
        };
        let failed = refused_at_each_call(
            setup,
            |w| &*w.mmu,
            World::picture,
            |w| w.vm.space.migrate(P),
        );
        assert_eq!(failed, calls);
    }
}

/// Should even the undoing be refused, the page is read-only, which costs a fault.
#[test]
fn a_migration_that_cannot_be_undone_leaves_a_read_only_page() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let frame = w.entry(P).pfn();
    w.mmu.from(1);
    w.vm.space.migrate(P).unwrap_err();
    w.mmu.never();
    assert_eq!((w.slot(P), w.entry(P).pfn()), ("RX", frame));
    assert_eq!(w.vm.mmu.page(P), (frame, Protection::ReadOnly));
    assert!(w.entry(P).is_dirty(), "it was written");
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::Reused);
    assert_eq!(w.pool.usage().in_use, 1);
}
