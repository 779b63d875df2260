//! What there is in a store.

use std::collections::{HashMap, HashSet};

use crate::chunk::{self, CHUNKS, COMPRESSED};
use crate::disk::Kind;
use crate::error::StoreError;
use crate::hash::Hash;
use crate::manifest::Manifest;
use crate::name::SnapshotName;
use crate::read::read_held;
use crate::store::{Store, TMP};

/// A snapshot of a store.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub name: SnapshotName,
    /// What it is, and what it takes; or why that cannot be said.
    pub found: Result<(Manifest, Usage), StoreError>,
}

/// What a snapshot takes on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of all its chunks, as they are on disk.
    pub bytes: u64,
    /// Bytes of those that no other snapshot names: what dropping it gives back.
    pub own_bytes: u64,
    /// Chunks of those that are not there.
    pub missing: u64,
}

/// All snapshots of a store, by name.
///
/// # Errors
/// If the store cannot be looked into. Of a snapshot that cannot be read its entry says why.
pub fn list(store: &Store) -> Result<Vec<Entry>, StoreError> {
    let _hold = store.hold()?;
    let names = store.names()?;
    let kept: Vec<_> = names.iter().map(|name| read_held(store, name)).collect();
    let mut named_by: HashMap<Hash, u64> = HashMap::new();
    for kept in kept.iter().flatten() {
        let of_one: HashSet<_> = kept.index().iter().map(|(_, hash)| hash).collect();
        of_one
            .into_iter()
            .for_each(|hash| *named_by.entry(hash).or_default() += 1);
    }
    let files = chunk_files(store)?;
    let usage = |hashes: HashSet<Hash>| {
        let mut usage = Usage::default();
        for hash in hashes {
            let Some(bytes) = files.get(&hash) else {
                usage.missing += 1;
                continue;
            };
            usage.bytes += bytes;
            if named_by.get(&hash) == Some(&1) {
                usage.own_bytes += bytes;
            }
        }
        usage
    };
    let entries = names.into_iter().zip(kept).map(|(name, kept)| Entry {
        name,
        found: kept.map(|kept| {
            let hashes = kept.index().iter().map(|(_, hash)| hash).collect();
            (kept.manifest().clone(), usage(hashes))
        }),
    });
    Ok(entries.collect())
}

/// The chunks that there are, and what each takes.
fn chunk_files(store: &Store) -> Result<HashMap<Hash, u64>, StoreError> {
    let mut files = HashMap::new();
    let chunks = store.path().join(CHUNKS);
    let below = store.disk().files_below(&chunks);
    if let Some(below) = below.map_err(store.file("look into", &chunks))? {
        for (path, bytes) in below {
            if let Some(hash) = chunk::hash_of(store, &path) {
                *files.entry(hash).or_default() += bytes;
            }
        }
        return Ok(files);
    }
    for (hash, path) in chunk_paths(store)? {
        let bytes = store.disk().allocated(&path);
        *files.entry(hash).or_default() += bytes.map_err(store.file("look at", &path))?;
    }
    Ok(files)
}

/// The files of chunks that there are, by content. What else is there is nobody's.
pub(crate) fn chunk_paths(store: &Store) -> Result<Vec<(Hash, std::path::PathBuf)>, StoreError> {
    let mut paths = Vec::new();
    for (folder, kind) in store.list_if_there(&store.path().join(CHUNKS))? {
        let number = u8::from_str_radix(&folder, 16).ok();
        let Some(number) = number.filter(|_| kind == Kind::Directory) else {
            continue;
        };
        let place = chunk::folder_of(store, number);
        for (file, kind) in store.list_if_there(&place)? {
            let name = file.strip_suffix(COMPRESSED).unwrap_or(&file);
            if let (Ok(hash), Kind::File) = (name.parse(), kind) {
                paths.push((hash, place.join(file)));
            }
        }
    }
    Ok(paths)
}

/// What was being written when whoever did it ended, and what kind of thing each is.
pub(crate) fn leftovers(store: &Store) -> Result<Vec<(std::path::PathBuf, Kind)>, StoreError> {
    let tmp = store.path().join(TMP);
    let names = store.list_if_there(&tmp)?;
    let places = names.into_iter().map(|(name, kind)| (tmp.join(name), kind));
    Ok(places.collect())
}
