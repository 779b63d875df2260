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

/// Two machines have one account, with room for one frame more: one machine gets it and the other hears that
/// there is none. Or, if a frame is refunded meanwhile, so does nobody.
pub(crate) fn two_breaks_on_the_last_frame_of_an_account<C: Policy>() {
    let (pool, _, vms) = two_spaces::<C>(8);
    let account = pool.open_account(Some(1));
    let [mut one, mut other] = vms;
    one.space = one.space.with_account(account.clone());
    other.space = other.space.with_account(account.clone());
    let snapshots = [one.space.fork().unwrap(), other.space.fork().unwrap()];
    let write = |vm: SoftVm<C>, snapshot: Arc<Frozen>| {
        move || {
            let written = vm.cpu_write(P, NEW).is_ok();
            assert_eq!(vm.cpu_read(P), if written { NEW } else { OLD }, "isolation");
            // The copy of it, if it has one: it is refunded.
            drop(snapshot);
            (vm, written)
        }
    };
    let [first, second] = snapshots;
    let second = thread::spawn(write(other, second));
    let (one, first) = write(one, first)();
    let (other, second) = second.join().unwrap();
    assert!(first || second, "the one frame is somebody's");
    assert_eq!((account.usage().charged, account.usage().peak), (0, 1));
    drop((one, other, account));
    assert_eq!(pool.leftovers(9), []);
    assert_eq!((pool.charges().open, pool.charges().closed), (0, 0), "lost");
}
