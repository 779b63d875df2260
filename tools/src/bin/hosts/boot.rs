//! One host, from nothing to the results of its tasks.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

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
    #[error("no folder for the host's files")]
    Folder(#[source] io::Error),
    #[error("{trouble}; its files are in {}{}", folder.display(), listed(last))]
    Watch {
        trouble: WatchError,
        folder: PathBuf,
        /// The last of what kernel and emulator have said.
        last: Vec<String>,
    },
}

fn listed(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  | {line}")).collect()
}

/// How a task went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) task: usize,
    pub(crate) code: i32,
    /// By the host's clock.
    pub(crate) took: Duration,
    pub(crate) output: Vec<String>,
}

/// What a host has done.
#[derive(Debug)]
pub(crate) struct Visit {
    /// Its kernel and processor, as it says itself.
    pub(crate) about: Option<String>,
    /// The tasks that came to an end.
    pub(crate) done: Vec<Done>,
    pub(crate) took: Duration,
    /// Why that are not all.
    pub(crate) trouble: Option<BootError>,
}

/// Who wants to know how it goes.
pub(crate) trait Listener {
    /// A task prints a line.
    fn line(&mut self, line: &str);
    /// A task has ended.
    fn done(&mut self, task: &Task, done: &Done);
}

/// Boots `host` and runs `tasks` in it.
pub(crate) fn visit(
    host: &Host,
    store: &Store,
    programs: &Programs,
    extras: &[Extra],
    tasks: &[Task],
    stop: &AtomicBool,
    listener: &mut dyn Listener,
) -> Visit {
    let started = Instant::now();
    let mut visit = Visit {
        about: None,
        done: Vec::new(),
        took: Duration::ZERO,
        trouble: None,
    };
    visit.trouble = run(
        host, store, programs, extras, tasks, stop, listener, &mut visit,
    )
    .err();
    visit.took = started.elapsed();
    visit
}

#[expect(clippy::too_many_arguments, reason = "those of `visit`")]
fn run(
    host: &Host,
    store: &Store,
    programs: &Programs,
    extras: &[Extra],
    tasks: &[Task],
    stop: &AtomicBool,
    listener: &mut dyn Listener,
    visit: &mut Visit,
) -> Result<(), BootError> {
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
        host,
        folder: folder.path(),
        kernel: kernel.find("/boot", "vmlinuz-")?,
        initramfs: folder.path().join("initramfs"),
    };

    let mut files = Initramfs::new(&busybox)?;
    let modules = modules::load_order(&kernel, &busybox, host.processor.module())?;
    files.modules(modules, host.parameter, host.processor.flush_bytes());
    files.file(&programs.vmm, "/bin/vmm")?;
    // Tests have its path built in.
    files.link(&programs.vmm.to_string_lossy(), "/bin/vmm");
    for (name, path) in &programs.tests {
        files.file(path, &format!("/tests/{name}"))?;
    }
    for extra in extras {
        files.file(&extra.from, &extra.to)?;
    }
    files.tasks(tasks);
    files.write(&machine.initramfs)?;

    let mut command = machine.command(store)?;
    let complaints = File::create(machine.complaints())
        .and_then(|file| Ok((file.try_clone()?, file)))
        .map_err(BootError::Folder)?;
    command.stdout(complaints.0).stderr(complaints.1);
    const BETWEEN: Duration = Duration::from_secs(60);
    let slowness = host.processor.slowness();
    let limits = Limits {
        boot: host.processor.boot_limit(),
        tasks: tasks
            .iter()
            .map(|task| task.limit * slowness + BETWEEN)
            .collect(),
        between: BETWEEN * slowness,
    };

    let mut output = Vec::new();
    let mut begun = Duration::ZERO;
    let watched = watch::watch(
        &mut command,
        &machine.results(),
        &limits,
        stop,
        |event| match event {
            Event::Host(about) => visit.about = Some(about.clone()),
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
                if let Some(task) = tasks.get(*number) {
                    listener.done(task, &done);
                    visit.done.push(done);
                }
            }
            Event::Ready(_) | Event::NoKvm | Event::Done(_) => {}
        },
    );
    match watched {
        Ok(()) => Ok(()),
        Err(trouble) => {
            let mut last = last(&machine.complaints());
            last.extend(watch::last_lines(&machine.console(), 20));
            let folder = folder.keep();
            Err(BootError::Watch {
                trouble,
                folder,
                last,
            })
        }
    }
}

fn last(path: &Path) -> Vec<String> {
    watch::last_lines(path, 5)
}
