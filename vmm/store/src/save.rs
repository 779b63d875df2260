//! Writing a snapshot.
//!
//! ```text
//!   regions       tmp/NAME.../chunk-N ──sync──rename──> chunks/ab/abcd...     unless that is there
//!   finish        tmp/NAME.../{memory, state, snapshot.json} ──sync
//!                 sync of every folder of chunks that this snapshot names, of chunks/, of tmp/NAME..., of STORE
//!                 tmp/NAME... ──rename──> STORE/NAME ──sync of STORE
//! ```
//! Whatever ends this before, the power among it, there is no STORE/NAME, and what there is in `tmp` and
//! `chunks` is collected some time (`prune`). A chunk that was there is read and compared before it is named
//! once more, or was before by this process and has not changed since: one that is damaged is written anew. Its folder is made durable by everybody who names it: who
//! has written it may not have come so far.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::{Map, Value};

use crate::buffer::Buffer;
use crate::chunk::{self, CHUNK_BYTES, CHUNKS};
use crate::error::StoreError;
use crate::hash::Hash;
use crate::index::{ChunkIndex, MAX_MEMORY_BYTES};
use crate::manifest::{FileFacts, Machine, Manifest, MemoryFacts, Parent};
use crate::name::SnapshotName;
use crate::parts::{Part, encode_parts};
use crate::read::Kept;
use crate::right::Known;
use crate::store::{Hold, Store, TMP, fresh_suffix};
use crate::writers::Writers;

/// The files of a snapshot.
pub(crate) const MANIFEST: &str = "snapshot.json";
pub(crate) const INDEX: &str = "memory";
pub(crate) const STATE: &str = "state";

/// How the chunks that a save writes are kept. Those that are there stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As they are: they can be mapped.
    #[default]
    None,
    /// Compressed by zstd.
    Zstd {
        /// 1 (fast) to 19 (small); 0 is zstd's default.
        level: i32,
    },
}

impl Compression {
    /// Compressed, whichever way.
    pub(crate) const ANY: Self = Self::Zstd { level: 0 };
}

/// How a snapshot is saved.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// Of the chunks.
    pub compression: Compression,
    /// What it is an increment of ([`Kept::as_parent`](crate::Kept::as_parent), [`Store::parent`]). It need not be there
    /// any more.
    pub parent: Option<Parent>,
}

/// What is to be known of a snapshot, beside memory and parts.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The program that saves it.
    pub creator: String,
    /// The machine.
    pub machine: Machine,
    /// For the program that saves it.
    pub program: Map<String, Value>,
}

/// What a save has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Chunks that were written, and the bytes of them.
    pub written: u64,
    /// Bytes of those that were written to disk.
    pub bytes_written: u64,
    /// Chunks that were there.
    pub found: u64,
    /// Regions whose memory was not read, since their chunks are known: these were read and checked.
    pub same: u64,
    /// Regions that are all zeros, among those that were handed over.
    pub zeros: u64,
}

/// A snapshot that is being written. Dropping it before it is finished leaves nothing but what `prune`
/// collects.
#[derive(Debug)]
pub struct Saving {
    store: Store,
    _hold: Hold,
    name: SnapshotName,
    parent: Option<Parent>,
    staging: PathBuf,
    index: ChunkIndex,
    /// Those that are to be made durable.
    folders: [bool; 256],
    /// Chunks that this save has written, or read and found right: it need not look at them once more.
    right: HashSet<Hash>,
    /// Room for the content of one.
    scratch: Buffer,
    writers: Writers,
    saved: Saved,
    is_named: bool,
}

impl Saving {
    /// Begins to save `name`, of a machine with `memory` bytes of memory.
    ///
    /// # Errors
    /// If there is a snapshot of that name, or the store cannot be written to.
    pub fn begin(
        store: &Store,
        name: &SnapshotName,
        memory: u64,
        options: SaveOptions,
    ) -> Result<Self, StoreError> {
        if memory == 0 || !memory.is_multiple_of(4096) || memory > MAX_MEMORY_BYTES {
            let what = format!("memory of {memory} bytes");
            return Err(StoreError::NotOfFormat { what });
        }
        store.is_directory()?;
        let hold = store.hold()?;
        store.is_free_held(name)?;
        let tmp = store.path().join(TMP);
        store.make_dir(&tmp)?;
        store.make_dir(&store.path().join(CHUNKS))?;
        let staging = tmp.join(format!("{name}.{}", fresh_suffix()));
        store
            .disk()
            .make_dir(&staging)
            .map_err(store.file("make", &staging))?;
        Ok(Self {
            store: store.clone(),
            _hold: hold,
            name: name.clone(),
            parent: options.parent,
            index: ChunkIndex::new(memory),
            folders: [false; 256],
            right: HashSet::new(),
            scratch: Buffer::default(),
            writers: Writers::start(store, &staging, options.compression)?,
            staging,
            saved: Saved::default(),
            is_named: false,
        })
    }

    /// Bytes of region `region`; 0 if there is none.
    pub fn region_bytes(&self, region: u64) -> u64 {
        self.index.region_bytes(region)
    }

    /// What was written so far.
    pub fn so_far(&self) -> Saved {
        Saved {
            bytes_written: self.writers.bytes(),
            ..self.saved
        }
    }

    /// Room for the content of region `region`, for [`Saving::region_of`]. What is in it is anybody's.
    pub fn room(&self, region: u64) -> Buffer {
        self.writers.room(self.region_bytes(region))
    }

    /// Saves a region. Regions come in ascending order; one that is left out is zeros.
    ///
    /// # Errors
    /// If it comes out of order or has another length, or cannot be written.
    pub fn region(&mut self, region: u64, content: &[u8]) -> Result<(), StoreError> {
        self.check(region, content.len() as u64)?;
        let mut room = self.room(region);
        room.copy_from_slice(content);
        self.region_of(region, room)
    }

    /// The same of a content that is handed over, in [`Saving::room`] at best. It is written by other threads: an
    /// error of theirs may come with a later region, or at the end.
    ///
    /// # Errors
    /// As [`Saving::region`].
    pub fn region_of(&mut self, region: u64, content: Buffer) -> Result<(), StoreError> {
        self.check(region, content.len() as u64)?;
        if chunk::is_zero(&content) {
            self.saved.zeros += 1;
            return Ok(());
        }
        let hash = Hash::of(&content);
        if self.right.contains(&hash) || self.has(hash, &content) {
            self.saved.found += 1;
        } else {
            self.saved.written += 1;
            self.folders[usize::from(hash.folder())] = true;
            self.writers.send(region, hash, content)?;
        }
        self.right.insert(hash);
        self.name_chunk(region, hash);
        Ok(())
    }

    /// Saves a region that is known to be in chunk `hash` without looking at its memory. The chunk is read and checked,
    /// unless this process has seen it to be right and its file has not changed since. `false`, and nothing has changed, if it is not there any more, or cannot be read, or is damaged:
    /// hand over the content then ([`region`](Self::region)), and it is written anew.
    ///
    /// # Errors
    /// If it comes out of order.
    pub fn same(&mut self, region: u64, hash: Hash) -> Result<bool, StoreError> {
        let bytes = self.index.region_bytes(region);
        self.check(region, bytes)?;
        // A chunk of the same name and another length is not this one.
        let is_whole = bytes == CHUNK_BYTES;
        if !(is_whole && self.right.contains(&hash)) {
            let is_right = self.is_right(hash, bytes, |_| true);
            if !is_right {
                return Ok(false);
            }
            if is_whole {
                self.right.insert(hash);
            }
        }
        self.saved.same += 1;
        self.name_chunk(region, hash);
        Ok(true)
    }

    fn check(&self, region: u64, bytes: u64) -> Result<(), StoreError> {
        if self.index.may_push(region) && bytes == self.index.region_bytes(region) {
            return Ok(());
        }
        Err(StoreError::NotOfFormat {
            what: format!("region {region} of {bytes} bytes, there"),
        })
    }

    fn name_chunk(&mut self, region: u64, hash: Hash) {
        self.index.push(region, hash);
    }

    /// Whether there is a chunk of this content, every byte of it. One that cannot be read is written anew.
    fn has(&mut self, hash: Hash, content: &[u8]) -> bool {
        self.is_right(hash, content.len() as u64, |found| found == content)
    }

    /// Whether there is a chunk `hash` of so many bytes that is right: it is known to be, or is read and found to be,
    /// and `is_it`. Its folder is made durable in the end, unless that is known, too.
    fn is_right(&mut self, hash: Hash, bytes: u64, is_it: impl FnOnce(&[u8]) -> bool) -> bool {
        let known = self.store.known(hash, bytes);
        if known == Known::Nothing {
            self.scratch.resize(bytes as usize);
            let found = &mut self.scratch;
            if !matches!(chunk::read(&self.store, hash, found), Ok(true)) || !is_it(found) {
                return false;
            }
        }
        self.folders[usize::from(hash.folder())] |= known != Known::RightAndDurable;
        true
    }

    #[cfg(test)]
    pub(crate) fn name_for_test(&mut self) {
        self.writers.finish().unwrap();
    }

    /// Saves the rest, and gives the snapshot its name. When this returns all of it is durable.
    ///
    /// # Errors
    /// If it cannot be written, or somebody else has saved a snapshot of that name meanwhile. There is none by
    /// this one then.
    pub fn finish(mut self, facts: Facts, parts: &[Part]) -> Result<Saved, StoreError> {
        let (index, chunks) = (self.index.encode(), self.index.len());
        let state = encode_parts(parts).map_err(|error| StoreError::NotOfFormat {
            what: error.to_string(),
        })?;
        let facts_of = |bytes: &[u8]| FileFacts {
            bytes: bytes.len() as u64,
            blake3: Hash::of(bytes),
        };
        let memory = MemoryFacts {
            bytes: self.index.memory_bytes(),
            chunk_bytes: CHUNK_BYTES,
            chunks,
            index: facts_of(&index),
        };
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let manifest = Manifest {
            created_unix_s: since_1970.map_or(0, |time| time.as_secs()),
            creator: facts.creator,
            parent: self.parent.take(),
            program: facts.program,
            ..Manifest::new(memory, facts_of(&state), facts.machine)
        };
        let (manifest, _) = manifest.encode().map_err(|error| StoreError::NotOfFormat {
            what: error.to_string(),
        })?;
        self.name_files(&index, &state, &manifest)
    }

    /// The same of a snapshot of another store, all of whose regions were saved.
    pub(crate) fn finish_copy(self, kept: &Kept) -> Result<Saved, StoreError> {
        let index = self.index.encode();
        let state = encode_parts(kept.parts()).map_err(|error| StoreError::NotOfFormat {
            what: error.to_string(),
        })?;
        // A region of zeros that was in a chunk is none here.
        if self.index != *kept.index() {
            return Err(StoreError::NotOfFormat {
                what: format!("`{}`, which has a chunk of zeros", kept.name()),
            });
        }
        self.name_files(&index, &state, kept.manifest_bytes())
    }

    fn name_files(
        mut self,
        index: &[u8],
        state: &[u8],
        manifest: &[u8],
    ) -> Result<Saved, StoreError> {
        self.writers.finish()?;
        let store = self.store.clone();
        let seen = store
            .right()
            .stamps(self.index.iter().map(|(_, hash)| hash));
        for folder in (0..=u8::MAX).filter(|folder| self.folders[usize::from(*folder)]) {
            store.sync_dir(&chunk::folder_of(&store, folder))?;
        }
        store.sync_dir(&store.path().join(CHUNKS))?;
        store.right().named_durably(&seen);
        for (file, bytes) in [(INDEX, index), (STATE, state), (MANIFEST, manifest)] {
            store.write_durable(&self.staging.join(file), bytes)?;
        }
        store.sync_dir(&self.staging)?;
        // The folders of the store themselves, which may be new.
        store.sync_dir(store.path())?;
        let place = store.directory_of(&self.name);
        if let Err(error) = store.disk().rename(&self.staging, &place) {
            use std::io::ErrorKind::{AlreadyExists, DirectoryNotEmpty, NotADirectory};
            return Err(match error.kind() {
                AlreadyExists | DirectoryNotEmpty | NotADirectory => {
                    let taken = store.is_free_held(&self.name);
                    taken
                        .err()
                        .unwrap_or_else(|| store.file("name", &place)(error))
                }
                _ => store.file("name", &place)(error),
            });
        }
        if let Err(error) = store.sync_dir(store.path()) {
            // It is whole, but its name may be lost with the power: then it is not there now either.
            self.is_named = store.disk().rename(&place, &self.staging).is_err();
            return Err(error);
        }
        self.is_named = true;
        Ok(self.so_far())
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        if self.is_named {
            return;
        }
        // It would put more there.
        let _ = self.writers.finish();
        // What cannot be taken away now is collected later.
        let disk = self.store.disk();
        for (name, _) in disk.list(&self.staging).unwrap_or_default() {
            let _ = disk.remove_file(&self.staging.join(name));
        }
        let _ = disk.remove_dir(&self.staging);
    }
}
