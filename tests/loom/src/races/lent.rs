//! What a snapshot lends to its clones, against whoever breaks it, takes it over or goes.

use super::folio::{Q, huge_world};
use super::*;
use crate::mm::Access;

/// A VM whose region is broken as one: for races in which that is not the point, since it is fewer steps.
fn whole_world<C: Policy>() -> World<C> {
    let w = huge_world::<C>();
    w.vm.space.set_whole_price(0);
    w
}

/// A clone of `w`'s that is broken as one, too, and has its locks already: loom does not see who makes them.
fn whole_clone<C: Policy>(w: &World<C>, frozen: &Frozen) -> SoftVm<C> {
    let clone = w.clone_of(frozen);
    clone.space.set_whole_price(0);
    // What it has borrowed is not looked at for that.
    clone.space.restore(frozen).unwrap();
    clone
}

/// A clone is made of a snapshot, which it borrows, while a page is broken: the snapshot is given the copy,
/// or lent.
pub(crate) fn lending_against_break<C: Policy>() {
    let w = huge_world::<C>();
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let clone = w.clone_of(&frozen);
    assert_eq!(clone.cpu_read(P), OLD, "isolation");
    guest.join().unwrap();
    assert_eq!((w.read(), clone.cpu_read(P)), (NEW, OLD), "isolation");
    assert_eq!(w.read_frozen(&frozen), OLD, "isolation");
    drop((clone, frozen));
    w.settle();
}

/// The same of all of the region at once.
pub(crate) fn lending_against_whole_break<C: Policy>() {
    let w = whole_world::<C>();
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let clone = w.clone_of(&frozen);
    guest.join().unwrap();
    assert_eq!((w.read(), clone.cpu_read(P)), (NEW, OLD), "isolation");
    drop((clone, frozen));
    w.settle();
}

/// The same, of a snapshot that has the page in common with another, by a chunk: whoever moves the other
/// moves both.
pub(crate) fn lending_against_break_for_another_snapshot<C: Policy>() {
    let w = huge_world::<C>();
    drop(w.fork());
    w.write(NEW);
    let frozen = w.fork();
    w.write(DMA);
    let other = w.fork();
    assert_eq!(frozen.frame(Q).unwrap(), other.frame(Q).unwrap());
    let guest = w.beside(|vm| vm.cpu_write(Q, NEW).unwrap());
    let clone = w.clone_of(&frozen);
    guest.join().unwrap();
    assert_eq!(clone.cpu_read(Q), OLD, "isolation");
    assert_eq!(w.vm.read_frozen(&other, Q), OLD, "isolation");
    drop((clone, frozen, other));
    w.settle();
}

/// The second clone of a snapshot maps what was worked out for the first, if nothing has moved since that
/// went.
pub(crate) fn second_lending_against_break<C: Policy>() {
    let w = huge_world::<C>();
    let frozen = w.fork();
    drop(w.clone_of(&frozen));
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let clone = w.clone_of(&frozen);
    guest.join().unwrap();
    assert_eq!((w.read(), clone.cpu_read(P)), (NEW, OLD), "isolation");
    drop((clone, frozen));
    w.settle();
}

/// A clone adopts a region while its parent breaks it.
pub(crate) fn adoption_against_break<C: Policy>() {
    let w = whole_world::<C>();
    let frozen = w.fork();
    let clone = whole_clone(&w, &frozen);
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    // Nothing but that: a page is merged with itself.
    clone.space.merge(P, &clone.space, P).unwrap();
    guest.join().unwrap();
    assert_eq!((w.read(), clone.cpu_read(P)), (NEW, OLD), "isolation");
    let entry = clone.space.entry(P).unwrap();
    assert_eq!(clone.mmu.page(P).0, entry.pfn(), "isolation");
    drop((clone, frozen));
    w.settle();
}

/// Two clones adopt what they borrow of one snapshot.
pub(crate) fn adoption_against_adoption<C: Policy>() {
    adoptions::<C>(|_| ());
}

/// The same where nobody else has the snapshot any more, nor the frames.
pub(crate) fn adoption_against_adoption_by_the_last_but_one<C: Policy>() {
    adoptions::<C>(drop);
}

/// `end` may end the parent and the snapshot.
fn adoptions<C: Policy>(end: fn((World<C>, Arc<Frozen>)) -> ()) {
    let w = whole_world::<C>();
    let frozen = w.fork();
    let [one, other] = [(); 2].map(|()| whole_clone(&w, &frozen));
    let pool = Arc::clone(&w.pool);
    end((w, frozen));
    let theirs = thread::spawn(move || {
        one.cpu_write(P, CLONES).unwrap();
        assert_eq!(
            (one.cpu_read(P), one.cpu_read(Q)),
            (CLONES, OLD),
            "isolation"
        );
        one
    });
    other.cpu_write(P, NEW).unwrap();
    assert_eq!(
        (other.cpu_read(P), other.cpu_read(Q)),
        (NEW, OLD),
        "isolation"
    );
    let one = theirs.join().unwrap();
    assert_eq!(
        (one.cpu_read(P), other.cpu_read(P)),
        (CLONES, NEW),
        "isolation"
    );
    drop((one, other));
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0, "once");
}

/// A clone adopts a region while the snapshot goes, and so does its parent: it may be the last.
pub(crate) fn adoption_against_drop_of_the_snapshot<C: Policy>() {
    let w = whole_world::<C>();
    let frozen = w.fork();
    let clone = whole_clone(&w, &frozen);
    let pool = Arc::clone(&w.pool);
    let rest = thread::spawn(move || drop((frozen, w)));
    clone.cpu_write(P, CLONES).unwrap();
    rest.join().unwrap();
    assert_eq!(
        (clone.cpu_read(P), clone.cpu_read(Q)),
        (CLONES, OLD),
        "lost"
    );
    drop(clone);
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0, "once");
}

/// A reader looks at a page of a region that is adopted meanwhile, for another page of it.
pub(crate) fn get_against_adoption<C: Policy>() {
    let w = whole_world::<C>();
    let clone = Arc::new(whole_clone(&w, &w.fork()));
    let guest = {
        let clone = Arc::clone(&clone);
        thread::spawn(move || clone.cpu_write(Q, CLONES).unwrap())
    };
    let held = clone.space.get(P, Access::Read).unwrap();
    assert_eq!(clone.read_held(&held), OLD, "isolation");
    let entry = clone.space.entry(P).unwrap();
    assert!(entry.is_present(), "isolation");
    guest.join().unwrap();
    drop((held, clone));
    w.settle();
}

/// A device pins such a page.
pub(crate) fn pin_against_adoption<C: Policy>() {
    let w = whole_world::<C>();
    let clone = Arc::new(whole_clone(&w, &w.fork()));
    let guest = {
        let clone = Arc::clone(&clone);
        thread::spawn(move || clone.cpu_write(Q, CLONES).unwrap())
    };
    let pin = clone.space.pin(P, Access::Read).unwrap();
    assert_eq!(clone.dma_read(&pin), OLD, "isolation");
    guest.join().unwrap();
    clone.cpu_write(P, NEW).unwrap();
    assert_eq!(clone.dma_read(&pin), NEW, "coherence");
    assert_eq!((w.read(), w.vm.cpu_read(Q)), (OLD, OLD), "isolation");
    drop((pin, clone));
    w.settle();
}
