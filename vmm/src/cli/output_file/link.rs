//! What a path leads to: links, and the names of descriptors.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::{io, process};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use super::error::{Asked, OutputFileError};

/// Links that are followed, one after the other: as many as the kernel does.
const MOST_LINKS: usize = 40;

/// What a path leads to when all links are followed.
pub(super) enum Followed {
    /// A path that is no link. There need not be a file.
    File(PathBuf),
    /// A descriptor of this process, by one of its names: `/dev/stdout`, `/dev/fd/3`, `/proc/self/fd/3`.
    Descriptor(RawFd),
}

/// Why links lead nowhere.
pub(super) enum NoWhere {
    Directory,
    NoDirectory(PathBuf),
    TooManyLinks,
}

impl NoWhere {
    pub(super) fn of(self, asked: &Asked) -> OutputFileError {
        let asked = asked.clone();
        match self {
            Self::Directory => OutputFileError::Directory { asked },
            Self::NoDirectory(directory) => OutputFileError::NoDirectory { asked, directory },
            Self::TooManyLinks => OutputFileError::Write {
                asked,
                source: Errno::LOOP.into(),
            },
        }
    }
}

/// Follows links by hand: what a descriptor is open on has a link, too, and need have no
/// path that could be opened.
pub(super) fn followed(path: &Path) -> Result<Followed, NoWhere> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let Some(name) = path.file_name() else {
            return Err(NoWhere::Directory);
        };
        let Ok(directory) = parent.canonicalize() else {
            return Err(NoWhere::NoDirectory(parent));
        };
        if !directory.is_dir() {
            return Err(NoWhere::NoDirectory(parent));
        }
        let target = directory.join(name);
        if directory
            == Path::new("/proc")
                .join(process::id().to_string())
                .join("fd")
            && let Some(number) = name.to_str().and_then(|name| name.parse().ok())
        {
            return Ok(Followed::Descriptor(number));
        }
        match fs::read_link(&target) {
            Ok(link) => path = directory.join(link),
            Err(_) => return Ok(Followed::File(target)),
        }
    }
    Err(NoWhere::TooManyLinks)
}

/// Descriptor `number` of this process, once more.
pub(super) fn descriptor(number: RawFd) -> io::Result<OwnedFd> {
    // Not by number, for which there is no safe way: every descriptor can be opened by its path, but
    // then has an offset of its own. So the standard streams are had as what they are, and others
    // opened to be appended to.
    let streams = (io::stdout(), io::stderr());
    let open: OwnedFd = match number {
        1 => streams.0.as_fd().try_clone_to_owned()?,
        2 => streams.1.as_fd().try_clone_to_owned()?,
        _ => OpenOptions::new()
            .append(true)
            // A pipe may have lost its reader.
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{number}"))?
            .into(),
    };
    if fcntl_getfl(&open)?.intersects(OFlags::WRONLY | OFlags::RDWR) {
        Ok(open)
    } else {
        Err(Errno::BADF.into())
    }
}
