//! Machines that share a folio of a few pages, by huge entries or by small ones: who leaves it, who is the
//! last, and who comes while others leave.

use super::*;
use crate::mm::Order;
use crate::mm::soft::soft_pool_of;

const Q: Gfn = Gfn(1);

/// A VM whose two pages hold [`OLD`], in one folio, and which breaks whole or by the page.
fn folio_of_two<C: Policy>(whole_price: u32) -> World<C> {
    folio_of(Order::new(1), whole_price)
}

/// The same of as many pages.
fn folio_of<C: Policy>(order: Order, whole_price: u32) -> World<C> {
    let pages = order.pages();
    let (pool, memory) = soft_pool_of(order, 7 * pages).unwrap();
    let vm = SoftVm::new(&pool, &memory, C::default(), pages).unwrap();
    for page in 0..pages {
        vm.cpu_write(Gfn(page), OLD).unwrap();
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

/// A VM of four pages that a clone shares, but for one that has moved house by itself. The next break of it
/// brings all of them together.
fn about_to_be_gathered<C: Policy>() -> (World<C>, SoftVm<C>) {
    let w = folio_of::<C>(Order::new(2), BY_PAGE);
    let clone = clone_with_price(&w, BY_PAGE);
    w.write(OLD);
    w.vm.space.set_whole_price(WHOLE);
    (w, clone)
}

/// Brings them together, and says what is to be so when all is done.
fn gather_against<C: Policy, T: 'static>(
    part: impl FnOnce(&SoftVm<C>) -> T + 'static,
    end: impl FnOnce(&World<C>, T),
) {
    let (w, clone) = about_to_be_gathered::<C>();
    let other = w.beside(part);
    w.vm.cpu_write(Q, NEW).unwrap();
    end(&w, other.join().unwrap());
    let rest = [1, 2, 3].map(|page| w.vm.cpu_read(Gfn(page)));
    assert_eq!(rest, [NEW, OLD, OLD], "lost");
    let clones = [0, 1, 2, 3].map(|page| clone.cpu_read(Gfn(page)));
    assert_eq!(clones, [OLD; 4], "isolation");
    drop(clone);
    w.settle();
}

/// A vCPU writes a page that is brought together with the others.
pub(crate) fn write_against_gathering<C: Policy>() {
    let write = |vm: &SoftVm<C>| vm.cpu_write(P, NEW).unwrap();
    gather_against(write, |w, ()| assert_eq!(w.read(), NEW, "lost"));
}

/// G3's counterpart: a page is not brought anywhere from under a pin.
pub(crate) fn pin_against_gathering<C: Policy>() {
    gather_against(pin_and_write::<C>, |w, pin| {
        assert_eq!(pin.pfn(), w.frame(), "coherence");
        assert_eq!(w.read(), DMA, "coherence");
    });
}

/// A device writes and lets go while the page is to be brought together with the others.
pub(crate) fn unpin_against_gathering<C: Policy>() {
    let write = |vm: &SoftVm<C>| drop(pin_and_write(vm));
    gather_against(write, |w, ()| assert_eq!(w.read(), DMA, "lost"));
}
