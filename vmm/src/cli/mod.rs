//! The `vmm` program: arguments in, a run, a report out.
//!
//! Standard output gets the report and nothing else; standard error gets the rest.

mod args;
mod compare;
mod interrupt;
mod race_text;
mod report_text;
mod scenario_text;
mod status;
pub mod units;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use tracing::level_filters::LevelFilter;

use self::{
    args::{Args, Command},
    status::{Screen, Status},
};
pub use crate::causes::chain;
use crate::session::{
    self,
    config::{ConfigError, GuestSource, HostLimits},
    report::{ReportFile, ReportFileError, Verdict},
};

/// The run could not start or finish, or the guest crashed.
const EXIT_ERROR: u8 = 1;
/// The command line makes no sense.
const EXIT_USAGE: u8 = 2;
/// An oracle found a violation.
const EXIT_VIOLATED: u8 = 3;

/// What the program does, from its arguments to its exit code.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let screen = Screen::new();
    start_log(args.verbose, &screen);
    let done = match &args.command {
        Some(Command::Compare(compare)) => compare::run(compare, &screen),
        None => run(&args, screen),
    };
    match done {
        Ok(verdict) => exit_code(verdict),
        Err(failure) => {
            complain(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn exit_code(verdict: Verdict) -> ExitCode {
    match verdict {
        Verdict::Ok => ExitCode::SUCCESS,
        Verdict::Error => ExitCode::from(EXIT_ERROR),
        Verdict::Violated => ExitCode::from(EXIT_VIOLATED),
    }
}

/// Why there was no run, or no report of it.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("cannot tell how much memory this host has")]
    HostLimits(#[source] io::Error),
    #[error(transparent)]
    ReportFile(#[from] ReportFileError),
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
    #[error("--scenario {id}: there is none of that name")]
    NoScenario { id: String },
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::NoScenario { .. } => EXIT_USAGE,
            _ => EXIT_ERROR,
        }
    }

    /// What to do about it, where that is not plain from the error.
    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Config(ConfigError::MemoryNotAvailable { .. }) => {
                Some("the guest touches all of its memory in time: give it less, or free some")
            }
            Self::Config(_) => Some("vmm --help explains every flag"),
            Self::NoScenario { .. } => Some("vmm compare --list has them all"),
            Self::Guest { .. } => Some("--guest takes `payload`, or the path of a static ELF"),
            _ => None,
        }
    }
}

fn complain(failure: &Failure) {
    // Nothing is left to do if even this cannot be written.
    let mut stderr = io::stderr().lock();
    let _ = writeln!(stderr, "error: {}", chain(failure));
    if let Some(hint) = failure.hint() {
        let _ = writeln!(stderr, "hint: {hint}");
    }
}

/// The verdict, or that of a run whose report got lost.
fn run(args: &Args, screen: Screen) -> Result<Verdict, Failure> {
    let config = args.config();
    config.validate(&HostLimits::detect().map_err(Failure::HostLimits)?)?;
    // Found out now and not after minutes of running.
    let report_file = args
        .report
        .as_deref()
        .map(ReportFile::prepare)
        .transpose()?;
    let image = guest_image(&config.guest)?;
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;

    // Told at the start too: a run that is killed has no report.
    screen.line(&format!(
        "vmm {}: seed {}",
        env!("CARGO_PKG_VERSION"),
        config.seed
    ));
    let mut status = Status::new(screen, config.length, stop.clone());
    let outcome = session::run(&config, image, &stop, &mut status);
    status.finish();
    let report = outcome?;

    let printed = print(&report_text::render(&report)).map_err(Failure::Print);
    let written = report_file.map_or(Ok(()), |file| file.write(&report));
    let mut verdict = report.verdict;
    for outcome in [printed, written.map_err(Failure::from)] {
        if let Err(failure) = outcome {
            complain(&failure);
            // A violation is the worse news of the two: it still decides the exit code.
            if verdict == Verdict::Ok {
                verdict = Verdict::Error;
            }
        }
    }
    Ok(verdict)
}

fn guest_image(source: &GuestSource) -> Result<Vec<u8>, Failure> {
    match source {
        GuestSource::Payload => Ok(guest::PAYLOAD.to_vec()),
        GuestSource::File(path) => read_image(path).map_err(|source| Failure::Guest {
            path: path.clone(),
            source,
        }),
    }
}

fn read_image(path: &Path) -> io::Result<Vec<u8>> {
    // A device such as /dev/zero has no end.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file"));
    }
    fs::read(path)
}

fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        // Whoever read it, `head` perhaps, has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

fn start_log(verbose: u8, screen: &Screen) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let writer = screen.clone();
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(screen.colours())
        .with_timer(tracing_subscriber::fmt::time::uptime())
        .with_writer(move || writer.clone())
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

    #[test]
    fn a_guest_image_must_have_an_end() {
        let failure = guest_image(&GuestSource::File("/dev/zero".into())).unwrap_err();
        assert_eq!(
            chain(&failure),
            "--guest /dev/zero: cannot read: not a file"
        );
    }
}
