//! Measures what clones of a running VM cost, beside a VM that is merely made, on this machine.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use benches::clones::parent::Entries;
use benches::clones::report::CloneReport;
use benches::clones::{
    MeasureError, crowd, idle, parse_memory, pause, price, rewrite, targets, text,
};
use benches::console::{self, ProgressDisplay};
use benches::footprint;
use benches::json_file::{JsonFile, JsonFileError};
use benches::report::{Platform, Skipped};
use clap::{Parser, ValueEnum};
use palimpsest::kvm::{Kvm, PlatformError};
use vmm::cli::chain;
use vmm::cli::units::{bytes, parse_size};

/// Measure what clones of a running VM cost.
///
/// The first instruction of a clone is an `out`, and it is held in the handler of ports: it has run when it
/// is seen there, and takes no CPU time. What is printed are times, and their ratios to a VM that is made
/// with nothing of ours.
#[derive(Debug, Parser)]
#[command(name = "clone", max_term_width = 100)]
struct Args {
    /// Memory of parents and clones, all of it resident. What does not fit is left out
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = parse_memory,
          default_value = "256M,1G,4G,8G")]
    memory: Vec<u64>,

    /// In which pieces the parent's memory is mapped
    #[arg(
        long,
        value_name = "WHAT",
        value_delimiter = ',',
        default_value = "huge,half-small"
    )]
    entries: Vec<Pieces>,

    /// What to measure
    #[arg(
        long,
        value_name = "WHAT",
        value_delimiter = ',',
        default_value = "price,idle,crowd,pause,rewrite"
    )]
    part: Vec<Part>,

    /// Clones, snapshots or rewrites that are measured of each
    #[arg(long, value_name = "N", default_value = "20", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,

    /// Clones whose memory is measured together
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u64).range(1..))]
    idle: u64,

    /// Clones of a crowd
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u64).range(1..))]
    crowd: u64,

    /// The largest memory of the parts pause and rewrite, which take twice as much of the host's
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1G")]
    largest_rewrite: u64,

    /// Write the numbers here as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// What `cargo bench` passes on
    #[arg(long, hide = true)]
    bench: bool,
}

/// In which pieces memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pieces {
    /// By huge entries
    Huge,
    /// Every second region by small entries: it was written sparsely between snapshots
    HalfSmall,
}

impl From<Pieces> for Entries {
    fn from(pieces: Pieces) -> Self {
        match pieces {
            Pieces::Huge => Self::Huge,
            Pieces::HalfSmall => Self::HalfSmall,
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From the wish for a clone to its first instruction
    Price,
    /// Memory of a clone that does nothing
    Idle,
    /// Many clones of a parent that runs
    Crowd,
    /// How long a parent stands still for a snapshot
    Pause,
    /// A clone that writes all of its memory
    Rewrite,
}

/// Why there are no numbers, or not all.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Kvm(#[from] PlatformError),
    #[error(transparent)]
    Json(#[from] JsonFileError),
    #[error("cannot tell how much memory is available")]
    Memory(#[source] io::Error),
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
struct Step {
    part: Part,
    memory: u64,
    entries: Entries,
}

impl Step {
    fn name(self) -> String {
        let part = self.part.to_possible_value();
        let part = part.map_or(String::new(), |value| value.get_name().to_owned());
        format!("{part}, {}, {}", bytes(self.memory), self.entries.name())
    }

    /// Bytes that it takes of the host at most.
    fn needs(self) -> u64 {
        let copies = match self.part {
            Part::Price | Part::Idle | Part::Crowd => self.entries.copies(self.memory),
            Part::Pause | Part::Rewrite => self.memory,
        };
        // Tables, and what else the program has.
        self.memory + copies + self.memory / 32 + (128 << 20)
    }
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
    let mut report = CloneReport::new(Platform::of(kvm.platform()), args.rounds);
    let (mut failed, mut interrupted) = (0, false);
    for step in steps {
        display.begin(&step.name());
        display.step(&step.name());
        let why = match fits(step)?.and_then(|()| measure(&kvm, step, args, &stop, &mut report)) {
            Ok(()) => None,
            Err(MeasureError::Interrupted) => {
                interrupted = true;
                break;
            }
            Err(error) => {
                failed += usize::from(!matches!(error, MeasureError::NoMemory { .. }));
                Some(chain(&error))
            }
        };
        if let Some(why) = why {
            display.say(&format!("left out: {}: {why}", step.name()));
            let what = step.name();
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
    for &part in &args.part {
        for &memory in &args.memory {
            let both = matches!(part, Part::Price | Part::Idle);
            let large = matches!(part, Part::Pause | Part::Rewrite);
            if large && memory > args.largest_rewrite {
                continue;
            }
            let entries = args.entries.iter().map(|&pieces| Entries::from(pieces));
            let entries: Vec<_> = match both {
                true => entries.collect(),
                false => vec![Entries::Huge],
            };
            let step = |entries| Step {
                part,
                memory,
                entries,
            };
            steps.extend(entries.into_iter().map(step));
        }
    }
    steps
}

/// Whether the host has memory for it.
fn fits(step: Step) -> Result<Result<(), MeasureError>, Error> {
    let available = footprint::available().map_err(Error::Memory)?;
    let needed = step.needs();
    Ok(match needed <= available {
        true => Ok(()),
        false => Err(MeasureError::NoMemory { needed, available }),
    })
}

fn measure(
    kvm: &Kvm,
    step: Step,
    args: &Args,
    stop: &AtomicBool,
    report: &mut CloneReport,
) -> Result<(), MeasureError> {
    let Step {
        part,
        memory,
        entries,
    } = step;
    match part {
        Part::Price => {
            let price = price::measure(kvm, memory, entries, args.rounds, stop)?;
            report.prices.push(price);
        }
        Part::Idle => report
            .idle
            .push(idle::measure(kvm, memory, entries, args.idle, stop)?),
        Part::Crowd => report
            .crowds
            .push(crowd::measure(kvm, memory, args.crowd, stop)?),
        Part::Pause => report
            .pauses
            .push(pause::measure(kvm, memory, args.rounds, stop)?),
        Part::Rewrite => {
            let rewrite = rewrite::measure(kvm, memory, args.rounds, stop)?;
            report.rewrites.push(rewrite);
        }
    }
    Ok(())
}
