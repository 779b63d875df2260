//! Work that is done when nobody else wants the CPU, by threads that hold locks others wait for.
//!
//! A break holds the lock of its region while 2 MiB are copied, and a fault in that region waits for it. Were
//! the thread that breaks ahead at a low priority, it could be taken off the CPU just then, and the guest would
//! wait until nobody else wants that CPU: priorities are not inherited by who holds a lock, and without
//! privilege they can be lowered and never raised again. So it takes two threads:
//!
//! * a *worker* does the work, at the priority of everybody else, a *turn* at a time: some pieces, or one that
//!   is large.
//! * `spare` has the lowest priority, holds nothing, and does nothing but to give the worker its next turn. When
//!   it gets to run there was CPU time that nobody wanted.
//!
//! On a machine that is busy there are few turns. What a guest can wait for is the end of one piece that runs
//! like itself.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle, Thread};

use rustix::process::setpriority_process;

/// The lowest there is: everybody else goes first.
const NICE: i32 = 19;

/// The thread that gives turns. It ends when this is dropped, which is after its worker has ended.
pub(crate) struct Spare {
    turn: Arc<IdleTurn>,
    thread: Option<JoinHandle<()>>,
}

/// What the two threads say to each other: no lock is held by the one at low priority.
#[derive(Default)]
pub(crate) struct IdleTurn {
    /// Who gives turns, from when it runs on.
    giver: OnceLock<Thread>,
    /// Who takes them, from when it has asked for the first on.
    worker: OnceLock<Thread>,
    is_given: AtomicBool,
    is_over: AtomicBool,
}

impl Spare {
    /// # Errors
    /// The host's, if it can't have another thread.
    pub(crate) fn start() -> io::Result<Self> {
        let turn = Arc::<IdleTurn>::default();
        let its = Arc::clone(&turn);
        let thread = thread::Builder::new()
            .name("spare".to_owned())
            .spawn(move || {
                if let Err(error) = setpriority_process(None, NICE) {
                    tracing::debug!(
                        %error,
                        "work for spare time is done whether there is CPU time to spare or not"
                    );
                }
                its.give();
            })?;
        turn.giver.get_or_init(|| thread.thread().clone());
        Ok(Self {
            turn,
            thread: Some(thread),
        })
    }

    /// Its turns, of which one worker takes them all.
    pub(crate) fn turn(&self) -> &Arc<IdleTurn> {
        &self.turn
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.turn.is_over.store(true, Ordering::Release);
            thread.thread().unpark();
            let _ = thread.join();
        }
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
            self.look_again();
        }
    }

    /// Asks for a turn, as the worker. Returns when it is given, or `go_on` says no: it is asked again after
    /// [`IdleTurn::look_again`].
    pub(crate) fn wait(&self, go_on: impl Fn() -> bool) {
        self.worker.get_or_init(thread::current);
        self.is_given.store(false, Ordering::Relaxed);
        self.giver.get().inspect(|giver| giver.unpark());
        while !self.is_given.load(Ordering::Acquire) && go_on() {
            thread::park();
        }
    }

    /// Has a worker that waits for a turn ask whether to go on.
    pub(crate) fn look_again(&self) {
        self.worker.get().inspect(|worker| worker.unpark());
    }
}
