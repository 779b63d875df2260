//! Objects as a disk that is only read: all that looks at a store of files looks at one of objects, too.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{CalledOff, Objects};
use crate::disk::{Disk, File, Kind, Lock, Locked, Stamp};
use crate::error::ReadOnly;

/// What is asked for at once: a chunk, in whichever form, and the whole of most other files.
const PIECE: u64 = 4 << 20;

/// The disk.
#[derive(Debug)]
pub(crate) struct ObjectDisk {
    root: PathBuf,
    objects: Arc<dyn Objects>,
}

impl ObjectDisk {
    /// One on which `objects` are under `url`.
    pub(crate) fn new(url: &str, objects: Arc<dyn Objects>) -> Self {
        Self {
            root: PathBuf::from(url),
            objects,
        }
    }

    fn key(&self, path: &Path) -> io::Result<String> {
        let key = path.strip_prefix(&self.root).ok().and_then(Path::to_str);
        let key = key.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(key.to_owned())
    }
}

/// All that is known of an object, which does not do to tell it from another: nobody does.
fn stamp(bytes: u64) -> Stamp {
    Stamp {
        device: 0,
        inode: 0,
        bytes,
        modified: (0, 0),
        changed: (0, 0),
    }
}

fn refused<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, ReadOnly))
}

/// Nobody takes away what is in a store of objects but who drops a snapshot by name, and chunks stay: there is nothing
/// to be held.
#[derive(Debug)]
struct Unheld;

impl Locked for Unheld {}

impl Disk for ObjectDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let key = self.key(path)?;
        let piece = self.objects.get(&key, 0..PIECE)?;
        let piece = piece.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(Box::new(Object {
            objects: Arc::clone(&self.objects),
            key,
            len: piece.len,
            piece: Mutex::new((0, piece.bytes)),
        }))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(String, Kind)>> {
        let listing = self.objects.list(&self.key(path)?)?;
        let folders = listing.folders.into_iter();
        let folders = folders.map(|name| (name, Kind::Directory));
        let objects = listing.objects.into_iter();
        let mut names: Vec<_> = folders
            .chain(objects.map(|(name, _)| (name, Kind::File)))
            .collect();
        names.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Ok(names)
    }

    fn files_below(&self, path: &Path) -> io::Result<Option<Vec<(PathBuf, u64)>>> {
        let files = self.objects.list_below(&self.key(path)?)?;
        let files = files
            .into_iter()
            .map(|(key, bytes)| (path.join(key), bytes));
        Ok(Some(files.collect()))
    }

    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        self.objects.len(&self.key(path)?)
    }

    fn kind(&self, path: &Path) -> io::Result<Option<Kind>> {
        if self.len(path)?.is_some() {
            return Ok(Some(Kind::File));
        }
        let listing = self.objects.list(&self.key(path)?)?;
        let is_there = !listing.folders.is_empty() || !listing.objects.is_empty();
        Ok(is_there.then_some(Kind::Directory))
    }

    fn stamp(&self, path: &Path) -> io::Result<Option<Stamp>> {
        Ok(self.len(path)?.map(stamp))
    }

    fn allocated(&self, path: &Path) -> io::Result<u64> {
        Ok(self.len(path)?.unwrap_or(0))
    }

    fn real(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.to_owned())
    }

    fn lock(&self, _path: &Path, how: Lock) -> io::Result<Option<Box<dyn Locked>>> {
        match how {
            Lock::Shared => Ok(Some(Box::new(Unheld))),
            Lock::Exclusive => refused(),
        }
    }

    fn create(&self, _path: &Path) -> io::Result<Box<dyn File>> {
        refused()
    }

    fn make_dir(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        refused()
    }

    fn remove_file(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn remove_dir(&self, _path: &Path) -> io::Result<()> {
        refused()
    }
}

/// An object, and what was read of it last.
#[derive(Debug)]
struct Object {
    objects: Arc<dyn Objects>,
    key: String,
    len: u64,
    /// Where it begins in the object, and its bytes.
    piece: Mutex<(u64, Vec<u8>)>,
}

impl File for Object {
    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<usize> {
        if offset >= self.len || to.is_empty() {
            return Ok(0);
        }
        // What was read is whole, whoever has panicked since.
        let mut piece = self.piece.lock().unwrap_or_else(PoisonError::into_inner);
        let has = |(from, bytes): &(u64, Vec<u8>)| {
            let at = usize::try_from(offset.checked_sub(*from)?).ok()?;
            bytes.get(at..).filter(|rest| !rest.is_empty())?;
            Some(at)
        };
        let at = match has(&piece) {
            Some(at) => at,
            None => {
                let read = self
                    .objects
                    .get(&self.key, offset..offset.saturating_add(PIECE))?;
                let changed = || io::Error::other("it was replaced while it was read");
                let read = read.ok_or_else(changed)?;
                if read.len != self.len {
                    return Err(changed());
                }
                *piece = (offset, read.bytes);
                match has(&piece) {
                    Some(at) => at,
                    None => return Ok(0),
                }
            }
        };
        let there = &piece.1[at..];
        let read = there.len().min(to.len());
        to[..read].copy_from_slice(&there[..read]);
        Ok(read)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn stamp(&self) -> io::Result<Stamp> {
        Ok(stamp(self.len))
    }

    fn write_at(&self, _offset: u64, _bytes: &[u8]) -> io::Result<usize> {
        refused()
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        refused()
    }

    fn sync(&self) -> io::Result<()> {
        refused()
    }
}

/// Whether an operation ended because it was called off.
pub(crate) fn is_called_off(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| error.is::<CalledOff>())
}
