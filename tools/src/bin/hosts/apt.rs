//! Packages, by `apt-get`, without installing any and without being root: apt gets
//! lists and a cache of its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// Apt, with a folder for what it must remember.
#[derive(Debug)]
pub(crate) struct Apt {
    folder: PathBuf,
}

/// Where a package is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The sources this machine has.
    Machine,
    /// The backports of its release, from the same server.
    Backports,
}

/// Why there is no package.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AptError {
    #[error("cannot run {program}")]
    Start {
        program: &'static str,
        source: io::Error,
    },
    #[error("{program} {what} ended with {status}:\n{said}")]
    Failed {
        program: &'static str,
        what: String,
        status: ExitStatus,
        said: String,
    },
    #[error("{}: cannot write", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "apt has no source for {release:?} in its configuration: backports come from the same server"
    )]
    NoSource { release: String },
}

impl Apt {
    /// The apt of this machine, or nothing if there is none.
    pub(crate) fn find(folder: PathBuf) -> Option<Self> {
        let mut apt = Command::new("apt-get");
        apt.arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let runs = apt.status().is_ok_and(|status| status.success());
        runs.then_some(Self { folder })
    }

    /// Fetches the lists of what `origin` has.
    pub(crate) fn update(&self, origin: Origin) -> Result<(), AptError> {
        let folder = self.state(origin);
        for folder in ["lists/partial", "cache/archives/partial"].map(|name| folder.join(name)) {
            make_folder(&folder)?;
        }
        if origin == Origin::Backports {
            let path = folder.join("backports.sources");
            let sources = self.backports()?;
            fs::write(&path, sources).map_err(|source| AptError::Write { path, source })?;
        }
        output(self.apt_get(origin).args(["-q", "update"]), "apt-get").map(drop)
    }

    /// All that must be there, and is not, for `packages` to work; themselves not among them.
    pub(crate) fn lacking(&self, packages: &[&str]) -> Result<Vec<String>, AptError> {
        let mut command = self.apt_get(Origin::Machine);
        command.args(["--simulate", "--no-install-recommends", "install"]);
        let said = output(command.args(packages), "apt-get")?;
        let mut names = to_install(&said);
        names.retain(|name| !packages.contains(&name.as_str()));
        Ok(names)
    }

    /// What `package` depends on.
    pub(crate) fn dependencies(
        &self,
        origin: Origin,
        package: &str,
    ) -> Result<Vec<String>, AptError> {
        let mut command = self.command("apt-cache", origin);
        let said = output(command.args(["depends", package]), "apt-cache")?;
        Ok(depended_on(&said))
    }

    /// Downloads `packages` into `folder`, a file each.
    pub(crate) fn download(
        &self,
        origin: Origin,
        packages: &[String],
        folder: &Path,
    ) -> Result<(), AptError> {
        let mut command = self.apt_get(origin);
        command.args(["-q", "download"]).args(packages);
        output(command.current_dir(folder), "apt-get").map(drop)
    }

    fn state(&self, origin: Origin) -> PathBuf {
        self.folder.join(match origin {
            Origin::Machine => "machine",
            Origin::Backports => "backports",
        })
    }

    fn apt_get(&self, origin: Origin) -> Command {
        self.command("apt-get", origin)
    }

    fn command(&self, program: &str, origin: Origin) -> Command {
        let mut command = Command::new(program);
        let folder = self.state(origin);
        // What is parsed is not to be translated.
        command.env("LC_ALL", "C");
        let set = |command: &mut Command, name: &str, value: &Path| {
            command.arg("-o").arg(format!("{name}={}", value.display()));
        };
        set(&mut command, "Dir::State::lists", &folder.join("lists"));
        set(&mut command, "Dir::Cache", &folder.join("cache"));
        // Its own user may not look into a home.
        set(&mut command, "APT::Sandbox::User", Path::new("root"));
        if origin == Origin::Backports {
            let sources = folder.join("backports.sources");
            set(&mut command, "Dir::Etc::sourcelist", &sources);
            set(&mut command, "Dir::Etc::sourceparts", Path::new("-"));
        }
        command
    }

    /// A source of backports: the one that this machine has of its release, with another suite.
    fn backports(&self) -> Result<String, AptError> {
        let release = fs::read_to_string("/etc/os-release")
            .ok()
            .and_then(|text| code_name(&text))
            .unwrap_or_default();
        let mut command = self.apt_get(Origin::Machine);
        command.args(["indextargets", "--format", "$(RELEASE) $(REPO_URI)"]);
        let said = output(&mut command, "apt-get")?;
        let server = said.lines().find_map(|line| {
            let (name, server) = line.split_once(' ')?;
            (name == release).then_some(server)
        });
        let Some(server) = server else {
            return Err(AptError::NoSource { release });
        };
        let mut source =
            format!("Types: deb\nURIs: {server}\nSuites: {release}-backports\nComponents: main\n");
        // Sources that name a key of their own do not have it among those that are trusted everywhere.
        let key = "/usr/share/keyrings/debian-archive-keyring.gpg";
        if Path::new(key).exists() {
            source.push_str(&format!("Signed-By: {key}\n"));
        }
        Ok(source)
    }
}

/// Unpacks the package in `file` into `root`.
pub(crate) fn unpack(file: &Path, root: &Path) -> Result<(), AptError> {
    let mut command = Command::new("dpkg");
    output(command.arg("--extract").arg(file).arg(root), "dpkg").map(drop)
}

fn make_folder(path: &Path) -> Result<(), AptError> {
    fs::create_dir_all(path).map_err(|source| AptError::Write {
        path: path.to_owned(),
        source,
    })
}

/// What `command` prints, if it ends well.
fn output(command: &mut Command, program: &'static str) -> Result<String, AptError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| AptError::Start { program, source })?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let what = command.get_args().last().unwrap_or_default();
    let mut said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if said.is_empty() {
        said = printed.trim().to_owned();
    }
    Err(AptError::Failed {
        program,
        what: what.to_string_lossy().into_owned(),
        status: output.status,
        said,
    })
}

/// The packages that a simulated installation says it would install.
fn to_install(said: &str) -> Vec<String> {
    said.lines()
        .filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next())
        .map(str::to_owned)
        .collect()
}

/// The packages that `apt-cache depends` names.
fn depended_on(said: &str) -> Vec<String> {
    said.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .collect()
}

/// The code name of a Debian release, from its `/etc/os-release`.
fn code_name(os_release: &str) -> Option<String> {
    let value = |key: &str| {
        let mut lines = os_release.lines();
        let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(value.trim_matches('"').to_owned())
    };
    (value("ID")? == "debian")
        .then(|| value("VERSION_CODENAME"))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_installed_is_read_from_a_simulation() {
        let said = "Reading package lists...\n\
            Inst libfdt1 (1.6.1-4+b1 Debian:12.15/oldstable [amd64])\n\
            Inst seabios (1.16.2-1 Debian:12.15/oldstable [all])\n\
            Conf libfdt1 (1.6.1-4+b1 Debian:12.15/oldstable [amd64])\n";
        assert_eq!(to_install(said), ["libfdt1", "seabios"]);
        assert_eq!(
            to_install("qemu-system-x86 is already the newest version\n").len(),
            0
        );
    }

    #[test]
    fn dependencies_are_read_and_nothing_else_is() {
        let said = "linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64\n  Recommends: x\n";
        assert_eq!(depended_on(said), ["linux-image-6.1.0-9-amd64"]);
    }

    #[test]
    fn only_debian_has_a_code_name_here() {
        let debian = "ID=debian\nVERSION_CODENAME=bookworm\n";
        assert_eq!(code_name(debian).as_deref(), Some("bookworm"));
        let quoted = "VERSION_CODENAME=\"bookworm\"\nID=\"debian\"\n";
        assert_eq!(code_name(quoted).as_deref(), Some("bookworm"));
        assert_eq!(code_name("ID=fedora\nVERSION_CODENAME=x\n"), None);
        assert_eq!(code_name("ID=debian\n"), None);
    }
}
