//! Holds taken without a lock.

use super::*;
use crate::mm::Access;

/// B1 as a race: a reader that holds a snapshot's frame never sees what the guest writes.
pub(crate) fn get_through_a_snapshot_against_break<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let hold = frozen.get(P).unwrap();
    let before = w.vm.read_held(&hold);
    guest.join().unwrap();
    assert_eq!(before, OLD, "isolation");
    assert_eq!(w.vm.read_held(&hold), OLD, "isolation");
    assert_eq!(w.read(), NEW, "lost");
    drop((hold, frozen));
    w.settle();
}

/// The frame leaves the page, and becomes exclusive to a clone, while a hold on the page is on its way.
pub(crate) fn get_against_a_frame_that_becomes_a_clones<C: Policy>() {
    let w = world::<C>();
    let clone = w.clone();
    let reader = w.beside(|vm| {
        let hold = vm.space.get(P, Access::Read).unwrap();
        let first = vm.read_held(&hold);
        (hold, first)
    });
    w.write(NEW);
    clone.cpu_write(P, CLONES).unwrap();
    let (hold, first) = reader.join().unwrap();
    for seen in [first, w.vm.read_held(&hold)] {
        assert!([OLD, NEW].contains(&seen), "isolation: {seen}");
    }
    drop((hold, clone));
    w.settle();
}

/// A hold against a page that moves to another frame: refused, or the hold is of the old frame or the new,
/// and given back once.
pub(crate) fn get_against_migrate<C: Policy>() {
    let w = world::<C>();
    let reader = w.beside(|vm| {
        let hold = vm.space.get(P, Access::Read).unwrap();
        vm.read_held(&hold)
    });
    // Refused if the reader is there.
    let _ = w.vm.space.migrate(P);
    assert_eq!(reader.join().unwrap(), OLD, "isolation");
    assert_eq!(w.read(), OLD, "lost");
    assert_eq!(w.pool.usage().in_use, 1);
    w.settle();
}

/// A hold against a page that is given back: its reader sees what was there, or zeros.
pub(crate) fn get_against_discard<C: Policy>() {
    let w = world::<C>();
    let reader = w.beside(|vm| {
        let hold = vm.space.get(P, Access::Read).unwrap();
        vm.read_held(&hold)
    });
    w.vm.space.discard(P, 1).unwrap();
    let seen = reader.join().unwrap();
    assert!([OLD, 0].contains(&seen), "isolation: {seen}");
    assert_eq!(w.read(), 0, "lost");
    assert_eq!(w.pool.usage().in_use, 0);
    w.settle();
}
