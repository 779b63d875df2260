//! The thread that keeps memory in stock for copies to come (`mm/stock.rs`), when nobody else wants the CPU
//! (`idle`).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::idle::{IdleTurn, Spare};
use crate::mm::FramePool;
use crate::timeline::span;

/// A turn that took longer to come than this was waited for: somebody else has the CPUs. To get memory from the
/// host takes many times as long as a turn of the thread that copies ahead, so a turn now and then is too much.
const AT_ONCE: Duration = Duration::from_micros(500);
/// How long it is before the next is asked for then, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

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
                let mut pauses = Pauses::default();
                while its.wait_for_want() {
                    if !pauses.wait_for_idle_cpu(&turn, &over) {
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

/// How long it is before a CPU is asked for again.
#[derive(Default)]
pub(crate) struct Pauses {
    next: Duration,
}

impl Pauses {
    /// Waits until a CPU is idle. `false` if it is over before.
    pub(crate) fn wait_for_idle_cpu(&mut self, turn: &IdleTurn, over: &AtomicBool) -> bool {
        let is_over = || over.load(Ordering::Acquire);
        while !is_over() {
            let asked = Instant::now();
            turn.wait(|| !is_over());
            let Some(pause) = self.after(asked.elapsed()) else {
                break;
            };
            let asleep = Instant::now();
            while let Some(left) = pause.checked_sub(asleep.elapsed()).filter(|_| !is_over()) {
                thread::park_timeout(left);
            }
        }
        !is_over()
    }

    /// How long it is to the next try, after a turn took `waited` to come: no time if that was of an idle CPU's.
    fn after(&mut self, waited: Duration) -> Option<Duration> {
        let (first, most) = PAUSES;
        if waited <= AT_ONCE {
            self.next = Duration::ZERO;
            return None;
        }
        self.next = (2 * self.next).clamp(first, most);
        Some(self.next)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_a_turn_asks_less_and_less_often() {
        let mut pauses = Pauses::default();
        let busy = AT_ONCE + Duration::from_nanos(1);
        let waits = |pauses: &mut Pauses| pauses.after(busy).unwrap().as_millis();
        assert_eq!(pauses.after(AT_ONCE), None);
        assert_eq!([(); 3].map(|()| waits(&mut pauses)), [20, 40, 80]);
        (0..5).for_each(|_| _ = waits(&mut pauses));
        assert_eq!(waits(&mut pauses), 1000);
        assert_eq!(pauses.after(Duration::ZERO), None);
        assert_eq!(waits(&mut pauses), 20);
    }

    /// Between two tries it sleeps, and whoever ends it does not wait for that.
    #[test]
    fn it_ends_while_it_pauses() {
        let (turn, over) = (Arc::<IdleTurn>::default(), Arc::<AtomicBool>::default());
        let (its_turn, its_over) = (Arc::clone(&turn), Arc::clone(&over));
        // There is nobody who gives turns.
        let worker =
            thread::spawn(move || Pauses::default().wait_for_idle_cpu(&its_turn, &its_over));
        over.store(true, Ordering::Release);
        while !worker.is_finished() {
            turn.look_again();
            thread::yield_now();
        }
        assert!(!worker.join().unwrap());
    }
}
