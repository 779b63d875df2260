//! The thread that breaks ahead of the guest's writes (`mm/ahead.rs`), with whatever CPU time the guest leaves.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::process::setpriority_process;

use crate::mm::{AddressSpace, CowPolicy};

/// The lowest there is: everybody else goes first.
const NICE: i32 = 19;

/// A thread beside the vCPUs that copies, after each snapshot, what the guest has written before all of the last ones, so that
/// the guest need not fault on it. It ends when this is dropped.
pub struct Ahead {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    order: Mutex<Order>,
    changed: Condvar,
    /// Whether to go on after a piece. Only a hint beside `order`: it saves the thread from locking that every time.
    go_on: AtomicBool,
}

#[derive(Default)]
struct Order {
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
        let shared = Arc::<Shared>::default();
        let its = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("ahead".to_owned())
            .spawn(move || {
                if let Err(error) = setpriority_process(None, NICE) {
                    tracing::debug!(%error, "copies ahead are made at the priority of everything else");
                }
                its.run(|| space.break_ahead());
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Has it rest: before a fork, which would wait for it. Returns when it does.
    pub fn rest(&self) {
        self.shared.order(Todo::Rest);
        let mut order = self.shared.lock();
        while order.is_busy {
            order = self
                .shared
                .changed
                .wait(order)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has it work: after a fork.
    pub fn work(&self) {
        self.shared.order(Todo::Work);
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.order(Todo::End);
        if let Some(thread) = self.thread.take() {
            // It has panicked: that was said then, and what it left undone the guest's faults do.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ahead").finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, todo: Todo) {
        self.lock().todo = todo;
        self.go_on.store(todo == Todo::Work, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// The thread's life. `piece` does one, and says whether there may be more.
    fn run(&self, mut piece: impl FnMut() -> bool) {
        let mut order = self.lock();
        loop {
            match order.todo {
                Todo::End => return,
                Todo::Rest => {
                    order = self
                        .changed
                        .wait(order)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Todo::Work => {
                    order.is_busy = true;
                    drop(order);
                    let is_done = loop {
                        if !piece() {
                            break true;
                        }
                        if !self.go_on.load(Ordering::Relaxed) {
                            break false;
                        }
                    };
                    order = self.lock();
                    order.is_busy = false;
                    if is_done && order.todo == Todo::Work {
                        order.todo = Todo::Rest;
                    }
                    self.changed.notify_all();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// `work` right after `rest` must not be lost because the last round has just ended.
    #[test]
    fn it_works_when_told_and_rests_when_told() {
        let (shared, left) = (Arc::new(Shared::default()), Arc::new(AtomicU64::new(0)));
        let (its, todo) = (Arc::clone(&shared), Arc::clone(&left));
        let thread = thread::spawn(move || {
            its.run(|| {
                let one_less = |n: u64| n.checked_sub(1);
                todo.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less)
                    .is_ok()
            });
        });
        let ahead = Ahead {
            shared,
            thread: Some(thread),
        };
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
}
