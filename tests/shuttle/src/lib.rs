//! The memory protocol under everything at once, in random schedules.
//!
//! `tests/loom` explores each race alone and in full. Here many run together: vCPUs, devices, forks, clones,
//! readers, moves, merges, discards and dirty tracking on one address space, and shuttle picks the schedule.
//! The code under test is `vmm/mm/src` itself, compiled against shuttle's atomics and locks.
//!
//! Seeds are fixed, so that a run is like the one before; `SHUTTLE_RANDOM_SEED` sets another,
//! `SHUTTLE_ITERATIONS` how many schedules are tried.
//!
//! What shuttle cannot see: weak memory. All its atomics are sequentially consistent.

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../../../vmm/mm/src/lib.rs"]
pub mod mm;
#[allow(unreachable_pub)]
mod sync {
    pub use shuttle::sync::atomic::{AtomicU64, Ordering, fence};
    pub use shuttle::sync::{
        Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    };
}

#[cfg(test)]
#[path = "../../loom/src/child.rs"]
mod child;
#[cfg(test)]
mod mix;
#[cfg(test)]
mod schedules;
