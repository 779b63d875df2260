//! Memory that two want at once, while the host is asked for it with no lock held.

use super::*;
use crate::mm::{Access, FrameMemory, Order};

/// A pool with memory for `limit` frames, and two spaces of one page, which a device holds so that a fork
/// needs a frame.
fn two_spaces<C: Policy>(limit: u64) -> (Arc<FramePool>, Arc<SoftMemory>, [SoftVm<C>; 2]) {
    let memory = SoftMemory::new(32);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 32, limit).unwrap();
    let vms = [(); 2].map(|()| {
        let vm = SoftVm::new(&pool, &memory, C::default(), 1).unwrap();
        vm.cpu_write(P, OLD).unwrap();
        vm
    });
    (pool, memory, vms)
}

fn fork_both<C: Policy>(pool: &Arc<FramePool>, vms: [SoftVm<C>; 2]) {
    let fork = |vm: SoftVm<C>| {
        move || {
            let pin = vm.space.pin(P, Access::Write).unwrap();
            let frozen = vm.space.fork().unwrap();
            assert_ne!(frozen.frame(P).unwrap(), pin.pfn(), "isolation");
            (vm, pin, frozen)
        }
    };
    let [one, other] = vms;
    let other = thread::spawn(fork(other));
    let one = fork(one)();
    let other = other.join().unwrap();
    let (a, b) = (one.2.frame(P).unwrap(), other.2.frame(P).unwrap());
    assert_ne!(a, b, "isolation");
    assert_eq!(pool.usage().in_use, pool.usage().committed);
    drop((one, other));
}

/// The first is given memory for more than it needs. The other waits for what is left of it, and does not say
/// that there is none.
pub(crate) fn two_forks_that_need_the_last_memory<C: Policy>() {
    let (pool, _, vms) = two_spaces::<C>(4);
    fork_both(&pool, vms);
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0, "lost");
}

/// All memory that there is lies idle in a home: one makes room, and the other waits for it, or makes some as
/// well.
pub(crate) fn two_forks_that_need_what_a_home_does_not_use<C: Policy>() {
    let (pool, memory, vms) = two_spaces::<C>(6);
    let idle = SoftVm::new(&pool, &memory, C::default(), 2).unwrap();
    for page in [P, Gfn(1)] {
        idle.cpu_write(page, OLD).unwrap();
    }
    // Away from home.
    for page in [P, Gfn(1)] {
        idle.space.migrate(page).unwrap();
    }
    assert_eq!((pool.usage().in_use, pool.usage().committed), (4, 6));
    fork_both(&pool, vms);
    drop(idle);
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0, "lost");
}
