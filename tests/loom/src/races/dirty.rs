//! Dirty tracking, against those who write: whoever reads a page after it was reported has it as it was then
//! or newer, and what is newer is reported again.

use super::*;
use crate::mm::Access;

/// A device that pins without a lock, and writes.
pub(crate) fn pin_against_take_dirty<C: Policy>() {
    tracked::<C>(|vm, _| {
        let pin = vm.space.pin(P, Access::Write).unwrap();
        vm.dma_write(&pin, DMA);
    });
}

/// A vCPU that writes.
pub(crate) fn write_against_take_dirty<C: Policy>() {
    tracked::<C>(|vm, _| vm.cpu_write(P, DMA).unwrap());
}

/// A host writer whose hold was taken before the answer or after it.
pub(crate) fn get_to_write_against_take_dirty<C: Policy>() {
    tracked::<C>(|vm, memory| {
        let hold = vm.space.get(P, Access::Write).unwrap();
        memory.store(hold.pfn(), DMA);
    });
}

/// A debugger that writes.
pub(crate) fn force_write_against_take_dirty<C: Policy>() {
    tracked::<C>(|vm, _| vm.space.force_write(P, 0, &DMA.to_le_bytes()).unwrap());
}

fn tracked<C: Policy>(write: fn(&SoftVm<C>, &SoftMemory)) {
    let w = world::<C>();
    let memory = Arc::clone(&w.memory);
    let writer = w.beside(move |vm| write(vm, &memory));
    assert!(w.vm.space.take_dirty().unwrap().contains(P), "tracking");
    let seen = w.read();
    writer.join().unwrap();
    let reported = w.vm.space.take_dirty().unwrap().contains(P);
    assert_eq!(w.read(), DMA, "lost");
    assert!(reported || seen == DMA, "tracking");
    w.settle();
}
