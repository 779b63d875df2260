//! Output that never waits for its reader.
//!
//! Nobody has to read what this program prints: a pipe may be full, a terminal stopped by Ctrl-S, and then a
//! write waits for ever. So a thread of its own writes, from a queue that has an end: what does not fit is
//! dropped and counted, whoever prints never waits, and at the end the rest is waited for as long as
//! somebody takes some of it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that may wait to be written, beyond one text of any length.
const MOST_WAITING: usize = 256 << 10;
/// Bytes written at a time. After each piece it is known that somebody still reads.
const PIECE: usize = 4096;

/// How long a reader of a report may take nothing before the rest is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A place to write to. Clones share it; with the last of them the file is closed, once all is written.
#[derive(Clone, Debug)]
pub(crate) struct Outlet {
    sender: Arc<Sender>,
}

/// What the writing thread shares with those who send.
#[derive(Debug)]
struct Sender(Arc<TextQueue>);

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

#[derive(Debug)]
struct TextQueue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    texts: VecDeque<Vec<u8>>,
    /// Bytes in the queue, and of the text that is being written.
    waiting: usize,
    /// Texts that were dropped, and those of them that the reader was not told of.
    lost: u64,
    untold: u64,
    /// The first error, until somebody asks for it.
    error: Option<io::Error>,
    /// There was an error. Nothing is written any more.
    is_over: bool,
    /// Nobody will send any more.
    is_closed: bool,
}

impl TextQueue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outlet {
    /// An outlet to the file behind `stream`.
    ///
    /// # Errors
    /// If it is not open, or the host gives no thread.
    pub(crate) fn to(stream: &impl AsFd) -> io::Result<Self> {
        Self::to_file(stream.as_fd().try_clone_to_owned()?)
    }

    /// An outlet to `file`.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub(crate) fn to_file(file: OwnedFd) -> io::Result<Self> {
        let queue = Arc::new(TextQueue {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let writers = Arc::clone(&queue);
        thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || write_all(&writers, File::from(file)))?;
        Ok(Self {
            sender: Arc::new(Sender(queue)),
        })
    }

    fn queue(&self) -> &TextQueue {
        &self.sender.0
    }

    /// Has `text` written, unless too much waits already: then it is dropped and counted.
    pub(crate) fn send(&self, text: impl Into<Vec<u8>>) {
        let mut state = self.queue().lock();
        let told = (state.untold > 0).then(|| {
            let texts = state.untold;
            format!("[{texts} lines lost here: nobody read them]\n").into_bytes()
        });
        if state.is_over || state.waiting > MOST_WAITING {
            state.lost += 1;
            state.untold += 1;
            return;
        }
        state.untold = 0;
        for text in told.into_iter().chain([text.into()]) {
            state.waiting += text.len();
            state.texts.push_back(text);
        }
        drop(state);
        self.queue().changed.notify_all();
    }

    /// Texts that were dropped so far.
    pub(crate) fn lost(&self) -> u64 {
        self.queue().lock().lost
    }

    /// Waits until all is written, or nobody takes any of it for `patience`.
    ///
    /// # Errors
    /// The first that a write had, or that nobody reads.
    pub(crate) fn finish(&self, patience: Duration) -> io::Result<()> {
        let mut state = self.queue().lock();
        let mut last = (state.waiting, Instant::now());
        loop {
            if let Some(error) = state.error.take() {
                return Err(error);
            }
            if state.waiting == 0 {
                return Ok(());
            }
            if state.waiting < last.0 {
                last = (state.waiting, Instant::now());
            }
            let Some(left) = patience
                .checked_sub(last.1.elapsed())
                .filter(|left| !left.is_zero())
            else {
                let what = format!(
                    "nobody reads it: {} bytes could not be written for {patience:.0?}",
                    state.waiting
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            };
            let waited = self.queue().changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Writes what comes. May live until the process ends: stuck in a write that nobody can end.
fn write_all(queue: &TextQueue, mut file: File) {
    let mut state = queue.lock();
    loop {
        let Some(text) = state.texts.pop_front() else {
            if state.is_closed {
                return;
            }
            let waited = queue.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        let mut result = Ok(());
        for piece in text.chunks(PIECE) {
            result = write_piece(&mut file, piece);
            if result.is_err() {
                break;
            }
            queue.lock().waiting -= piece.len();
            queue.changed.notify_all();
        }
        state = queue.lock();
        if let Err(error) = result {
            state.lost += 1 + state.texts.len() as u64;
            state.texts.clear();
            state.waiting = 0;
            state.error = Some(error);
            state.is_over = true;
            queue.changed.notify_all();
            return;
        }
    }
}

/// Writes `piece`, to a file that may be set not to wait: by somebody else who has it, too.
fn write_piece(file: &mut File, mut piece: &[u8]) -> io::Result<()> {
    while !piece.is_empty() {
        match file.write(piece) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => piece = &piece[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(1);

    #[test]
    fn what_is_read_is_all_there_and_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let outlet = Outlet::to_file(writer.into()).unwrap();
        let (first, long) = ("first\n", "x".repeat(1 << 20));
        outlet.send(first);
        outlet.send(long.clone());
        let mut bytes = vec![0; first.len() + long.len()];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, (first.to_owned() + &long).into_bytes());
        outlet.finish(LONG).unwrap();
        assert_eq!(outlet.lost(), 0);
    }

    #[test]
    fn what_nobody_reads_is_dropped_and_counted() {
        let (mut reader, writer) = io::pipe().unwrap();
        let outlet = Outlet::to_file(writer.into()).unwrap();
        let line = "y".repeat(1000) + "\n";
        for _ in 0..2000 {
            outlet.send(line.clone());
        }
        let lost = outlet.lost();
        assert!(lost > 1000, "{lost}");
        let error = outlet.finish(SHORT).unwrap_err();
        assert!(
            error.to_string().starts_with("nobody reads it: "),
            "{error}"
        );

        // Who reads on is told how much is missing.
        let read = thread::spawn(move || {
            let mut text = String::new();
            while !text.contains("last\n") {
                let mut bytes = [0; 4096];
                let count = reader.read(&mut bytes).unwrap();
                text += std::str::from_utf8(&bytes[..count]).unwrap();
            }
            text
        });
        outlet.finish(LONG).unwrap();
        outlet.send("last\n");
        let text = read.join().unwrap();
        assert!(text.ends_with(" lines lost here: nobody read them]\nlast\n"));
        // On a busy machine they are lost in several places.
        let told = |line: &str| {
            let told = line
                .strip_prefix('[')?
                .strip_suffix(" lines lost here: nobody read them]");
            told?.parse::<u64>().ok()
        };
        let told = Vec::from_iter(text.lines().filter_map(told));
        assert_eq!(told.iter().sum::<u64>(), lost);
        assert_eq!(
            text.lines().filter(|text| *text == &line[..1000]).count() as u64,
            2000 - lost
        );
    }

    #[test]
    fn a_reader_who_has_gone_is_an_error_and_no_wait() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let outlet = Outlet::to_file(writer.into()).unwrap();
        outlet.send("x");
        let error = outlet.finish(LONG).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        outlet.send("y");
        assert_eq!(outlet.lost(), 2);
    }
}
