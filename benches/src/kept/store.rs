//! Stores to measure with.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use guest::abi::REGION_SIZE;
use palimpsest::kept::store::{
    Compression, Facts, Hash, Kept, Machine, Saved, SnapshotName, Store,
};
use palimpsest::kept::{Base, Saver};
use palimpsest::memory::Frames;
use palimpsest::snapshot::Snapshot;

use super::{KeptError, content, host};

/// What the snapshots of a store are called here.
///
/// # Panics
/// If `name` is none.
pub fn name(name: &str) -> SnapshotName {
    name.parse().expect("it is a name")
}

/// Saves `snapshot` as `STORE/NAME`. Says what was written, and how long it took.
///
/// # Errors
/// The store's.
pub fn save(
    store: &Store,
    as_name: &str,
    snapshot: &Snapshot,
    frames: &Frames,
    base: Option<&Base>,
    machine: Machine,
) -> Result<(Saved, Duration), KeptError> {
    let saver = Saver {
        store,
        name: name(as_name),
        snapshot,
        frames,
        base,
        parent: None,
        compression: Compression::None,
        aside: None,
        most_a_second: None,
        facts: Facts {
            creator: "benches".to_owned(),
            machine,
            ..Facts::default()
        },
        parts: Vec::new(),
    };
    let began = Instant::now();
    let saved = saver.save(&mut |_| true)?;
    Ok((saved, began.elapsed()))
}

/// What `STORE/NAME` is.
///
/// # Errors
/// If it cannot be read.
pub fn read(store: &Store, as_name: &str) -> Result<Kept, KeptError> {
    Ok(store.read(&name(as_name))?)
}

/// Writes `bytes` bytes to a new file in `dir`, 2 MiB at a time, and makes them durable, as `dd bs=2M
/// conv=fdatasync` does. How long that took.
///
/// # Errors
/// The host's.
pub fn raw_write(dir: &Path, bytes: u64) -> Result<Duration, KeptError> {
    let mut file = tempfile::tempfile_in(dir).map_err(host("make a file"))?;
    let mut region = vec![0; REGION_SIZE as usize];
    content::region(u64::MAX, 0, &mut region);
    let began = Instant::now();
    for at in (0..bytes).step_by(REGION_SIZE as usize) {
        let part = &region[..(bytes - at).min(REGION_SIZE) as usize];
        file.write_all(part).map_err(host("write a file"))?;
    }
    file.sync_data().map_err(host("make a file durable"))?;
    Ok(began.elapsed())
}

/// Copies all of `snapshot`'s memory out and hashes it, 2 MiB at a time. How long that took.
///
/// # Errors
/// If the snapshot has less memory than it says.
pub fn copy_and_hash(
    snapshot: &Snapshot,
    frames: &Frames,
    bytes: u64,
) -> Result<Duration, KeptError> {
    let mut region = vec![0; REGION_SIZE as usize];
    let began = Instant::now();
    for at in (0..bytes).step_by(REGION_SIZE as usize) {
        let part = &mut region[..(bytes - at).min(REGION_SIZE) as usize];
        let read = frames.read(snapshot.memory(), at, part);
        read.map_err(|error| KeptError::Wrong(error.to_string()))?;
        std::hint::black_box(Hash::of(part));
    }
    Ok(began.elapsed())
}

/// Reads all of `file` and hashes it, 2 MiB at a time. How long that took.
///
/// # Errors
/// The host's.
pub fn read_and_hash(file: &mut std::fs::File, bytes: u64) -> Result<Duration, KeptError> {
    let mut region = vec![0; REGION_SIZE as usize];
    let began = Instant::now();
    file.seek(SeekFrom::Start(0)).map_err(host("read a file"))?;
    for at in (0..bytes).step_by(REGION_SIZE as usize) {
        let part = &mut region[..(bytes - at).min(REGION_SIZE) as usize];
        file.read_exact(part).map_err(host("read a file"))?;
        std::hint::black_box(Hash::of(part));
    }
    Ok(began.elapsed())
}

/// Bytes that are free where `dir` is.
///
/// # Errors
/// The host's.
pub fn free(dir: &Path) -> Result<u64, KeptError> {
    let stat = rustix::fs::statvfs(dir).map_err(host("tell how much room there is"))?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// Refuses what needs `needed` bytes of disk where there are fewer.
///
/// # Errors
/// That says so.
pub fn has_room(dir: &Path, needed: u64) -> Result<(), KeptError> {
    match free(dir)? {
        free if free < needed => Err(KeptError::NoRoom { needed, free }),
        _ => Ok(()),
    }
}
