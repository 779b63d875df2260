//! The file system a host starts with, and all it has: tools, modules, our programs with their
//! libraries, and what to run.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::NamedTempFile;

use super::cpio::Archive;
use super::host::Host;
use super::libraries;
use super::modules::Module;
use super::task::Task;

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitramfsError {
    #[error("{}: cannot read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: cannot write", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// A file system in the making.
#[derive(Debug, Default)]
pub(crate) struct Initramfs {
    archive: Archive,
}

impl Initramfs {
    /// One with the tools in it.
    pub(crate) fn new(busybox: &Path) -> Result<Self, InitramfsError> {
        let mut made = Self::default();
        for folder in ["proc", "sys", "dev", "root"] {
            made.archive.folder(folder);
        }
        made.archive.program("/bin/busybox", read(busybox)?);
        made.archive
            .program("/init", include_str!("inside/init.sh"));
        Ok(made)
    }

    /// Adds the file at `from` as `to`, with the libraries it needs if it is a program.
    pub(crate) fn file(&mut self, from: &Path, to: &str) -> Result<(), InitramfsError> {
        for library in libraries::of(from) {
            let name = library.to_string_lossy();
            if !self.archive.contains(&name) {
                self.archive.program(&name, read(&library)?);
            }
        }
        self.archive.program(to, without_symbols(from)?);
        Ok(())
    }

    /// Makes `link` another name for `target`.
    pub(crate) fn link(&mut self, link: &str, target: &str) {
        self.archive.link(link, target);
    }

    /// Adds what `init.sh` must know of `host`: the modules to load, and what the last of them is told.
    pub(crate) fn settings(&mut self, modules: &[Module], host: &Host) {
        let names = Vec::from_iter(modules.iter().map(|module| module.name.as_str()));
        let last = names.last().copied().unwrap_or_default();
        let settings = format!(
            "MODULES={}\nLAST={}\nPARAMETER={}\nPADDED={}\n",
            quoted(&names.join(" ")),
            quoted(last),
            quoted(host.parameter),
            u8::from(host.processor.is_padded())
        );
        self.archive.program("/settings.sh", settings);
    }

    /// Adds `modules`.
    pub(crate) fn modules(&mut self, modules: Vec<Module>) {
        for module in modules {
            let path = format!("/modules/{}.ko", module.name);
            self.archive.program(&path, module.code);
        }
    }

    /// Adds what is to be run.
    pub(crate) fn tasks(&mut self, tasks: &[Task]) {
        self.archive.program("/tasks.sh", script(tasks));
    }

    /// Writes it to `path`.
    pub(crate) fn write(&self, path: &Path) -> Result<(), InitramfsError> {
        File::create(path)
            .and_then(|file| self.archive.write(BufWriter::new(file)))
            .map_err(|source| InitramfsError::Write {
                path: path.to_owned(),
                source,
            })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    fs::read(path).map_err(|source| InitramfsError::Read {
        path: path.to_owned(),
        source,
    })
}

/// The file at `path`, without what only a debugger reads: a host has it all in memory.
fn without_symbols(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    let stripped = || -> Option<Vec<u8>> {
        let file = NamedTempFile::new().ok()?;
        let mut strip = Command::new("strip");
        strip
            .arg("--strip-debug")
            .arg("-o")
            .arg(file.path())
            .arg(path);
        strip.stdin(Stdio::null()).stderr(Stdio::null());
        strip.status().ok()?.success().then_some(())?;
        fs::read(file.path()).ok()
    };
    // A file that is no program, or a machine without the tool: the file is taken as it is.
    stripped().map_or_else(|| read(path), Ok)
}

/// The tasks as `init.sh` runs them.
fn script(tasks: &[Task]) -> String {
    let mut script = String::new();
    for (number, task) in tasks.iter().enumerate() {
        let limit = task.limit.as_secs();
        script.push_str(&format!("run {number} {limit}"));
        for word in &task.command {
            script.push(' ');
            script.push_str(&quoted(word));
        }
        script.push('\n');
    }
    script
}

/// `word` as a shell takes it for one word, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn words_stay_words() {
        let script = script(
            &[
                ["vmm", "--seed", "1"].as_slice(),
                &["sh", "-c", "echo 'a  b' $HOME; exit 4"],
            ]
            .map(|command| {
                Task::given(
                    &command
                        .iter()
                        .map(|&word| word.to_owned())
                        .collect::<Vec<_>>(),
                )
            }),
        );
        assert_eq!(
            script,
            "run 0 180 'vmm' '--seed' '1'\nrun 1 180 'sh' '-c' 'echo '\\''a  b'\\'' $HOME; exit 4'\n"
        );
    }

    #[test]
    fn a_program_comes_with_its_libraries() {
        let mut made = Initramfs::default();
        made.file(&env::current_exe().unwrap(), "/bin/test")
            .unwrap();
        assert!(made.archive.contains("/bin/test"));
        assert!(made.archive.contains("/lib64/ld-linux-x86-64.so.2"));
        let missing = made.file(Path::new("/nowhere"), "/x").unwrap_err();
        assert!(missing.to_string().contains("/nowhere"));
    }
}
