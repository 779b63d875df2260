//! What a family was found to be: also the format of `--report`. Times name their unit.

use serde::{Deserialize, Serialize};

use super::config::FamilyConfig;
use crate::check::ViolationCounts;
use crate::session::report::{EndedBy, LoadCounts, Platform, Quantiles, Verdict};

/// How clones were made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forking {
    /// How many.
    pub clones: u64,
    /// From the first snapshot to the last clone.
    pub time_s: f64,
    /// What the root did in the second half of its warming up.
    pub root_ops_per_s_before: f64,
    /// What it did while clones were made.
    pub root_ops_per_s_meanwhile: f64,
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberReport {
    /// Its number: the root's is 0.
    pub id: usize,
    /// Whose clone it was.
    pub parent: Option<usize>,
    /// Generations from the root.
    pub depth: u64,
    /// From the wish for it to its first instruction; nothing of the root.
    pub first_instruction_us: Option<f64>,
    /// Operations it has done itself.
    pub ops: u64,
    /// Pages that were copied for it.
    pub pages_copied: u64,
}

/// What a machine, or a snapshot that clones were made of, has of memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shares {
    /// The machine; of a snapshot, the machine it is of.
    pub machine: usize,
    /// Whether this is a snapshot.
    pub is_snapshot: bool,
    /// Bytes that nobody else has.
    pub alone_bytes: u64,
    /// Bytes that it shares.
    pub shared_bytes: u64,
}

/// What everybody has of memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SharesReport {
    /// By machine, then by snapshot.
    pub holders: Vec<Shares>,
    /// Bytes in frames that several share, each counted once.
    pub shared_bytes: u64,
    /// Bytes that only devices hold: of pages that their guest has no more.
    pub held_bytes: u64,
    /// Bytes in use by nobody of them: none, if all is well.
    pub unexplained_bytes: u64,
}

/// What a family was found to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FamilyReport {
    /// Version of the program.
    pub version: String,
    /// The machine it was on.
    pub platform: Platform,
    /// What was asked for.
    pub config: FamilyConfig,
    /// What it amounts to.
    pub verdict: Verdict,
    /// What could not be done, a line each.
    pub error: Option<String>,
    /// What was not checked though it must be.
    pub unchecked: Vec<String>,
    /// What ended it.
    pub ended_by: EndedBy,
    /// How long the root, or those after it, ran.
    pub duration_s: f64,
    /// What the root was loaded from, if it was. That is the first of the snapshots.
    #[serde(default)]
    pub loaded: Option<LoadCounts>,
    /// Why there are fewer machines than were asked for.
    pub refused: Option<String>,
    /// How clones were made; nothing if it did not come to that.
    pub forking: Option<Forking>,
    /// From the wish for a clone to its first instruction, of each.
    pub first_instruction_us: Quantiles,
    /// How long machines stood still for snapshots that clones were made of.
    pub fork_pause_us: Quantiles,
    /// And for all others.
    pub pause_us: Quantiles,
    /// Snapshots taken.
    pub snapshots: u64,
    /// Snapshots checked, every page of them.
    pub checked: u64,
    /// Pages that were compared.
    pub checked_pages: u64,
    /// Random numbers that were compared.
    pub checked_draws: u64,
    /// Who had what of memory at the end.
    pub shares: Option<SharesReport>,
    /// The machines, by number.
    pub machines: Vec<MemberReport>,
    /// Violations.
    pub violations: ViolationCounts,
    /// Bytes of frames in use at the worst moment.
    pub bytes_peak: u64,
    /// And how many might be.
    pub bytes_limit: u64,
    /// Mappings in use at the worst moment.
    pub mappings_peak: u64,
    /// And how many might be.
    pub mappings_limit: u64,
}
