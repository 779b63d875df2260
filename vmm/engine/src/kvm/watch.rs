//! Kicks vCPUs that have not come out of the guest for a while.
//!
//! Some waits in KVM end only when a signal interrupts them: it retries for ever an instruction whose store
//! it emulates to a page that it may not write. The vCPU then has to come out to make the page writable. A
//! guest that runs well is kicked as well, a few times a second, at some 50 microseconds each.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::control::{Control, Phase};
use super::counters::Counters;
use super::kick;

/// How long a vCPU may stay in the guest.
const EVERY: Duration = Duration::from_millis(200);

/// The watching thread. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Watch {
    thread: Option<JoinHandle<()>>,
    over: Arc<(Mutex<bool>, Condvar)>,
}

impl Watch {
    /// Watches the vCPUs on `threads`.
    pub(super) fn start(
        threads: Arc<Vec<JoinHandle<()>>>,
        control: Arc<Control>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let told = Arc::clone(&over);
        let thread = thread::Builder::new().name("watch".into()).spawn(move || {
            let mut seen = counters.exits();
            while !wait(&told) {
                let exits = counters.exits();
                let running = control.each(|slot| slot.phase == Phase::Running);
                for (vcpu, thread) in threads.iter().enumerate() {
                    if running[vcpu] && exits[vcpu] == seen[vcpu] {
                        // Refused, it is tried again the next time.
                        let _ = kick::kick(thread);
                    }
                }
                seen = exits;
            }
        })?;
        Ok(Self {
            thread: Some(thread),
            over,
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let (over, told) = &*self.over;
        *over.lock().unwrap_or_else(|e| e.into_inner()) = true;
        told.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for the next look; whether it is over.
fn wait((over, told): &(Mutex<bool>, Condvar)) -> bool {
    let guard = over.lock().unwrap_or_else(|e| e.into_inner());
    let waited = told.wait_timeout_while(guard, EVERY, |over| !*over);
    *waited.unwrap_or_else(|e| e.into_inner()).0
}
