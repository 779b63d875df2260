//! A thread that makes chunks durable and gives them their names, while the next are hashed and written.
//!
//! Names come after contents: a chunk is renamed when its bytes are on disk. That the names are durable too is for who
//! ends the save.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{self, SyncSender};
use std::thread::{self, JoinHandle};

use crate::disk::File;
use crate::error::StoreError;
use crate::store::Store;

/// Chunks that wait to be made durable, at most: what is written runs no further ahead of the disk.
const MOST_WAITING: usize = 32;

/// A chunk that was written and has not its name yet.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) file: Box<dyn File>,
    /// Where it is, the folder it is to be in, which may not be there, and where it is to be.
    pub(crate) from: PathBuf,
    pub(crate) folder: PathBuf,
    pub(crate) to: PathBuf,
}

/// The thread. Dropping it waits for its end.
#[derive(Debug)]
pub(crate) struct Namer {
    sender: Option<SyncSender<Pending>>,
    thread: Option<JoinHandle<Result<(), StoreError>>>,
    /// For what is said of a thread that is not to be had.
    path: PathBuf,
}

impl Namer {
    pub(crate) fn start(store: &Store) -> Result<Self, StoreError> {
        let (sender, receiver) = mpsc::sync_channel::<Pending>(MOST_WAITING);
        let path = store.path().to_owned();
        let store = store.clone();
        let thread = thread::Builder::new()
            .name("chunks".to_owned())
            .spawn(move || {
                // Who fails stops listening: the next send says so.
                receiver.iter().try_for_each(|chunk| name(&store, &chunk))
            });
        let thread = thread.map_err(|source| StoreError::File {
            what: "start a thread that writes to",
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            sender: Some(sender),
            thread: Some(thread),
            path,
        })
    }

    /// Has a chunk named. Waits if the disk is far behind.
    ///
    /// # Errors
    /// If one before it could not be.
    pub(crate) fn send(&mut self, chunk: Pending) -> Result<(), StoreError> {
        match self.sender.as_ref().map(|sender| sender.send(chunk)) {
            Some(Ok(())) => Ok(()),
            // It has ended, and there is a reason.
            Some(Err(_)) | None => self.finish().and_then(|()| Err(self.gone())),
        }
    }

    /// Waits until all have their names.
    ///
    /// # Errors
    /// If one could not be named.
    pub(crate) fn finish(&mut self) -> Result<(), StoreError> {
        drop(self.sender.take());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(named)) => named,
            Some(Err(_)) => Err(self.gone()),
            None => Ok(()),
        }
    }

    fn gone(&self) -> StoreError {
        StoreError::File {
            what: "go on writing to",
            path: self.path.clone(),
            source: io::Error::other("the thread that does has ended"),
        }
    }
}

impl Drop for Namer {
    fn drop(&mut self) {
        // Whoever has not asked does not want to know.
        let _ = self.finish();
    }
}

fn name(store: &Store, chunk: &Pending) -> Result<(), StoreError> {
    let Pending {
        file,
        from,
        folder,
        to,
    } = chunk;
    file.sync().map_err(store.file("make durable", from))?;
    store.make_dir(folder)?;
    store
        .disk()
        .rename(from, to)
        .map_err(store.file("name", to))
}
