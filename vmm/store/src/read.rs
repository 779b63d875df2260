//! Reading a snapshot: no byte of it is used that was not checked.

use std::io;
use std::num::NonZeroUsize;

use crate::buffer::Buffer;
use crate::chunk;
use crate::copy::in_order;
use crate::disk::Kind;
use crate::error::StoreError;
use crate::hash::Hash;
use crate::index::ChunkIndex;
use crate::manifest::{FileFacts, MAX_MANIFEST_BYTES, Manifest, Parent};
use crate::name::SnapshotName;
use crate::parts::{Part, decode_parts};
use crate::save::{Compression, INDEX, MANIFEST, STATE};
use crate::store::{Hold, Store};

/// Chunks of a store of objects that are fetched at once.
const AT_ONCE: usize = 8;

/// A snapshot that is read. The store keeps all that it names while this is there.
#[derive(Debug)]
pub struct Kept {
    store: Store,
    _hold: Option<Hold>,
    name: SnapshotName,
    manifest: Manifest,
    /// The same as it was written.
    manifest_bytes: Vec<u8>,
    hash: Hash,
    index: ChunkIndex,
    parts: Vec<Part>,
}

impl Store {
    /// Reads a snapshot: all but memory, which comes by region.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    pub fn read(&self, name: &SnapshotName) -> Result<Kept, StoreError> {
        let hold = self.hold()?;
        let kept = read_held(self, name)?;
        Ok(Kept {
            _hold: Some(hold),
            ..kept
        })
    }

    /// The snapshot that has the name now, as the parent of another.
    ///
    /// # Errors
    /// If there is none, or its manifest is damaged.
    pub fn parent(&self, name: &SnapshotName) -> Result<Parent, StoreError> {
        let _hold = self.hold()?;
        let (_, blake3, _) = manifest(self, name)?;
        Ok(Parent {
            name: name.clone(),
            blake3,
        })
    }
}

/// The same for who holds the store.
pub(crate) fn read_held(store: &Store, name: &SnapshotName) -> Result<Kept, StoreError> {
    let (manifest, hash, manifest_bytes) = manifest(store, name)?;
    let place = store.directory_of(name);
    let path = place.join(INDEX);
    let index = checked(store, &path, &manifest.memory.index)?;
    let index = ChunkIndex::decode(&index, manifest.memory.bytes);
    let index = index.map_err(|source| StoreError::Index { path, source })?;
    let path = place.join(STATE);
    let parts = decode_parts(&checked(store, &path, &manifest.state)?);
    let parts = parts.map_err(|source| StoreError::Parts { path, source })?;
    Ok(Kept {
        store: store.clone(),
        _hold: None,
        name: name.clone(),
        manifest,
        manifest_bytes,
        hash,
        index,
        parts,
    })
}

/// The manifest of a snapshot, its hash, and its bytes.
fn manifest(store: &Store, name: &SnapshotName) -> Result<(Manifest, Hash, Vec<u8>), StoreError> {
    let none = || StoreError::NoSnapshot {
        store: store.path().to_owned(),
        name: name.clone(),
    };
    let place = store.directory_of(name);
    // What a link leads to is not in the store. Objects have none.
    if !store.is_remote() {
        let kind = store.disk().kind(&place);
        if kind.map_err(store.file("look at", &place))? == Some(Kind::Link) {
            return Err(none());
        }
    }
    let path = place.join(MANIFEST);
    let file = match store.disk().open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(none()),
        Err(error) => return Err(store.file("open", &path)(error)),
    };
    let bytes = store.read_file(&path, &*file, MAX_MANIFEST_BYTES)?;
    match Manifest::decode(&bytes) {
        Ok((manifest, hash)) => Ok((manifest, hash, bytes)),
        Err(source) => Err(StoreError::Manifest { path, source }),
    }
}

/// The bytes of a file beside a manifest, which has what they should be.
fn checked(
    store: &Store,
    path: &std::path::Path,
    facts: &FileFacts,
) -> Result<Vec<u8>, StoreError> {
    let file = store.disk().open(path).map_err(store.file("open", path))?;
    let bytes = store.read_file(path, &*file, facts.bytes)?;
    let damaged = |offset, what| StoreError::Damaged {
        path: path.to_owned(),
        offset,
        what,
    };
    if bytes.len() as u64 != facts.bytes {
        let what = format!("it ends there, and should have {} bytes", facts.bytes);
        return Err(damaged(bytes.len() as u64, what));
    }
    match Hash::of(&bytes) {
        found if found == facts.blake3 => Ok(bytes),
        found => Err(damaged(
            0,
            format!(
                "its bytes have the hash {found}, and the manifest says {}",
                facts.blake3
            ),
        )),
    }
}

impl Kept {
    /// Its name.
    pub fn name(&self) -> &SnapshotName {
        &self.name
    }

    /// The store that it is in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The same, as it is in its file.
    pub fn manifest_bytes(&self) -> &[u8] {
        &self.manifest_bytes
    }

    /// The hash of its manifest, and so of all of it.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// This one, as the parent of another: whatever has its name when that is saved.
    pub fn as_parent(&self) -> Parent {
        Parent {
            name: self.name.clone(),
            blake3: self.hash,
        }
    }

    /// Which region is in which chunk.
    pub fn index(&self) -> &ChunkIndex {
        &self.index
    }

    /// The parts of the machine.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The part of that name.
    pub fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == name)
    }

    /// Reads a region into `to`, which is as long as it ([`ChunkIndex::region_bytes`]). `false` if it is all
    /// zeros, and `to` is as it was then.
    ///
    /// # Errors
    /// If its chunk is not there, or damaged. What is in `to` is not to be used then.
    pub fn region(&self, region: u64, to: &mut [u8]) -> Result<bool, StoreError> {
        if to.len() as u64 != self.index.region_bytes(region) {
            return Err(StoreError::NotOfFormat {
                what: format!("region {region} into {} bytes", to.len()),
            });
        }
        let Some(hash) = self.index.get(region) else {
            return Ok(false);
        };
        match chunk::read(&self.store, hash, to)? {
            true => Ok(true),
            false => Err(StoreError::NoChunk {
                path: chunk::path_of(&self.store, hash, Compression::None),
                region,
                snapshot: self.name.clone(),
            }),
        }
    }

    /// Reads every region that is not all zeros, and hands it over with its number: in order and on this thread, while
    /// others read what comes next. From a directory they are few: what takes time there is to hash.
    ///
    /// # Errors
    /// The first of a chunk that is not there or damaged, or of `take`: nothing more is handed over then.
    pub fn each_region<E: From<StoreError>>(
        &self,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let regions: Vec<u64> = self.index.iter().map(|(region, _)| region).collect();
        let at_once = match self.store.is_remote() {
            false => 1,
            true => AT_ONCE,
        };
        let at_once = NonZeroUsize::MIN.saturating_add(at_once - 1);
        let read = |region: &u64| {
            let mut content = Buffer::new(self.index.region_bytes(*region) as usize);
            self.region(*region, &mut content)?;
            Ok(content)
        };
        in_order(&regions, at_once, read, |region, content| {
            take(*region, &content)
        })
    }
}
