//! One host, from nothing to the results of its tasks.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::emulator::{EmulatorError, Machine};
use super::host::Host;
use super::initramfs::{Initramfs, InitramfsError};
use super::modules::{self, ModuleError};
use super::packages::{self, PackageError, Store};
use super::programs::Programs;
use super::results::Event;
use super::task::Task;
use super::watch::{self, Limits, WatchError};

/// A file to bring along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extra {
    /// Path on this machine.
    pub(crate) from: PathBuf,
    /// Its absolute path in the host.
    pub(crate) to: String,
}

/// Why a host could not be made, or did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Module(#[from] ModuleError),
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    #[error(transparent)]
    Emulator(#[from] EmulatorError),
    #[error("cannot make a folder for the host's files")]
    Folder(#[source] io::Error),
    #[error("interrupted")]
    Interrupted,
    #[error("{trouble}; its files are in {}{}", folder.display(), listed(last))]
    Watch {
        trouble: WatchError,
        folder: PathBuf,
        /// The last of what emulator and kernel have said.
        last: Vec<String>,
    },
}

fn listed(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  | {line}")).collect()
}

/// A host to be booted, and what it is to do.
#[derive(Debug)]
pub(crate) struct Visit<'a> {
    pub(crate) host: &'static Host,
    pub(crate) store: &'a Store,
    pub(crate) programs: &'a Programs,
    pub(crate) extras: &'a [Extra],
    pub(crate) tasks: Vec<Task>,
}

/// How a task went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// Its number.
    pub(crate) task: usize,
    pub(crate) code: i32,
    /// By the host's clock.
    pub(crate) took: Duration,
    pub(crate) output: Vec<String>,
}

/// What a host was to do, and has done.
#[derive(Debug)]
pub(crate) struct HostRun {
    pub(crate) host: &'static Host,
    pub(crate) tasks: Vec<Task>,
    /// Its kernel and processor, as it says itself.
    pub(crate) about: String,
    /// The tasks that came to an end.
    pub(crate) done: Vec<Done>,
    /// By the clock on the wall, from making its file system until it was off.
    pub(crate) took: Duration,
    /// Why some tasks did not come to an end, if so.
    pub(crate) trouble: Option<BootError>,
}

/// Who wants to know how it goes.
pub(crate) trait Listener {
    /// A task prints a line.
    fn line(&mut self, line: &str);
    /// A task has ended.
    fn done(&mut self, task: &Task, done: &Done);
}

impl HostRun {
    /// That of a host that has done nothing yet.
    pub(crate) fn new(host: &'static Host, tasks: Vec<Task>) -> Self {
        Self {
            host,
            tasks,
            about: String::new(),
            done: Vec::new(),
            took: Duration::ZERO,
            trouble: None,
        }
    }

    /// The task that `done` is about.
    pub(crate) fn task(&self, done: &Done) -> &Task {
        &self.tasks[done.task]
    }

    /// The tasks that came to the end that is right.
    pub(crate) fn right(&self) -> impl Iterator<Item = &Done> {
        let is_right = |done: &&Done| done.code == self.task(done).expected;
        self.done.iter().filter(is_right)
    }

    /// Whether every task came to the end that is right, and so did the host.
    pub(crate) fn is_right(&self) -> bool {
        self.trouble.is_none() && self.right().count() == self.tasks.len()
    }
}

impl Visit<'_> {
    /// Boots the host, runs the tasks there, and waits for its end.
    pub(crate) fn run(self, stop: &AtomicBool, listener: &mut dyn Listener) -> HostRun {
        let started = Instant::now();
        let prepared = self.prepare();
        let mut run = HostRun::new(self.host, self.tasks);
        run.trouble = match prepared {
            Ok(prepared) => prepared.run(&mut run, stop, listener).err(),
            Err(error) => Some(error),
        };
        run.took = started.elapsed();
        run
    }

    fn prepare(&self) -> Result<Prepared, BootError> {
        let Self { host, store, .. } = *self;
        // All that must be fetched is fetched before anything is made.
        for set in host.processor.emulator() {
            store.get(set)?;
        }
        let busybox = store.get(&packages::BUSYBOX)?.path("/bin/busybox")?;
        let kernel = store.get(host.kernel)?;
        let folder = tempfile::Builder::new()
            .prefix("palimpsest-host-")
            .tempdir()
            .map_err(BootError::Folder)?;
        let machine = Machine {
            processor: host.processor,
            folder: folder.path().to_owned(),
            kernel: kernel.find("/boot", "vmlinuz-")?,
        };

        let mut files = Initramfs::new(&busybox)?;
        let modules = modules::load_order(&kernel, &busybox, host.processor.module())?;
        files.settings(&modules, host);
        files.modules(modules);
        files.file(&self.programs.vmm, "/bin/vmm")?;
        // Tests have its path built in.
        files.link(&self.programs.vmm.to_string_lossy(), "/bin/vmm");
        for (name, path) in &self.programs.tests {
            files.file(path, &format!("/tests/{name}"))?;
        }
        for extra in self.extras {
            files.file(&extra.from, &extra.to)?;
        }
        files.tasks(&self.tasks);
        files.write(&machine.initramfs())?;

        Ok(Prepared {
            command: machine.command(store)?,
            limits: self.limits(),
            machine,
            folder,
        })
    }

    fn limits(&self) -> Limits {
        const BETWEEN: Duration = Duration::from_secs(60);
        let slowness = self.host.processor.slowness();
        let task = |task: &Task| task.limit * slowness + BETWEEN;
        Limits {
            boot: self.host.processor.boot_limit(),
            tasks: self.tasks.iter().map(task).collect(),
            between: BETWEEN * slowness,
        }
    }
}

/// A host that has only to be started.
#[derive(Debug)]
struct Prepared {
    command: Command,
    machine: Machine,
    limits: Limits,
    /// Goes with this, unless something is to be looked at.
    folder: TempDir,
}

impl Prepared {
    fn run(
        mut self,
        run: &mut HostRun,
        stop: &AtomicBool,
        listener: &mut dyn Listener,
    ) -> Result<(), BootError> {
        let complaints = File::create(self.machine.complaints()).map_err(BootError::Folder)?;
        let same = complaints.try_clone().map_err(BootError::Folder)?;
        self.command.stdout(complaints).stderr(same);

        let mut output = Vec::new();
        let mut begun = Duration::ZERO;
        let tell = |event: &Event| match event {
            Event::Host(about) => run.about.clone_from(about),
            Event::Begun(_, at) => begun = *at,
            Event::Line(line) => {
                listener.line(line);
                output.push(line.clone());
            }
            Event::Ended(number, code, at) => {
                let done = Done {
                    task: *number,
                    code: *code,
                    took: at.saturating_sub(begun),
                    output: std::mem::take(&mut output),
                };
                if let Some(task) = run.tasks.get(*number) {
                    listener.done(task, &done);
                    run.done.push(done);
                }
            }
            Event::Ready(_) | Event::NoKvm | Event::Done(_) => {}
        };
        let results = self.machine.results();
        let watched = watch::watch(&mut self.command, &results, &self.limits, stop, tell);
        watched.map_err(|trouble| match trouble {
            // The user has ended it: there is no fault to look for.
            WatchError::Interrupted => BootError::Interrupted,
            trouble => {
                let mut last = watch::last_lines(&self.machine.complaints(), 5);
                last.extend(watch::last_lines(&self.machine.console(), 20));
                let folder = self.folder.keep();
                BootError::Watch {
                    trouble,
                    folder,
                    last,
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host;

    #[test]
    fn a_host_is_right_if_all_that_it_was_to_do_is_done_and_right() {
        let done = |task, code| Done {
            task,
            code,
            took: Duration::ZERO,
            output: Vec::new(),
        };
        let tasks = || {
            let task = Task::given(&["vmm".to_owned()]);
            vec![task.clone(), task.expecting(3)]
        };
        let run = |done: &[Done]| HostRun {
            done: done.to_vec(),
            ..HostRun::new(&host::ALL[0], tasks())
        };
        assert!(run(&[done(0, 0), done(1, 3)]).is_right());
        assert!(!run(&[done(0, 0), done(1, 0)]).is_right());
        assert!(!run(&[done(0, 0)]).is_right(), "one is missing");
        let mut ended = run(&[done(0, 0), done(1, 3)]);
        ended.trouble = Some(BootError::Interrupted);
        assert!(!ended.is_right());
    }
}
