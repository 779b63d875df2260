//! Into a directory: a save like any other, whose memory comes from another store.

use super::{Copied, CopyOptions, in_order};
use crate::buffer::Buffer;
use crate::chunk;
use crate::error::StoreError;
use crate::hash::Hash;
use crate::name::SnapshotName;
use crate::read::Kept;
use crate::save::{SaveOptions, Saving};
use crate::store::Store;

/// See [`copy`](super::copy).
pub(super) fn copy(
    kept: &Kept,
    to: &Store,
    name: &SnapshotName,
    options: CopyOptions,
    mut copied: Copied,
    goes_on: &mut dyn FnMut(&Copied) -> bool,
) -> Result<Copied, StoreError> {
    match to.read(name) {
        Ok(there) if there.hash() == kept.hash() => copied.was_there = true,
        // What is wrong with it, if anything is, is for the save to say.
        _ => {}
    }
    if copied.was_there {
        copied.done = copied.chunks;
        return Ok(copied);
    }
    let save = SaveOptions {
        compression: options.compression,
        parent: None,
    };
    let mut saving = Saving::begin(to, name, kept.index().memory_bytes(), save)?;
    let chunks: Vec<(u64, Hash)> = kept.index().iter().collect();
    if !goes_on(&copied) {
        return Err(StoreError::CalledOff);
    }
    let fetch = |(region, hash): &(u64, Hash)| {
        // What is there is read where it is saved, which finds out whether it is right.
        match chunk::is_there(to, *hash) {
            true => Ok(None),
            false => content(kept, *region).map(Some),
        }
    };
    in_order(
        &chunks,
        options.at_once,
        fetch,
        |(region, hash), fetched| {
            match fetched {
                Some(content) => saving.region_of(*region, content)?,
                None if saving.same(*region, *hash)? => {}
                None => saving.region_of(*region, content(kept, *region)?)?,
            }
            copied.done += 1;
            copied.sent = saving.so_far().written;
            copied.bytes_sent = saving.so_far().bytes_written;
            match goes_on(&copied) {
                true => Ok(()),
                false => Err(StoreError::CalledOff),
            }
        },
    )?;
    let saved = saving.finish_copy(kept)?;
    copied.bytes_sent = saved.bytes_written;
    Ok(copied)
}

fn content(kept: &Kept, region: u64) -> Result<Buffer, StoreError> {
    let mut content = Buffer::new(kept.index().region_bytes(region) as usize);
    kept.region(region, &mut content)?;
    Ok(content)
}
