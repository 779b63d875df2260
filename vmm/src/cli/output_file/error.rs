//! Why a file cannot be written.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A file as it was asked for on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    /// The flag, with its dashes.
    pub(super) flag: &'static str,
    /// What it was given.
    pub(super) path: PathBuf,
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.flag, self.path.display())
    }
}

/// Why a file cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutputFileError {
    /// The path is that of a directory.
    #[error("{asked}: is a directory")]
    Directory { asked: Asked },
    /// Something else goes there, too.
    #[error("{asked} and {other}: one file cannot be both")]
    Same { asked: Asked, other: Asked },
    /// The path is that of a disk.
    #[error("{asked}: is a block device")]
    BlockDevice { asked: Asked },
    /// The path's directory does not exist.
    #[error("{asked}: there is no directory {}", directory.display())]
    NoDirectory { asked: Asked, directory: PathBuf },
    /// The file, or its directory, does not let itself be written.
    #[error("{asked}: cannot write")]
    Write {
        asked: Asked,
        #[source]
        source: io::Error,
    },
}
