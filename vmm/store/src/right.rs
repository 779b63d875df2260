//! Chunks that this process has seen to be right, and what their files were then: who names one once more
//! need not read it again as long as its file is that.
//!
//! A file is the same if it has the same number on the same device and as many bytes, and neither its content
//! nor anything else of it has changed since by the file system's own clock, which nobody sets back who is
//! not the host's. So what is written to a chunk's file, cut off or put in its place is noticed. What is not:
//! a change within the same tick of that clock (10 ms at most, and none on Linux 6.13 and later, where a file
//! that was looked at gets a time of its own), and what happens below the file system. A disk that rots is
//! not noticed by who reads a file a second time either, which is in the page cache; it is found when the
//! chunk is read to be used, since nothing is used that was not checked.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::chunk;
use crate::disk::{File, Stamp};
use crate::hash::Hash;
use crate::save::Compression;
use crate::store::Store;

/// The chunks of a store that were seen to be right.
#[derive(Debug, Default)]
pub(crate) struct Right(Mutex<HashMap<Hash, Seen>>);

/// What a chunk's file was.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Bytes of its content.
    bytes: u64,
    is_compressed: bool,
    stamp: Stamp,
    /// Its name was made durable since. It is that of this file, which would have changed with it.
    is_named_durably: bool,
}

/// What is known of a chunk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Nothing, or it has changed: it must be read.
    Nothing,
    /// Its content is right.
    Right,
    /// And it will have its name after a power cut.
    RightAndDurable,
}

impl Right {
    /// The chunk `hash`, with `bytes` bytes of content, was written or is about to be read and checked by
    /// `file`.
    pub(crate) fn saw(&self, hash: Hash, bytes: u64, compression: Compression, file: &dyn File) {
        // If the host does not say, it is read again.
        if let Ok(stamp) = file.stamp() {
            self.saw_as(hash, bytes, compression, stamp);
        }
    }

    /// The same of a file that was this before it was read.
    pub(crate) fn saw_as(&self, hash: Hash, bytes: u64, compression: Compression, stamp: Stamp) {
        let seen = Seen {
            bytes,
            is_compressed: compression != Compression::None,
            stamp,
            is_named_durably: false,
        };
        let mut all = self.seen();
        match all.get(&hash) {
            // Nothing new.
            Some(known) if known.stamp == stamp => {}
            _ => drop(all.insert(hash, seen)),
        }
    }

    /// What was seen of `hashes`: before their folders are made durable.
    pub(crate) fn stamps(&self, hashes: impl Iterator<Item = Hash>) -> Vec<(Hash, Stamp)> {
        let all = self.seen();
        let stamp = |hash| Some((hash, all.get(&hash)?.stamp));
        hashes.filter_map(stamp).collect()
    }

    /// The folders of `seen` were made durable since. Another save may have put other files there meanwhile.
    pub(crate) fn named_durably(&self, seen: &[(Hash, Stamp)]) {
        let mut all = self.seen();
        for (hash, stamp) in seen {
            if let Some(seen) = all.get_mut(hash).filter(|seen| seen.stamp == *stamp) {
                seen.is_named_durably = true;
            }
        }
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<Hash, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// What is known of the chunk `hash`, with `bytes` bytes of content, if it is as it was when it was seen.
    pub(crate) fn known(&self, hash: Hash, bytes: u64) -> Known {
        let Some(seen) = self.right().seen().get(&hash).copied() else {
            return Known::Nothing;
        };
        let stamp = |compression| {
            let path = chunk::path_of(self, hash, compression);
            self.disk().stamp(&path)
        };
        // If both files are there, the one that is not compressed counts. It is no other's stamp.
        let now = match (stamp(Compression::None), seen.is_compressed) {
            (Ok(None), true) => stamp(Compression::ANY),
            (now, _) => now,
        };
        let is_same = seen.bytes == bytes && matches!(now, Ok(Some(now)) if now == seen.stamp);
        match (is_same, seen.is_named_durably) {
            (false, _) => Known::Nothing,
            (true, false) => Known::Right,
            (true, true) => Known::RightAndDurable,
        }
    }
}
