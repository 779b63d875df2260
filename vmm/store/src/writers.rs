//! Threads that write chunks, make them durable and give them their names, while the next are read and
//! hashed.
//!
//! Names come after contents: a chunk is renamed when its bytes are on disk, by the thread that has seen to
//! that. Chunks are named in no order among each other, and need none: a snapshot is only named when all are.
//! That names are durable too is for who ends the save.
//!
//! Several, since to make a new file durable is mostly to wait for the disk, which does what several wait for
//! at once.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::buffer::Buffer;
use crate::chunk;
use crate::error::StoreError;
use crate::hash::Hash;
use crate::save::Compression;
use crate::store::Store;

/// Threads.
const WRITERS: usize = 4;
/// Chunks that wait for one of them, at most: whoever reads memory runs no further ahead of the disk.
const MOST_WAITING: usize = 4;

/// A chunk that is to be written.
#[derive(Debug)]
struct Chunk {
    region: u64,
    hash: Hash,
    content: Buffer,
}

/// The threads. Dropping it waits for their end.
#[derive(Debug)]
pub(crate) struct Writers {
    sender: Option<SyncSender<Chunk>>,
    threads: Vec<JoinHandle<Result<(), StoreError>>>,
    shared: Arc<Shared>,
    /// Room for contents, which comes back when they are written.
    emptied: Receiver<Buffer>,
    /// For what is said of threads that are not to be had.
    path: PathBuf,
}

/// What the threads have in common.
#[derive(Debug, Default)]
struct Shared {
    /// One has failed: the others end.
    has_failed: AtomicBool,
    /// Bytes that were written to disk.
    bytes: AtomicU64,
}

impl Writers {
    /// Starts them, to write to `staging` first.
    pub(crate) fn start(
        store: &Store,
        staging: &Path,
        compression: Compression,
    ) -> Result<Self, StoreError> {
        let (sender, receiver) = mpsc::sync_channel(MOST_WAITING);
        let (empties, emptied) = mpsc::channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut writers = Self {
            sender: Some(sender),
            threads: Vec::with_capacity(WRITERS),
            shared: Arc::default(),
            emptied,
            path: store.path().to_owned(),
        };
        for _ in 0..WRITERS {
            let writer = Writer {
                store: store.clone(),
                staging: staging.to_owned(),
                compression,
                receiver: Arc::clone(&receiver),
                shared: Arc::clone(&writers.shared),
                empties: empties.clone(),
            };
            let thread = thread::Builder::new().name("chunks".to_owned());
            let thread = thread.spawn(move || writer.write_all());
            let thread = thread.map_err(|source| StoreError::File {
                what: "start a thread that writes to",
                path: writers.path.clone(),
                source,
            });
            writers.threads.push(thread?);
        }
        Ok(writers)
    }

    /// Room for the content of a chunk, `bytes` long. What is in it is anybody's.
    pub(crate) fn room(&self, bytes: u64) -> Buffer {
        let mut room = self.emptied.try_recv().unwrap_or_default();
        room.resize(bytes as usize);
        room
    }

    /// Bytes that were written to disk so far.
    pub(crate) fn bytes(&self) -> u64 {
        // A number to be shown. The last is read when the threads have ended.
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Has a chunk written and named. Waits if the disk is far behind.
    ///
    /// # Errors
    /// If one before it could not be.
    pub(crate) fn send(
        &mut self,
        region: u64,
        hash: Hash,
        content: Buffer,
    ) -> Result<(), StoreError> {
        let chunk = Chunk {
            region,
            hash,
            content,
        };
        let has_failed = self.shared.has_failed.load(Ordering::Relaxed);
        match self.sender.as_ref().map(|sender| sender.send(chunk)) {
            Some(Ok(())) if !has_failed => Ok(()),
            // They end, and there is a reason.
            _ => self.finish().and_then(|()| Err(self.gone())),
        }
    }

    /// Waits until all have their names.
    ///
    /// # Errors
    /// If one could not be written or named.
    pub(crate) fn finish(&mut self) -> Result<(), StoreError> {
        drop(self.sender.take());
        let mut all = Ok(());
        for thread in self.threads.drain(..) {
            let written = thread.join();
            // The first reason is as good as any.
            all = all.and(written.unwrap_or_else(|_| Err(gone(&self.path))));
        }
        all
    }

    fn gone(&self) -> StoreError {
        gone(&self.path)
    }
}

fn gone(path: &Path) -> StoreError {
    StoreError::File {
        what: "go on writing to",
        path: path.to_owned(),
        source: io::Error::other("a thread that does has ended"),
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        // Whoever has not asked does not want to know.
        let _ = self.finish();
    }
}

/// One of the threads.
struct Writer {
    store: Store,
    staging: PathBuf,
    compression: Compression,
    receiver: Arc<Mutex<Receiver<Chunk>>>,
    shared: Arc<Shared>,
    empties: mpsc::Sender<Buffer>,
}

impl Writer {
    fn write_all(self) -> Result<(), StoreError> {
        loop {
            // All but one of those that have nothing to do wait for the lock.
            let receiver = self.receiver.lock();
            let chunk = receiver.unwrap_or_else(PoisonError::into_inner).recv();
            // Only that it is seen some time matters: what is written for nothing is collected.
            if self.shared.has_failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            let Ok(chunk) = chunk else {
                return Ok(());
            };
            let written = self.write(&chunk);
            if written.is_err() {
                self.shared.has_failed.store(true, Ordering::Relaxed);
            }
            written?;
            // Nobody may want it any more.
            let _ = self.empties.send(chunk.content);
        }
    }

    fn write(&self, chunk: &Chunk) -> Result<(), StoreError> {
        let Chunk {
            region,
            hash,
            content,
        } = chunk;
        let (store, hash) = (&self.store, *hash);
        // One that is there as it is, and no good, is what readers would take: it is replaced.
        let plain = chunk::path_of(store, hash, Compression::None);
        let compression = match store.disk().len(&plain) {
            Ok(None) => self.compression,
            _ => Compression::None,
        };
        let from = self.staging.join(format!("chunk-{region}"));
        let (file, bytes) = chunk::write(store, &from, content, compression)?;
        file.sync().map_err(store.file("make durable", &from))?;
        self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        store.make_dir(&chunk::folder_of(store, hash.folder()))?;
        let to = chunk::path_of(store, hash, compression);
        let named = store.disk().rename(&from, &to);
        named.map_err(store.file("name", &to))?;
        store
            .right()
            .saw(hash, content.len() as u64, compression, &*file);
        Ok(())
    }
}
