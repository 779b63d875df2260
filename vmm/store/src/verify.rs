//! Reading all of a snapshot, to see whether it could be loaded.

use std::collections::HashSet;

use crate::buffer::Buffer;
use crate::chunk::CHUNK_BYTES;
use crate::error::StoreError;
use crate::hash::Hash;
use crate::name::SnapshotName;
use crate::store::Store;

/// What was found of a snapshot.
#[derive(Debug, Default)]
pub struct Verified {
    /// Chunks that it names.
    pub chunks: u64,
    /// Those that were read now, and not before for another.
    pub read: u64,
    /// Bytes of memory in these.
    pub bytes: u64,
    /// What is wrong: of each chunk that is, and of the snapshot as a whole.
    pub wrong: Vec<StoreError>,
}

/// Reads all of a snapshot. Chunks in `right` were seen to be right before, and are not read again; those that are
/// seen now are put there. `goes_on` is told how many chunks are done of how many, and says whether to go on.
///
/// # Errors
/// If it was called off. What is wrong with the snapshot is in what is returned.
pub fn verify(
    store: &Store,
    name: &SnapshotName,
    right: &mut HashSet<Hash>,
    goes_on: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Verified, StoreError> {
    let mut verified = Verified::default();
    // What is in a cache says nothing of what is there.
    let kept = match store.without_cache().read(name) {
        Ok(kept) => kept,
        Err(error) => {
            verified.wrong.push(error);
            return Ok(verified);
        }
    };
    verified.chunks = kept.index().len();
    let mut content = Buffer::new(CHUNK_BYTES as usize);
    for (done, (region, hash)) in (0..).zip(kept.index().iter()) {
        if !goes_on(done, verified.chunks) {
            return Err(StoreError::CalledOff);
        }
        let bytes = kept.index().region_bytes(region);
        // A chunk of the same name and another length is not this one.
        let is_whole = bytes == CHUNK_BYTES;
        if is_whole && right.contains(&hash) {
            continue;
        }
        match kept.region(region, &mut content[..bytes as usize]) {
            Ok(_) if is_whole => drop(right.insert(hash)),
            Ok(_) => {}
            Err(error) => verified.wrong.push(error),
        }
        verified.read += 1;
        verified.bytes += bytes;
    }
    goes_on(verified.chunks, verified.chunks);
    Ok(verified)
}
