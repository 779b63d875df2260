//! Dropping snapshots, and collecting what nobody names.
//!
//! The store is held alone meanwhile: nobody is about to name a chunk, or to read one. A chunk is taken away only
//! when every snapshot that there is could be read, and none names it. So a store whose pruner is killed, or loses
//! its power, has more than it needs and never less.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use crate::disk::{Kind, Lock};
use crate::error::StoreError;
use crate::hash::Hash;
use crate::list::{chunk_paths, leftovers};
use crate::name::SnapshotName;
use crate::objects::{Objects, drop_name};
use crate::read::read_held;
use crate::store::{Store, TMP, fresh_suffix};

/// What was taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Snapshots that were dropped by name.
    pub dropped: Vec<SnapshotName>,
    /// Chunks that nobody named.
    pub chunks: u64,
    /// What all that took on disk.
    pub bytes: u64,
    /// What was left of saves that did not end.
    pub leftovers: u64,
    /// Chunks that are still there.
    pub kept: u64,
}

/// Drops the snapshots `names`, and collects what nobody names. Waits `patience` for who uses the store.
///
/// A store of objects is not collected: with `names` they are dropped there, and their chunks stay; without it is an
/// error.
///
/// # Errors
/// If one of `names` is not there, or is no snapshot: nothing was done then. If somebody uses the store, or it is not known which chunks
/// are wanted, or something cannot be taken away: all that is there is still whole.
pub fn prune(
    store: &Store,
    names: &[SnapshotName],
    patience: Duration,
) -> Result<Pruned, StoreError> {
    if let Some(objects) = store.objects() {
        return prune_objects(store, &**objects, names);
    }
    let _hold = store.lock(Lock::Exclusive, patience)?;
    let mut pruned = Pruned::default();
    let there = store.names()?;
    if let Some(name) = names.iter().find(|name| !there.contains(name)) {
        return Err(StoreError::NoSnapshot {
            store: store.path().to_owned(),
            name: name.clone(),
        });
    }
    for name in names {
        // It is somebody's: nobody has saved it, and what is in it is not known.
        if !store.has_manifest(name)? {
            let path = store.directory_of(name);
            return Err(StoreError::InTheWay { path });
        }
    }
    let tmp = store.path().join(TMP);
    if !names.is_empty() {
        store.make_dir(&tmp)?;
    }
    for name in names {
        if pruned.dropped.contains(name) {
            continue;
        }
        // At once: there is no half of a snapshot under its name.
        let place = store.directory_of(name);
        let gone = tmp.join(format!("{name}.{}", fresh_suffix()));
        store
            .disk()
            .rename(&place, &gone)
            .map_err(store.file("drop", &place))?;
        pruned.dropped.push(name.clone());
    }
    if !pruned.dropped.is_empty() {
        // Before any chunk of them goes.
        store.sync_dir(store.path())?;
    }
    let wanted = wanted(store)?;
    for (path, kind) in leftovers(store)? {
        pruned.bytes += remove(store, &path, kind, MOST_NESTED)?;
        pruned.leftovers += 1;
    }
    pruned.leftovers -= pruned.dropped.len() as u64;
    for (hash, path) in chunk_paths(store)? {
        if wanted.contains(&hash) {
            pruned.kept += 1;
            continue;
        }
        pruned.bytes += remove_file(store, &path)?;
        pruned.chunks += 1;
    }
    Ok(pruned)
}

/// Drops snapshots by name, and leaves their chunks: who pushes holds nothing, and may be about to name one that it has
/// found.
fn prune_objects(
    store: &Store,
    objects: &dyn Objects,
    names: &[SnapshotName],
) -> Result<Pruned, StoreError> {
    if names.is_empty() {
        return Err(StoreError::NotCollected {
            store: store.path().to_owned(),
        });
    }
    let mut pruned = Pruned::default();
    for name in names {
        if !pruned.dropped.contains(name) {
            drop_name(store, objects, name)?;
            pruned.dropped.push(name.clone());
        }
    }
    Ok(pruned)
}

/// The chunks that snapshots name.
fn wanted(store: &Store) -> Result<HashSet<Hash>, StoreError> {
    let mut wanted = HashSet::new();
    for name in store.names()? {
        match read_held(store, &name) {
            Ok(kept) => wanted.extend(kept.index().iter().map(|(_, hash)| hash)),
            Err(source) => {
                return Err(StoreError::Unknown {
                    snapshot: name.to_string(),
                    source: Box::new(source),
                });
            }
        }
    }
    Ok(wanted)
}

/// Folders in folders that are taken away: a save has one.
const MOST_NESTED: u32 = 4;

/// Takes away what is at `path`, and not what a link there leads to. Says how much space it took.
fn remove(store: &Store, path: &Path, kind: Kind, nested: u32) -> Result<u64, StoreError> {
    if kind != Kind::Directory || nested == 0 {
        return remove_file(store, path);
    }
    let mut bytes = 0;
    for (name, kind) in store.list(path)? {
        bytes += remove(store, &path.join(name), kind, nested - 1)?;
    }
    let removed = store.disk().remove_dir(path);
    removed.map_err(store.file("take away", path))?;
    Ok(bytes)
}

fn remove_file(store: &Store, path: &Path) -> Result<u64, StoreError> {
    let bytes = store.disk().allocated(path).unwrap_or(0);
    let removed = store.disk().remove_file(path);
    removed.map_err(store.file("take away", path))?;
    Ok(bytes)
}
