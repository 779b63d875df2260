//! Migrate, discard and merge, against whoever comes for the page meanwhile.

use super::*;
use crate::mm::Access;
use crate::mm::soft::soft_pool;

/// G3's counterpart: a page never moves from under a pin.
pub(crate) fn pin_against_migrate<C: Policy>() {
    let w = world::<C>();
    let device = w.beside(pin_and_write);
    // Refused if the device was there first.
    let _ = w.vm.space.migrate(P);
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    assert_eq!(w.read(), DMA, "coherence");
    w.write(NEW);
    assert_eq!(w.vm.dma_read(&pin), NEW, "coherence");
    drop(pin);
    w.settle();
}

/// A device writes and lets go while the page is to move: what it wrote moves along.
pub(crate) fn unpin_against_migrate<C: Policy>() {
    let w = world::<C>();
    let device = w.beside(|vm| drop(pin_and_write(vm)));
    let _ = w.vm.space.migrate(P);
    device.join().unwrap();
    assert_eq!(w.read(), DMA, "lost");
    w.settle();
}

/// A vCPU writes while the page moves.
pub(crate) fn write_against_migrate<C: Policy>() {
    let w = world::<C>();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    w.vm.space.migrate(P).unwrap();
    guest.join().unwrap();
    assert_eq!(w.read(), NEW, "lost");
    w.settle();
}

/// A page that moves, against a fork.
pub(crate) fn migrate_against_fork<C: Policy>() {
    let w = world::<C>();
    // Refused once the page is shared.
    let compactor = w.beside(|vm| drop(vm.space.migrate(P)));
    let frozen = w.fork();
    compactor.join().unwrap();
    w.write(NEW);
    assert_eq!((w.read(), w.read_frozen(&frozen)), (NEW, OLD), "isolation");
    drop(frozen);
    w.settle();
}

/// G3's counterpart: a page that a device holds is not discarded.
pub(crate) fn pin_against_discard<C: Policy>() {
    let w = world::<C>();
    let device = w.beside(pin_and_write);
    let _ = w.vm.space.discard(P, 1);
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    assert_eq!(w.read(), DMA, "coherence");
    drop(pin);
    w.settle();
}

/// A page is discarded while a vCPU writes it: zeros, or what it wrote.
pub(crate) fn write_against_discard<C: Policy>() {
    let w = world::<C>();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    assert_eq!(w.vm.space.discard(P, 1).unwrap(), 1);
    guest.join().unwrap();
    let seen = w.read();
    assert!([0, NEW].contains(&seen), "lost: {seen}");
    w.settle();
}

/// A discarded frame is somebody else's as soon as it is free.
pub(crate) fn discard_against_the_next_owner<C: Policy>() {
    let w = world::<C>();
    // The page's frame is to be one that others are given too: not its home, which a reader holds for the
    // moment.
    let hold = w.fork().get(P).unwrap();
    w.write(NEW);
    drop(hold);
    let next = SoftVm::new(&w.pool, &w.memory, C::default(), 1).unwrap();
    next.cpu_write(P, OLD).unwrap();
    let frozen = next.space.fork().unwrap();
    let next = thread::spawn(move || {
        // The snapshot is given the copy, which may be in the discarded frame.
        next.cpu_write(P, CLONES).unwrap();
        (next, frozen)
    });
    assert_eq!(w.vm.space.discard(P, 1).unwrap(), 1);
    let (next, frozen) = next.join().unwrap();
    assert_eq!(next.cpu_read(P), CLONES, "isolation");
    assert_eq!(next.read_frozen(&frozen, P), OLD, "isolation");
    drop((next, frozen));
    w.settle();
}

/// G2's and G3's counterpart: a device that reads pins the page that is kept. Its entry is read-only and
/// looks the same before, meanwhile and after: only the frame's word tells.
pub(crate) fn pin_to_read_against_merge<C: Policy>() {
    let w = world_of::<C>(2);
    w.vm.space.take_dirty().unwrap();
    let device = w.beside(|vm| vm.space.pin(P, Access::Read).unwrap());
    // Refused if the device was there first.
    let _ = w.vm.space.merge(P, &w.vm.space, Gfn(1));
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    w.write(NEW);
    assert_eq!(w.vm.dma_read(&pin), NEW, "coherence");
    assert_eq!(w.vm.cpu_read(Gfn(1)), OLD, "isolation");
    drop(pin);
    w.settle();
}

/// G3's counterpart: a device pins the page that is kept, and writes.
pub(crate) fn pin_to_write_against_merge<C: Policy>() {
    pin_against_merge::<C>(P, Gfn(1));
}

/// G3's counterpart: a device pins the page whose frame is to be freed, and writes.
pub(crate) fn pin_to_write_against_merge_into_another<C: Policy>() {
    pin_against_merge::<C>(Gfn(1), P);
}

/// `P` is pinned.
fn pin_against_merge<C: Policy>(kept: Gfn, freed: Gfn) {
    let w = world_of::<C>(2);
    let device = w.beside(pin_and_write);
    let _ = w.vm.space.merge(kept, &w.vm.space, freed);
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    assert_eq!((w.read(), w.vm.cpu_read(Gfn(1))), (DMA, OLD), "isolation");
    drop(pin);
    w.settle();
}

/// A device writes and lets go while the page is to be merged with one of equal content.
pub(crate) fn unpin_against_merge<C: Policy>() {
    let w = world_of::<C>(2);
    let device = w.beside(|vm| drop(pin_and_write(vm)));
    let _ = w.vm.space.merge(Gfn(1), &w.vm.space, P);
    device.join().unwrap();
    assert_eq!((w.read(), w.vm.cpu_read(Gfn(1))), (DMA, OLD), "lost");
    w.settle();
}

/// A vCPU writes one of two pages that are equal at first.
pub(crate) fn write_against_merge<C: Policy>() {
    let w = world_of::<C>(2);
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    // Refused once they differ.
    let _ = w.vm.space.merge(Gfn(1), &w.vm.space, P);
    guest.join().unwrap();
    assert_eq!((w.read(), w.vm.cpu_read(Gfn(1))), (NEW, OLD), "lost");
    w.settle();
}

/// Two address spaces, each merged with the other at once.
pub(crate) fn merge_against_merge<C: Policy>() {
    let (pool, memory) = soft_pool(4).unwrap();
    // In an array, so that their addresses, which the locks are ordered by, are in the same order in every
    // run.
    let vms = Arc::new([(); 2].map(|()| SoftVm::new(&pool, &memory, C::default(), 1).unwrap()));
    for vm in vms.iter() {
        vm.cpu_write(P, OLD).unwrap();
    }
    let other = {
        let vms = Arc::clone(&vms);
        thread::spawn(move || vms[1].space.merge(P, &vms[0].space, P).unwrap())
    };
    vms[0].space.merge(P, &vms[1].space, P).unwrap();
    other.join().unwrap();
    assert_eq!(pool.usage().in_use, 1, "once");
    vms[0].cpu_write(P, NEW).unwrap();
    assert_eq!(
        (vms[0].cpu_read(P), vms[1].cpu_read(P)),
        (NEW, OLD),
        "isolation"
    );
    drop(vms);
    assert_eq!(pool.leftovers(9), []);
}

pub(super) fn pin_and_write<C: Policy>(vm: &SoftVm<C>) -> crate::mm::Pin {
    let pin = vm.space.pin(P, Access::Write).unwrap();
    vm.dma_write(&pin, DMA);
    pin
}
