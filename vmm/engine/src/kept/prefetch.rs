//! A thread that brings chunks before somebody wants them.
//!
//! It has a turn when a CPU is idle, brings one chunk, and waits for the next: vCPUs come first. While it reads it
//! holds nothing but the turn of the region that it brings, for which only who wants the same bytes would wait. What it
//! brings is in frames and shown to nobody: a vCPU that touches it has a fault, and no reading to wait for. It keeps no
//! memory alive: what nobody has any more is not brought.
//!
//! What cannot be brought is left to who touches it, and is told then.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::host::{IdleTurn, Pauses, Spare};
use crate::memory::Frames;
use crate::mm::{BackedRegions, BringError, REGION_PAGES, Toucher};

/// It ends when this is dropped.
pub struct Prefetcher {
    is_over: Arc<AtomicBool>,
    turn: Arc<IdleTurn>,
    worker: Option<JoinHandle<()>>,
    /// After the worker, which waits for it.
    _spare: Spare,
}

impl Prefetcher {
    /// Has regions brought, in this order: those of `regions` that `order` has. Their frames are `frames`, a quarter of
    /// whose limit it leaves to others.
    ///
    /// # Errors
    /// The host's, if it can't have another thread.
    pub fn start(regions: BackedRegions, order: Vec<u32>, frames: &Frames) -> io::Result<Self> {
        let spare = Spare::start()?;
        let (is_over, turn) = (Arc::<AtomicBool>::default(), Arc::clone(spare.turn()));
        let (over, its_turn) = (Arc::clone(&is_over), Arc::clone(&turn));
        let pool = Arc::clone(frames.pool());
        let has_room = move || {
            let usage = pool.usage();
            usage.in_use + REGION_PAGES <= usage.limit / 4 * 3
        };
        let worker = thread::Builder::new()
            .name("prefetch".to_owned())
            .spawn(move || {
                let mut pauses = Pauses::default();
                for region in order {
                    if !pauses.wait_for_idle_cpu(&its_turn, &over) || !has_room() {
                        return;
                    }
                    match regions.bring(region as usize, Toucher::Prefetch) {
                        Ok(()) => {}
                        Err(error @ BringError::Backing { .. }) => {
                            tracing::debug!(%error, "a chunk is not prefetched");
                        }
                        Err(BringError::Alloc { .. }) => return,
                    }
                }
            })?;
        Ok(Self {
            is_over,
            turn,
            worker: Some(worker),
            _spare: spare,
        })
    }

    /// Whether there is nothing more to prefetch.
    pub fn is_finished(&self) -> bool {
        self.worker.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        self.turn.look_again();
        if let Some(worker) = self.worker.take() {
            worker.thread().unpark();
            // If it has panicked, that was said then, and chunks are brought by who touches them.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Prefetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefetcher").finish_non_exhaustive()
    }
}
