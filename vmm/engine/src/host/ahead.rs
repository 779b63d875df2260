//! The thread that breaks ahead of the guest's writes (`mm/ahead.rs`), with whatever CPU time the guest
//! leaves (`idle`).

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::idle::{IdleTurn, Spare};
use crate::mm::{AddressSpace, CowPolicy};
use crate::timeline::span;

/// How long a turn is, or one piece longer: many times what it costs to give it.
const TURN: Duration = Duration::from_micros(200);

/// A thread beside the vCPUs that copies, after each snapshot, what the guest has written before all of the
/// last ones, so that the guest need not fault on it. It ends when this is dropped.
pub struct Ahead {
    shared: Arc<WorkerState>,
    worker: Option<JoinHandle<()>>,
    /// After the worker, which waits for it.
    _spare: Spare,
}

/// What the worker shares with who gives it its duty.
#[derive(Default)]
struct WorkerState {
    duty: Mutex<Duty>,
    changed: Condvar,
    /// Whether to go on after a piece. Only a hint beside `duty`: it saves the thread from locking that
    /// every time.
    go_on: AtomicBool,
    turn: Arc<IdleTurn>,
}

/// What the worker is to do, and whether it is doing a piece.
#[derive(Default)]
struct Duty {
    todo: Todo,
    is_busy: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Todo {
    #[default]
    Rest,
    Work,
    End,
}

impl Ahead {
    /// Starts the thread, which rests.
    ///
    /// # Errors
    /// The host's, if it can't have another thread.
    pub fn start<P: CowPolicy>(space: Arc<AddressSpace<P>>) -> io::Result<Self> {
        space.notes_writes();
        Self::of(move || space.break_ahead())
    }

    /// `piece` does one, and says whether there may be more.
    fn of(piece: impl FnMut() -> bool + Send + 'static) -> io::Result<Self> {
        let spare = Spare::start()?;
        let shared = Arc::new(WorkerState {
            turn: Arc::clone(spare.turn()),
            ..WorkerState::default()
        });
        let its = Arc::clone(&shared);
        let worker = thread::Builder::new()
            .name("ahead".to_owned())
            .spawn(move || {
                its.run(
                    || its.turn.wait(|| its.go_on.load(Ordering::Acquire)),
                    piece,
                )
            })?;
        Ok(Self {
            shared,
            worker: Some(worker),
            _spare: spare,
        })
    }

    /// Has it rest: before a fork, which would wait for it. Returns when it does.
    pub fn rest(&self) {
        self.shared.assign(Todo::Rest);
        let mut duty = self.shared.lock();
        while duty.is_busy {
            duty = self
                .shared
                .changed
                .wait(duty)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has it work: after a fork.
    pub fn work(&self) {
        self.shared.assign(Todo::Work);
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.assign(Todo::End);
        // If one has panicked, that was said then, and what it left undone the guest's faults do.
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ahead").finish_non_exhaustive()
    }
}

impl WorkerState {
    fn lock(&self) -> MutexGuard<'_, Duty> {
        self.duty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assign(&self, todo: Todo) {
        self.lock().todo = todo;
        self.go_on.store(todo == Todo::Work, Ordering::Release);
        self.changed.notify_all();
        self.turn.look_again();
    }

    /// The worker's life. `turn` returns when there is CPU time to spare, or the duty has changed.
    fn run(&self, mut turn: impl FnMut(), mut piece: impl FnMut() -> bool) {
        loop {
            let mut duty = self.lock();
            while duty.todo == Todo::Rest {
                duty = self
                    .changed
                    .wait(duty)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if duty.todo == Todo::End {
                return;
            }
            drop(duty);
            turn();
            let mut duty = self.lock();
            if duty.todo != Todo::Work {
                continue;
            }
            duty.is_busy = true;
            drop(duty);
            let span = span!("copy ahead");
            let end = Instant::now() + TURN;
            let is_done = loop {
                if !piece() {
                    break true;
                }
                if !self.go_on.load(Ordering::Relaxed) || Instant::now() >= end {
                    break false;
                }
            };
            drop(span);
            let mut duty = self.lock();
            duty.is_busy = false;
            if is_done && duty.todo == Todo::Work {
                duty.todo = Todo::Rest;
            }
            drop(duty);
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc;

    use rustix::process::getpriority_process;

    use super::*;

    /// `work` right after `rest` must not be lost because the last round has just ended.
    #[test]
    fn it_works_when_told_and_rests_when_told() {
        let left = Arc::new(AtomicU64::new(0));
        let todo = Arc::clone(&left);
        let ahead = Ahead::of(move || {
            let one_less = |n: u64| n.checked_sub(1);
            todo.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less)
                .is_ok()
        })
        .unwrap();
        for _ in 0..100 {
            left.store(1000, Ordering::Release);
            ahead.work();
            ahead.rest();
            let before = left.load(Ordering::Acquire);
            thread::yield_now();
            assert_eq!(left.load(Ordering::Acquire), before, "it rests");
        }
        left.store(10, Ordering::Release);
        ahead.work();
        while left.load(Ordering::Acquire) > 0 {
            thread::yield_now();
        }
    }

    /// Whoever holds locks that faults wait for runs like whoever faults.
    #[test]
    fn pieces_are_done_at_the_priority_of_everybody_else() {
        let (say, heard) = mpsc::channel();
        let ahead = Ahead::of(move || {
            say.send(getpriority_process(None).unwrap()).unwrap();
            false
        })
        .unwrap();
        ahead.work();
        assert_eq!(heard.recv(), Ok(getpriority_process(None).unwrap()));
    }

    /// A thread that waits for CPU time to spare is at rest already.
    #[test]
    fn who_has_it_rest_does_not_wait_for_its_turn() {
        let shared = Arc::<WorkerState>::default();
        let its = Arc::clone(&shared);
        let (give, turns) = mpsc::channel::<()>();
        let (asked, asks) = mpsc::channel();
        let worker = thread::spawn(move || {
            let turn = || {
                asked.send(()).unwrap();
                let _ = turns.recv();
            };
            its.run(turn, || panic!("nobody has given it a turn"));
        });
        let ahead = Ahead {
            shared,
            worker: Some(worker),
            _spare: Spare::start().unwrap(),
        };
        ahead.work();
        asks.recv().unwrap();
        ahead.rest();
        give.send(()).unwrap();
    }
}
