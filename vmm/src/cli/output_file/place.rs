//! How a file is written, by what is at its path.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};

use super::super::outlet::{Outlet, PATIENCE};
use super::error::{Asked, OutputFileError};

/// Time between two looks whether a pipe has a reader.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How a file is written, which depends on what is at its path.
#[derive(Debug)]
pub(super) enum Place {
    /// A regular file, or none yet: replaced in one step by one like `old`.
    Replaced {
        target: PathBuf,
        old: Option<Metadata>,
    },
    /// A regular file that must stay the one it is.
    Kept(PathBuf),
    /// A pipe that nobody has opened to read yet.
    Pipe(PathBuf),
    /// What is open already.
    Open(OwnedFd),
}

impl Place {
    /// That of `target`, which is no link, for what was asked for by `asked`.
    pub(super) fn of(target: PathBuf, asked: &Asked) -> Result<Self, OutputFileError> {
        let asked = || asked.clone();
        let write = |source: io::Error| OutputFileError::Write {
            asked: asked(),
            source,
        };
        let meta = match fs::metadata(&target) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let directory = directory_of(&target);
                temporary(directory, None).map_err(write)?;
                return Ok(Self::Replaced { target, old: None });
            }
            Err(error) => return Err(write(error)),
        };
        let kind = meta.file_type();
        if kind.is_dir() {
            return Err(OutputFileError::Directory { asked: asked() });
        }
        if kind.is_block_device() {
            return Err(OutputFileError::BlockDevice { asked: asked() });
        }
        if kind.is_fifo() {
            access(&target, Access::WRITE_OK).map_err(|errno| write(errno.into()))?;
            return match open_pipe(&target).map_err(write)? {
                Some(open) => Ok(Self::Open(open)),
                None => Ok(Self::Pipe(target)),
            };
        }
        let open = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(&target)
            .map_err(write)?;
        if !kind.is_file() {
            return Ok(Self::Open(open.into()));
        }
        // `vmm --report out > out` is one file, to be written once after the other.
        let streams = (io::stdout(), io::stderr());
        for stream in [streams.0.as_fd(), streams.1.as_fd()] {
            if is_the_file(stream, &meta) {
                return Ok(Self::Open(stream.try_clone_to_owned().map_err(write)?));
            }
        }
        let stays = meta.nlink() > 1 || temporary(directory_of(&target), Some(&meta)).is_err();
        Ok(if stays {
            Self::Kept(target)
        } else {
            Self::Replaced {
                target,
                old: Some(meta),
            }
        })
    }

    /// Whether this and `other` are one file that is written anew. What is open is added to.
    pub(super) fn is_file_of(&self, other: &Self) -> bool {
        let inode = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        match (self, other) {
            (
                Self::Replaced { target, .. } | Self::Kept(target),
                Self::Replaced { target: other, .. } | Self::Kept(other),
            ) => target == other || inode(target).is_some_and(|one| inode(other) == Some(one)),
            _ => false,
        }
    }

    /// Writes `json` there.
    pub(super) fn write(self, json: Vec<u8>) -> io::Result<()> {
        match self {
            Self::Replaced { target, old } => replace(&target, old.as_ref(), &json),
            Self::Kept(target) => overwrite(&target, &json),
            Self::Open(open) => send(open, json),
            Self::Pipe(path) => {
                let deadline = Instant::now() + PATIENCE;
                loop {
                    if let Some(open) = open_pipe(&path)? {
                        return send(open, json);
                    }
                    if Instant::now() >= deadline {
                        let what =
                            format!("nobody has opened this pipe to read it for {PATIENCE:.0?}");
                        return Err(io::Error::new(io::ErrorKind::TimedOut, what));
                    }
                    thread::sleep(LOOK_EVERY);
                }
            }
        }
    }
}

/// Whether `stream` is open on the file that `meta` is of.
fn is_the_file(stream: BorrowedFd<'_>, meta: &Metadata) -> bool {
    rustix::fs::fstat(stream)
        .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (meta.dev(), meta.ino()))
}

fn directory_of(target: &Path) -> &Path {
    target.parent().unwrap_or(Path::new("/"))
}

/// A new file in `directory`, to be renamed over one there.
/// With owner and mode of `old`.
fn temporary(directory: &Path, old: Option<&Metadata>) -> io::Result<tempfile::NamedTempFile> {
    let file = tempfile::Builder::new()
        .prefix(".vmm-")
        .suffix(".tmp")
        // What any new file gets; the umask takes its part. Temporary files are private otherwise.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        // The error would name the temporary file, which the user did not ask for.
        .map_err(|error| io::Error::from(error.kind()))?;
    if let Some(old) = old {
        let new = file.as_file().metadata()?;
        if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
            fchown(file.as_file(), Some(old.uid()), Some(old.gid()))?;
        }
        file.as_file().set_permissions(old.permissions())?;
    }
    Ok(file)
}

/// Opens a pipe to write to it; `None` if nobody has it open to read.
fn open_pipe(path: &Path) -> io::Result<Option<OwnedFd>> {
    let open = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    match open {
        Ok(open) => Ok(Some(open.into())),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn replace(target: &Path, old: Option<&Metadata>, json: &[u8]) -> io::Result<()> {
    let temporary = temporary(directory_of(target), old)?;
    // By its descriptor: the error of another way would name the temporary file.
    temporary.as_file().write_all(json)?;
    temporary.as_file().sync_all()?;
    match temporary.persist(target) {
        Ok(_) => Ok(()),
        // Something is mounted on it, as files are in containers.
        Err(error) if error.error.raw_os_error() == Some(libc::EBUSY) => overwrite(target, json),
        Err(error) => Err(error.error),
    }
}

fn overwrite(target: &Path, json: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).open(target)?;
    file.write_all(json)?;
    file.sync_all()
}

/// Writes to what may have no end and no reader.
fn send(open: OwnedFd, json: Vec<u8>) -> io::Result<()> {
    if File::from(open.try_clone()?).metadata()?.is_file() {
        return File::from(open).write_all(&json);
    }
    let outlet = Outlet::to_file(open)?;
    outlet.send(json);
    match outlet.finish(PATIENCE) {
        // The reader has gone, as `head` does: that is no error.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}
