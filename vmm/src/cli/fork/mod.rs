//! `vmm fork`: a guest that runs, and clones of it.
//!
//! | file | concept |
//! |---|---|
//! | `args` | its flags |
//! | `status` | what is shown while it goes on |
//! | `tree` | machines as a tree |
//! | `text` | the report |

mod args;
mod status;
mod text;
mod tree;

pub(super) use self::args::ForkArgs;
use self::status::ForkStatus;
use super::output_file::OutputFile;
use super::screen::Screen;
use super::snapshot::Places;
use super::{Failure, guest_image, interrupt, print, told};
use crate::session::kept::Source;
use crate::session::report::Verdict;
use crate::session::{Beginning, family};
use palimpsest::host::Limits;

/// What came of it.
pub(super) fn run(args: &ForkArgs, screen: &Screen) -> Result<Verdict, Failure> {
    // What is asked of a store by URL goes on when the run is to end: its last checks may want memory that is there.
    let places = Places::new(&args.reach, Default::default()).with_cache(&args.cache);
    let mut source = match &args.from {
        Some(path) => Some(Source::of(places.read(path)?)?),
        None => None,
    };
    if let Some(source) = &mut source {
        source.loading = args.loading.loading();
    }
    let config = match &source {
        Some(source) => args.config_from(source.config()),
        None => args.config(),
    };
    config.validate(&Limits::detect().map_err(Failure::Limits)?)?;
    // Found out now and not after minutes of running.
    let report_file = args.report.as_deref();
    let report_file = report_file.map(|path| OutputFile::prepare("--report", path));
    let report_file = report_file.transpose()?;
    let beginning = match source {
        Some(source) => Beginning::Load(Box::new(source)),
        None => Beginning::Boot(guest_image(&config.guest.guest)?),
    };
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;
    screen.line(&format!(
        "vmm {}: seed {}",
        env!("CARGO_PKG_VERSION"),
        config.guest.seed
    ));
    let mut status = ForkStatus::new(screen.clone(), &config, stop.clone());
    let outcome = family::run_from(&config, beginning, &stop, &mut status);
    status.finish();
    places.tell_trouble(screen);
    let report = outcome?;

    let printed = print(&text::render(&report)).map_err(Failure::Print);
    let written = report_file.map_or(Ok(()), |file| file.write(&report));
    let outcomes = [printed, written.map_err(Failure::from)];
    Ok(told(report.verdict, outcomes, screen))
}
