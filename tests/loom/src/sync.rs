//! loom's atomics and locks, with a gap in loom mended.
//!
//! loom decides where to switch threads by the *last* access to each object. Loads do not depend on one
//! another, so a thread's own load hides an earlier one of another thread from its store that follows: loom
//! 0.7.3 then never tries that store before the other's load (`rt/atomic.rs`, `last_access`). Copying a page
//! before writing it is just that. Here every access to an atomic first changes a second one, which belongs
//! to it: such changes all depend on one another, so that none is hidden. They are relaxed, and order
//! nothing: what a load may see is as it was.

use loom::sync::atomic;

pub use loom::sync::atomic::{Ordering, fence};
pub use loom::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[derive(Debug)]
pub struct AtomicU64 {
    value: atomic::AtomicU64,
    accessed: atomic::AtomicU64,
}

impl AtomicU64 {
    pub fn new(value: u64) -> Self {
        Self {
            value: atomic::AtomicU64::new(value),
            accessed: atomic::AtomicU64::new(0),
        }
    }

    fn about_to_be_accessed(&self) -> &atomic::AtomicU64 {
        self.accessed.fetch_or(0, Ordering::Relaxed);
        &self.value
    }

    pub fn load(&self, order: Ordering) -> u64 {
        self.about_to_be_accessed().load(order)
    }

    pub fn store(&self, value: u64, order: Ordering) {
        self.about_to_be_accessed().store(value, order);
    }

    pub fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.about_to_be_accessed().fetch_or(bits, order)
    }

    pub fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.about_to_be_accessed()
            .compare_exchange_weak(current, new, success, failure)
    }
}
