//! Where a file goes that is asked for on the command line, by `--report` or `--trace`.
//!
//! A regular file is replaced in one step, so that whoever reads the path sees the old one or the whole new
//! one; it keeps its owner and its mode. Everything else is written to where it is: pipes, terminals, what a
//! descriptor of this program is open on, and files with several names, of which only one would be replaced.
//! That it can be done is found out before the run.
//!
//! | file | concept |
//! |---|---|
//! | `link` | what a path leads to |
//! | `place` | how what is there is written |
//! | `error` | why it cannot be |

mod error;
mod link;
mod place;

use std::io;
use std::path::Path;

use serde::Serialize;

pub(crate) use self::error::{Asked, OutputFileError};
use self::link::{Followed, descriptor, followed};
use self::place::Place;

/// Where a file goes, found to be writable before the run.
#[derive(Debug)]
pub(crate) struct OutputFile {
    asked: Asked,
    place: Place,
}

impl OutputFile {
    /// Checks that `path`, which `flag` has asked for, can be written to. Leaves nothing behind, and an
    /// existing file as it is.
    pub(crate) fn prepare(flag: &'static str, path: &Path) -> Result<Self, OutputFileError> {
        let path = path.to_owned();
        let asked = Asked { flag, path };
        let place = match followed(&asked.path).map_err(|reason| reason.of(&asked))? {
            Followed::Descriptor(number) => {
                let open = descriptor(number).map_err(|source| OutputFileError::Write {
                    asked: asked.clone(),
                    source,
                });
                Place::Open(open?)
            }
            Followed::File(target) => Place::of(target, &asked)?,
        };
        Ok(Self { asked, place })
    }

    /// Checks that this is not `other`'s file: the second to be written would be all that is left of both.
    pub(crate) fn is_not(&self, other: &Self) -> Result<(), OutputFileError> {
        if self.place.is_file_of(&other.place) {
            return Err(OutputFileError::Same {
                asked: self.asked.clone(),
                other: other.asked.clone(),
            });
        }
        Ok(())
    }

    /// Writes `content` as JSON.
    pub(crate) fn write(self, content: &impl Serialize) -> Result<(), OutputFileError> {
        self.write_json(serde_json::to_vec_pretty(content))
    }

    /// Writes what is JSON already.
    pub(crate) fn write_json(
        self,
        json: serde_json::Result<Vec<u8>>,
    ) -> Result<(), OutputFileError> {
        let Self { asked, place } = self;
        let written = json.map_err(io::Error::from).and_then(|mut json| {
            json.push(b'\n');
            place.write(json)
        });
        written.map_err(|source| OutputFileError::Write { asked, source })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions, Permissions};
    use std::io::{Read, Write};
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;
    use std::thread;

    use rustix::fs::{CWD, Mode, mkfifoat};

    use super::*;
    use crate::session::report::Report;
    use crate::session::report::tests::example;

    fn prepare(path: &Path) -> Result<OutputFile, OutputFileError> {
        OutputFile::prepare("--report", path)
    }

    #[track_caller]
    fn write(path: &Path) {
        prepare(path).unwrap().write(&example()).unwrap();
    }

    #[track_caller]
    fn assert_written(path: &Path) {
        let written: Report = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        assert_eq!(written, example());
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        fs::write(&path, "old").unwrap();
        let before = fs::metadata(&path).unwrap().ino();
        let file = prepare(&path).unwrap();
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
    fn a_link_to_a_file_stays_a_link() {
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
        let error = prepare(&at("ring")).unwrap_err();
        assert!(matches!(error, OutputFileError::Write { .. }), "{error:?}");
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
        let file = prepare(Path::new("/dev/null")).unwrap();
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
        let file = prepare(&path).unwrap();
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
        let file = prepare(&path).unwrap();
        assert!(matches!(file.place, Place::Open(_)), "{file:?}");
        file.write(&example()).unwrap();
        drop(both);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_found_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let error = prepare(directory.path()).unwrap_err();
        assert!(matches!(error, OutputFileError::Directory { .. }));
        let error = prepare(&directory.path().join("no/such/file")).unwrap_err();
        assert!(error.to_string().ends_with("/no/such"), "{error}");
        let error = prepare(Path::new("/proc/report.json")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--report /proc/report.json: cannot write"
        );
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(!cause.contains(".vmm-"), "{cause}");
        for path in ["", "/", ".."] {
            let error = prepare(Path::new(path)).unwrap_err();
            assert!(
                matches!(error, OutputFileError::Directory { .. }),
                "{path:?} {error:?}"
            );
        }
    }
}
