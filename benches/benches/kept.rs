//! Measures what keeping snapshots as files costs, beside plain ways to do the same, on this machine.

use std::env;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use benches::clones::parse_memory;
use benches::console::{self, ProgressDisplay};
use benches::json_file::{JsonFile, JsonFileError};
use benches::kept::report::KeptReport;
use benches::kept::{KeptError, clones, increment, load, save, targets, text, verify};
use benches::report::{Platform, Skipped};
use clap::{Parser, ValueEnum};
use palimpsest::kvm::{Kvm, PlatformError};
use vmm::cli::chain;
use vmm::cli::units::{bytes, parse_size};

/// Measure what keeping snapshots as files costs.
///
/// Memory is filled with what leaves nothing to be gained by zeros, equal chunks or compression. What is
/// printed are times, and their ratios to plain ways to do the same: a file with all of memory that is mapped
/// privately, a raw write, copying and hashing, b3sum.
#[derive(Debug, Parser)]
#[command(name = "kept", max_term_width = 100)]
struct Args {
    /// What to measure
    #[arg(
        long,
        value_name = "WHAT",
        value_delimiter = ',',
        default_value = "load,save,increment,verify,clones"
    )]
    part: Vec<Part>,

    /// Memory of what is loaded. It takes twice as much of the host's, and of the disk
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = parse_memory,
          default_value = "1G,8G")]
    load_memory: Vec<u64>,

    /// Memory of what is saved and verified
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "1G")]
    memory: u64,

    /// vCPUs of a guest that is saved
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2",
          value_parser = clap::value_parser!(u64).range(1..=16))]
    vcpus: Vec<u64>,

    /// Loads, saves and so on of each that are measured
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,

    /// Clones of one load
    #[arg(long, value_name = "N", default_value = "100",
          value_parser = clap::value_parser!(u64).range(1..1023))]
    clones: u64,

    /// What each of these writes
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = parse_size)]
    written: u64,

    /// Where stores are made, and taken away again: what is measured is that disk [default: where temporary
    /// files are]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Write the numbers here as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// What `cargo bench` passes on
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From the wish for a VM to its first instruction, and its first pass over memory
    Load,
    /// A save beside a guest that runs
    Save,
    /// A save of what has changed
    Increment,
    /// Reading all of a snapshot
    Verify,
    /// Memory of clones of one load
    Clones,
}

/// Why there are no numbers, or not all.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Kvm(#[from] PlatformError),
    #[error(transparent)]
    Json(#[from] JsonFileError),
    #[error("cannot print")]
    Print(#[source] io::Error),
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    #[error("interrupted: what is above is all there is")]
    Interrupted,
    #[error("{failed} could not be measured: see what was left out")]
    Failed { failed: usize },
    #[error("nothing could be measured: see what was left out")]
    Nothing,
}

/// One measurement.
#[derive(Clone, Copy)]
enum Step {
    Load(u64),
    Save(u64),
    Increment,
    Verify,
    Clones,
}

fn main() -> ExitCode {
    console::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Error> {
    let json = JsonFile::prepare(args.json.clone())?;
    let kvm = Kvm::open()?;
    let stop = console::stop_flag().map_err(Error::Signals)?;
    let steps = steps(args);
    let display = ProgressDisplay::new(steps.len());
    let mut report = KeptReport::new(Platform::of(kvm.platform()), args.rounds);
    let (mut failed, mut interrupted) = (0, false);
    for step in steps {
        let what = name(step, args);
        display.begin(&what);
        display.step(&what);
        let mut tell = |text: &str| display.step(&format!("{what}: {text}"));
        if let Err(error) = measure(&kvm, step, args, &stop, &mut tell, &mut report) {
            if error.is_interruption() {
                interrupted = true;
                break;
            }
            failed += usize::from(!error.is_of_size());
            let why = chain(&error);
            display.say(&format!("left out: {what}: {why}"));
            report.skipped.push(Skipped { what, why });
        }
        display.next();
    }
    display.finish();
    report.targets = targets::judge(&report);
    // What there is is worth having, however it ended.
    if !report.is_empty() {
        console::print(&text::report(&report)).map_err(Error::Print)?;
        json.write(&report)?;
    }
    match failed {
        _ if interrupted => Err(Error::Interrupted),
        0 if report.is_empty() => Err(Error::Nothing),
        0 => Ok(()),
        failed => Err(Error::Failed { failed }),
    }
}

/// What is to be measured, in the order of tables.
fn steps(args: &Args) -> Vec<Step> {
    let mut steps = Vec::new();
    for part in &args.part {
        match part {
            Part::Load => steps.extend(args.load_memory.iter().map(|&memory| Step::Load(memory))),
            Part::Save => steps.extend(args.vcpus.iter().map(|&vcpus| Step::Save(vcpus))),
            Part::Increment => steps.push(Step::Increment),
            Part::Verify => steps.push(Step::Verify),
            Part::Clones => steps.push(Step::Clones),
        }
    }
    steps
}

fn name(step: Step, args: &Args) -> String {
    let memory = bytes(args.memory);
    match step {
        Step::Load(memory) => format!("load, {}", bytes(memory)),
        Step::Save(vcpus) => format!("save, {memory}, {vcpus} vcpus"),
        Step::Increment => format!("increments, {memory}"),
        Step::Verify => format!("verify, {memory}"),
        Step::Clones => format!("{} clones, {memory}", args.clones),
    }
}

fn measure(
    kvm: &Kvm,
    step: Step,
    args: &Args,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(&str),
    report: &mut KeptReport,
) -> Result<(), KeptError> {
    let dir = args.dir.clone().unwrap_or_else(env::temp_dir);
    let (memory, rounds) = (args.memory, args.rounds);
    match step {
        Step::Load(memory) => {
            let cost = load::measure(kvm, &dir, memory, rounds, stop)?;
            report.loads.push(cost);
        }
        Step::Save(vcpus) => {
            let guest = save::guest(memory, vcpus);
            let cost = save::measure(kvm, &dir, &guest, rounds, stop, tell)?;
            report.saves.push(cost);
        }
        Step::Increment => {
            let cost = increment::measure(&dir, memory, rounds, stop)?;
            report.increments.push(cost);
        }
        Step::Verify => {
            let cost = verify::measure(&dir, memory, rounds, stop)?;
            report.verifies.push(cost);
        }
        Step::Clones => {
            let cost = clones::measure(kvm, &dir, memory, args.clones, args.written, stop)?;
            report.clones.push(cost);
        }
    }
    Ok(())
}
