//! Fork, against what it does not stop.

use super::*;
use crate::mm::Access;

/// G6: an unshare and a fork come one after the other: exclusive, or shared again.
pub(crate) fn unshare_against_fork<C: Policy>() {
    let w = world::<C>();
    let first = w.fork();
    let reader = w.beside(|vm| vm.space.unshare(P).unwrap());
    let second = w.fork();
    reader.join().unwrap();
    let entry = w.vm.space.entry(P).unwrap();
    assert!(!entry.is_writable(), "to unshare is not to write");
    let state = w.pool.state(entry.pfn());
    let shared = second.frame(P).unwrap() == entry.pfn();
    assert_eq!(state.is_exclusive(), !shared, "isolation: {state:?}");
    w.write(NEW);
    let all = (w.read_frozen(&first), w.read_frozen(&second));
    assert_eq!(all, (OLD, OLD), "isolation");
    drop((first, second));
    w.settle();
}

/// A vCPU that was not stopped writes a page while it is forked: before, or after a fault.
pub(crate) fn write_against_fork<C: Policy>() {
    let w = world::<C>();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let frozen = w.fork();
    let at_fork = w.read_frozen(&frozen);
    guest.join().unwrap();
    assert_eq!(w.read(), NEW, "lost");
    assert_eq!(w.read_frozen(&frozen), at_fork, "isolation");
    drop(frozen);
    w.settle();
}

/// A fault on a read-only page between two writable ones: fork protects all three in one call.
pub(crate) fn write_against_fork_of_a_run<C: Policy>() {
    const X: Gfn = Gfn(1);
    let w = world_of::<C>(3);
    w.vm.space.take_dirty().unwrap();
    w.write(NEW);
    w.vm.cpu_write(Gfn(2), NEW).unwrap();
    let guest = w.beside(|vm| vm.cpu_write(X, NEW).unwrap());
    let frozen = w.fork();
    let at_fork = w.vm.read_frozen(&frozen, X);
    guest.join().unwrap();
    w.vm.cpu_write(X, DMA).unwrap();
    assert_eq!(w.vm.read_frozen(&frozen, X), at_fork, "isolation");
    drop(frozen);
    w.settle();
}

/// A vCPU that was not stopped writes a page that a device holds, which fork copies, and then one that is
/// shared.
pub(crate) fn two_writes_against_fork<C: Policy>() {
    const SECOND: Gfn = Gfn(1);
    let w = world_of::<C>(2);
    let pin = w.vm.space.pin(P, Access::Read).unwrap();
    let guest = w.beside(|vm| {
        vm.cpu_write(P, NEW).unwrap();
        vm.cpu_write(SECOND, NEW).unwrap();
    });
    let frozen = w.fork();
    guest.join().unwrap();
    let both = (w.read_frozen(&frozen), w.vm.read_frozen(&frozen, SECOND));
    assert_ne!(both, (OLD, NEW), "torn");
    drop((pin, frozen));
    w.settle();
}

/// A clone is made of a snapshot while the page is broken, and the snapshot given the copy.
pub(crate) fn clone_against_break<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let clone = w.clone_of(&frozen);
    assert_eq!(clone.cpu_read(P), OLD, "isolation");
    guest.join().unwrap();
    assert_eq!((w.read(), clone.cpu_read(P)), (NEW, OLD), "isolation");
    drop((clone, frozen));
    w.settle();
}
