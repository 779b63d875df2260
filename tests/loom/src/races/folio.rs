//! Huge folios, of two pages: holds by page against whatever happens to the folio as one (group F of
//! PROTOCOL.md; G4).

use super::*;
use crate::mm::soft::soft_pool_of;
use crate::mm::{Access, Order, PinnedRun};

pub(super) const Q: Gfn = Gfn(1);

/// A VM whose two pages hold [`OLD`], in one folio.
pub(super) fn huge_world<C: Policy>() -> World<C> {
    let (pool, memory) = soft_pool_of(Order::new(1), 12).unwrap();
    let vm = SoftVm::new(&pool, &memory, C::default(), 2).unwrap();
    for page in [P, Q] {
        vm.cpu_write(page, OLD).unwrap();
    }
    assert!(vm.space.entry(P).unwrap().is_huge());
    World {
        pool,
        memory,
        vm: Arc::new(vm),
    }
}

/// Leaves the folio read-only and exclusive, with a page that was held once.
fn protected<C: Policy>(w: &World<C>) {
    drop(w.vm.space.pin(Q, Access::Read).unwrap());
    drop(w.fork());
    w.vm.space.write_fault(P).unwrap();
    assert!(w.vm.space.entry(P).unwrap().is_huge());
}

/// A write to a region that has not changed since the last fork: the next takes it over as it is, or has it
/// among those that have.
pub(crate) fn write_to_an_unchanged_region_against_fork<C: Policy>() {
    let w = huge_world::<C>();
    let before = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let frozen = w.fork();
    let at_fork = w.read_frozen(&frozen);
    assert!([OLD, NEW].contains(&at_fork), "lost");
    guest.join().unwrap();
    w.write(DMA);
    assert_eq!(w.read_frozen(&frozen), at_fork, "isolation");
    assert_eq!(w.read_frozen(&before), OLD, "isolation");
    let next = w.fork();
    assert_eq!(w.read_frozen(&next), DMA, "lost");
    drop((before, frozen, next));
    w.settle();
}

/// D5, F7: a pin that was granted is never of a page the child shares, though folio and page have a word
/// each.
pub(crate) fn pin_of_a_folios_page_against_fork<C: Policy>() {
    let w = huge_world::<C>();
    protected(&w);
    // (A device that reads, on a page that fork does not touch for its own sake. It writes so that the child
    // would show it.)
    let device = w.beside(move |vm| {
        let pin = vm.space.pin(P, Access::Read).unwrap();
        vm.dma_write(&pin, DMA);
        pin
    });
    let frozen = w.fork();
    let at_fork = w.read_frozen(&frozen);
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    assert_ne!(frozen.frame(P).unwrap(), pin.pfn(), "isolation");
    assert_eq!(w.read_frozen(&frozen), at_fork, "isolation");
    w.write(NEW);
    assert_eq!(w.vm.dma_read(&pin), NEW, "coherence");
    drop((pin, frozen));
    w.settle();
}

/// D5, F7 for pins on both pages at once. The page that shows a leak is the last: its count is next to the
/// barrier.
pub(crate) fn pins_of_a_folio_against_fork<C: Policy>() {
    let w = huge_world::<C>();
    protected(&w);
    let memory = Arc::clone(&w.memory);
    let device = w.beside(move |vm| {
        let pins = vm.space.pin_range(P, 2, Access::Read).unwrap();
        let frames: Vec<_> = pins.iter().flat_map(PinnedRun::pfns).collect();
        memory.store(frames[1], DMA);
        (pins, frames)
    });
    let frozen = w.fork();
    let at_fork = w.vm.read_frozen(&frozen, Q);
    let (pins, frames) = device.join().unwrap();
    for (page, pinned) in [P, Q].into_iter().zip(frames) {
        assert_eq!(pinned, w.vm.space.entry(page).unwrap().pfn(), "coherence");
        assert_ne!(frozen.frame(page).unwrap(), pinned, "isolation");
    }
    assert_eq!(w.vm.read_frozen(&frozen, Q), at_fork, "isolation");
    assert_eq!(w.vm.cpu_read(Q), DMA, "coherence");
    drop((pins, frozen));
    w.settle();
}

/// G4: a split while a hold is on its way. The pin on the other page makes fork split the folio.
pub(crate) fn pin_of_a_folios_page_against_split<C: Policy>() {
    let w = huge_world::<C>();
    let other = w.vm.space.pin(Q, Access::Write).unwrap();
    let device = w.beside(move |vm| vm.space.pin(P, Access::Write).unwrap());
    let frozen = w.fork();
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    assert_ne!(frozen.frame(P).unwrap(), pin.pfn(), "isolation");
    drop((pin, other, frozen));
    w.settle();
}

/// Small entries become a huge one again while a pin through one of them is on its way.
pub(crate) fn pin_against_the_making_of_a_folio<C: Policy>() {
    let w = huge_world::<C>();
    w.vm.space.set_whole_price(1);
    let other = w.vm.space.pin(Q, Access::Write).unwrap();
    let frozen = w.fork();
    assert!(!w.vm.space.entry(P).unwrap().is_huge());
    let device = w.beside(move |vm| vm.space.pin(Q, Access::Write).unwrap());
    w.write(NEW);
    assert!(w.vm.space.entry(P).unwrap().is_huge());
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), other.pfn(), "coherence");
    drop(w.fork());
    assert_eq!(pin.pfn(), w.vm.space.entry(Q).unwrap().pfn(), "coherence");
    drop((pin, other, frozen));
    w.settle();
}

/// G7 for a folio: the guest takes it over, or not, while the snapshot goes away.
pub(crate) fn break_of_a_folio_against_drop_of_the_snapshot<C: Policy>() {
    let w = huge_world::<C>();
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    thread::yield_now();
    drop(frozen);
    guest.join().unwrap();
    assert_eq!(w.read(), NEW, "lost");
    assert_eq!(w.vm.cpu_read(Q), OLD, "lost");
    w.settle();
}

/// The same, broken whole: the snapshot is moved to a folio of its own, or is gone.
pub(crate) fn whole_break_of_a_folio_against_drop_of_the_snapshot<C: Policy>() {
    let w = huge_world::<C>();
    w.vm.space.set_whole_price(0);
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    thread::yield_now();
    drop(frozen);
    guest.join().unwrap();
    assert_eq!(w.read(), NEW, "lost");
    assert_eq!(w.vm.cpu_read(Q), OLD, "lost");
    assert_eq!(w.pool.usage().in_use, 2, "once");
    w.settle();
}

/// A reader of the snapshot, while its region is moved to another folio: what it holds stays what the
/// snapshot has.
pub(crate) fn whole_break_of_a_folio_against_a_reader_of_the_snapshot<C: Policy>() {
    let w = huge_world::<C>();
    w.vm.space.set_whole_price(0);
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    thread::yield_now();
    let held = frozen.get(P).unwrap();
    assert_eq!(w.vm.read_held(&held), OLD, "isolation");
    guest.join().unwrap();
    assert_eq!(w.vm.read_held(&held), OLD, "isolation");
    assert_eq!(w.read_frozen(&frozen), OLD, "isolation");
    assert_eq!(w.read(), NEW, "lost");
    drop((held, frozen));
    w.settle();
}

/// A reader marks a folio, which ends; its frames become another folio, the copy for a snapshot, and the
/// reader counts its hold there; that snapshot goes, and the reader finds that there is nothing to hold.
pub(crate) fn reader_of_a_folio_against_its_next_lives<C: Policy>() {
    let (pool, memory) = soft_pool_of(Order::new(1), 20).unwrap();
    let new = |vm: SoftVm<C>| {
        vm.space.set_whole_price(0);
        vm
    };
    let parent = new(SoftVm::new(&pool, &memory, C::default(), 2).unwrap());
    for page in [P, Q] {
        parent.cpu_write(page, OLD).unwrap();
    }
    let frozen = parent.space.fork().unwrap();
    parent.cpu_write(P, NEW).unwrap();
    let clones = [(); 2].map(|()| new(SoftVm::clone_of(&frozen, &memory, C::default()).unwrap()));
    // By entries of their own: a reader of what is borrowed holds the snapshot's page.
    clones
        .iter()
        .for_each(|clone| clone.space.adopt_region_of(P));
    drop(frozen);
    let next = parent.space.fork().unwrap();
    let [clone, other] = clones;
    let clone = Arc::new(clone);
    let theirs = Arc::clone(&clone);
    let rest = thread::spawn(move || {
        theirs.cpu_write(P, CLONES).unwrap();
        drop((theirs, other));
        parent.cpu_write(P, DMA).unwrap();
        assert_eq!(parent.read_frozen(&next, P), NEW, "isolation");
        drop((next, parent));
    });
    let held = clone.space.get(P, Access::Read).unwrap();
    let seen = clone.read_held(&held);
    assert!([OLD, CLONES].contains(&seen), "isolation");
    rest.join().unwrap();
    drop((held, clone));
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0, "once");
}

/// The last mapping of a folio goes while a hold on one of its pages is on its way, or is given back.
pub(crate) fn end_of_a_folio_against_its_last_holder<C: Policy>() {
    let w = huge_world::<C>();
    let pin = w.vm.space.pin(Q, Access::Write).unwrap();
    let World { pool, memory, vm } = w;
    let device = thread::spawn(move || drop(pin));
    drop(vm);
    device.join().unwrap();
    drop(memory);
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0, "lost");
}
