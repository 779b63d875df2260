//! Boots hosts with KVM in them that are not the one this runs on, in emulators, and runs the workspace's programs there.
//!
//! A host's kernel and tools are Debian packages, unpacked in a cache ([`packages`]); its file system is made on the spot
//! ([`initramfs`]) with our programs and what to run ([`task`]); results come out of its second serial port ([`results`]).

mod apt;
mod boot;
mod cpio;
mod emulator;
mod host;
mod initramfs;
mod libraries;
mod modules;
mod packages;
mod programs;
mod results;
mod task;
mod watch;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use palimpsest::cli::chain;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use boot::{Done, Extra, Listener, Visit};
use host::Host;
use packages::Store;
use task::{Extent, Part, Task};

/// Run the workspace's programs on emulated hosts with KVM: AMD with and without nested paging, Intel with EPT
#[derive(Debug, Parser)]
#[command(name = "hosts", max_term_width = 100)]
struct Args {
    /// A host to boot; may be given several times
    #[arg(long = "host", value_name = "HOST", value_parser = host_parser())]
    hosts: Vec<&'static Host>,

    /// Boot every host, by and by
    #[arg(long, conflicts_with_all = ["hosts", "ci"])]
    all: bool,

    /// What there is time for with every change: AMD with nested paging, and less of it without
    #[arg(long, conflicts_with_all = ["hosts", "command", "parts"])]
    ci: bool,

    /// List the hosts
    #[arg(long, conflicts_with_all = ["hosts", "all", "ci", "command", "parts"])]
    list: bool,

    /// Only this part of what is run in a host; may be given several times
    #[arg(long = "part", value_name = "PART", conflicts_with = "command")]
    parts: Vec<Part>,

    /// A file to bring along; with its libraries if it is a program [default DEST: /NAME]
    #[arg(long = "file", value_name = "PATH[=DEST]", value_parser = parse_extra)]
    files: Vec<Extra>,

    /// Run this there instead, and expect exit code 0
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
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
            let name = from.file_name().ok_or("must be a file")?;
            let to = format!("/{}", name.to_string_lossy());
            (from, to)
        }
    };
    if !to.starts_with('/') || to.ends_with('/') {
        return Err(format!("DEST {to:?} must be the absolute path of a file"));
    }
    if from.is_file() {
        Ok(Extra { from, to })
    } else {
        Err(format!("{} is no file", from.display()))
    }
}
fn say(text: &str) {
    // Whoever does not listen misses it.
    let _ = writeln!(io::stderr(), "{text}");
}
struct Screen {
    live: bool,
}
impl Listener for Screen {
    fn line(&mut self, line: &str) {
        if self.live {
            println!("{line}");
        }
    }
    fn done(&mut self, task: &Task, done: &Done) {
        if self.live {
            return;
        }
        let ok = done.code == task.expected;
        println!(
            "{} {:>6.1} s  exit {}  {}",
            if ok { "ok   " } else { "WRONG" },
            done.took.as_secs_f64(),
            done.code,
            task.title()
        );
        if !ok {
            for l in &done.output {
                println!("    {l}");
            }
        }
    }
}
fn main() -> ExitCode {
    let args = Args::parse();
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_default(signal, Arc::clone(&stop)).unwrap();
        flag::register(signal, Arc::clone(&stop)).unwrap();
    }
    let store = Store::open().unwrap();
    let programs = match programs::build(
        if args.command.is_empty() && (args.parts.is_empty() || args.parts.contains(&Part::Tests)) {
            programs::Wanted::Tests
        } else {
            programs::Wanted::Program
        },
    ) {
        Ok(p) => p,
        Err(e) => {
            say(&chain(&e));
            return ExitCode::FAILURE;
        }
    };
    let names: Vec<String> = programs.tests.iter().map(|t| t.0.clone()).collect();
    let mut bad = false;
    for host in &args.hosts {
        let parts = if args.parts.is_empty() {
            &Part::ALL[..]
        } else {
            &args.parts
        };
        let tasks: Vec<Task> = if args.command.is_empty() {
            parts
                .iter()
                .flat_map(|&p| task::tasks(p, Extent::Full, &names))
                .collect()
        } else {
            vec![Task::given(&args.command)]
        };
        let mut screen = Screen {
            live: !args.command.is_empty(),
        };
        let Visit {
            about,
            done,
            took,
            trouble,
        } = boot::visit(
            host,
            &store,
            &programs,
            &args.files,
            &tasks,
            &stop,
            &mut screen,
        );
        println!(
            "{}: {} in {:?}, {} of {} tasks",
            host.name,
            about.unwrap_or_default(),
            took,
            done.len(),
            tasks.len()
        );
        if let Some(t) = trouble {
            bad = true;
            println!("error: {}", chain(&t));
        }
        bad |= done.iter().any(|d| d.code != tasks[d.task].expected);
    }
    if bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
