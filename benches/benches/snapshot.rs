//! Measures snapshots of the same guest under each technique, on this machine, one after the other.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use benches::console::{self, ProgressDisplay};
use benches::heap::{self, Counting};
use benches::json_file::{JsonFile, JsonFileError};
use benches::machine::Machine;
use benches::measure::{Sampling, measure};
use benches::report::{self, Platform, Report, Skipped, pattern_name};
use benches::technique::{Kind, TechniqueError};
use benches::vm::{GuestConfig, VmError};
use benches::{targets, text};
use clap::{Parser, ValueEnum};
use guest::abi::Pattern;
use palimpsest::kvm::{Kvm, PlatformError};
use palimpsest::user::{User, UserError};
use palimpsest::vm::By;
use vmm::cli::chain;
use vmm::cli::units::{bytes, parse_size, parse_time};

/// What tables cost is counted.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Measure snapshots of the same guest under each technique.
///
/// The guest writes one word a page as fast as it can. Each technique takes the same snapshots of it, one
/// after the other on this machine; what is printed are the times, and their ratios to ours.
#[derive(Debug, Parser)]
#[command(name = "snapshot", max_term_width = 100, after_long_help = techniques())]
struct Args {
    /// Guest memory, all of it touched before anything is measured
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = parse_size,
          default_value = "256M,1G", conflicts_with = "all")]
    memory: Vec<u64>,

    /// Which pages the guest writes: dense, uniform, hot, sparse
    #[arg(long, value_delimiter = ',', value_parser = parse_pattern,
          default_value = "dense,hot,sparse", conflicts_with = "all")]
    pattern: Vec<Pattern>,

    /// vCPUs, which share the memory out among them
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=16), conflicts_with = "all")]
    vcpus: Vec<u64>,

    /// Techniques to measure; see below [default: those with a star; with --all, all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    technique: Vec<Kind>,

    /// What runs guests: `kvm` those of all techniques but ours-user, `user` those of ours-user, which
    /// are threads [default: both, as far as they can be had]
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    accel: Vec<Runs>,

    /// Snapshots of each whose pause and stall are measured
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,

    /// Fresh guests whose first snapshot is measured as well; 0 for none
    #[arg(long, value_name = "N", default_value = "0")]
    first: u64,

    /// Snapshots a second while the guest's speed is measured; 0 for none
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,10")]
    rates: Vec<f64>,

    /// How long the guest's speed is measured at each of these
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_time)]
    rate_time: Duration,

    /// What the guest sweeps, and writes between two looks at the time
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = parse_size)]
    sweep: u64,

    /// What is hot in the pattern hot [default: 1/16 of memory, at most 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    hot: Option<u64>,

    /// In the pattern hot, one write of this many is elsewhere. A vCPU writes tens of millions of pages a
    /// second: one in ten would leave nothing cold
    #[arg(
        long,
        value_name = "N",
        default_value = "10000",
        value_parser = clap::value_parser!(u64).range(2..)
    )]
    cold_every: u64,

    /// A device writes guest memory beside the vCPUs
    #[arg(long)]
    dma: bool,

    /// The whole matrix: 256M, 1G, 4G, 8G; all patterns; 1 and 2 vCPUs; with and
    /// without a device. Takes hours
    #[arg(long)]
    all: bool,

    /// Write the numbers here as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// What `cargo bench` passes on
    #[arg(long, hide = true)]
    bench: bool,
}

/// What runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Runs {
    Kvm,
    User,
}

/// What there is to run guests.
struct Accelerators {
    kvm: Option<Kvm>,
    user: Option<User>,
}

impl Accelerators {
    /// Opens what is `asked` for, or what there is if nothing is. What cannot be had then is noted in
    /// `skipped`.
    fn open(asked: &[Runs], skipped: &mut Vec<Skipped>) -> Result<Self, Error> {
        let wants = |runs| asked.is_empty() || asked.contains(&runs);
        let mut accelerators = Self {
            kvm: None,
            user: None,
        };
        let mut skip = |what: &str, error: Error| match asked {
            [] => {
                skipped.push(Skipped {
                    what: what.to_owned(),
                    why: chain(&error),
                });
                Ok(())
            }
            _ => Err(error),
        };
        if wants(Runs::Kvm) {
            match Kvm::open() {
                Ok(kvm) => accelerators.kvm = Some(kvm),
                Err(error) => skip("all that KVM runs", error.into())?,
            }
        }
        if wants(Runs::User) {
            match User::open() {
                Ok(user) => accelerators.user = Some(user),
                Err(error) => skip(Kind::OursUser.name(), error.into())?,
            }
        }
        Ok(accelerators)
    }

    /// What runs the guest of `kind`.
    fn of(&self, kind: Kind) -> Option<By<'_>> {
        if kind.needs_kvm() {
            self.kvm.as_ref().map(By::Kvm)
        } else {
            self.user.as_ref().map(By::User)
        }
    }

    fn platform(&self) -> Option<&palimpsest::kvm::Platform> {
        let kvm = self.kvm.as_ref().map(Kvm::platform);
        kvm.or(self.user.as_ref().map(User::platform))
    }
}

fn parse_pattern(name: &str) -> Result<Pattern, String> {
    report::pattern_of(name).ok_or_else(|| "there are dense, uniform, hot, sparse".to_owned())
}

fn techniques() -> String {
    let lines = Kind::ALL.map(|kind| {
        let star = if kind.is_default() { '*' } else { ' ' };
        format!("  {star} {:<9} {}", kind.name(), kind.about())
    });
    format!("Techniques:\n{}", lines.join("\n"))
}

/// Why there are no numbers.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Kvm(#[from] PlatformError),
    #[error("guests cannot run without KVM here")]
    User(#[from] UserError),
    #[error("cannot measure the machine")]
    Machine(#[source] io::Error),
    #[error(transparent)]
    Json(#[from] JsonFileError),
    #[error("cannot print")]
    Print(#[source] io::Error),
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    #[error("interrupted: what is above is all there is")]
    Interrupted,
    #[error("{cells} could not be measured: see what was left out")]
    Failed { cells: usize },
    #[error("nothing could be measured: see what was left out")]
    Nothing,
}

fn main() -> ExitCode {
    heap::keep_large_apart();
    console::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Error> {
    let json = JsonFile::prepare(args.json.clone())?;
    let mut skipped = Vec::new();
    let accelerators = Accelerators::open(&args.accel, &mut skipped)?;
    let platform = accelerators.platform().ok_or(Error::Nothing)?;
    let stop = console::stop_flag().map_err(Error::Signals)?;
    let sampling = Sampling {
        rounds: args.rounds,
        first: args.first,
        quiet: Duration::from_secs(1),
        rates: args
            .rates
            .iter()
            .copied()
            .filter(|rate| *rate > 0.0)
            .collect(),
        rate_time: args.rate_time,
    };
    let mut techniques = match &args.technique[..] {
        [] => Kind::ALL
            .into_iter()
            .filter(|kind| args.all || kind.is_default())
            .collect(),
        some => some.to_vec(),
    };
    techniques.retain(|kind| accelerators.of(*kind).is_some());
    let configs = configs(args);
    let display = ProgressDisplay::new(configs.len() * techniques.len());

    display.step("the machine");
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        platform: Platform::of(platform),
        machine: Machine::measure().map_err(Error::Machine)?,
        rounds: args.rounds,
        cells: Vec::new(),
        skipped,
        targets: Vec::new(),
    };
    let ended = measure_all(
        &accelerators,
        &configs,
        &techniques,
        &sampling,
        &stop,
        &display,
        &mut report,
    );
    display.finish();
    report.targets = targets::judge(&report);
    // What there is is worth having, however it ended.
    if !report.cells.is_empty() {
        console::print(&text::report(&report)).map_err(Error::Print)?;
        json.write(&report)?;
    }
    match ended {
        Ended::Interrupted => Err(Error::Interrupted),
        Ended::Failed { cells } => Err(Error::Failed { cells }),
        Ended::Done if report.cells.is_empty() => Err(Error::Nothing),
        Ended::Done => Ok(()),
    }
}

/// How measuring ended.
enum Ended {
    Done,
    /// Some could not be measured: why is in the report.
    Failed {
        cells: usize,
    },
    Interrupted,
}

/// Fills in the cells of `report`. One that fails is noted, and the others are measured.
fn measure_all(
    accelerators: &Accelerators,
    configs: &[GuestConfig],
    techniques: &[Kind],
    sampling: &Sampling,
    stop: &AtomicBool,
    display: &ProgressDisplay,
    report: &mut Report,
) -> Ended {
    let mut failed = 0;
    for config in configs {
        for &technique in techniques {
            let is_skipped = |skipped: &Skipped| skipped.what == technique.name();
            if report.skipped.iter().any(is_skipped) {
                display.next();
                continue;
            }
            let cell = format!(
                "{technique}, {}, {}, {} vcpus{}",
                bytes(config.memory),
                pattern_name(config.pattern),
                config.vcpus,
                if config.dma { ", DMA" } else { "" }
            );
            let Some(by) = accelerators.of(technique) else {
                continue;
            };
            display.begin(&cell);
            let mut step = |step: &str| display.step(&format!("{cell}: {step}"));
            let (what, why) = match measure(by, technique, config, sampling, stop, &mut step) {
                Ok(measured) => {
                    report.cells.push(measured);
                    display.next();
                    continue;
                }
                Err(VmError::Interrupted) => return Ended::Interrupted,
                // Why it cannot run here is the same in every setting: said once.
                Err(VmError::Technique(TechniqueError::Unavailable { why })) => {
                    (technique.name().to_owned(), why)
                }
                Err(error @ VmError::NoMemory { .. }) => (cell, error.to_string()),
                Err(error) => {
                    failed += 1;
                    (cell, chain(&error))
                }
            };
            display.say(&format!("left out: {what}: {why}"));
            report.skipped.push(Skipped { what, why });
            display.next();
        }
    }
    match failed {
        0 => Ended::Done,
        cells => Ended::Failed { cells },
    }
}

/// The guests to measure with.
fn configs(args: &Args) -> Vec<GuestConfig> {
    let (memory, patterns, vcpus, dma);
    if args.all {
        memory = vec![256 * MIB, GIB, 4 * GIB, 8 * GIB];
        patterns = vec![
            Pattern::Dense,
            Pattern::Uniform,
            Pattern::Hot,
            Pattern::Sparse,
        ];
        vcpus = vec![1, 2];
        dma = vec![false, true];
    } else {
        memory = args.memory.clone();
        patterns = args.pattern.clone();
        vcpus = args.vcpus.clone();
        dma = vec![args.dma];
    }
    let mut configs = Vec::new();
    for &dma in &dma {
        for &vcpus in &vcpus {
            for &memory in &memory {
                for &pattern in &patterns {
                    configs.push(GuestConfig {
                        memory,
                        vcpus,
                        pattern,
                        sweep: args.sweep,
                        hot: args.hot.unwrap_or((memory / 16).min(64 * MIB)),
                        cold_every: args.cold_every,
                        dma,
                    });
                }
            }
        }
    }
    configs
}
