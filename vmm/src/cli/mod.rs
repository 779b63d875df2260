//! The `vmm` program: arguments in, a run, a report out.
//!
//! Standard output gets the report and nothing else; standard error gets the rest.

mod args;
mod compare;
mod doctor;
mod fork;
mod guest_file;
mod interrupt;
mod outlet;
mod output_file;
mod printable;
mod progress_text;
mod race_text;
mod report_text;
mod scenario_text;
mod screen;
mod snapshot;
mod status;
mod teller;
mod terminal;
mod timeline;
pub mod units;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use tracing::{Metadata, level_filters::LevelFilter};
use tracing_subscriber::{Layer, filter::filter_fn, layer::SubscriberExt, util::SubscriberInitExt};

use self::{
    args::{Args, Command},
    outlet::{Outlet, PATIENCE},
    output_file::{OutputFile, OutputFileError},
    screen::{Colours, Screen},
    status::Status,
    timeline::Timeline,
};
use crate::session::{
    self,
    config::{ConfigError, GuestSource},
    family::{FamilyError, config::FamilyConfigError},
    kept::SourceError,
    report::Verdict,
};
pub use palimpsest::causes::chain;
use palimpsest::host::Limits;
use palimpsest::kept::store::StoreError;

/// The run could not start or finish, the guest crashed, or nothing was checked.
const EXIT_ERROR: u8 = 1;
/// The command line makes no sense.
const EXIT_USAGE: u8 = 2;
/// An oracle found a violation.
const EXIT_VIOLATED: u8 = 3;

/// What the program does, from its arguments to its exit code.
pub fn main() -> ExitCode {
    interrupt::ignore_file_size_signal();
    let args = Args::parse();
    let screen = Screen::new();
    let timeline = args.trace.is_some().then(Timeline::new);
    start_log(args.verbose, &screen, timeline.clone());
    let done = match &args.command {
        Some(Command::Fork(fork)) => fork::run(fork, &screen),
        Some(Command::Snapshot(snapshot)) => snapshot::run(snapshot, &screen),
        Some(Command::Compare(compare)) => compare::run(compare, &screen),
        // Without a run's flags `args` are those of the main job.
        Some(Command::Doctor(doctor)) => doctor::run(doctor, &args.config()),
        None => run(&args, screen.clone(), timeline),
    };
    let code = match done {
        Ok(verdict) => exit_code(verdict),
        Err(failure) => {
            complain(&screen, &failure);
            ExitCode::from(failure.exit_code())
        }
    };
    screen.finish();
    code
}

fn exit_code(verdict: Verdict) -> ExitCode {
    match verdict {
        Verdict::Ok => ExitCode::SUCCESS,
        Verdict::Error | Verdict::NothingChecked => ExitCode::from(EXIT_ERROR),
        Verdict::Violated => ExitCode::from(EXIT_VIOLATED),
    }
}

/// Why there was no run, or no report of it.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("cannot tell how much memory this host has")]
    Limits(#[source] io::Error),
    #[error(transparent)]
    OutputFile(#[from] OutputFileError),
    #[error("--guest {}: cannot read", path.display())]
    Guest {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    #[error("cannot print the report")]
    Print(#[source] io::Error),
    #[error(transparent)]
    Run(#[from] session::RunError),
    #[error(transparent)]
    FamilyConfig(#[from] FamilyConfigError),
    #[error(transparent)]
    Family(#[from] FamilyError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Place(#[from] snapshot::PlaceError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("{why}")]
    NameTaken { why: String },
    #[error("could not play all of it: {why}")]
    NotPlayed { why: String },
    #[error("--scenario {id}: there is none of that name")]
    NoScenario { id: String },
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            // The same command line is right on a larger machine.
            Self::Config(ConfigError::Need(_))
            | Self::FamilyConfig(FamilyConfigError::Guest(ConfigError::Need(_))) => EXIT_ERROR,
            Self::Config(_)
            | Self::FamilyConfig(_)
            | Self::NoScenario { .. }
            | Self::NameTaken { .. }
            | Self::Store(
                StoreError::Name(_)
                | StoreError::NoPlace { .. }
                | StoreError::Exists { .. }
                | StoreError::InTheWay { .. }
                | StoreError::Nested { .. }
                | StoreError::ReadOnly { .. }
                | StoreError::NotCollected { .. },
            )
            | Self::OutputFile(OutputFileError::Same { .. }) => EXIT_USAGE,
            Self::Run(session::RunError::Untrusted(_)) => EXIT_USAGE,
            Self::Place(error) if error.is_usage() => EXIT_USAGE,
            _ => EXIT_ERROR,
        }
    }

    /// What to do about it, where that is not plain from the error.
    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Config(ConfigError::Need(_))
            | Self::FamilyConfig(FamilyConfigError::Guest(ConfigError::Need(_)))
            | Self::Family(FamilyError::Run(session::RunError::Need(_)))
            | Self::Run(session::RunError::Need(_)) => {
                Some("`vmm doctor` says who limits memory, and what guest would run")
            }
            Self::Config(_) => Some("vmm --help explains every flag"),
            Self::FamilyConfig(_) => Some("vmm fork --help explains every flag"),
            Self::NoScenario { .. } => Some("vmm compare --list has them all"),
            Self::Guest { .. }
            | Self::Run(session::RunError::Build(session::PayloadVmError::Image { .. })) => {
                Some("--guest takes `payload`, or the path of a static ELF")
            }
            Self::Run(session::RunError::Untrusted(_) | session::RunError::Load(_)) => None,
            Self::Store(StoreError::Name(_)) => {
                Some("a snapshot is STORE/NAME: the directory of its store, and its name there")
            }
            Self::Run(_) | Self::Family(_) | Self::Limits(_) | Self::NotPlayed { .. } => {
                Some("`vmm doctor` says what this machine can and cannot do")
            }
            _ => None,
        }
    }
}

fn complain(screen: &Screen, failure: &Failure) {
    screen.line(&format!("error: {}", chain(failure)));
    if let Some(hint) = failure.hint() {
        screen.line(&format!("hint: {hint}"));
    }
}

/// The verdict, or that of a run whose report got lost.
fn run(args: &Args, screen: Screen, timeline: Option<Timeline>) -> Result<Verdict, Failure> {
    let config = args.config();
    config.validate(&Limits::detect().map_err(Failure::Limits)?)?;
    // Found out now and not after minutes of running.
    let file = |flag, path: Option<&Path>| path.map(|p| OutputFile::prepare(flag, p)).transpose();
    let report_file = file("--report", args.report.as_deref())?;
    let trace_file = file("--trace", args.trace.as_deref())?;
    if let (Some(trace), Some(report)) = (&trace_file, &report_file) {
        trace.is_not(report)?;
    }
    let image = guest_image(&config.guest)?;
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;

    // Told at the start too: a run that is killed has no report.
    screen.line(&format!(
        "vmm {}: seed {}",
        env!("CARGO_PKG_VERSION"),
        config.seed
    ));
    let mut status = Status::new(screen.clone(), config.length, stop.clone());
    let outcome = session::run(&config, image, &stop, &mut status);
    status.finish();
    let mut report = outcome?;
    report.lines_lost += screen.lost();

    let printed = print(&report_text::render(&report)).map_err(Failure::Print);
    let written = report_file.map_or(Ok(()), |file| file.write(&report));
    let traced = trace_file.zip(timeline).map_or(Ok(()), |(file, timeline)| {
        let (json, lost) = timeline.to_json();
        if lost > 0 {
            screen.line(&format!("--trace: no room for the last {lost} events"));
        }
        file.write_json(json)
    });
    let outcomes = [
        printed,
        written.map_err(Failure::from),
        traced.map_err(Failure::from),
    ];
    Ok(told(report.verdict, outcomes, &screen))
}

/// The verdict of a run whose reports came to `outcomes`: one that got lost is complained of.
fn told(
    mut verdict: Verdict,
    outcomes: impl IntoIterator<Item = Result<(), Failure>>,
    screen: &Screen,
) -> Verdict {
    for failure in outcomes.into_iter().filter_map(Result::err) {
        complain(screen, &failure);
        // A violation is the worse news of the two: it still decides the exit code.
        if verdict == Verdict::Ok {
            verdict = Verdict::Error;
        }
    }
    verdict
}

fn guest_image(source: &GuestSource) -> Result<Vec<u8>, Failure> {
    match source {
        GuestSource::Payload => Ok(guest::PAYLOAD.to_vec()),
        GuestSource::File(path) => guest_file::read(path).map_err(|source| Failure::Guest {
            path: path.clone(),
            source,
        }),
    }
}

/// Writes `text` to standard output, for as long as somebody reads it.
fn print(text: &str) -> io::Result<()> {
    let printed = match Outlet::to(&io::stdout()) {
        Ok(stdout) => {
            stdout.send(text);
            stdout.finish(PATIENCE)
        }
        // There is no thread to be had: then whoever does not read is waited for.
        Err(_) => {
            let mut stdout = io::stdout().lock();
            stdout
                .write_all(text.as_bytes())
                .and_then(|()| stdout.flush())
        }
    };
    match printed {
        // Whoever read it, `head` perhaps, has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

fn start_log(verbose: u8, screen: &Screen, timeline: Option<Timeline>) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let writer = screen.clone();
    let is_of_timeline = |meta: &Metadata<'_>| meta.target() == palimpsest::timeline::TARGET;
    let log = tracing_subscriber::fmt::layer()
        .with_ansi(screen.colours() == Colours::On)
        .with_timer(tracing_subscriber::fmt::time::uptime())
        .with_writer(move || writer.clone())
        .with_filter(filter_fn(move |meta| {
            *meta.level() <= level && !is_of_timeline(meta)
        }));
    let timeline = timeline.map(|timeline| timeline.with_filter(filter_fn(is_of_timeline)));
    tracing_subscriber::registry()
        .with(log)
        .with(timeline)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_as_documented() {
        let usage = Failure::from(ConfigError::KeepNone);
        assert_eq!(usage.exit_code(), 2);
        let other = Failure::Signals(io::Error::other("x"));
        assert_eq!(other.exit_code(), 1);
        for (verdict, code) in [
            (Verdict::Ok, 0),
            (Verdict::Error, 1),
            (Verdict::NothingChecked, 1),
            (Verdict::Violated, 3),
        ] {
            assert_eq!(exit_code(verdict), ExitCode::from(code));
        }
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        let failure = guest_image(&GuestSource::File("/no/such.elf".into())).unwrap_err();
        assert_eq!(
            chain(&failure),
            "--guest /no/such.elf: cannot read: No such file or directory (os error 2)"
        );
    }
}
