//! Tests that measure the memory of this process, and those that take and give back so much of it that
//! they would be measured too.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static MEMORY: RwLock<()> = RwLock::new(());

/// Nobody else takes or gives back much memory while the result lives.
pub(crate) fn alone() -> RwLockWriteGuard<'static, ()> {
    MEMORY.write().unwrap_or_else(PoisonError::into_inner)
}

/// Nobody measures memory while the result lives: to be held longest of all.
pub(crate) fn beside_others() -> RwLockReadGuard<'static, ()> {
    MEMORY.read().unwrap_or_else(PoisonError::into_inner)
}
