//! Pins taken without a lock, against whatever takes the page's frame away or shares it.

use super::*;
use crate::mm::{Access, PinnedRun};

/// G1, D5: a pin that was granted is never of a frame the child shares.
pub(crate) fn pin_to_write_against_fork<C: Policy>() {
    pin_against_fork::<C>(Access::Write);
}

/// G1, D5, for a device that reads. (It writes here too, so that the child would show it.)
pub(crate) fn pin_to_read_against_fork<C: Policy>() {
    pin_against_fork::<C>(Access::Read);
}

fn pin_against_fork<C: Policy>(access: Access) {
    let w = world::<C>();
    let device = w.beside(move |vm| {
        let pin = vm.space.pin(P, access).unwrap();
        vm.dma_write(&pin, DMA);
        pin
    });
    let frozen = w.fork();
    let at_fork = w.read_frozen(&frozen);
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    assert_ne!(frozen.frame(P).unwrap(), pin.pfn(), "isolation");
    assert_eq!(w.read(), DMA, "coherence");
    // The device may have written before the fork or after it, and the child keeps what it saw.
    assert_eq!(w.read_frozen(&frozen), at_fork, "isolation");
    w.write(NEW);
    assert_eq!(w.vm.dma_read(&pin), NEW, "coherence");
    drop((pin, frozen));
    w.settle();
}

/// G9: unpin against fork's pin test: shared or copied, both right. The page is read-only: dirty tracking was
/// there.
pub(crate) fn unpin_against_fork<C: Policy>() {
    let w = world::<C>();
    let pin = w.vm.space.pin(P, Access::Write).unwrap();
    w.vm.space.take_dirty().unwrap();
    let device = w.beside(move |vm| {
        vm.dma_write(&pin, DMA);
        drop(pin);
    });
    let frozen = w.fork();
    let at_fork = w.read_frozen(&frozen);
    device.join().unwrap();
    assert_eq!(w.read_frozen(&frozen), at_fork, "isolation");
    assert_eq!(w.read(), DMA, "coherence");
    w.write(NEW);
    assert_eq!(w.read(), NEW, "lost");
    assert_eq!(w.read_frozen(&frozen), at_fork, "isolation");
    drop(frozen);
    w.settle();
}

/// G6 and the pin's half of it: whoever makes the page exclusive, the pin is of the page.
pub(crate) fn pin_against_unshare<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let device = w.beside(|vm| vm.space.pin(P, Access::Read).unwrap());
    w.vm.space.unshare(P).unwrap();
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    assert_ne!(frozen.frame(P).unwrap(), pin.pfn(), "isolation");
    assert!(w.pool.state(pin.pfn()).is_exclusive());
    let both = (w.vm.dma_read(&pin), w.read_frozen(&frozen));
    assert_eq!(both, (OLD, OLD));
    drop((pin, frozen));
    w.settle();
}

/// A pin against a break in which the snapshot is given the copy.
pub(crate) fn pin_against_break_that_moves_the_sharers<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let device = w.beside(|vm| vm.space.pin(P, Access::Read).unwrap());
    w.write(NEW);
    let pin = device.join().unwrap();
    assert_eq!(w.vm.dma_read(&pin), NEW, "coherence");
    assert_eq!(w.read_frozen(&frozen), OLD, "isolation");
    drop((pin, frozen));
    w.settle();
}

/// A pin against a break in which the writer is given the copy, because a reader holds the frame.
pub(crate) fn pin_against_break_that_moves_the_writer<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let hold = frozen.get(P).unwrap();
    let device = w.beside(|vm| vm.space.pin(P, Access::Read).unwrap());
    w.write(NEW);
    let pin = device.join().unwrap();
    assert_eq!(w.vm.dma_read(&pin), NEW, "coherence");
    assert_eq!(w.vm.read_held(&hold), OLD, "isolation");
    drop((pin, frozen, hold));
    w.settle();
}

/// The frame leaves the page, and becomes exclusive to a clone, while a pin on the page is on its way.
pub(crate) fn pin_against_a_frame_that_becomes_a_clones<C: Policy>() {
    let w = world::<C>();
    let clone = w.clone();
    let device = w.beside(|vm| vm.space.pin(P, Access::Read).unwrap());
    w.write(NEW);
    clone.cpu_write(P, CLONES).unwrap();
    let pin = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    let all = (w.vm.dma_read(&pin), w.read(), clone.cpu_read(P));
    assert_eq!(all, (NEW, NEW, CLONES), "coherence");
    drop((pin, clone));
    w.settle();
}

/// The same for two pages that are pinned at once, by small entries: it is the second that goes.
pub(crate) fn pins_against_a_frame_that_becomes_a_clones<C: Policy>() {
    let w = world_of::<C>(2);
    let clone = w.clone();
    // Its other page is nobody else's.
    w.write(OLD);
    let second = Gfn(1);
    let device = w.beside(move |vm| vm.space.pin_range(P, 2, Access::Read).unwrap());
    w.vm.cpu_write(second, NEW).unwrap();
    clone.cpu_write(second, CLONES).unwrap();
    let pins = device.join().unwrap();
    let frames: Vec<_> = pins.iter().flat_map(PinnedRun::pfns).collect();
    for (page, pinned) in [P, second].into_iter().zip(&frames) {
        assert_eq!(*pinned, w.vm.space.entry(page).unwrap().pfn(), "coherence");
    }
    let all = (w.vm.cpu_read(second), clone.cpu_read(second));
    assert_eq!(all, (NEW, CLONES), "coherence");
    drop((pins, clone));
    w.settle();
}

/// The same, with the clone's write before the pin: what is to be seen is the order of the break alone.
pub(crate) fn pin_after_the_clones_break_against_break<C: Policy>() {
    let w = world::<C>();
    let clone = w.clone();
    let device = w.beside(move |vm| {
        clone.cpu_write(P, CLONES).unwrap();
        (vm.space.pin(P, Access::Read).unwrap(), clone)
    });
    w.write(NEW);
    let (pin, clone) = device.join().unwrap();
    assert_eq!(pin.pfn(), w.frame(), "coherence");
    let all = (w.vm.dma_read(&pin), w.read(), clone.cpu_read(P));
    assert_eq!(all, (NEW, NEW, CLONES), "coherence");
    drop((pin, clone));
    w.settle();
}
