//! Why a report file cannot be written.

use std::io;
use std::path::PathBuf;

/// Why a report file cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReportFileError {
    /// The path is that of a directory.
    #[error("--report {}: is a directory", path.display())]
    Directory { path: PathBuf },
    /// The path is that of a disk.
    #[error("--report {}: is a block device", path.display())]
    BlockDevice { path: PathBuf },
    /// The path's directory does not exist.
    #[error("--report {}: there is no directory {}", path.display(), directory.display())]
    NoDirectory { path: PathBuf, directory: PathBuf },
    /// The file, or its directory, does not let itself be written.
    #[error("--report {}: cannot write", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}
