//! The numbers of a run of `benches/kept.rs`, and the file they are kept in.

use serde::{Deserialize, Serialize};

use super::clones::ClonesCost;
use super::increment::IncrementCost;
use super::load::LoadCost;
use super::save::SaveCost;
use super::verify::VerifyCost;
use crate::report::{Platform, Skipped};
use crate::verdict::Verdict;

/// A run. Times are in microseconds, sizes in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptReport {
    /// Version of this program.
    pub version: String,
    /// Where it ran.
    pub platform: Platform,
    /// Rounds of each measurement.
    pub rounds: u64,
    /// From the wish for a VM to its first instruction, and its first pass over memory.
    pub loads: Vec<LoadCost>,
    /// Saves beside a guest that runs.
    pub saves: Vec<SaveCost>,
    /// Saves of what has changed.
    pub increments: Vec<IncrementCost>,
    /// Reading all of a snapshot.
    pub verifies: Vec<VerifyCost>,
    /// Memory of clones of one.
    pub clones: Vec<ClonesCost>,
    /// What was not measured, and why.
    pub skipped: Vec<Skipped>,
    /// What the numbers say about the targets.
    pub targets: Vec<Verdict>,
}

impl KeptReport {
    /// One without numbers.
    pub fn new(platform: Platform, rounds: u64) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            platform,
            rounds,
            loads: Vec::new(),
            saves: Vec::new(),
            increments: Vec::new(),
            verifies: Vec::new(),
            clones: Vec::new(),
            skipped: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        let Self {
            loads,
            saves,
            increments,
            verifies,
            clones,
            ..
        } = self;
        loads.is_empty()
            && saves.is_empty()
            && increments.is_empty()
            && verifies.is_empty()
            && clones.is_empty()
    }

    /// What a load of `memory` bytes costs.
    pub fn load(&self, memory: u64) -> Option<&LoadCost> {
        self.loads.iter().find(|load| load.memory == memory)
    }
}
