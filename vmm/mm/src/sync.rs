//! The one place where `mm` takes its atomics and locks from: `std`, or under `--cfg loom` and `--cfg
//! shuttle` the crate that compiles it for a model checker (`tests/loom`, `tests/shuttle`).

#[cfg(any(loom, shuttle))]
pub(super) use crate::sync::{
    AtomicU64, Condvar, Mutex, MutexGuard, Ordering, RwLock, RwLockReadGuard, RwLockWriteGuard,
    fence,
};
#[cfg(not(any(loom, shuttle)))]
pub(super) use std::sync::{
    Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicU64, Ordering, fence},
};

#[cfg(any(loom, shuttle))]
pub(super) use crate::sync::{
    RwLock as ShardedLock, RwLockReadGuard as ShardedLockReadGuard,
    RwLockWriteGuard as ShardedLockWriteGuard,
};
/// A lock that is taken shared all the time and alone now and then: whoever takes it shared changes a cache
/// line that only a few threads have in common, and whoever takes it alone changes all of them. Model checkers
/// have one that does the same by one line.
#[cfg(not(any(loom, shuttle)))]
pub(super) use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};

use std::sync::PoisonError;

/// Locks `mutex`. A panic elsewhere does not make the data wrong: every critical section of `mm` leaves
/// a legal state at each step.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for `condition`, without the lock meanwhile; poisoning as in [`lock`].
pub(super) fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition
        .wait(guard)
        .unwrap_or_else(PoisonError::into_inner)
}

/// Locks `lock` shared; poisoning as in [`lock`].
pub(super) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks `lock` alone; poisoning as in [`lock`].
pub(super) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// As [`read`].
pub(super) fn read_sharded<T>(lock: &ShardedLock<T>) -> ShardedLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// As [`write`].
pub(super) fn write_sharded<T>(lock: &ShardedLock<T>) -> ShardedLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// A boxed slice of zeroed atomics. With `std` the memory comes from the kernel untouched, so that a
/// table costs what is used of it.
pub(super) fn zeroed(len: usize) -> Box<[AtomicU64]> {
    #[cfg(not(any(loom, shuttle)))]
    {
        use zerocopy::FromZeros;
        <[AtomicU64]>::new_box_zeroed_with_elems(len)
            .unwrap_or_else(|_| std::alloc::handle_alloc_error(std::alloc::Layout::new::<u64>()))
    }
    #[cfg(any(loom, shuttle))]
    (0..len).map(|_| AtomicU64::new(0)).collect()
}
