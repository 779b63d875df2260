//! Giving a snapshot its name in a store of objects, once and for all, and taking it back.
//!
//! There is no rename by which a name appears with all that is under it. The manifest comes last, but who reads it
//! takes whatever index and state are beside it, and two that push different snapshots by one name write the same
//! keys. So **each of the three is put only if nothing is there**, always in the order index, state, manifest:
//!
//! ```text
//!   push   look for NAME/dropping;  put-new memory, state, snapshot.json;  look for NAME/dropping, memory, state
//!   drop   put NAME/dropping;  delete snapshot.json, state, memory, snapshot.json;  delete NAME/dropping
//! ```
//! - Who finds another's index or state there has lost: what is there by a name is never of two snapshots. Who finds
//!   what it was to put there goes on: it is what it has put itself, when it was cut or its answer got lost, or what
//!   another has put who pushes the same snapshot.
//! - A push and a drop of one name say first what they are about to do, and look at the other's word after: at least
//!   one of them sees the other. If it is the push, it takes its manifest back; if it is the drop alone, the push was
//!   over before, and all of it goes.
//!
//! Not covered: a push that is killed between its manifest and its last look, while somebody drops the same name, may
//! leave a manifest without an index. Who reads that gets an error, and dropping or pushing it again mends it.

use std::io;
use std::path::PathBuf;

use super::Objects;
use crate::error::StoreError;
use crate::name::SnapshotName;
use crate::save::{INDEX, MANIFEST, STATE};
use crate::store::Store;

/// What is there while a snapshot is dropped.
const DROPPING: &str = "dropping";
/// What is compared at once.
const PIECE: u64 = 4 << 20;

/// The files of a snapshot, and the name that they are to have.
#[derive(Debug)]
pub(crate) struct Naming<'a> {
    pub(crate) store: &'a Store,
    pub(crate) objects: &'a dyn Objects,
    pub(crate) name: &'a SnapshotName,
    pub(crate) index: &'a [u8],
    pub(crate) state: &'a [u8],
    pub(crate) manifest: &'a [u8],
}

/// What is there by a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum There {
    Nothing,
    Same,
    Another,
}

impl Naming<'_> {
    /// Whether the name could be given now, as far as can be seen: for who has much to do before. Whether all of it is
    /// there by this name already.
    ///
    /// # Errors
    /// If another snapshot has the name, or is about to have it, or it is being dropped.
    pub(crate) fn look(&self) -> Result<bool, StoreError> {
        self.is_not_dropped()?;
        let mut is_all_there = true;
        for (file, bytes) in self.files() {
            match self.there(file, bytes)? {
                There::Nothing => is_all_there = false,
                There::Same => {}
                There::Another => return Err(self.taken()?),
            }
        }
        Ok(is_all_there)
    }

    /// Gives the name. When this returns whoever looks sees it, whole.
    ///
    /// # Errors
    /// If another snapshot has it, or it is being dropped, or the store refuses.
    pub(crate) fn give(&self) -> Result<(), StoreError> {
        self.is_not_dropped()?;
        for (file, bytes) in self.files() {
            self.put(file, bytes)?;
        }
        let is_whole = self.is_not_dropped().and_then(|()| {
            for (file, bytes) in self.files() {
                let path = self.path(file);
                let len = self.objects.len(&self.key(file));
                if len.map_err(StoreError::file("look at", &path))? != Some(bytes.len() as u64) {
                    return Err(self.being_dropped());
                }
            }
            Ok(())
        });
        if let Err(error @ StoreError::BeingDropped { .. }) = is_whole {
            let path = self.path(MANIFEST);
            let taken_back = self.objects.delete(&self.key(MANIFEST));
            taken_back.map_err(StoreError::file("take back", &path))?;
            return Err(error);
        }
        // What could not be looked at is there: this one has put it, or seen it.
        is_whole
    }

    fn put(&self, file: &'static str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(file);
        // There was something, and now there is nothing: it is dropped, or the store puts off who comes when another
        // one is at it.
        for _ in 0..3 {
            let put = self.objects.put_new(&self.key(file), bytes);
            if matches!(put, Ok(true)) {
                return Ok(());
            }
            match (self.there(file, bytes)?, put) {
                (There::Same, _) => return Ok(()),
                (There::Another, _) => return Err(self.taken()?),
                (There::Nothing, Err(error)) => return Err(StoreError::file("put", &path)(error)),
                (There::Nothing, Ok(_)) => {}
            }
        }
        Err(self.being_dropped())
    }

    fn files(&self) -> [(&'static str, &[u8]); 3] {
        [
            (INDEX, self.index),
            (STATE, self.state),
            (MANIFEST, self.manifest),
        ]
    }

    /// Compares what is there with what should be.
    fn there(&self, file: &'static str, bytes: &[u8]) -> Result<There, StoreError> {
        let path = self.path(file);
        let key = self.key(file);
        let mut at = 0;
        loop {
            let piece = self.objects.get(&key, at..at + PIECE);
            let piece = piece.map_err(StoreError::file("look at", &path))?;
            let Some(piece) = piece else {
                return Ok(There::Nothing);
            };
            let until = (at + PIECE).min(bytes.len() as u64);
            let is_same = piece.len == bytes.len() as u64
                && piece.bytes == bytes[at as usize..until as usize];
            if !is_same {
                return Ok(There::Another);
            }
            if until == bytes.len() as u64 {
                return Ok(There::Same);
            }
            at = until;
        }
    }

    /// Who has the name, or is about to have it.
    fn taken(&self) -> Result<StoreError, StoreError> {
        let (store, name) = (self.store.path().to_owned(), self.name.clone());
        let path = self.path(MANIFEST);
        let manifest = self.objects.len(&self.key(MANIFEST));
        Ok(
            match manifest.map_err(StoreError::file("look at", &path))? {
                Some(_) => StoreError::Exists { store, name },
                None => StoreError::Claimed { store, name },
            },
        )
    }

    fn is_not_dropped(&self) -> Result<(), StoreError> {
        let path = self.path(DROPPING);
        let found = self.objects.len(&self.key(DROPPING));
        match found.map_err(StoreError::file("look at", &path))? {
            None => Ok(()),
            Some(_) => Err(self.being_dropped()),
        }
    }

    fn being_dropped(&self) -> StoreError {
        StoreError::BeingDropped {
            store: self.store.path().to_owned(),
            name: self.name.clone(),
        }
    }

    fn key(&self, file: &str) -> String {
        key(self.name, file)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.store.directory_of(self.name).join(file)
    }
}

fn key(name: &SnapshotName, file: &str) -> String {
    format!("{name}/{file}")
}

/// Drops a snapshot by name, or what is left of a push that did not end. Its chunks stay.
pub(crate) fn drop_name(
    store: &Store,
    objects: &dyn Objects,
    name: &SnapshotName,
) -> Result<(), StoreError> {
    let place = store.directory_of(name);
    let failed = |what, file: &str| StoreError::file(what, &place.join(file));
    let there = objects.list(name.as_str());
    let there = there.map_err(StoreError::file("look into", &place))?;
    let is_there = |file: &str| there.objects.iter().any(|(name, _)| name == file);
    if ![MANIFEST, STATE, INDEX, DROPPING].into_iter().any(is_there) {
        return Err(StoreError::NoSnapshot {
            store: store.path().to_owned(),
            name: name.clone(),
        });
    }
    let text = b"This snapshot is being dropped.\n";
    let said: io::Result<()> = objects.put(&key(name, DROPPING), text);
    said.map_err(failed("put", DROPPING))?;
    for file in [MANIFEST, STATE, INDEX, MANIFEST, DROPPING] {
        let gone = objects.delete(&key(name, file));
        gone.map_err(failed("take away", file))?;
    }
    Ok(())
}
