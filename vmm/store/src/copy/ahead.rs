//! Work on several things at once, whose results come in order.

use std::num::NonZeroUsize;
use std::sync::mpsc;
use std::thread;

use crate::error::StoreError;

/// Does `work` on each of `items`, on `at_once` threads, and hands what comes of each to `take`, in order and on this
/// thread. Each thread is ahead of that by two at most. Ends with the first error of either; what is being worked on is
/// waited for then.
///
/// # Errors
/// The first of either, or that there are no threads to be had.
pub(crate) fn in_order<T: Sync, R: Send, E: From<StoreError>>(
    items: &[T],
    at_once: NonZeroUsize,
    work: impl Fn(&T) -> Result<R, StoreError> + Sync,
    mut take: impl FnMut(&T, R) -> Result<(), E>,
) -> Result<(), E> {
    let at_once = at_once.get().min(items.len().max(1));
    thread::scope(|scope| {
        let mut receivers = Vec::with_capacity(at_once);
        for first in 0..at_once {
            let (sender, receiver) = mpsc::sync_channel(1);
            let work = &work;
            let thread = thread::Builder::new().name("copy".to_owned());
            // Every so many-th is its own, so that who takes them knows where the next one comes from.
            let spawned = thread.spawn_scoped(scope, move || {
                for item in items.iter().skip(first).step_by(at_once) {
                    let done = work(item);
                    let is_last = done.is_err();
                    // Nobody wants it any more, or it was the end.
                    if sender.send(done).is_err() || is_last {
                        return;
                    }
                }
            });
            if let Err(source) = spawned {
                return Err(StoreError::Threads { source }.into());
            }
            receivers.push(receiver);
        }
        for (number, item) in items.iter().enumerate() {
            match receivers[number % at_once].recv() {
                Ok(done) => take(item, done?)?,
                // It has panicked, which the end of the scope passes on.
                Err(mpsc::RecvError) => break,
            }
        }
        // Before the threads are waited for: they see that nobody listens.
        drop(receivers);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn threads(number: usize) -> NonZeroUsize {
        NonZeroUsize::new(number).unwrap()
    }

    #[test]
    fn results_come_in_order_whoever_is_first() {
        let items: Vec<usize> = (0..100).collect();
        for at_once in [1, 3, 8, 200] {
            let mut taken = Vec::new();
            let done = in_order(
                &items,
                threads(at_once),
                |item| Ok(item * 2),
                |item, doubled| {
                    taken.push((*item, doubled));
                    Ok::<(), StoreError>(())
                },
            );
            done.unwrap();
            let expected: Vec<_> = (0..100).map(|item| (item, item * 2)).collect();
            assert_eq!(taken, expected, "{at_once}");
        }
    }

    #[test]
    fn the_first_error_ends_it_and_little_is_done_in_vain() {
        let items: Vec<usize> = (0..1000).collect();
        for fails_in_work in [true, false] {
            let worked = AtomicUsize::new(0);
            let mut taken = 0;
            let done = in_order(
                &items,
                threads(4),
                |item| {
                    worked.fetch_add(1, Ordering::Relaxed);
                    match fails_in_work && *item == 10 {
                        true => Err(StoreError::CalledOff),
                        false => Ok(()),
                    }
                },
                |item, ()| {
                    taken += 1;
                    match !fails_in_work && *item == 9 {
                        true => Err(StoreError::CalledOff),
                        false => Ok(()),
                    }
                },
            );
            assert!(matches!(done, Err(StoreError::CalledOff)), "{done:?}");
            assert_eq!(taken, 10);
            // Each thread: one that was taken or waits, one that is sent, one that is worked on.
            let worked = worked.into_inner();
            assert!(worked <= 10 + 3 * 4, "{worked}");
        }
    }

    #[test]
    fn nothing_is_done_of_nothing() {
        let done = in_order(&[0_u8; 0], threads(4), |_| Ok(()), |_, ()| unreachable!());
        let done: Result<(), StoreError> = done;
        done.unwrap();
    }
}
