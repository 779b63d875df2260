//! All operations on files, behind one trait: so that each can be refused, be short or be lost with the power.
//!
//! Whoever implements it says what a host says. What is made of that, retries among it, is above.

mod host;

use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{fmt, io};

pub(crate) use self::host::Host;

/// What kind of thing a name in a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
    /// A symbolic link, whatever it leads to.
    Link,
    Other,
}

/// What a file is, to whoever wants to know whether it is another, or was changed: its number and its device, bytes,
/// and when its content and anything else of it were changed last (seconds and nanoseconds).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) bytes: u64,
    pub(crate) modified: (i64, i64),
    pub(crate) changed: (i64, i64),
}

/// How a store is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// With others: nobody takes anything away meanwhile.
    Shared,
    /// Alone.
    Exclusive,
}

/// What keeps a lock while it is there.
pub(crate) trait Locked: Send + Sync + fmt::Debug {}

/// Files and directories.
pub(crate) trait Disk: fmt::Debug + Send + Sync {
    /// Makes a file that is not there yet.
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>>;
    /// Opens a file for reading; not by a link.
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>>;
    /// Makes a directory that is not there yet.
    fn make_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Gives a file or directory another name. A directory that is there under it is not replaced, unless it is
    /// empty.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Takes the name of a file away.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Takes the name of an empty directory away.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory.
    fn list(&self, path: &Path) -> io::Result<Vec<(String, Kind)>>;
    /// What is there by a name, if anything is; not what a link leads to.
    fn kind(&self, path: &Path) -> io::Result<Option<Kind>>;
    /// Bytes of a file; `None` if it is not there.
    fn len(&self, path: &Path) -> io::Result<Option<u64>>;
    /// What the file is; `None` if it is not there.
    fn stamp(&self, path: &Path) -> io::Result<Option<Stamp>>;
    /// The path of what is there, from the root on and without links.
    fn real(&self, path: &Path) -> io::Result<PathBuf>;
    /// Bytes of a file that take space.
    fn allocated(&self, path: &Path) -> io::Result<u64>;
    /// The files in a directory and in those in it, and the bytes of each; `None` where each has to be looked for.
    fn files_below(&self, _path: &Path) -> io::Result<Option<Vec<(PathBuf, u64)>>> {
        Ok(None)
    }
    /// Notes that a file was used now.
    fn touch(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }
    /// When a file was used last, as far as was noted.
    fn touched(&self, _path: &Path) -> io::Result<SystemTime> {
        Ok(SystemTime::UNIX_EPOCH)
    }
    /// Holds a directory; `None` if that cannot be had now.
    fn lock(&self, path: &Path, how: Lock) -> io::Result<Option<Box<dyn Locked>>>;
}

/// A file that is open.
pub(crate) trait File: Send + fmt::Debug {
    /// Reads some bytes at `offset`: none at the end.
    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<usize>;
    /// Writes some of `bytes` at `offset`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;
    /// Makes it `len` bytes long.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Bytes there are.
    fn len(&self) -> io::Result<u64>;
    /// What it is.
    fn stamp(&self) -> io::Result<Stamp>;
    /// Makes all of it durable.
    fn sync(&self) -> io::Result<()>;
}

/// Writes all of `bytes` at `offset`, in as many pieces as the host wants. An error comes with where.
pub(crate) fn write_all(
    file: &dyn File,
    offset: u64,
    mut bytes: &[u8],
) -> Result<(), (u64, io::Error)> {
    let mut at = offset;
    while !bytes.is_empty() {
        match file.write_at(at, bytes) {
            Ok(0) => return Err((at, io::ErrorKind::WriteZero.into())),
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or_default();
                at += written as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err((at, error)),
        }
    }
    Ok(())
}

/// Reads as many bytes as `to` has and the file, from its beginning on. An error comes with where.
pub(crate) fn read_all(file: &dyn File, to: &mut [u8]) -> Result<usize, (u64, io::Error)> {
    let mut at = 0;
    while at < to.len() {
        match file.read_at(at as u64, &mut to[at..]) {
            Ok(0) => break,
            Ok(read) => at += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err((at as u64, error)),
        }
    }
    Ok(at)
}
