//! Kicks vCPUs that have not come out of the guest for a while.
//!
//! Some waits in KVM end only when a signal interrupts them: it retries for ever an instruction whose store
//! it emulates to a page that it may not write. The vCPU then has to come out to make the page writable. A
//! guest that runs well is kicked as well, a few times a second, at some 50 microseconds each.
//!
//! One thread looks after all machines of the process, for as long as there are any: a hundred clones need no
//! hundred threads that wake up five times a second.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::control::{Control, Phase};
use super::counters::Counters;
use super::kick;

/// How long a vCPU may stay in the guest.
const EVERY: Duration = Duration::from_millis(200);

/// Who is watched in this process.
static WATCHERS: Watchers = Watchers(Mutex::new(Watched {
    machines: Vec::new(),
    thread: None,
}));

struct Watchers(Mutex<Watched>);

struct Watched {
    machines: Vec<Arc<Mutex<Machine>>>,
    /// There is one if there are machines.
    thread: Option<Watcher>,
}

/// The thread, and how it is told to end.
struct Watcher {
    thread: JoinHandle<()>,
    over: Arc<(Mutex<bool>, Condvar)>,
}

/// What is looked at of a machine. Nothing, once that is over.
#[derive(Debug, Default)]
struct Machine(Option<Vcpus>);

#[derive(Debug)]
struct Vcpus {
    threads: Arc<Vec<JoinHandle<()>>>,
    control: Arc<Control>,
    counters: Arc<Counters>,
    /// How often each had come out when it was last looked at.
    seen: Vec<u64>,
}

impl Vcpus {
    fn look(&mut self) {
        let exits = self.counters.exits();
        let running = self.control.each(|slot| slot.phase == Phase::Running);
        for (vcpu, thread) in self.threads.iter().enumerate() {
            if running[vcpu] && exits[vcpu] == self.seen[vcpu] {
                // Refused, it is tried again the next time.
                let _ = kick::kick(thread);
            }
        }
        self.seen = exits;
    }
}

/// A machine that is watched. Dropping it ends that: nobody has its threads then.
#[derive(Debug)]
pub(super) struct Watch(Arc<Mutex<Machine>>);

impl Watch {
    /// Watches the vCPUs on `threads`.
    ///
    /// # Errors
    /// If the host has no thread for it.
    pub(super) fn start(
        threads: Arc<Vec<JoinHandle<()>>>,
        control: Arc<Control>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let seen = counters.exits();
        let machine = Arc::new(Mutex::new(Machine(Some(Vcpus {
            threads,
            control,
            counters,
            seen,
        }))));
        let mut watched = lock(&WATCHERS.0);
        if watched.thread.is_none() {
            watched.thread = Some(Watcher::start()?);
        }
        watched.machines.push(Arc::clone(&machine));
        Ok(Self(machine))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may be looked at just now: that is waited for.
        lock(&self.0).0 = None;
        let mut watched = lock(&WATCHERS.0);
        watched
            .machines
            .retain(|other| !Arc::ptr_eq(other, &self.0));
        let last = watched
            .machines
            .is_empty()
            .then(|| watched.thread.take())
            .flatten();
        drop(watched);
        if let Some(watcher) = last {
            watcher.end();
        }
    }
}

impl Watcher {
    fn start() -> io::Result<Self> {
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let told = Arc::clone(&over);
        let thread = thread::Builder::new().name("watch".into()).spawn(move || {
            while !wait(&told) {
                let machines = lock(&WATCHERS.0).machines.clone();
                for machine in machines {
                    if let Some(vcpus) = &mut lock(&machine).0 {
                        vcpus.look();
                    }
                }
            }
        })?;
        Ok(Self { thread, over })
    }

    fn end(self) {
        let (over, told) = &*self.over;
        *lock(over) = true;
        told.notify_all();
        let _ = self.thread.join();
    }
}

/// Waits for the next look; whether it is over.
fn wait((over, told): &(Mutex<bool>, Condvar)) -> bool {
    let waited = told.wait_timeout_while(lock(over), EVERY, |over| !*over);
    *waited.unwrap_or_else(PoisonError::into_inner).0
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
