//! The thread that breaks ahead of the guest's writes (`mm/ahead.rs`), with whatever CPU time the guest
//! leaves.
//!
//! A break holds the lock of its region while 2 MiB are copied, and a fault in that region waits for it. Were
//! the thread at a low priority, it could be taken off the CPU just then, and the guest would wait until
//! nobody else wants that CPU: priorities are not inherited by who holds a lock, and without privilege they
//! can be lowered and never raised again. So it takes two threads:
//!
//! * `ahead` does the work, at the priority of everybody else, a *turn* at a time: some pieces, or one that
//!   is large.
//! * `spare` has the lowest priority, holds nothing, and does nothing but to give `ahead` its next turn. When
//!   it gets to run there was CPU time that nobody wanted.
//!
//! On a machine that is busy there are few turns. What a guest can wait for is the end of one piece that runs
//! like itself.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use rustix::process::setpriority_process;

use crate::mm::{AddressSpace, CowPolicy};
use crate::timeline::span;

/// The lowest there is: everybody else goes first.
const NICE: i32 = 19;

/// How long a turn is, or one piece longer: many times what it costs to give it.
const TURN: Duration = Duration::from_micros(200);

/// A thread beside the vCPUs that copies, after each snapshot, what the guest has written before all of the
/// last ones, so that the guest need not fault on it. It ends when this is dropped.
pub struct Ahead {
    shared: Arc<WorkerState>,
    worker: Option<JoinHandle<()>>,
    spare: Option<JoinHandle<()>>,
}

/// What the worker shares with who gives it its duty.
#[derive(Default)]
struct WorkerState {
    duty: Mutex<Duty>,
    changed: Condvar,
    /// Whether to go on after a piece. Only a hint beside `duty`: it saves the thread from locking that
    /// every time.
    go_on: AtomicBool,
    turn: IdleTurn,
}

/// What the two threads say to each other: no lock is held by the one at low priority.
#[derive(Default)]
struct IdleTurn {
    worker: OnceLock<Thread>,
    is_given: AtomicBool,
    is_over: AtomicBool,
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
        let shared = Arc::<WorkerState>::default();
        let (its, theirs) = (Arc::clone(&shared), Arc::clone(&shared));
        let spare = thread::Builder::new()
            .name("spare".to_owned())
            .spawn(move || {
                if let Err(error) = setpriority_process(None, NICE) {
                    tracing::debug!(
                        %error,
                        "copies ahead are made whether there is CPU time to spare or not"
                    );
                }
                theirs.turn.give();
            })?;
        let giver = spare.thread().clone();
        // If there is no second thread, dropping this ends the first.
        let mut ahead = Self {
            shared,
            worker: None,
            spare: Some(spare),
        };
        let worker = thread::Builder::new()
            .name("ahead".to_owned())
            .spawn(move || {
                its.turn.worker.get_or_init(thread::current);
                its.run(|| its.turn.wait(&giver, &its.go_on), piece);
            })?;
        ahead.worker = Some(worker);
        Ok(ahead)
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
        if let Some(spare) = self.spare.take() {
            self.shared.turn.is_over.store(true, Ordering::Release);
            spare.thread().unpark();
            let _ = spare.join();
        }
    }
}

impl fmt::Debug for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ahead").finish_non_exhaustive()
    }
}

impl IdleTurn {
    /// The life of the thread that gives turns: one each time it is asked, as soon as it gets to run.
    fn give(&self) {
        loop {
            thread::park();
            if self.is_over.load(Ordering::Acquire) {
                return;
            }
            self.is_given.store(true, Ordering::Release);
            self.worker.get().inspect(|worker| worker.unpark());
        }
    }

    /// Asks for a turn. Returns when it is given, or the worker is not to go on.
    fn wait(&self, giver: &Thread, go_on: &AtomicBool) {
        self.is_given.store(false, Ordering::Relaxed);
        giver.unpark();
        while !self.is_given.load(Ordering::Acquire) && go_on.load(Ordering::Acquire) {
            thread::park();
        }
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
        self.turn.worker.get().inspect(|worker| worker.unpark());
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
            spare: None,
        };
        ahead.work();
        asks.recv().unwrap();
        ahead.rest();
        give.send(()).unwrap();
    }
}
