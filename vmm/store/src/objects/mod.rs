//! Stores that are in no directory: objects by key, as an object store has them.
//!
//! An object appears whole or not at all, is replaced whole, and can be put *if nothing is there*. There are no
//! directories, no renames, no locks, and nothing to make durable. So such a store is read by the same code as a
//! directory ([`disk`]), and written by another: see [`copy`](crate::copy).
//!
//! | file | concept |
//! |---|---|
//! | `disk` | objects as a disk that is only read |
//! | `naming` | giving a snapshot its name, once and for all; taking it back |

mod disk;
mod naming;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::{fmt, io};

pub(crate) use self::disk::{ObjectDisk, is_called_off};
pub(crate) use self::naming::{Naming, drop_name};
use crate::error::StoreError;
use crate::store::{MARKER, MARKER_TEXT, Store};

/// Part of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The bytes of it that were asked for and are there.
    pub bytes: Vec<u8>,
    /// Bytes of all of it.
    pub len: u64,
}

/// What is in a folder: what has its name and a `/` before the rest of its key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Folders in it, by name, in order.
    pub folders: Vec<String>,
    /// Objects in it by name, and the bytes of each, in order.
    pub objects: Vec<(String, u64)>,
}

/// Objects by key, in a place of their own. A key is a path in it, `warm/snapshot.json`; `""` is the folder of all.
///
/// Whoever implements this has tried what can be tried again: an error is the end of it. All of it may be called from
/// several threads at once. What was put is there for whoever looks from then on (all the large stores promise that
/// now).
pub trait Objects: fmt::Debug + Send + Sync {
    /// Bytes `range` of an object, or what there is of them; `None` if there is no such object.
    ///
    /// # Errors
    /// If it could not be found out.
    fn get(&self, key: &str, range: Range<u64>) -> io::Result<Option<Piece>>;

    /// Bytes of an object; `None` if there is none.
    ///
    /// # Errors
    /// If it could not be found out.
    fn len(&self, key: &str) -> io::Result<Option<u64>>;

    /// Puts an object, in place of what is there.
    ///
    /// # Errors
    /// If that could not be done. It may be there all the same, then: never in part.
    fn put(&self, key: &str, bytes: &[u8]) -> io::Result<()>;

    /// Puts an object unless something is there by its key: `false` then, and nothing has changed.
    ///
    /// # Errors
    /// If that could not be done. It may be there all the same, then, and so it may be that `false` is said of what
    /// this very call has put there, if it was tried more than once.
    fn put_new(&self, key: &str, bytes: &[u8]) -> io::Result<bool>;

    /// Takes an object away. It need not be there.
    ///
    /// # Errors
    /// If that could not be done.
    fn delete(&self, key: &str) -> io::Result<()>;

    /// What is in a folder, but not in folders of it.
    ///
    /// # Errors
    /// If it could not be found out.
    fn list(&self, folder: &str) -> io::Result<Listing>;

    /// All that is in a folder and in folders of it: keys from the folder on, and the bytes of each, in order.
    ///
    /// # Errors
    /// If it could not be found out.
    fn list_below(&self, folder: &str) -> io::Result<Vec<(String, u64)>>;
}

/// What an operation that was called off ends with.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("it was called off")]
pub struct CalledOff;

impl Store {
    /// The store that `objects` have, which is at `url` to people.
    ///
    /// # Errors
    /// If there is none, or one of another version, or it cannot be reached.
    pub fn open_objects(url: &str, objects: Arc<dyn Objects>) -> Result<Self, StoreError> {
        let disk = ObjectDisk::new(url, Arc::clone(&objects));
        let store = Self::open_on(Path::new(url), Arc::new(disk))?;
        Ok(store.of_objects(objects))
    }

    /// The same, which is made if there is nothing.
    ///
    /// # Errors
    /// If there is something else, or it cannot be made, or whoever has the objects replaces one that it was told not to
    /// replace.
    pub fn open_or_create_objects(
        url: &str,
        objects: Arc<dyn Objects>,
    ) -> Result<Self, StoreError> {
        let path = Path::new(url);
        let marker = path.join(MARKER);
        let store = match Self::open_objects(url, Arc::clone(&objects)) {
            Ok(store) => store,
            Err(none @ StoreError::NoStore { .. }) => {
                let there = objects
                    .list("")
                    .map_err(StoreError::file("look into", path))?;
                // Two that make it at once write the same, and one may have been at it since.
                if there.objects.is_empty() && there.folders.is_empty() {
                    let made = objects.put_new(MARKER, MARKER_TEXT.as_bytes());
                    made.map_err(StoreError::file("make", &marker))?;
                } else if there.objects.iter().all(|(name, _)| name != MARKER) {
                    return Err(none);
                }
                Self::open_objects(url, Arc::clone(&objects))?
            }
            Err(error) => return Err(error),
        };
        // It is there now, with these very bytes: so nothing is lost if it is replaced.
        let refused = objects.put_new(MARKER, MARKER_TEXT.as_bytes());
        match refused.map_err(StoreError::file("try to make", &marker))? {
            false => Ok(store),
            true => Err(StoreError::Replaces {
                store: path.to_owned(),
            }),
        }
    }
}
