//! Snapshots and restores of the payload, one after the other, under DMA and with all oracles.

use guest::abi::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use vmm::cli::chain;
use vmm::session::config::Config;
use vmm::session::progress::{Observer, Progress};
use vmm::session::report::{Quantiles, Verdict, Violation};
use vmm::session::{self, RunError};

use super::level::{Flatness, Levels};
use super::{Going, payload};

/// What became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rewinds {
    /// Bytes of guest memory.
    pub memory: u64,
    /// How long it went on.
    pub seconds: f64,
    /// Snapshots, of which each was checked.
    pub snapshots: u64,
    /// Restores.
    pub restores: u64,
    /// Pauses for snapshots.
    pub pause_us: Quantiles,
    /// DMA requests.
    pub dma_requests: u64,
    /// What the oracles say, and what is not as it should be beside.
    pub wrong: Vec<String>,
    /// Memory.
    pub flatness: Flatness,
}

/// Snapshots after which memory is looked at: with those that are kept, and those on their way to be checked,
/// it grows by itself till then, and while the guest boots.
const UNTIL_FULL: u64 = 20;

/// Watches a run.
struct Watch<'a, 'b> {
    going: &'a mut Going<'b>,
    levels: Levels,
    wrong: Vec<String>,
}

impl Observer for Watch<'_, '_> {
    fn progress(&mut self, progress: &Progress) {
        let frames = progress.frames_in_use * PAGE_SIZE;
        let is_full = progress.snapshots >= UNTIL_FULL;
        if is_full && let Err(error) = self.levels.look(frames) {
            self.wrong.push(chain(&error));
        }
        (self.going.tell)(&format!(
            "{:.0} s, {} snapshots, {} restores, {} violations",
            progress.elapsed.as_secs_f64(),
            progress.snapshots,
            progress.restored,
            progress.violations.total()
        ));
    }

    fn console(&mut self, _text: &str) {}

    fn violation(&mut self, violation: &Violation) {
        note(&mut self.wrong, violation.to_string());
    }

    fn note(&mut self, _text: &str) {}
}

/// Keeps `text`, unless there are many.
pub(super) fn note(wrong: &mut Vec<String>, text: String) {
    const MOST: usize = 20;
    if wrong.len() < MOST {
        wrong.push(text);
    }
}

/// Runs the payload with `memory` bytes.
///
/// # Errors
/// If it could not be started.
pub fn run(memory: u64, going: &mut Going<'_>) -> Result<Rewinds, RunError> {
    run_as(&payload(memory, 2, 2, going.length), going)
}

/// Runs the payload as `config` says.
pub(super) fn run_as(config: &Config, going: &mut Going<'_>) -> Result<Rewinds, RunError> {
    let stop = going.stop;
    let mut watch = Watch {
        going,
        levels: Levels::default(),
        wrong: Vec::new(),
    };
    let image = guest::PAYLOAD.to_vec();
    let report = session::run(config, image, stop, &mut watch)?;
    let Watch {
        levels, mut wrong, ..
    } = watch;
    wrong.extend(report.error);
    if report.verdict != Verdict::Ok && wrong.is_empty() {
        wrong.push(format!("the verdict is {}", report.verdict.name()));
    }
    Ok(Rewinds {
        memory: config.memory,
        seconds: report.duration_s,
        snapshots: report.snapshots.taken,
        restores: report.snapshots.restored,
        pause_us: report.pause_us,
        dma_requests: report.dma.to_guest + report.dma.from_guest,
        wrong,
        flatness: levels.flatness(),
    })
}
