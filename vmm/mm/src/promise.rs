//! Promises: memory that is spoken for before anybody uses it.
//!
//! A pool is shared by machines that grow. Whether there is room for *one more* cannot be seen from what the
//! others use now. So who starts a machine has what it may need promised first, and is refused if that is
//! more than is left of the pool's limit: before anybody runs out. A promise is bookkeeping: nothing is
//! allocated, and no allocation asks for a promise. That a machine does not take more than it was promised is
//! its account's limit (`account.rs`).

use std::fmt;
use std::sync::Arc;

use super::addr::PAGE_SIZE;
use super::sync::{Mutex, lock};

/// Frames.
const MIB: u64 = (1 << 20) / PAGE_SIZE;

/// What a pool has promised. At most its limit.
pub(super) struct Promises {
    limit: u64,
    promised: Mutex<u64>,
}

/// Memory that was promised to somebody, until this is dropped.
pub struct Promise {
    promises: Arc<Promises>,
    frames: u64,
}

/// Memory could not be promised: too much is promised already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot promise {} MiB: {} of {} MiB are promised already",
    asked.div_ceil(MIB),
    promised / MIB,
    limit / MIB
)]
pub struct PromiseError {
    /// Frames asked for.
    pub asked: u64,
    /// Frames promised to others.
    pub promised: u64,
    /// The most that may be promised in all: what the pool may commit.
    pub limit: u64,
}

impl Promises {
    /// None yet, of `limit` frames.
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            promised: Mutex::new(0),
        })
    }

    pub(super) fn promised(&self) -> u64 {
        *lock(&self.promised)
    }

    pub(super) fn try_promise(self: &Arc<Self>, asked: u64) -> Result<Promise, PromiseError> {
        let mut promised = lock(&self.promised);
        if asked > self.limit - *promised {
            return Err(PromiseError {
                asked,
                promised: *promised,
                limit: self.limit,
            });
        }
        *promised += asked;
        Ok(Promise {
            promises: Arc::clone(self),
            frames: asked,
        })
    }
}

impl Promise {
    /// How many frames.
    pub fn frames(&self) -> u64 {
        self.frames
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        *lock(&self.promises.promised) -= self.frames;
    }
}

impl fmt::Debug for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Promise")
            .field("frames", &self.frames)
            .finish()
    }
}
