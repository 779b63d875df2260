//! The thread that keeps memory in stock for copies to come (`mm/stock.rs`), when nobody else wants the CPU
//! (`idle`).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use super::idle::Spare;
use crate::mm::FramePool;
use crate::timeline::span;

/// A thread beside all VMs of a pool. It ends when this is dropped.
pub(crate) struct StockKeeper {
    pool: Arc<FramePool>,
    is_over: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
    /// After the worker, which waits for it.
    spare: Spare,
}

impl StockKeeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host's, if it can't have another thread.
    pub(crate) fn start(pool: &Arc<FramePool>) -> io::Result<Self> {
        let spare = Spare::start()?;
        let is_over = Arc::<AtomicBool>::default();
        let (its, over, turn) = (
            Arc::clone(pool),
            Arc::clone(&is_over),
            Arc::clone(spare.turn()),
        );
        let worker = thread::Builder::new()
            .name("stock".to_owned())
            .spawn(move || {
                while its.wait_for_want() {
                    turn.wait(|| !over.load(Ordering::Acquire));
                    if over.load(Ordering::Acquire) {
                        return;
                    }
                    let _span = span!("stock up");
                    its.stock_up();
                }
            })?;
        Ok(Self {
            pool: Arc::clone(pool),
            is_over,
            worker: Some(worker),
            spare,
        })
    }
}

impl Drop for StockKeeper {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        self.pool.close_stock();
        self.spare.turn().look_again();
        // If it has panicked, that was said then, and who needs memory asks the host for it.
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for StockKeeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StockKeeper").finish_non_exhaustive()
    }
}
