//! Copying a snapshot from one store to another: a directory or objects, on either side.
//!
//! What is copied is the same snapshot: its manifest, index and state are the same bytes, so its hash is the same.
//! Chunks that the other store has already are not sent. Each that is sent was read from the first store and checked;
//! nothing has the snapshot's name there before all of it is there. A copy that was cut is done again: it goes on.
//!
//! | file | concept |
//! |---|---|
//! | `ahead` | work on several things at once, whose results come in order |
//! | `to_directory` | into a directory (a pull) |
//! | `to_objects` | into objects (a push) |

mod ahead;
mod to_directory;
mod to_objects;

use std::num::NonZeroUsize;

pub(crate) use self::ahead::in_order;
use crate::error::StoreError;
use crate::name::SnapshotName;
use crate::read::Kept;
use crate::save::Compression;
use crate::store::Store;

/// How a snapshot is copied.
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// How the chunks that are sent are kept. Those that are there stay as they are.
    pub compression: Compression,
    /// Chunks that are under way at once.
    pub at_once: NonZeroUsize,
    /// Whether each chunk is read back from where it was put, and each that was found there is read: one that is
    /// damaged there is sent again. A directory's are always read.
    pub check: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            compression: Compression::None,
            at_once: NonZeroUsize::MIN.saturating_add(7),
            check: false,
        }
    }
}

/// What a copy has done, so far or in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Chunks that the snapshot names.
    pub chunks: u64,
    /// Those that are done.
    pub done: u64,
    /// Of these, those that were sent.
    pub sent: u64,
    /// Bytes of these, as they were sent.
    pub bytes_sent: u64,
    /// Whether the snapshot had its name there before.
    pub was_there: bool,
}

/// Copies the snapshot `kept` to the store `to`, as `name`. `goes_on` is told how far it is, and says whether to go on.
///
/// # Errors
/// If another snapshot has that name there, or a chunk cannot be read or sent, or it was called off. Nothing is there by
/// the name then that was not before; chunks that were sent stay, and are found by the next try.
pub fn copy(
    kept: &Kept,
    to: &Store,
    name: &SnapshotName,
    options: CopyOptions,
    goes_on: &mut dyn FnMut(&Copied) -> bool,
) -> Result<Copied, StoreError> {
    let copied = Copied {
        chunks: kept.index().len(),
        ..Copied::default()
    };
    let to = &to.without_cache();
    match to.objects() {
        None => to_directory::copy(kept, to, name, options, copied, goes_on),
        Some(objects) => to_objects::copy(kept, to, &**objects, name, options, copied, goes_on),
    }
}
