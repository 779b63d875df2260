//! Machines that share a folio of two pages, by huge entries or by small ones: who leaves it, who is the
//! last, and who comes while others leave.

use super::*;
use crate::mm::Order;
use crate::mm::soft::soft_pool_of;

const Q: Gfn = Gfn(1);

/// A VM whose two pages hold [`OLD`], in one folio, and which breaks whole or by the page.
fn folio_of_two<C: Policy>(whole_price: u32) -> World<C> {
    let (pool, memory) = soft_pool_of(Order::new(1), 14).unwrap();
    let vm = SoftVm::new(&pool, &memory, C::default(), 2).unwrap();
    for page in [P, Q] {
        vm.cpu_write(page, OLD).unwrap();
    }
    vm.space.set_whole_price(whole_price);
    World {
        pool,
        memory,
        vm: Arc::new(vm),
    }
}

/// A running clone that breaks whole or by the page, and nobody else, that shares the folio.
fn clone_with_price<C: Policy>(w: &World<C>, whole_price: u32) -> SoftVm<C> {
    let clone = w.clone();
    clone.space.set_whole_price(whole_price);
    clone
}

const WHOLE: u32 = 0;
const BY_PAGE: u32 = 1000;

/// Both write to the folio at once: each moves to a folio of its own, or is the last by then and takes it
/// over.
pub(crate) fn whole_breaks_of_a_folio_by_parent_and_clone<C: Policy>() {
    let w = folio_of_two::<C>(WHOLE);
    let clone = clone_with_price(&w, WHOLE);
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    clone.cpu_write(Q, CLONES).unwrap();
    guest.join().unwrap();
    assert_eq!((w.read(), w.vm.cpu_read(Q)), (NEW, OLD), "isolation");
    let clones = (clone.cpu_read(P), clone.cpu_read(Q));
    assert_eq!(clones, (OLD, CLONES), "isolation");
    assert_eq!(w.pool.usage().in_use, 4, "once");
    drop(clone);
    w.settle();
}

/// The clone splits its entry for a page that it may not write, and the parent takes the folio over, or does
/// not: the clone has its pages still.
pub(crate) fn split_of_a_clone_against_reuse_by_its_parent<C: Policy>() {
    let w = folio_of_two::<C>(BY_PAGE);
    let clone = clone_with_price(&w, BY_PAGE);
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    clone.cpu_write(Q, CLONES).unwrap();
    assert_eq!(clone.cpu_read(P), OLD, "isolation");
    guest.join().unwrap();
    assert_eq!((w.read(), clone.cpu_read(P)), (NEW, OLD), "isolation");
    drop(clone);
    w.settle();
}

/// A clone is made of a snapshot while its folio is broken, and the snapshot given a copy of it.
fn clone_against<C: Policy>(whole_price: u32) {
    let w = folio_of_two::<C>(whole_price);
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let clone = w.clone_of(&frozen);
    let reads = || (clone.cpu_read(P), clone.cpu_read(Q));
    assert_eq!(reads(), (OLD, OLD), "isolation");
    guest.join().unwrap();
    w.vm.cpu_write(Q, DMA).unwrap();
    assert_eq!(reads(), (OLD, OLD), "isolation");
    assert_eq!((w.read(), w.vm.cpu_read(Q)), (NEW, DMA), "lost");
    drop((clone, frozen));
    w.settle();
}

/// In one piece.
pub(crate) fn clone_against_whole_break_of_a_folio<C: Policy>() {
    clone_against::<C>(WHOLE);
}

/// By the page: the snapshot's region is split meanwhile.
pub(crate) fn clone_against_break_of_a_folios_page<C: Policy>() {
    clone_against::<C>(BY_PAGE);
}

/// A clone goes while its sibling looks whether it is the last: it takes the folio over, or leaves it.
pub(crate) fn end_of_a_clone_against_whole_break_of_its_sibling<C: Policy>() {
    let w = folio_of_two::<C>(WHOLE);
    let frozen = w.fork();
    let [clone, sibling] = [(); 2].map(|()| w.clone_of(&frozen));
    sibling.space.set_whole_price(WHOLE);
    drop(frozen);
    // The parent has left.
    w.write(NEW);
    let guest = thread::spawn(move || {
        sibling.cpu_write(P, CLONES).unwrap();
        sibling
    });
    assert_eq!(
        (clone.cpu_read(P), clone.cpu_read(Q)),
        (OLD, OLD),
        "isolation"
    );
    drop(clone);
    let sibling = guest.join().unwrap();
    assert_eq!(
        (sibling.cpu_read(P), sibling.cpu_read(Q)),
        (CLONES, OLD),
        "lost"
    );
    assert_eq!(w.pool.usage().in_use, 4, "once");
    drop(sibling);
    w.settle();
}
