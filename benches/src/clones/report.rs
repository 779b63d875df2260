//! The numbers of a run of `benches/clone.rs`, and the file they are kept in.

use serde::{Deserialize, Serialize};

use super::crowd::Crowd;
use super::idle::Idle;
use super::pause::Pause;
use super::price::Price;
use super::rewrite::Rewrite;
use crate::report::{Platform, Skipped};
use crate::verdict::Verdict;

/// A run. Times are in microseconds, sizes in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CloneReport {
    /// Version of this program.
    pub version: String,
    /// Where it ran.
    pub platform: Platform,
    /// Rounds of each measurement.
    pub rounds: u64,
    /// From the wish for a clone to its first instruction.
    pub prices: Vec<Price>,
    /// What idle clones take.
    pub idle: Vec<Idle>,
    /// Many clones of a parent that runs.
    pub crowds: Vec<Crowd>,
    /// How long parents stand still.
    pub pauses: Vec<Pause>,
    /// Clones that write all of their memory.
    pub rewrites: Vec<Rewrite>,
    /// What was not measured, and why.
    pub skipped: Vec<Skipped>,
    /// What the numbers say about the targets.
    pub targets: Vec<Verdict>,
}

impl CloneReport {
    /// One without numbers.
    pub fn new(platform: Platform, rounds: u64) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            platform,
            rounds,
            prices: Vec::new(),
            idle: Vec::new(),
            crowds: Vec::new(),
            pauses: Vec::new(),
            rewrites: Vec::new(),
            skipped: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        let Self {
            prices,
            idle,
            crowds,
            pauses,
            rewrites,
            ..
        } = self;
        prices.is_empty()
            && idle.is_empty()
            && crowds.is_empty()
            && pauses.is_empty()
            && rewrites.is_empty()
    }

    /// What clones of a parent of `memory` bytes cost whose memory is in such pieces.
    pub fn price(&self, memory: u64, entries: &str) -> Option<&Price> {
        let is = |price: &&Price| price.memory == memory && price.entries == entries;
        self.prices.iter().find(is)
    }
}
