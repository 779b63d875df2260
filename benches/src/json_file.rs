//! The file that the numbers of a run are kept in.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Where `--json` says that a report goes to, if it says so.
#[derive(Debug)]
pub struct JsonFile {
    path: Option<PathBuf>,
}

/// A report cannot be written to where it should go.
#[derive(Debug, thiserror::Error)]
#[error("--json {}: cannot write", path.display())]
pub struct JsonFileError {
    path: PathBuf,
    source: io::Error,
}

impl JsonFile {
    /// Checks that a report can be written to `path`, before minutes are spent on it.
    ///
    /// # Errors
    /// If it cannot.
    pub fn prepare(path: Option<PathBuf>) -> Result<Self, JsonFileError> {
        if let Some(path) = &path {
            check_writable(path).map_err(|source| at(path, source))?;
        }
        Ok(Self { path })
    }

    /// Writes `report` there as JSON. Whoever reads there at any moment sees the old file or the whole new one.
    ///
    /// # Errors
    /// If the host refuses that.
    pub fn write(&self, report: &impl Serialize) -> Result<(), JsonFileError> {
        match &self.path {
            Some(path) => write(report, path).map_err(|source| at(path, source)),
            None => Ok(()),
        }
    }
}

fn at(path: &Path, source: io::Error) -> JsonFileError {
    let path = path.to_owned();
    JsonFileError { path, source }
}

fn write(report: &impl Serialize, path: &Path) -> io::Result<()> {
    let json = serde_json::to_vec_pretty(report)?;
    if fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        // A terminal, a pipe, /dev/null.
        return fs::write(path, json);
    }
    let mut file = temporary(path)?;
    file.write_all(&json)?;
    file.write_all(b"\n")?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn check_writable(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        Ok(meta) if !meta.is_file() => fs::OpenOptions::new().write(true).open(path).map(drop),
        _ if !directory(path).is_dir() => {
            let missing = directory(path).display().to_string();
            Err(io::Error::other(format!("there is no directory {missing}")))
        }
        _ => temporary(path).map(drop),
    }
}

/// A new file beside `path`: on the same file system, so that it can be renamed over it.
fn temporary(path: &Path) -> io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".bench-")
        .suffix(".tmp")
        // What any new file gets; the umask takes its part. Temporary files are private otherwise.
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(directory(path))
        // The error would name the temporary file, which the user did not ask for.
        .map_err(|error| error.kind().into())
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
