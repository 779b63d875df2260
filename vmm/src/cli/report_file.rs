//! Where a report goes that is asked for by `--report`.
//!
//! A regular file is replaced in one step, so that whoever reads the path sees the old one or the whole new one; it keeps its owner and
//! its mode. Everything else is written to where it is: pipes, terminals, what a descriptor of this program is open on, and files with
//! several names, of which only one would be replaced. That it can be done is found out before the run.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{process, thread};

use rustix::fs::{Access, OFlags, access, fcntl_getfl};
use rustix::io::Errno;

use super::PATIENCE;
use super::outlet::Outlet;
use crate::session::report::Report;

/// Links that are followed, one after the other: as many as the kernel does.
const MOST_LINKS: usize = 40;
/// Between two looks whether somebody has come to read a pipe.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Where a [`Report`] goes, found to be writable before the run.
#[derive(Debug)]
pub(crate) struct ReportFile {
    /// As it was asked for.
    path: PathBuf,
    place: Place,
}

#[derive(Debug)]
enum Place {
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

impl ReportFile {
    /// Checks that a report can be written to `path`. Leaves nothing behind, and an existing file as it is.
    pub(crate) fn prepare(path: &Path) -> Result<Self, ReportFileError> {
        let write = |source| ReportFileError::Write {
            path: path.to_owned(),
            source,
        };
        let place = match followed(path).map_err(|reason| reason.of(path))? {
            Followed::Descriptor(number) => Place::Open(descriptor(number).map_err(write)?),
            Followed::File(target) => place_of(target, path)?,
        };
        Ok(Self {
            path: path.to_owned(),
            place,
        })
    }

    /// Writes `report`.
    pub(crate) fn write(self, report: &Report) -> Result<(), ReportFileError> {
        let Self { path, place } = self;
        let written = serde_json::to_vec_pretty(report)
            .map_err(io::Error::from)
            .and_then(|mut json| {
                json.push(b'\n');
                place.write(json)
            });
        written.map_err(|source| ReportFileError::Write { path, source })
    }
}

/// What is at the end of all links.
enum Followed {
    /// A path that is no link. There need not be a file.
    File(PathBuf),
    /// A descriptor of this process, by one of its names: `/dev/stdout`, `/dev/fd/3`, `/proc/self/fd/3`.
    Descriptor(RawFd),
}

/// Why links lead nowhere.
enum NoWhere {
    Directory,
    NoDirectory(PathBuf),
    TooManyLinks,
}

impl NoWhere {
    fn of(self, path: &Path) -> ReportFileError {
        let path = path.to_owned();
        match self {
            Self::Directory => ReportFileError::Directory { path },
            Self::NoDirectory(directory) => ReportFileError::NoDirectory { path, directory },
            Self::TooManyLinks => ReportFileError::Write {
                path,
                source: Errno::LOOP.into(),
            },
        }
    }
}

/// Follows links by hand: what a descriptor is open on has a link, too, and need have no path that could be opened.
fn followed(path: &Path) -> Result<Followed, NoWhere> {
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
fn descriptor(number: RawFd) -> io::Result<OwnedFd> {
    // Not by number, for which there is no safe way: every descriptor can be opened by its path, but then has an offset of its own. So
    // the standard streams are had as what they are, and others opened to be appended to.
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

fn place_of(target: PathBuf, asked: &Path) -> Result<Place, ReportFileError> {
    let path = || asked.to_owned();
    let write = |source: io::Error| ReportFileError::Write {
        path: path(),
        source,
    };
    let meta = match fs::metadata(&target) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let directory = directory_of(&target);
            temporary(directory, None).map_err(write)?;
            return Ok(Place::Replaced { target, old: None });
        }
        Err(error) => return Err(write(error)),
    };
    let kind = meta.file_type();
    if kind.is_dir() {
        return Err(ReportFileError::Directory { path: path() });
    }
    if kind.is_block_device() {
        return Err(ReportFileError::BlockDevice { path: path() });
    }
    if kind.is_fifo() {
        access(&target, Access::WRITE_OK).map_err(|errno| write(errno.into()))?;
        return match open_pipe(&target).map_err(write)? {
            Some(open) => Ok(Place::Open(open)),
            None => Ok(Place::Pipe(target)),
        };
    }
    let open = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(&target)
        .map_err(write)?;
    if !kind.is_file() {
        return Ok(Place::Open(open.into()));
    }
    // `vmm --report out > out` is one file, to be written once after the other.
    let streams = (io::stdout(), io::stderr());
    for stream in [streams.0.as_fd(), streams.1.as_fd()] {
        if is_the_file(stream, &meta) {
            return Ok(Place::Open(stream.try_clone_to_owned().map_err(write)?));
        }
    }
    let stays = meta.nlink() > 1 || temporary(directory_of(&target), Some(&meta)).is_err();
    Ok(if stays {
        Place::Kept(target)
    } else {
        Place::Replaced {
            target,
            old: Some(meta),
        }
    })
}

/// Whether `stream` is open on the file that `meta` is of.
fn is_the_file(stream: BorrowedFd<'_>, meta: &Metadata) -> bool {
    rustix::fs::fstat(stream)
        .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (meta.dev(), meta.ino()))
}

fn directory_of(target: &Path) -> &Path {
    target.parent().unwrap_or(Path::new("/"))
}

/// A new file in `directory`, that of the report: on the same file system, so that it can be renamed over it. With owner and mode of `old`.
fn temporary(directory: &Path, old: Option<&Metadata>) -> io::Result<tempfile::NamedTempFile> {
    let file = tempfile::Builder::new()
        .prefix(".report-")
        .suffix(".tmp")
        // What any new file gets; the umask takes its part. Temporary files are private otherwise.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        // The error names a file that nobody asked for.
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

impl Place {
    fn write(self, json: Vec<u8>) -> io::Result<()> {
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

fn replace(target: &Path, old: Option<&Metadata>, json: &[u8]) -> io::Result<()> {
    let mut temporary = temporary(directory_of(target), old)?;
    temporary.write_all(json)?;
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
        // Whoever read it has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, Mode, mkfifoat};

    use super::*;
    use crate::session::report::tests::example;

    #[track_caller]
    fn write(path: &Path) {
        ReportFile::prepare(path)
            .unwrap()
            .write(&example())
            .unwrap();
    }

    #[track_caller]
    fn assert_written(path: &Path) {
        let written: Report = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        assert_eq!(written, example());
    }

    #[test]
    fn a_report_file_is_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        fs::write(&path, "old").unwrap();
        let before = fs::metadata(&path).unwrap().ino();
        let file = ReportFile::prepare(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        file.write(&example()).unwrap();
        assert_written(&path);
        assert_ne!(fs::metadata(&path).unwrap().ino(), before);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_new_file_is_like_any_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        write(&path);
        assert_written(&path);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o600, 0o600);
        assert_eq!(mode & 0o111, 0);
    }

    #[test]
    fn an_old_file_keeps_its_mode_and_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        const SOMEBODY: u32 = 12345;
        // Only root gives files away.
        let is_given = std::os::unix::fs::chown(&path, Some(SOMEBODY), Some(SOMEBODY)).is_ok();
        write(&path);
        assert_written(&path);
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o640);
        if is_given {
            assert_eq!((meta.uid(), meta.gid()), (SOMEBODY, SOMEBODY));
        }
    }

    #[test]
    fn a_link_to_a_report_file_stays_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        fs::write(at("old"), "old").unwrap();
        for target in ["old", "new"] {
            let link = at("link");
            // Relative to where the link is.
            symlink(target, &link).unwrap();
            write(&link);
            assert!(
                fs::symlink_metadata(&link).unwrap().is_symlink(),
                "{target}"
            );
            assert_written(&at(target));
            fs::remove_file(&link).unwrap();
        }
        symlink("ring", at("ring")).unwrap();
        let error = ReportFile::prepare(&at("ring")).unwrap_err();
        assert!(matches!(error, ReportFileError::Write { .. }), "{error:?}");
    }

    #[test]
    fn every_name_of_a_file_has_the_report() {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| directory.path().join(name));
        fs::write(&one, "old".repeat(10_000)).unwrap();
        fs::hard_link(&one, &other).unwrap();
        write(&one);
        assert_written(&one);
        assert_written(&other);
    }

    #[test]
    fn a_device_is_written_to_and_not_replaced() {
        let file = ReportFile::prepare(Path::new("/dev/null")).unwrap();
        assert!(matches!(file.place, Place::Open(_)));
        file.write(&example()).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn what_a_descriptor_is_open_on_is_added_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        let open = File::create(&path).unwrap();
        (&open).write_all(b"first\n").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&open);
        for name in ["/dev/fd", "/proc/self/fd"] {
            write(&Path::new(name).join(number.to_string()));
        }
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("first\n{"), "{text}");
        assert_eq!(text.matches("\"verdict\"").count(), 2);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let read_only = File::open(&path).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&read_only);
        // Opened anew, so what it was opened for does not matter, but what the file allows.
        write(&Path::new("/dev/fd").join(number.to_string()));
    }

    #[test]
    fn a_pipe_is_written_to_whoever_comes_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        mkfifoat(CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        let reader = |path: PathBuf| {
            thread::spawn(move || {
                let mut text = String::new();
                File::open(path).unwrap().read_to_string(&mut text).unwrap();
                text
            })
        };
        let file = ReportFile::prepare(&path).unwrap();
        assert!(matches!(file.place, Place::Pipe(_)), "{file:?}");
        let read = reader(path.clone());
        file.write(&example()).unwrap();
        let text = read.join().unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), example());
        assert!(fs::metadata(&path).unwrap().file_type().is_fifo());

        // Opened for both, so that opening waits for nobody.
        let both = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let file = ReportFile::prepare(&path).unwrap();
        assert!(matches!(file.place, Place::Open(_)), "{file:?}");
        file.write(&example()).unwrap();
        drop(both);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_found_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let error = ReportFile::prepare(directory.path()).unwrap_err();
        assert!(matches!(error, ReportFileError::Directory { .. }));
        let error = ReportFile::prepare(&directory.path().join("no/such/file")).unwrap_err();
        assert!(error.to_string().ends_with("/no/such"), "{error}");
        let error = ReportFile::prepare(Path::new("/proc/report.json")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--report /proc/report.json: cannot write"
        );
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(!cause.contains(".report-"), "{cause}");
        for path in ["", "/", ".."] {
            let error = ReportFile::prepare(Path::new(path)).unwrap_err();
            assert!(
                matches!(error, ReportFileError::Directory { .. }),
                "{path:?} {error:?}"
            );
        }
    }
}
