//! Boots hosts with another KVM than this machine's, in emulators, and runs the workspace's programs there.
//!
//! A host's kernel and tools are Debian packages, unpacked in a cache ([`packages`]). Its file system is made
//! on the spot ([`initramfs`]), with our programs and what they are to do ([`task`]). Results come out of its
//! second serial port ([`results`]).
//!
//! An emulated host shows what is right and what is wrong, not what is fast.

mod apt;
mod assignment;
mod boot;
mod cpio;
mod emulator;
mod host;
mod initramfs;
mod libraries;
mod modules;
mod packages;

mod programs;
mod record;
mod results;
mod screen;
mod task;
mod watch;

use std::io::{self, Write};
use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Parser};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use vmm::cli::chain;
use vmm::cli::units::parse_time;

use assignment::Assignment;
use boot::{Extra, HostRun, Listener, Visit};
use host::Host;
use packages::{PackageError, Store};
use programs::{BuildError, Wanted};
use record::RecordError;
use task::{Suite, Task};

const AFTER_HELP: &str = "\
Examples:
  hosts --host amd                                  all there is to try, on that host
  hosts --host amd --part main --part faults        some of it
  hosts --host amd -- vmm --snapshots 5             a command of your own
  hosts --host amd --file a.elf -- vmm --guest /a.elf
  hosts --all                                       every host; the results go to docs/platforms.md

What a host is made of is downloaded once, with apt-get, and kept in XDG_CACHE_HOME (or ~/.cache) under
palimpsest/hosts. Nothing is installed. Remove a folder there to have it fetched anew.

Exit codes:
  0  everything went as it must
  1  something did not, or could not be tried
  2  the command line makes no sense";

/// Run the workspace's programs on emulated hosts: AMD with and without nested paging, Intel with EPT
#[derive(Debug, Parser)]
#[command(
    name = "hosts",
    after_help = AFTER_HELP,
    max_term_width = 100,
    group = ArgGroup::new("which").args(["hosts", "all", "ci", "list"]).required(true)
)]
struct Args {
    /// A host to boot; may be given several times
    #[arg(long = "host", value_name = "HOST", value_parser = host_parser())]
    hosts: Vec<&'static Host>,

    /// Boot every host, and keep the results in docs/platforms.md
    #[arg(long, conflicts_with_all = ["command", "suites"])]
    all: bool,

    /// What there is time for with every change: AMD with nested paging, and less of it without
    #[arg(long, conflicts_with_all = ["command", "suites"])]
    ci: bool,

    /// List the hosts
    #[arg(long, conflicts_with_all = ["command", "suites", "files"])]
    list: bool,

    /// Try only this; may be given several times
    #[arg(long = "part", value_name = "PART", conflicts_with = "command")]
    suites: Vec<Suite>,

    /// A file to bring along, with its libraries if it is a program [default DEST: /NAME]
    #[arg(long = "file", value_name = "PATH[=DEST]", value_parser = parse_extra)]
    files: Vec<Extra>,

    /// The exit code that COMMAND must have
    #[arg(long, value_name = "CODE", default_value_t = 0, requires = "command")]
    expect: i32,

    /// How long COMMAND may take, by the host's clock [default: 3m]
    #[arg(long, value_name = "TIME", requires = "command", value_parser = parse_time)]
    limit: Option<Duration>,

    /// Run this there, and nothing else. There are vmm and the tools of busybox
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Why nothing could be tried.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error("cannot build what is to run")]
    Build(#[from] BuildError),
    #[error("cannot keep the results")]
    Record(#[from] RecordError),
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(Verdict::Right) => ExitCode::SUCCESS,
        Ok(Verdict::Wrong) => ExitCode::FAILURE,
        Err(failure) => {
            say(&format!("error: {}", chain(&failure)));
            ExitCode::FAILURE
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Right,
    Wrong,
}

fn run(args: &Args) -> Result<Verdict, Failure> {
    if args.list {
        for host in &host::ALL {
            screen::print(&format!("{:<13} {}", host.name, host.about));
        }
        return Ok(Verdict::Right);
    }
    let stop = stop_flag().map_err(Failure::Signals)?;
    let store = Store::open()?;
    let assignments = args.assignments();
    let programs = programs::build(args.wanted(&assignments))?;
    let visit = |assignment: &Assignment| {
        let visit = Visit {
            host: assignment.host,
            store: &store,
            programs: &programs,
            extras: &args.files,
            tasks: args.tasks(assignment, &programs.names()),
        };
        say(&format!(
            "{}: {}",
            assignment.host.name, assignment.host.about
        ));
        let run = visit.run(&stop, args.listener(assignment).as_mut());
        if let Some(trouble) = &run.trouble {
            say(&format!(
                "error: {}: {}",
                assignment.host.name,
                chain(trouble)
            ));
        }
        if args.command.is_empty() {
            screen::print(&screen::conclusion(&run));
        }
        run
    };
    let runs = side_by_side(&assignments, args.at_once(), &stop, visit);
    if stop.load(Ordering::Relaxed) {
        return Ok(Verdict::Wrong);
    }
    if args.command.is_empty() && runs.len() > 1 {
        screen::print(&format!("\n{}", record::table(&runs)));
    }
    if args.all {
        let path = record::keep(&runs)?;
        say(&format!("kept in {}", path.display()));
    }
    if runs.iter().all(HostRun::is_right) {
        Ok(Verdict::Right)
    } else {
        Ok(Verdict::Wrong)
    }
}

/// Makes all `visits`, `at_once` at the same time, until there is reason to stop. What
/// came of them, in their order.
fn side_by_side<V: Sync, O: Send>(
    visits: &[V],
    at_once: usize,
    stop: &AtomicBool,
    make: impl Fn(&V) -> O + Sync,
) -> Vec<O> {
    let next = AtomicUsize::new(0);
    let runs = Mutex::new(Vec::from_iter(visits.iter().map(|_| None)));
    let make_some = || {
        while !stop.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(visit) = visits.get(number) else {
                break;
            };
            let run = make(visit);
            let mut runs = runs.lock().unwrap_or_else(PoisonError::into_inner);
            runs[number] = Some(run);
        }
    };
    thread::scope(|scope| {
        for _ in 1..at_once.min(visits.len()) {
            scope.spawn(make_some);
        }
        make_some();
    });
    let runs = runs.into_inner().unwrap_or_else(PoisonError::into_inner);
    runs.into_iter().flatten().collect()
}

impl Args {
    /// Hosts that are emulated at the same time: each takes a CPU. What a command of one's own prints is not
    /// to be mixed with another's.
    fn at_once(&self) -> usize {
        if self.command.is_empty() {
            thread::available_parallelism().map_or(1, NonZero::get)
        } else {
            1
        }
    }

    fn assignments(&self) -> Vec<Assignment> {
        if self.ci {
            return assignment::for_every_change();
        }
        let hosts = if self.all {
            host::ALL.iter().collect()
        } else {
            self.hosts.clone()
        };
        if !self.command.is_empty() {
            return hosts.into_iter().map(assignment::for_a_command).collect();
        }
        let assignments = |host: &'static Host| assignment::by_hand(host, &self.suites);
        hosts.into_iter().flat_map(assignments).collect()
    }

    fn wanted(&self, assignments: &[Assignment]) -> Wanted {
        let tests = |assignment: &Assignment| assignment.suites.contains(&Suite::Tests);
        if self.command.is_empty() && assignments.iter().any(tests) {
            Wanted::Tests
        } else {
            Wanted::Program
        }
    }

    fn tasks(&self, assignment: &Assignment, tests: &[String]) -> Vec<Task> {
        if self.command.is_empty() {
            let tasks = |&suite| task::tasks(suite, assignment.extent, tests);
            assignment.suites.iter().flat_map(tasks).collect()
        } else {
            let task = Task::given(&self.command).expecting(self.expect);
            vec![task.within(self.limit.unwrap_or(task::LIMIT))]
        }
    }

    fn listener(&self, assignment: &Assignment) -> Box<dyn Listener> {
        if self.command.is_empty() {
            Box::new(screen::Verdicts {
                host: assignment.host.name,
            })
        } else {
            Box::new(screen::Passage)
        }
    }
}

fn host_parser() -> impl TypedValueParser<Value = &'static Host> {
    let named = |host: &Host| PossibleValue::new(host.name).help(host.about);
    PossibleValuesParser::new(host::ALL.iter().map(named))
        .map(|name| host::named(&name).expect("every name listed is that of a host"))
}

fn parse_extra(text: &str) -> Result<Extra, String> {
    let (from, to) = match text.split_once('=') {
        Some((from, to)) => (PathBuf::from(from), to.to_owned()),
        None => {
            let from = PathBuf::from(text);
            let name = from.file_name().ok_or("must be the path of a file")?;
            let to = format!("/{}", name.to_string_lossy());
            (from, to)
        }
    };
    if !to.starts_with('/') || to.ends_with('/') {
        return Err(format!(
            "DEST must be the absolute path of a file, not {to:?}"
        ));
    }
    if !from.is_file() {
        return Err(format!("{} is not a file", from.display()));
    }
    Ok(Extra { from, to })
}

/// A flag that the first SIGINT or SIGTERM sets. The second one ends the process.
fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_default(signal, Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// Says something to whoever waits.
fn say(text: &str) {
    // Whoever does not listen misses it.
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn all_are_visited_and_told_in_their_order() {
        let stop = AtomicBool::new(false);
        for at_once in [1, 2, 9] {
            let doubled = side_by_side(&[1, 2, 3, 4], at_once, &stop, |number| number * 2);
            assert_eq!(doubled, [2, 4, 6, 8]);
        }
        let only_first = side_by_side(&[1, 2, 3], 1, &stop, |number| {
            stop.store(true, Ordering::Relaxed);
            *number
        });
        assert_eq!(only_first, [1]);
    }

    fn parse(flags: &[&str]) -> Args {
        Args::try_parse_from(["hosts"].iter().chain(flags)).unwrap()
    }

    fn refusal(flags: &[&str]) -> String {
        let parsed = Args::try_parse_from(["hosts"].iter().chain(flags));
        parsed.unwrap_err().to_string()
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn hosts_are_known_by_name() {
        let args = parse(&["--host", "amd", "--host", "intel"]);
        let names = Vec::from_iter(args.hosts.iter().map(|host| host.name));
        assert_eq!(names, ["amd", "intel"]);
        assert!(refusal(&["--host", "arm"]).contains("possible values: amd"));
    }

    #[test]
    fn it_must_be_told_where_to_run() {
        assert!(refusal(&[]).contains("--host <HOST>"));
        assert!(refusal(&["--", "vmm"]).contains("--host <HOST>"));
        assert!(refusal(&["--all", "--host", "amd"]).contains("cannot be used with"));
        assert!(refusal(&["--all", "--", "vmm"]).contains("cannot be used with"));
    }

    #[test]
    fn a_command_is_run_as_it_is() {
        let flags = [
            "--host=amd",
            "--expect=3",
            "--limit=5m",
            "--",
            "vmm",
            "--inject",
            "leak-pin",
        ];
        let args = parse(&flags);
        let assignments = args.assignments();
        assert_eq!(args.wanted(&assignments), Wanted::Program);
        let tasks = args.tasks(&assignments[0], &[]);
        assert_eq!(tasks.len(), 1);
        assert_eq!(tasks[0].title(), "vmm --inject leak-pin");
        assert_eq!(tasks[0].expected, 3);
        assert_eq!(tasks[0].limit, Duration::from_secs(300));
    }

    #[test]
    fn tests_are_built_only_where_they_run() {
        let wanted = |flags: &[&str]| {
            let args = parse(flags);
            args.wanted(&args.assignments())
        };
        assert_eq!(wanted(&["--ci"]), Wanted::Tests);
        assert_eq!(wanted(&["--all"]), Wanted::Tests);
        assert_eq!(wanted(&["--host=amd", "--part=main"]), Wanted::Program);
        assert_eq!(wanted(&["--host=intel"]), Wanted::Program);
    }

    #[test]
    fn files_go_where_they_are_told_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.elf");
        std::fs::write(&path, "").unwrap();
        let name = path.to_str().unwrap();
        let extra = |to: &str| Extra {
            from: path.clone(),
            to: to.to_owned(),
        };
        assert_eq!(parse_extra(name), Ok(extra("/a.elf")));
        assert_eq!(parse_extra(&format!("{name}=/bin/a")), Ok(extra("/bin/a")));
        for bad in [
            format!("{name}=a"),
            format!("{name}=/a/"),
            "/nowhere".to_owned(),
        ] {
            parse_extra(&bad).unwrap_err();
        }
    }
}
