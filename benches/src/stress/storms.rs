//! Many clones at once, again and again: families of the payload, under DMA and with all oracles.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm::check::Violation;
use vmm::cli::chain;
use vmm::session::config::Config;
use vmm::session::family::config::{FamilyConfig, Shape};
use vmm::session::family::progress::{FamilyObserver, FamilyProgress};
use vmm::session::family::{self, FamilyError};
use vmm::session::report::Verdict;

use super::level::{Flatness, Levels};
use super::rewinds::note;
use super::{Going, Length, payload};
use crate::summary::median;

/// How long a root runs by itself.
const WARM_UP: Duration = Duration::from_millis(300);
/// How long all of them run.
const TOGETHER: Duration = Duration::from_secs(1);
/// Between two snapshots of some machine.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(20);

/// What became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Storms {
    /// Bytes of memory of each machine.
    pub memory: u64,
    /// Clones of a storm.
    pub clones: u64,
    /// Storms.
    pub storms: u64,
    /// How long they went on.
    pub seconds: f64,
    /// From the wish for a clone to its first instruction: the median of the storms' medians. `None`, as all
    /// that follows, if there was no storm to its end.
    pub first_instruction_p50_us: Option<f64>,
    /// The longest of the storms' 99th of 100.
    pub first_instruction_p99_us: Option<f64>,
    /// From the first snapshot of a storm to its last clone: the median.
    pub made_in_s: Option<f64>,
    /// What the root did meanwhile of what it did before: the median.
    pub root_share: Option<f64>,
    /// What the oracles say, and what is not as it should be beside.
    pub wrong: Vec<String>,
    /// Memory after each storm. Every frame was given back, or that is among what is wrong.
    pub flatness: Flatness,
}

struct Watch<'a, 'b> {
    going: &'a mut Going<'b>,
    wrong: Vec<String>,
    storm: u64,
}

impl FamilyObserver for Watch<'_, '_> {
    fn progress(&mut self, progress: &FamilyProgress) {
        (self.going.tell)(&format!(
            "storm {}: {} of {} machines, {} violations",
            self.storm,
            progress.members.len(),
            progress.wanted,
            progress.violations.total()
        ));
    }

    fn console(&mut self, _machine: usize, _text: &str) {}

    fn violation(&mut self, machine: Option<usize>, violation: &Violation) {
        let machine = machine.map_or(String::new(), |machine| format!("machine {machine}: "));
        note(&mut self.wrong, format!("{machine}{violation}"));
    }

    fn note(&mut self, text: &str) {
        note(&mut self.wrong, text.to_owned());
    }
}

/// Storms of `clones` clones of a payload with `memory` bytes, until the time is over: one at least.
///
/// # Errors
/// If a root could not be started.
pub fn run(memory: u64, clones: u64, going: &mut Going<'_>) -> Result<Storms, FamilyError> {
    let config = FamilyConfig {
        guest: Config {
            snapshot_every: SNAPSHOT_EVERY,
            keep: 2,
            restore_every: 0,
            registered_buffers: 2,
            copy_ahead: false,
            ..payload(memory, 1, 1, Length::Time(TOGETHER))
        },
        shape: Shape::Clones(clones),
        quota: None,
        warm_up: WARM_UP,
        duration: TOGETHER,
    };
    let (began, stop) = (Instant::now(), going.stop);
    let mut watch = Watch {
        going,
        wrong: Vec::new(),
        storm: 0,
    };
    let mut levels = Levels::default();
    let [mut p50, mut p99, mut made_in, mut shares] = [const { Vec::new() }; 4];
    while watch.storm == 0 || watch.going.goes_on(watch.storm, began) {
        watch.storm += 1;
        let image = guest::PAYLOAD.to_vec();
        let report = family::run(&config, image, stop, &mut watch)?;
        let interrupted = stop.load(Ordering::Relaxed);
        watch.wrong.extend(report.error);
        if report.verdict != Verdict::Ok && watch.wrong.is_empty() && !interrupted {
            let verdict = report.verdict.name();
            watch
                .wrong
                .push(format!("storm {}: the verdict is {verdict}", watch.storm));
        }
        p50.extend(report.first_instruction_us.p50);
        p99.extend(report.first_instruction_us.p99);
        if let Some(forking) = report.forking {
            made_in.push(forking.time_s);
            shares.push(forking.root_ops_per_s_meanwhile / forking.root_ops_per_s_before);
        }
        // All frames are gone with their family.
        if let Err(error) = levels.look(0) {
            watch.wrong.push(chain(&error));
        }
    }
    Ok(Storms {
        memory,
        clones,
        storms: watch.storm,
        seconds: began.elapsed().as_secs_f64(),
        first_instruction_p50_us: median(p50),
        first_instruction_p99_us: p99.into_iter().reduce(f64::max),
        made_in_s: median(made_in),
        root_share: median(shares),
        wrong: watch.wrong,
        flatness: levels.flatness(),
    })
}
