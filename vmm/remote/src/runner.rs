//! The thread that runs requests.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use palimpsest_store::CalledOff;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// How often somebody who waits looks whether it was called off.
const LOOK: Duration = Duration::from_millis(20);

/// A thread on which futures run. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Runner {
    handle: Handle,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Runner {
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        let thread = thread::Builder::new().name("objects".to_owned());
        let thread = thread.spawn(move || {
            // Whether it was said or whoever could say it is gone.
            let _ = runtime.block_on(ended);
            // A name that is being looked up cannot be called off, and is not waited for.
            runtime.shutdown_background();
        })?;
        Ok(Self {
            handle,
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// Waits for what comes of `future`, unless `stop` is set.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
        stop: &AtomicBool,
    ) -> io::Result<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let task = self.handle.spawn(async move {
            // Nobody waits any more if it was called off.
            let _ = sender.try_send(future.await);
        });
        loop {
            // Only whether, not what was before.
            if stop.load(Ordering::Relaxed) {
                task.abort();
                return Err(io::Error::other(CalledOff));
            }
            match receiver.recv_timeout(LOOK) {
                Ok(done) => return Ok(done),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the thread that runs requests has ended"));
                }
            }
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It has panicked, and nobody is left to be told.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn what_comes_of_it_is_returned_to_whichever_thread() {
        let (runner, stop) = (Runner::start().unwrap(), AtomicBool::new(false));
        thread::scope(|scope| {
            for number in 0..8 {
                let (runner, stop) = (&runner, &stop);
                scope.spawn(move || {
                    let twice = runner.run(async move { number * 2 }, stop);
                    assert_eq!(twice.unwrap(), number * 2);
                });
            }
        });
    }

    #[test]
    fn what_never_ends_is_called_off() {
        let runner = Runner::start().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (began, has_begun) = mpsc::channel();
        let never = async move {
            began.send(()).unwrap();
            std::future::pending::<()>().await;
        };
        thread::scope(|scope| {
            let waiting = scope.spawn(|| runner.run(never, &stop));
            has_begun.recv().unwrap();
            stop.store(true, Ordering::Relaxed);
            let error = waiting.join().unwrap().unwrap_err();
            assert!(error.get_ref().is_some_and(|error| error.is::<CalledOff>()));
        });
    }

    #[test]
    fn a_panic_is_an_error() {
        let (runner, stop) = (Runner::start().unwrap(), AtomicBool::new(false));
        runner
            .run(async { panic!("on purpose") }, &stop)
            .unwrap_err();
        runner.run(async {}, &stop).unwrap();
    }
}
