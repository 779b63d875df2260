//! What all threads change all the time, in several copies, so that two threads hardly ever change the same
//! cache line.
//!
//! Which copy a thread uses matters for its speed and for nothing else: threads are numbered as they come,
//! and share a copy when there are more of them than copies.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many copies there are: as many threads pin pages without meeting.
const STRIPES: usize = 16;

/// One `T` for each of a few threads. On the heap: model checkers have small stacks.
#[derive(Debug)]
pub(super) struct Striped<T>(Box<[T]>);

impl<T> Striped<T> {
    pub(super) fn new(make: impl Fn() -> T) -> Self {
        Self((0..STRIPES).map(|_| make()).collect())
    }

    /// The calling thread's.
    #[inline]
    pub(super) fn mine(&self) -> &T {
        &self.0[stripe() % STRIPES]
    }

    /// All of them.
    pub(super) fn each(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}

impl<T: Default> Default for Striped<T> {
    fn default() -> Self {
        Self::new(T::default)
    }
}

/// The number of the calling thread.
#[inline]
fn stripe() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<Option<usize>> = const { Cell::new(None) };
    }
    OWN.with(|own| {
        own.get().unwrap_or_else(|| {
            let number = THREADS.fetch_add(1, Ordering::Relaxed);
            own.set(Some(number));
            number
        })
    })
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::atomic::AtomicU64;

    use crossbeam_utils::CachePadded;

    use super::*;

    type StripedCounter = Striped<CachePadded<AtomicU64>>;

    #[test]
    fn what_threads_count_is_all_there() {
        let counter = StripedCounter::default();
        std::thread::scope(|scope| {
            for _ in 0..2 * STRIPES {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        counter.mine().fetch_add(3, Ordering::Relaxed);
                    }
                });
            }
        });
        let all: u64 = counter.each().map(|own| own.load(Ordering::Relaxed)).sum();
        assert_eq!(all, 2 * STRIPES as u64 * 3000);
    }

    #[test]
    fn a_thread_keeps_its_stripe_and_the_next_has_another_line() {
        let striped = StripedCounter::default();
        let address = |own: &CachePadded<AtomicU64>| std::ptr::from_ref(own).addr();
        let (mine, again) = (address(striped.mine()), address(striped.mine()));
        assert_eq!(mine, again);
        let others = std::thread::scope(|scope| {
            // At most one in sixteen threads shares the stripe of this one.
            let one = || scope.spawn(|| address(striped.mine())).join().unwrap();
            [one(), one()]
        });
        assert_eq!(mine % 128, 0);
        assert!(others.iter().any(|&other| other.abs_diff(mine) >= 128));
    }
}
