//! Threads that step aside while vCPUs are stopped and started.
//!
//! A pause ends when the last vCPU is about to run, and that can be as soon as there is a CPU for it. Where
//! there are fewer CPUs than threads, one that computes has it, and goes on for as long as the scheduler lets
//! it: milliseconds, beside a pause of microseconds. So who computes beside a guest asks at each small piece
//! of its work whether it is to wait ([`Aside::pass`]), which costs the load of a word, and a snapshot has
//! them wait from the kick to the last vCPU's entry.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::timeline::span;

/// Whether threads that compute beside a guest step aside.
#[derive(Debug, Default)]
pub struct Aside {
    /// How many there are who want it.
    holds: Mutex<u32>,
    free: Condvar,
    /// Whether `holds` is not 0. A hint: who misses a change does one more piece.
    is_held: AtomicBool,
}

impl Aside {
    /// Waits for as long as somebody [holds](Aside::hold). To be called with no lock held, between two pieces
    /// of work of some microseconds each; never by who holds.
    #[inline]
    pub fn pass(&self) {
        // Relaxed: nothing is ordered by it.
        if self.is_held.load(Ordering::Relaxed) {
            self.wait();
        }
    }

    #[cold]
    fn wait(&self) {
        let _span = span!("aside");
        let mut holds = self.lock();
        while *holds > 0 {
            holds = self
                .free
                .wait(holds)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has all who pass wait until what this gives is dropped. It does not wait for them to come by.
    #[must_use = "they go on when this is dropped"]
    pub fn hold(&self) -> Held<'_> {
        *self.lock() += 1;
        self.is_held.store(true, Ordering::Relaxed);
        Held(self)
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While it lives, threads step aside.
#[derive(Debug)]
pub struct Held<'a>(&'a Aside);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut holds = self.0.lock();
        *holds -= 1;
        if *holds == 0 {
            self.0.is_held.store(false, Ordering::Relaxed);
            self.0.free.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn who_passes_waits_for_the_last_who_holds() {
        let aside = Aside::default();
        aside.pass();
        let (first, second) = (aside.hold(), aside.hold());
        let (say, heard) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                say.send("comes").unwrap();
                aside.pass();
                say.send("passed").unwrap();
            });
            assert_eq!(heard.recv(), Ok("comes"));
            drop(second);
            thread::yield_now();
            assert!(heard.try_recv().is_err(), "one holds still");
            drop(first);
            assert_eq!(heard.recv(), Ok("passed"));
        });
        aside.pass();
    }
}
