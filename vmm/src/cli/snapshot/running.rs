//! Verbs that run a guest, or are about to.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use palimpsest::host::Limits;
use palimpsest::kept::store::{Store, StoreError};

use super::args::{KeepingArgs, LoadArgs, RunKeptArgs, SaveArgs};
use super::place::{Places, is_url, locate};
use super::transfer::Transfer;
use crate::accel::Accel;
use crate::cli::output_file::OutputFile;
use crate::cli::report_text::plural;
use crate::cli::screen::Screen;
use crate::cli::status::Status;
use crate::cli::units::{bytes, count, micros};
use crate::cli::{Failure, guest_image, interrupt, print, report_text, told};
use crate::session::config::{Config, RunLength};
use crate::session::kept::{self, CheckedKept, Every, Keep, Source, checkpoint_name, next_number};
use crate::session::report::{Report, Verdict};
use crate::session::{self, Beginning};

/// `vmm snapshot save`.
pub(super) fn save(args: &SaveArgs, screen: &Screen) -> Result<Verdict, Failure> {
    let mut config = args.run.config(std::time::Duration::from_secs(2));
    if args.keeping.every.is_some() && !args.run.has_length() {
        config.length = RunLength::UNTIL_STOPPED;
    }
    config.validate(&Limits::detect().map_err(Failure::Limits)?)?;
    let (path, name) = locate(&args.path)?;
    if is_url(&path) {
        return Err(StoreError::ReadOnly { store: path }.into());
    }
    // Found out now and not after minutes of running.
    let report = prepare_report(args.report.as_deref())?;
    let image = guest_image(&config.guest)?;
    let store = Store::open_or_create(&path)?;
    let keep = keep_in(store, name, &args.keeping)?;
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;
    go(
        &config,
        Beginning::Boot(image),
        Some(keep),
        &stop,
        report,
        screen,
    )
}

/// `vmm snapshot run`.
pub(super) fn run(args: &RunKeptArgs, screen: &Screen) -> Result<Verdict, Failure> {
    let report = prepare_report(args.report.as_deref())?;
    // What is asked of a store by URL goes on when the run is to end: its last checks may want memory that is there.
    let places = Places::new(&args.reach, Default::default()).with_cache(&args.cache);
    let mut source = Source::of(places.read(&args.path)?)?;
    source.loading = args.loading.loading();
    let config = args.apply(source.config());
    // How much room it needs the run finds out: no flag says how large the guest is.
    config.validate_all_but_room()?;
    let keep = match &args.save {
        Some(name) => Some(keep_in(
            source.store().clone(),
            name.clone(),
            &args.keeping,
        )?),
        None => None,
    };
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;
    let verdict = go(
        &config,
        Beginning::Load(Box::new(source)),
        keep,
        &stop,
        report,
        screen,
    );
    places.tell_trouble(screen);
    verdict
}

fn prepare_report(path: Option<&Path>) -> Result<Option<OutputFile>, Failure> {
    let file = path.map(|path| OutputFile::prepare("--report", path));
    Ok(file.transpose()?)
}

/// Where a snapshot is to be saved: its name is free, its parent there, and the store can be written to. Found out now
/// and not after minutes of running.
fn keep_in(
    store: Store,
    name: palimpsest::kept::store::SnapshotName,
    args: &KeepingArgs,
) -> Result<Keep, Failure> {
    let every = match args.every {
        Some(interval) => Some(Every {
            interval,
            first: next_number(&store, &name)?,
            keep_last: args.keep_last,
        }),
        None => None,
    };
    match &every {
        Some(every) => {
            store.may_save(&checkpoint_name(&name, every.first).map_err(StoreError::from)?)?
        }
        None => store.may_save(&name)?,
    }
    let parent = args.parent.as_ref().map(|parent| store.parent(parent));
    let parent = parent.transpose()?;
    Ok(Keep {
        store,
        name,
        parent,
        compression: args.compression(),
        most_a_second: args.rate,
        every,
    })
}

fn go(
    config: &Config,
    beginning: Beginning,
    keep: Option<Keep>,
    stop: &std::sync::Arc<AtomicBool>,
    report_file: Option<OutputFile>,
    screen: &Screen,
) -> Result<Verdict, Failure> {
    screen.line(&format!(
        "vmm {}: seed {}",
        env!("CARGO_PKG_VERSION"),
        config.seed
    ));
    let mut status = Status::new(screen.clone(), config.length, stop.clone());
    let outcome = session::run_from(config, beginning, keep, stop, &mut status);
    status.finish();
    let mut report: Report = outcome?;
    report.lines_lost += screen.lost();
    let printed = print(&report_text::render(&report)).map_err(Failure::Print);
    let written = report_file.map_or(Ok(()), |file| file.write(&report));
    let outcomes = [printed, written.map_err(Failure::from)];
    let verdict = told(report.verdict, outcomes, screen);
    match (verdict, report.saved, report.error) {
        // As it would have been if the name had been taken before.
        (Verdict::Error, Some(saved), Some(why)) if saved.name_is_taken => {
            Err(Failure::NameTaken { why })
        }
        _ => Ok(verdict),
    }
}

/// `vmm snapshot load`.
pub(super) fn load(args: &LoadArgs, screen: &Screen) -> Result<Verdict, Failure> {
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;
    let places = Places::new(&args.reach, stop.clone()).with_cache(&args.cache);
    let source = Source::of(places.read(&args.path)?)?;
    let config = args.place.apply(source.config());
    config.validate_all_but_room()?;
    let mut transfer = Transfer::default();
    let checked = kept::check(&config, &source, &mut |progress| {
        transfer.tell("loading", progress, screen);
        !stop.load(Ordering::Relaxed)
    });
    screen.clear_block();
    places.tell_trouble(screen);
    let checked = checked.map_err(Failure::Run)?;
    for violation in &checked.found {
        screen.line(&violation.to_string());
    }
    let text = match args.json {
        true => super::looking::json(&checked)?,
        false => render(&checked, config.accel),
    };
    print(&text).map_err(Failure::Print)?;
    Ok(match (checked.found.is_empty(), checked.follows_formula) {
        (false, _) => Verdict::Violated,
        (true, _) => Verdict::Ok,
    })
}

fn render(checked: &CheckedKept, accel: Accel) -> String {
    let loaded = &checked.loaded;
    let what = match (checked.found.len(), checked.follows_formula) {
        (0, true) => "what is in it is right".to_owned(),
        (0, false) => {
            "whole; its guest follows no formula by which more could be checked".to_owned()
        }
        (violations, _) => format!("VIOLATED: {}", plural(violations as u64, "violation")),
    };
    let mut text = format!("{}: {what}\n\n", loaded.name);
    for (name, value) in [
        (
            "loaded",
            format!(
                "{} chunks, {} of memory, in {}",
                count(loaded.chunks),
                bytes(loaded.bytes),
                micros(loaded.seconds * 1e6)
            ),
        ),
        ("checked", format!("{} pages", count(checked.checked_pages))),
        ("can run", format!("here, with --accel {accel}")),
    ] {
        text.push_str(&format!("{name:<11} {value}\n"));
    }
    for note in &checked.notes {
        text.push_str(&format!("{:<11} {note}\n", "note"));
    }
    text
}
