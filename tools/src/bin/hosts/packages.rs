//! What hosts are made of: Debian packages, downloaded and unpacked in a folder of the user's
//! cache, each set of them once.
//!
//! A set is unpacked beside its place and then renamed into it, so a folder that is there is whole, whatever
//! became of an earlier attempt. To have one fetched anew, remove its folder.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use super::apt::{self, Apt, AptError, Origin};
use super::say;

/// Packages that are fetched together.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Set {
    /// What its folder is called.
    pub(crate) name: &'static str,
    content: Content,
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    /// Packages with programs that run here, and the libraries these need.
    Programs {
        packages: &'static [&'static str],
        /// An installed program that does as well as the package.
        programs: &'static [&'static str],
    },
    /// A kernel and its modules.
    Kernel {
        version: &'static str,
        origin: Origin,
    },
}

pub(crate) const QEMU: Set = Set {
    name: "qemu",
    content: Content::Programs {
        packages: &["qemu-system-x86", "qemu-system-data", "seabios"],
        programs: &["qemu-system-x86_64"],
    },
};

pub(crate) const BOCHS: Set = Set {
    name: "bochs",
    content: Content::Programs {
        packages: &["bochs", "bochs-term", "bochsbios", "vgabios"],
        programs: &[],
    },
};

pub(crate) const GRUB: Set = Set {
    name: "grub",
    content: Content::Programs {
        packages: &["grub-common", "grub-pc-bin", "xorriso"],
        programs: &[],
    },
};

pub(crate) const BUSYBOX: Set = Set {
    name: "busybox",
    content: Content::Programs {
        packages: &["busybox-static"],
        programs: &[],
    },
};

pub(crate) const LINUX_6_1: Set = Set {
    name: "linux-6.1",
    content: Content::Kernel {
        version: "6.1",
        origin: Origin::Machine,
    },
};

pub(crate) const LINUX_6_12: Set = Set {
    name: "linux-6.12",
    content: Content::Kernel {
        version: "6.12",
        origin: Origin::Backports,
    },
};

/// The metapackage that depends on the newest kernel.
const NEWEST_KERNEL: &str = "linux-image-amd64";

/// Why packages cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackageError {
    #[error("no folder to keep packages in: set XDG_CACHE_HOME or HOME")]
    NoCache,
    #[error("{}: cannot keep packages there", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("cannot fetch {set}")]
    Apt { set: &'static str, source: AptError },
    #[error(
        "this machine's sources have {found} as the newest kernel, and this host is of Linux {version}: \
         unpack such a package of Debian's in {}",
        folder.display()
    )]
    OtherKernel {
        version: &'static str,
        found: String,
        folder: PathBuf,
    },
    #[error("{}", without_apt(set, folder))]
    NoApt { set: &'static Set, folder: PathBuf },
    #[error("{name} is not among what was unpacked in {}: remove that folder", root.display())]
    Incomplete { name: String, root: PathBuf },
}

/// What a person can do on a machine that has no apt.
fn without_apt(set: &Set, folder: &Path) -> String {
    let folder = folder.display();
    let packages = set.described();
    let unpack = format!("unpack Debian 12's {packages} in {folder} (ar x, tar xf data.tar.xz)");
    match &set.content {
        Content::Programs { programs, .. } if !programs.is_empty() => {
            format!(
                "no apt-get to fetch {} with: install {}, or {unpack}",
                set.name,
                programs.join(", ")
            )
        }
        _ => format!("no apt-get to fetch {} with: {unpack}", set.name),
    }
}

impl Set {
    /// Its packages, for people, as far as they are known before apt is asked.
    fn described(&self) -> String {
        match &self.content {
            Content::Programs { packages, .. } => packages.join(", "),
            Content::Kernel { version, .. } => format!("linux-image-{version}.*-amd64"),
        }
    }
}

/// Where packages are kept.
#[derive(Debug)]
pub(crate) struct Store {
    folder: PathBuf,
    apt: Option<Apt>,
}

/// A set that is downloaded and unpacked.
#[derive(Clone, Debug)]
pub(crate) struct Unpacked {
    /// What would be `/`, had it been installed.
    root: PathBuf,
}

impl Store {
    /// The store of this user.
    pub(crate) fn open() -> Result<Self, PackageError> {
        let folder = cache_folder(|name| env::var_os(name).map(PathBuf::from))
            .ok_or(PackageError::NoCache)?;
        let apt = Apt::find(folder.join("apt"));
        Ok(Self { folder, apt })
    }

    /// `set`, fetched first if need be.
    pub(crate) fn get(&self, set: &'static Set) -> Result<Unpacked, PackageError> {
        let place = self.folder.join(set.name);
        if place.is_dir() {
            return Ok(Unpacked { root: place });
        }
        let failed = |source| PackageError::Folder {
            path: self.folder.clone(),
            source,
        };
        if let (None, Content::Programs { programs, .. }) = (&self.apt, &set.content)
            && !programs.is_empty()
            && programs.iter().all(|name| on_path(name))
        {
            // Programs that are installed find their own libraries and files.
            return Ok(Unpacked { root: "/".into() });
        }
        let Some(apt) = &self.apt else {
            return Err(PackageError::NoApt { set, folder: place });
        };
        fs::create_dir_all(&self.folder).map_err(failed)?;
        let lock = File::create(self.folder.join("lock")).map_err(failed)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            say("waiting for another fetch to end");
            flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
        }
        // Somebody else may have fetched it while this waited.
        if !place.is_dir() {
            fill(&place, |part| fetch(apt, set, part, &place), failed)?;
        }
        Ok(Unpacked { root: place })
    }
}

/// Makes the folder `place` of what `make` puts into an empty one, all of it or nothing.
/// Only with the store's lock.
fn fill(
    place: &Path,
    make: impl FnOnce(&Path) -> Result<(), PackageError>,
    failed: impl Fn(io::Error) -> PackageError,
) -> Result<(), PackageError> {
    let part = beside(place);
    match fs::remove_dir_all(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    fs::create_dir(&part).map_err(&failed)?;
    make(&part)?;
    fs::rename(&part, place).map_err(failed)
}

/// Where what will be `place` is made. (`with_extension` would take the 1 of `linux-6.1` for one.)
fn beside(place: &Path) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

fn fetch(apt: &Apt, set: &'static Set, root: &Path, place: &Path) -> Result<(), PackageError> {
    let failed = |source| PackageError::Apt {
        set: set.name,
        source,
    };
    let origin = match set.content {
        Content::Programs { .. } => Origin::Machine,
        Content::Kernel { origin, .. } => origin,
    };
    say(&format!(
        "fetching {}: Debian's {}, by apt-get download. It is unpacked in {}, not installed",
        set.name,
        set.described(),
        place.display()
    ));
    apt.update(origin).map_err(failed)?;
    let packages = match set.content {
        Content::Programs { packages, .. } => {
            let mut all = apt.lacking(packages).map_err(failed)?;
            all.extend(packages.iter().map(|&name| name.to_owned()));
            all
        }
        Content::Kernel { version, .. } => {
            let newest = apt.dependencies(origin, NEWEST_KERNEL).map_err(failed)?;
            let found = newest.into_iter().next().unwrap_or_default();
            if !is_kernel(&found, version) {
                return Err(PackageError::OtherKernel {
                    version,
                    found,
                    folder: place.to_owned(),
                });
            }
            vec![found]
        }
    };
    let folder = |source| PackageError::Folder {
        path: root.to_owned(),
        source,
    };
    let files = root.join("packages");
    fs::create_dir(&files).map_err(folder)?;
    apt.download(origin, &packages, &files).map_err(failed)?;
    for file in fs::read_dir(&files).map_err(folder)? {
        apt::unpack(&file.map_err(folder)?.path(), root).map_err(failed)?;
    }
    fs::remove_dir_all(&files).map_err(folder)
}

/// Whether `package` is a kernel of `version`, such as `6.1`.
fn is_kernel(package: &str, version: &str) -> bool {
    package
        .strip_prefix("linux-image-")
        .and_then(|rest| rest.strip_prefix(version))
        .is_some_and(|rest| rest.starts_with('.'))
}

impl Unpacked {
    /// The file or folder `name`, which is absolute as if this were installed.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf, PackageError> {
        let path = self.root.join(name.trim_start_matches('/'));
        if path.exists() {
            Ok(path)
        } else {
            Err(self.incomplete(name))
        }
    }

    /// The one file or folder of the folder `parent` whose name begins with `prefix`.
    pub(crate) fn find(&self, parent: &str, prefix: &str) -> Result<PathBuf, PackageError> {
        let entries = fs::read_dir(self.root.join(parent.trim_start_matches('/')));
        entries
            .into_iter()
            .flatten()
            .flatten()
            .find(|entry| {
                entry
                    .file_name()
                    .as_encoded_bytes()
                    .starts_with(prefix.as_bytes())
            })
            .map(|entry| entry.path())
            .ok_or_else(|| self.incomplete(&format!("{parent}/{prefix}*")))
    }

    /// Adds the libraries that are among these packages to what `command` finds.
    pub(crate) fn with_libraries(&self, command: &mut Command) {
        if self.root != Path::new("/") {
            let folders = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
            let folders = folders.map(|folder| self.root.join(folder));
            if let Ok(folders) = env::join_paths(folders) {
                command.env("LD_LIBRARY_PATH", folders);
            }
        }
    }

    fn incomplete(&self, name: &str) -> PackageError {
        PackageError::Incomplete {
            name: name.to_owned(),
            root: self.root.clone(),
        }
    }
}

/// Where packages are kept, by the environment.
fn cache_folder(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    // A relative path is to be ignored: XDG Base Directory Specification.
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let cache = variable("XDG_CACHE_HOME")
        .and_then(absolute)
        .or_else(|| Some(variable("HOME").and_then(absolute)?.join(".cache")))?;
    Some(cache.join("palimpsest/hosts"))
}

/// Whether there is a program called `name`.
fn on_path(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(OsStr::new(name)).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_kept_in_the_users_cache() {
        let folder = |set: &[(&str, &str)]| {
            cache_folder(|name| {
                let found = set.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| PathBuf::from(value))
            })
        };
        let both = [("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(folder(&both), Some("/x/palimpsest/hosts".into()));
        let home = Some("/h/.cache/palimpsest/hosts".into());
        assert_eq!(folder(&both[1..]), home);
        assert_eq!(folder(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]), home);
        assert_eq!(folder(&[]), None);
    }

    fn broken(source: io::Error) -> PackageError {
        PackageError::Folder {
            path: PathBuf::new(),
            source,
        }
    }

    #[test]
    fn a_fetch_that_fails_half_way_leaves_nothing_that_looks_whole() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("linux-6.1");
        let half = |part: &Path| {
            fs::write(part.join("half"), "").unwrap();
            Err(PackageError::NoCache)
        };
        fill(&place, half, broken).unwrap_err();
        assert!(!place.exists());

        // The next attempt begins with nothing of the last one.
        let whole = |part: &Path| {
            fs::write(part.join("whole"), "").unwrap();
            Ok(())
        };
        fill(&place, whole, broken).unwrap();
        let names = fs::read_dir(&place).unwrap();
        let names = Vec::from_iter(names.map(|entry| entry.unwrap().file_name()));
        assert_eq!(names, ["whole"]);
    }

    #[test]
    fn what_is_there_is_not_fetched_again() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(LINUX_6_1.name)).unwrap();
        let store = Store {
            folder: folder.path().to_owned(),
            apt: None,
        };
        let unpacked = store.get(&LINUX_6_1).unwrap();
        assert_eq!(unpacked.root, folder.path().join(LINUX_6_1.name));
        let missing = unpacked.find("/boot", "vmlinuz-").unwrap_err().to_string();
        assert!(missing.contains("/boot/vmlinuz-*"), "{missing}");
        assert!(missing.contains("remove that folder"), "{missing}");
    }

    #[test]
    fn without_apt_it_says_what_to_unpack_where() {
        let store = Store {
            folder: "/cache/hosts".into(),
            apt: None,
        };
        let refusal = store.get(&LINUX_6_12).unwrap_err().to_string();
        assert!(refusal.contains("no apt-get"), "{refusal}");
        assert!(refusal.contains("linux-image-6.12."), "{refusal}");
        assert!(refusal.contains("/cache/hosts/linux-6.12"), "{refusal}");
        let refusal = without_apt(&QEMU, Path::new("/cache/hosts/qemu"));
        assert!(
            refusal.contains("install qemu-system-x86_64, or"),
            "{refusal}"
        );
    }

    #[test]
    fn a_kernel_is_one_of_its_version_and_no_other() {
        assert!(is_kernel("linux-image-6.1.0-50-amd64", "6.1"));
        assert!(is_kernel("linux-image-6.12.95+deb12-amd64", "6.12"));
        assert!(!is_kernel("linux-image-6.12.95+deb12-amd64", "6.1"));
        assert!(!is_kernel("linux-image-6.1.0-50-amd64", "6.12"));
        assert!(!is_kernel("", "6.1"));
    }
}
