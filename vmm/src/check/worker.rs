//! The thread that examines snapshots beside the running guest.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use palimpsest::causes::chain;
use palimpsest::timeline::TARGET;
use tracing::span::EnteredSpan;
use tracing::trace_span;

use super::examiner::{Examiner, Findings, Look};
use super::identity::Observation;
use super::violation::Violation;
use crate::incarnation::Incarnation;
use crate::run_snapshot::RunSnapshot;

/// Examines snapshots in the order they are handed over, on its own thread.
#[derive(Debug)]
pub struct Worker {
    tasks: Option<Sender<Task>>,
    violations: Receiver<Violation>,
    counters: Arc<WorkerCounters>,
    handed_over: u64,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Task {
    First(Arc<RunSnapshot>, Look),
    Last(Arc<RunSnapshot>, Option<Arc<RunSnapshot>>),
    Draws(Arc<Incarnation>, Observation),
}

impl Task {
    /// Says that it is being done.
    fn span(&self) -> EnteredSpan {
        let number = |snapshot: &RunSnapshot| snapshot.number();
        match self {
            Self::First(s, _) => {
                trace_span!(target: TARGET, "first look", snapshot = number(s)).entered()
            }
            Self::Last(s, _) => {
                trace_span!(target: TARGET, "last look", snapshot = number(s)).entered()
            }
            Self::Draws(..) => trace_span!(target: TARGET, "draws").entered(),
        }
    }
}

/// Statistics, and how far the thread is: nothing else is ordered by them.
#[derive(Debug, Default)]
struct WorkerCounters {
    tasks_done: AtomicU64,
    checked: AtomicU64,
    pages: AtomicU64,
    draws: AtomicU64,
    /// Why it cannot go on.
    failed: OnceLock<String>,
}

/// The checker has ended too early.
#[derive(Debug, thiserror::Error)]
#[error("{why}, with {tasks} looks at snapshots to do: not every snapshot was checked")]
pub struct Unfinished {
    /// Looks that were not done.
    pub tasks: u64,
    /// Why.
    pub why: String,
}

/// How far the worker is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckCounts {
    /// Snapshots that had their first look.
    pub checked: u64,
    /// Pages that were read and compared.
    pub pages: u64,
    /// Random numbers that were compared.
    pub draws: u64,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub fn start(mut examiner: Examiner) -> io::Result<Self> {
        let (tasks, todo) = mpsc::channel::<Task>();
        let (report, violations) = mpsc::channel();
        let counters = Arc::new(WorkerCounters::default());
        let count = Arc::clone(&counters);
        let thread = thread::Builder::new()
            .name("checker".to_owned())
            .spawn(move || {
                for task in todo {
                    let _span = task.span();
                    // Memory that is read as it is used: what cannot be had is no violation.
                    if let Task::First(snapshot, _) = &task
                        && let Err(error) = examiner.bring(snapshot)
                    {
                        count.failed.get_or_init(|| chain(&error));
                        return;
                    }
                    let Findings {
                        pages,
                        draws,
                        violations,
                    } = match &task {
                        Task::First(snapshot, look) => {
                            let findings = examiner.first_look(snapshot, look);
                            count.checked.fetch_add(1, Ordering::Relaxed);
                            findings
                        }
                        Task::Last(snapshot, heir) => examiner.last_look(snapshot, heir.as_deref()),
                        Task::Draws(incarnation, now) => examiner.look_at_draws(incarnation, now),
                    };
                    count.pages.fetch_add(pages, Ordering::Relaxed);
                    count.draws.fetch_add(draws, Ordering::Relaxed);
                    for violation in violations {
                        // Nobody listens any more: the run is over.
                        let _ = report.send(violation);
                    }
                    // Snapshots are dropped before the task counts as done.
                    drop(task);
                    count.tasks_done.fetch_add(1, Ordering::Release);
                }
            })?;
        Ok(Self {
            tasks: Some(tasks),
            violations,
            counters,
            handed_over: 0,
            thread: Some(thread),
        })
    }

    /// Hands over a new snapshot.
    pub fn first_look(&mut self, snapshot: &Arc<RunSnapshot>, look: Look) {
        self.hand_over(Task::First(Arc::clone(snapshot), look));
    }

    /// Hands over a snapshot for its last look, after which it is dropped. `heir` is a snapshot that stays,
    /// and whose parent this one is, if there is one.
    pub fn last_look(&mut self, snapshot: Arc<RunSnapshot>, heir: Option<&Arc<RunSnapshot>>) {
        self.hand_over(Task::Last(snapshot, heir.cloned()));
    }

    /// Hands over what a guest that stands still has drawn, after all snapshots of it.
    pub fn look_at_draws(&mut self, incarnation: Arc<Incarnation>, now: Observation) {
        self.hand_over(Task::Draws(incarnation, now));
    }

    /// Hands over the oldest of snapshots that are kept, if there is one, for its last look.
    pub fn retire_oldest(&mut self, kept: &mut VecDeque<Arc<RunSnapshot>>) {
        let Some(oldest) = kept.pop_front() else {
            return;
        };
        let heir = kept.iter().find(|s| s.parent() == Some(oldest.number()));
        self.last_look(oldest, heir);
    }

    fn hand_over(&mut self, task: Task) {
        if let Some(tasks) = &self.tasks
            && tasks.send(task).is_ok()
        {
            self.handed_over += 1;
        }
    }

    /// Tasks that are not done yet.
    pub fn backlog(&self) -> u64 {
        self.handed_over - self.counters.tasks_done.load(Ordering::Acquire)
    }

    /// How far it is.
    pub fn progress(&self) -> CheckCounts {
        CheckCounts {
            checked: self.counters.checked.load(Ordering::Relaxed),
            pages: self.counters.pages.load(Ordering::Relaxed),
            draws: self.counters.draws.load(Ordering::Relaxed),
        }
    }

    /// What was found since the last call.
    pub fn take_violations(&self) -> Vec<Violation> {
        self.violations.try_iter().collect()
    }

    /// Why it is dead, in words.
    pub fn why_dead(&self) -> String {
        match self.counters.failed.get() {
            Some(why) => format!("the checker cannot go on: {why}"),
            // The panic itself has been printed.
            None => "the checker has panicked".to_owned(),
        }
    }

    /// Whether the thread has ended though it should not have: it panicked, or memory cannot be had.
    pub fn is_dead(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished) && self.tasks.is_some()
    }

    /// Lets it finish what it was handed, and gives what it found since the last call.
    ///
    /// # Errors
    /// If it did not do all it was handed; what it found is given all the same.
    pub fn finish(&mut self) -> (Vec<Violation>, Result<(), Unfinished>) {
        self.tasks = None;
        let ended = self.thread.take().map_or(Ok(()), JoinHandle::join);
        let result = match (ended, self.backlog()) {
            (Ok(()), 0) => Ok(()),
            (_, tasks) => Err(Unfinished {
                tasks,
                why: self.why_dead(),
            }),
        };
        (self.take_violations(), result)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Whoever wants to know has asked before.
        let _ = self.finish();
    }
}
