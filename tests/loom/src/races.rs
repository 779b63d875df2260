use std::sync::Arc;

use loom::thread;

use crate::mm::soft::{SoftVm, soft_pool};
use crate::mm::{Access, Exclusive, FramePool, Frozen, Gfn, Pfn};

const P: Gfn = Gfn(0);
const OLD: u64 = 5;
const NEW: u64 = 6;
const DMA: u64 = 7;

struct World {
    pool: Arc<FramePool>,
    vm: Arc<SoftVm<Exclusive>>,
}

/// One page, which holds [`OLD`].
fn world() -> World {
    let (pool, memory) = soft_pool(6).unwrap();
    let vm = Arc::new(SoftVm::new(&pool, &memory, Exclusive, 1).unwrap());
    vm.cpu_write(P, OLD).unwrap();
    World { pool, vm }
}

impl World {
    fn fork(&self) -> Arc<Frozen> {
        self.vm.space.fork().unwrap()
    }

    fn frame(&self) -> Pfn {
        self.vm.space.entry(P).unwrap().pfn()
    }

    /// Nothing is left when everything is dropped.
    fn settle(self) {
        let Self { pool, vm } = self;
        drop(vm);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
    }
}

/// G1, D5: a pin that was granted is never of a frame the child shares.
#[test]
fn pin_fast_against_fork() {
    for access in [Access::Read, Access::Write] {
        loom::model(move || {
            let w = world();
            let vm = Arc::clone(&w.vm);
            let device = thread::spawn(move || {
                let pin = vm.space.pin(P, access).unwrap();
                vm.dma_write(&pin, DMA);
                pin
            });
            let frozen = w.fork();
            let at_fork = w.vm.read_frozen(&frozen, P);
            let pin = device.join().unwrap();
            assert_eq!(pin.pfn(), w.frame(), "coherence");
            assert_ne!(frozen.frame(P).unwrap(), pin.pfn(), "isolation");
            assert_eq!(w.vm.cpu_read(P), DMA);
            // The device may have written before the fork or after it, and the child keeps what it saw.
            assert_eq!(w.vm.read_frozen(&frozen, P), at_fork);
            w.vm.cpu_write(P, NEW).unwrap();
            assert_eq!(w.vm.dma_read(&pin), NEW);
            drop((pin, frozen));
            w.settle();
        });
    }
}

/// G6 and the pin's half of it: whoever makes the page exclusive, the pin is of the page.
#[test]
fn pin_fast_against_unshare() {
    loom::model(|| {
        let w = world();
        let frozen = w.fork();
        let vm = Arc::clone(&w.vm);
        let device = thread::spawn(move || vm.space.pin(P, Access::Read).unwrap());
        w.vm.space.unshare(P).unwrap();
        let pin = device.join().unwrap();
        assert_eq!(pin.pfn(), w.frame());
        assert_ne!(frozen.frame(P).unwrap(), pin.pfn());
        assert!(w.pool.state(pin.pfn()).is_exclusive());
        assert_eq!(
            (w.vm.dma_read(&pin), w.vm.read_frozen(&frozen, P)),
            (OLD, OLD)
        );
        drop((pin, frozen));
        w.settle();
    });
}

/// A pin against a COW break in which the snapshot is given the copy.
#[test]
fn pin_fast_against_break_that_moves_the_sharers() {
    loom::model(|| {
        let w = world();
        let frozen = w.fork();
        let vm = Arc::clone(&w.vm);
        let device = thread::spawn(move || vm.space.pin(P, Access::Read).unwrap());
        w.vm.cpu_write(P, NEW).unwrap();
        let pin = device.join().unwrap();
        assert_eq!(w.vm.dma_read(&pin), NEW);
        assert_eq!(w.vm.read_frozen(&frozen, P), OLD);
        drop((pin, frozen));
        w.settle();
    });
}

/// A pin against a COW break in which the writer is given the copy, because a reader holds the frame.
#[test]
fn pin_fast_against_break_that_moves_the_writer() {
    loom::model(|| {
        let w = world();
        let frozen = w.fork();
        let hold = frozen.get(P).unwrap();
        let vm = Arc::clone(&w.vm);
        let device = thread::spawn(move || vm.space.pin(P, Access::Read).unwrap());
        w.vm.cpu_write(P, NEW).unwrap();
        let pin = device.join().unwrap();
        assert_eq!(w.vm.dma_read(&pin), NEW);
        assert_eq!(w.vm.read_held(&hold), OLD);
        drop((pin, frozen, hold));
        w.settle();
    });
}

/// The re-read of the entry: the frame leaves the page, and becomes exclusive to a clone, while a pin on
/// the page is on its way.
#[test]
fn pin_fast_against_a_frame_that_becomes_a_clones() {
    loom::model(|| {
        let (pool, memory) = soft_pool(8).unwrap();
        let vm = Arc::new(SoftVm::new(&pool, &memory, Exclusive, 1).unwrap());
        vm.cpu_write(P, OLD).unwrap();
        let frozen = vm.space.fork().unwrap();
        let clone = SoftVm::clone_of(&frozen, &memory, Exclusive).unwrap();
        drop(frozen);
        let device = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || vm.space.pin(P, Access::Read).unwrap())
        };
        vm.cpu_write(P, NEW).unwrap();
        clone.cpu_write(P, 9).unwrap();
        let pin = device.join().unwrap();
        assert_eq!(pin.pfn(), vm.space.entry(P).unwrap().pfn());
        assert_eq!((vm.dma_read(&pin), clone.cpu_read(P)), (NEW, 9));
        drop((pin, vm, clone));
        assert_eq!(pool.leftovers(9), []);
    });
}

/// G5: one copy or one reuse; the loser finds the page writable.
#[test]
fn two_write_faults_on_one_page() {
    for shared in [false, true] {
        loom::model(move || {
            let w = world();
            let frozen = w.fork();
            let frozen = shared.then_some(frozen);
            let vm = Arc::clone(&w.vm);
            let other = thread::spawn(move || vm.cpu_write(P, NEW).unwrap());
            w.vm.cpu_write(P, DMA).unwrap();
            other.join().unwrap();
            assert!([NEW, DMA].contains(&w.vm.cpu_read(P)));
            let state = w.pool.state(w.frame());
            assert!(state.is_exclusive() && state.refs() == 1, "{state:?}");
            let stats = w.vm.space.stats();
            assert_eq!(
                stats.reused + stats.sharers_moved + stats.writer_moved,
                1,
                "{stats:?}"
            );
            if let Some(frozen) = frozen {
                assert_eq!(w.vm.read_frozen(&frozen, P), OLD);
            }
            w.settle();
        });
    }
}

/// B1 as a race: a reader that holds a snapshot's frame never sees what the guest writes.
#[test]
fn get_through_a_snapshot_against_break() {
    loom::model(|| {
        let w = world();
        let frozen = w.fork();
        let vm = Arc::clone(&w.vm);
        let guest = thread::spawn(move || vm.cpu_write(P, NEW).unwrap());
        let hold = frozen.get(P).unwrap();
        let before = w.vm.read_held(&hold);
        guest.join().unwrap();
        assert_eq!((before, w.vm.read_held(&hold)), (OLD, OLD));
        assert_eq!(w.vm.cpu_read(P), NEW);
        drop((hold, frozen));
        w.settle();
    });
}

/// A checker that reads a snapshot's page under its lock, against the break that moves it.
#[test]
fn read_of_a_snapshot_against_break() {
    loom::model(|| {
        let w = world();
        let frozen = w.fork();
        let vm = Arc::clone(&w.vm);
        let guest = thread::spawn(move || vm.cpu_write(P, NEW).unwrap());
        assert_eq!(w.vm.read_frozen(&frozen, P), OLD);
        guest.join().unwrap();
        assert_eq!(w.vm.read_frozen(&frozen, P), OLD);
        drop(frozen);
        w.settle();
    });
}

/// G7: the guest becomes the last holder, or not, while the snapshot goes away.
#[test]
fn break_against_drop_of_the_snapshot() {
    loom::model(|| {
        let w = world();
        let frozen = w.fork();
        let vm = Arc::clone(&w.vm);
        let guest = thread::spawn(move || vm.cpu_write(P, NEW).unwrap());
        thread::yield_now();
        drop(frozen);
        guest.join().unwrap();
        assert_eq!(w.vm.cpu_read(P), NEW);
        assert_eq!(w.pool.usage().in_use, 1);
        w.settle();
    });
}

/// The copy that several snapshots are given must outlive the first of them while it is handed round.
#[test]
fn break_for_two_snapshots_against_drop_of_one() {
    for first in [true, false] {
        loom::model(move || {
            let w = world();
            let (older, younger) = (w.fork(), w.fork());
            let (dropped, kept) = if first {
                (older, younger)
            } else {
                (younger, older)
            };
            let vm = Arc::clone(&w.vm);
            let guest = thread::spawn(move || vm.cpu_write(P, NEW).unwrap());
            // The count of an `Arc` is not loom's: without this it would always fall before the guest runs.
            thread::yield_now();
            drop(dropped);
            guest.join().unwrap();
            assert_eq!(w.vm.cpu_read(P), NEW);
            assert_eq!(w.vm.read_frozen(&kept, P), OLD);
            assert_eq!(w.pool.usage().in_use, 2);
            drop(kept);
            w.settle();
        });
    }
}

/// G7 with two that run: never both writable on one frame.
#[test]
fn break_of_a_clone_against_break_of_its_parent() {
    loom::model(|| {
        let (pool, memory) = soft_pool(8).unwrap();
        let vm = SoftVm::new(&pool, &memory, Exclusive, 1).unwrap();
        vm.cpu_write(P, OLD).unwrap();
        let frozen = vm.space.fork().unwrap();
        let clone = SoftVm::clone_of(&frozen, &memory, Exclusive).unwrap();
        drop(frozen);
        let clone = thread::spawn(move || {
            clone.cpu_write(P, NEW).unwrap();
            clone
        });
        vm.cpu_write(P, DMA).unwrap();
        let clone = clone.join().unwrap();
        assert_eq!((vm.cpu_read(P), clone.cpu_read(P)), (DMA, NEW));
        drop((vm, clone));
        assert_eq!(pool.leftovers(9), []);
    });
}

/// G9: unpin against fork's pin test: shared or copied, both right.
#[test]
fn unpin_against_fork() {
    loom::model(|| {
        let w = world();
        let pin = w.vm.space.pin(P, Access::Write).unwrap();
        let device = thread::spawn(move || drop(pin));
        let frozen = w.fork();
        device.join().unwrap();
        w.vm.cpu_write(P, NEW).unwrap();
        assert_eq!((w.vm.cpu_read(P), w.vm.read_frozen(&frozen, P)), (NEW, OLD));
        drop(frozen);
        w.settle();
    });
}
