//! Loops over snapshots, restores and clones under DMA, with all oracles on, and other ways to make a copy of
//! a running VM beside them.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use benches::clones::{MeasureError, parse_memory};
use benches::console::{self, ProgressDisplay};
use benches::copies::{self, Way};
use benches::footprint;
use benches::json_file::{JsonFile, JsonFileError};
use benches::report::{Platform, Skipped};
use benches::stress::report::StressReport;
use benches::stress::{Going, Length, churn, rewinds, storms, text};
use clap::{Parser, ValueEnum};
use palimpsest::kvm::{Kvm, PlatformError};
use vmm::cli::chain;
use vmm::cli::units::bytes;
use vmm::session::RunError;
use vmm::session::family::FamilyError;

/// Run snapshots, restores and clones in loops, under DMA and with all oracles on.
///
/// It fails if an oracle says something, a frame is not given back, or memory grows from the first tenth of a
/// loop to its end.
#[derive(Debug, Parser)]
#[command(name = "stress", max_term_width = 100)]
struct Args {
    /// What to run
    #[arg(
        long,
        value_name = "WHAT",
        value_delimiter = ',',
        default_value = "rewinds,churn,storms,copies"
    )]
    part: Vec<Part>,

    /// How long each loop goes on
    #[arg(long, value_name = "N", default_value = "60", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,

    /// A few seconds each, with little memory: does it work at all?
    #[arg(long, conflicts_with_all = ["seconds", "memory", "copy_memory", "clones", "rounds"])]
    short: bool,

    /// Memory of guests in loops; those of storms have a quarter of it
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_memory)]
    memory: u64,

    /// Clones of a storm
    #[arg(long, value_name = "N", default_value = "64",
          value_parser = clap::value_parser!(u64).range(1..1023))]
    clones: u64,

    /// Memory of guests that are copied in every way, all of it resident
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "256M,1G",
          value_parser = parse_memory)]
    copy_memory: Vec<u64>,

    /// Copies of each that are measured
    #[arg(long, value_name = "N", default_value = "10", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,

    /// Write the numbers here as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// What `cargo bench` passes on
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Snapshots and restores of the payload
    Rewinds,
    /// A parent that runs, and clones that do a few operations and go
    Churn,
    /// Many clones at once, again and again
    Storms,
    /// A copy of a running VM that runs: ours, fork(), a file, a copy
    Copies,
}

/// Why it is not well.
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
    #[error("{0} of what is above is wrong")]
    Wrong(usize),
    #[error("{0} could not be done: see what was left out")]
    Failed(usize),
}

/// Why a part could not be done.
#[derive(Debug, thiserror::Error)]
enum PartError {
    #[error(transparent)]
    Measure(#[from] MeasureError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Family(#[from] FamilyError),
    #[error("cannot tell how much memory is available")]
    Memory(#[source] io::Error),
}

/// One thing to do.
#[derive(Clone, Copy)]
enum Step {
    Rewinds,
    Churn,
    Storms,
    Copies(u64, Way),
}

impl Step {
    fn name(self) -> String {
        match self {
            Self::Rewinds => "snapshots and restores".to_owned(),
            Self::Churn => "fork, run, drop".to_owned(),
            Self::Storms => "storms".to_owned(),
            Self::Copies(memory, way) => format!("a copy that runs: {}, {way}", bytes(memory)),
        }
    }
}

fn main() -> ExitCode {
    let mut args = Args::parse();
    if args.short {
        args.seconds = 3;
        args.memory = 64 << 20;
        args.copy_memory = vec![64 << 20];
        (args.clones, args.rounds) = (8, 3);
    }
    console::exit_code(run(&args))
}

fn run(args: &Args) -> Result<(), Error> {
    let json = JsonFile::prepare(args.json.clone())?;
    let kvm = Kvm::open()?;
    let stop = console::stop_flag().map_err(Error::Signals)?;
    let steps = steps(args);
    let display = ProgressDisplay::new(steps.len());
    let mut report = StressReport::new(Platform::of(kvm.platform()));
    let mut failed = 0;
    for step in steps {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = step.name();
        display.begin(&name);
        display.step(&name);
        let mut tell = |text: &str| display.step(&format!("{name}: {text}"));
        let mut going = Going {
            length: Length::Time(Duration::from_secs(args.seconds)),
            stop: &stop,
            tell: &mut tell,
        };
        match done(&kvm, step, args, &mut going, &mut report) {
            Ok(()) | Err(PartError::Measure(MeasureError::Interrupted)) => {}
            Err(error) => {
                let is_small = matches!(error, PartError::Measure(MeasureError::NoMemory { .. }));
                failed += usize::from(!is_small);
                let why = chain(&error);
                display.say(&format!("left out: {name}: {why}"));
                report.skipped.push(Skipped { what: name, why });
            }
        }
        display.next();
    }
    display.finish();
    // What there is is worth having, however it ended.
    if !report.is_empty() {
        console::print(&text::report(&report)).map_err(Error::Print)?;
        json.write(&report)?;
    }
    match (report.wrong().len(), failed) {
        (0, _) if stop.load(Ordering::Relaxed) => Err(Error::Interrupted),
        (0, 0) => Ok(()),
        (0, failed) => Err(Error::Failed(failed)),
        (wrong, _) => Err(Error::Wrong(wrong)),
    }
}

fn steps(args: &Args) -> Vec<Step> {
    let mut steps = Vec::new();
    for part in &args.part {
        match part {
            Part::Rewinds => steps.push(Step::Rewinds),
            Part::Churn => steps.push(Step::Churn),
            Part::Storms => steps.push(Step::Storms),
            Part::Copies => {
                for &memory in &args.copy_memory {
                    steps.extend(Way::ALL.map(|way| Step::Copies(memory, way)));
                }
            }
        }
    }
    steps
}

fn done(
    kvm: &Kvm,
    step: Step,
    args: &Args,
    going: &mut Going<'_>,
    report: &mut StressReport,
) -> Result<(), PartError> {
    match step {
        Step::Rewinds => report.rewinds = Some(rewinds::run(args.memory, going)?),
        Step::Churn => report.churn = Some(churn::run(kvm, args.memory, going, &mut drop)?),
        Step::Storms => {
            let memory = (args.memory / 4).max(32 << 20);
            report.storms = Some(storms::run(memory, args.clones, going)?);
        }
        Step::Copies(memory, way) => {
            fits(way.needs(memory))?;
            let cost = copies::measure(kvm, way, memory, args.rounds, going.stop)?;
            report.copies.push(cost);
        }
    }
    Ok(())
}

/// Whether the host has so much memory.
fn fits(needed: u64) -> Result<(), PartError> {
    let available = footprint::available().map_err(PartError::Memory)?;
    if needed > available {
        return Err(MeasureError::NoMemory { needed, available }.into());
    }
    Ok(())
}
