//! What is backed and brought by whoever comes first, against others who want it, or share it, or go.

use super::folio::Q;
use super::*;
use crate::mm::soft::{SoftBacking, soft_pool_of};
use crate::mm::{Access, Order, Toucher};

/// A snapshot of two pages that hold [`OLD`] and are in one region, which is backed.
struct Outside {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    backing: Arc<SoftBacking>,
    frozen: Arc<Frozen>,
}

fn outside() -> Outside {
    let (pool, memory) = soft_pool_of(Order::new(1), 12).unwrap();
    let backing = SoftBacking::new(&pool, &memory, vec![OLD, OLD]);
    let frozen = backing.frozen(&pool, true);
    Outside {
        pool,
        memory,
        backing,
        frozen,
    }
}

impl Outside {
    fn clone_of<C: Policy>(&self) -> Arc<SoftVm<C>> {
        let clone = SoftVm::clone_of(&self.frozen, &self.memory, C::default()).unwrap();
        clone.space.set_whole_price(0);
        // It has its locks already: loom does not see who makes them.
        clone.space.restore(&self.frozen).unwrap();
        Arc::new(clone)
    }

    /// It was brought once, and nothing is left.
    fn settle(self) {
        let Self {
            pool,
            backing,
            frozen,
            ..
        } = self;
        drop(frozen);
        assert_eq!(backing.brought().len(), 1, "once");
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0, "once");
    }
}

/// Two clones touch what is not there: one reads, one writes.
pub(crate) fn touch_against_touch<C: Policy>() {
    let w = outside();
    let (one, other) = (w.clone_of::<C>(), w.clone_of::<C>());
    let theirs = thread::spawn(move || {
        one.cpu_write(P, CLONES).unwrap();
        one
    });
    assert_eq!(other.cpu_read(P), OLD, "isolation");
    let one = theirs.join().unwrap();
    assert_eq!((one.cpu_read(P), one.cpu_read(Q)), (CLONES, OLD), "lost");
    assert_eq!(other.cpu_read(P), OLD, "isolation");
    drop((one, other));
    w.settle();
}

/// Two vCPUs of one machine, on neighbouring pages.
pub(crate) fn touch_against_touch_of_its_neighbour<C: Policy>() {
    let w = outside();
    let vm = w.clone_of::<C>();
    let theirs = {
        let vm = Arc::clone(&vm);
        thread::spawn(move || vm.cpu_write(Q, CLONES).unwrap())
    };
    assert_eq!(vm.cpu_read(P), OLD, "isolation");
    theirs.join().unwrap();
    assert_eq!((vm.cpu_read(P), vm.cpu_read(Q)), (OLD, CLONES), "lost");
    drop(vm);
    w.settle();
}

/// A device pins a page while a vCPU writes its neighbour.
pub(crate) fn touch_against_pin<C: Policy>() {
    let w = outside();
    let vm = w.clone_of::<C>();
    let theirs = {
        let vm = Arc::clone(&vm);
        thread::spawn(move || vm.cpu_write(Q, CLONES).unwrap())
    };
    let pin = vm.space.pin(P, Access::Read).unwrap();
    assert_eq!(vm.dma_read(&pin), OLD, "coherence");
    theirs.join().unwrap();
    vm.cpu_write(P, NEW).unwrap();
    assert_eq!(vm.dma_read(&pin), NEW, "coherence");
    drop((pin, vm));
    w.settle();
}

/// A reader looks at a page while a vCPU touches its neighbour.
pub(crate) fn touch_against_get<C: Policy>() {
    let w = outside();
    let vm = w.clone_of::<C>();
    let theirs = {
        let vm = Arc::clone(&vm);
        thread::spawn(move || assert_eq!(vm.cpu_read(Q), OLD, "isolation"))
    };
    let held = vm.space.get(P, Access::Read).unwrap();
    assert_eq!(vm.read_held(&held), OLD, "isolation");
    theirs.join().unwrap();
    drop((held, vm));
    w.settle();
}

/// A clone is made while another brings what they have in common: it shows it, or hides it.
pub(crate) fn touch_against_clone<C: Policy>() {
    let w = outside();
    let vm = w.clone_of::<C>();
    let theirs = {
        let vm = Arc::clone(&vm);
        thread::spawn(move || vm.cpu_write(P, NEW).unwrap())
    };
    let clone = w.clone_of::<C>();
    theirs.join().unwrap();
    assert_eq!((clone.cpu_read(P), vm.cpu_read(P)), (OLD, NEW), "isolation");
    drop((vm, clone));
    w.settle();
}

/// A machine is forked while its vCPU touches what is not there.
pub(crate) fn touch_against_fork<C: Policy>() {
    let w = outside();
    let vm = w.clone_of::<C>();
    let theirs = {
        let vm = Arc::clone(&vm);
        thread::spawn(move || vm.cpu_write(P, NEW).unwrap())
    };
    let frozen = vm.space.fork().unwrap();
    theirs.join().unwrap();
    let at_fork = vm.read_frozen(&frozen, P);
    assert!([OLD, NEW].contains(&at_fork), "lost");
    vm.cpu_write(P, DMA).unwrap();
    assert_eq!(vm.read_frozen(&frozen, P), at_fork, "isolation");
    drop((vm, frozen));
    w.settle();
}

/// A save reads the snapshot while a vCPU touches what is not there, and the region is prefetched.
pub(crate) fn touch_against_reader_and_prefetch<C: Policy>() {
    let w = outside();
    let (vm, regions) = (w.clone_of::<C>(), w.frozen.backed_regions());
    let prefetch = thread::spawn(move || regions.bring(0, Toucher::Prefetch).unwrap());
    vm.cpu_write(P, NEW).unwrap();
    assert_eq!(vm.read_frozen(&w.frozen, P), OLD, "isolation");
    prefetch.join().unwrap();
    drop(vm);
    w.settle();
}

/// The last machine goes while its memory is prefetched.
pub(crate) fn prefetch_against_drop_of_all<C: Policy>() {
    let w = outside();
    let (vm, regions) = (w.clone_of::<C>(), w.frozen.backed_regions());
    let prefetch = thread::spawn(move || regions.bring(0, Toucher::Prefetch).unwrap());
    let Outside {
        pool,
        backing,
        frozen,
        ..
    } = w;
    drop((vm, frozen));
    prefetch.join().unwrap();
    assert!(
        backing
            .brought()
            .iter()
            .all(|&b| b == (0, Toucher::Prefetch)),
        "once"
    );
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0, "once");
}
