//! The numbers of a run of `benches/stress.rs`, and the file they are kept in.

use serde::{Deserialize, Serialize};

use super::churn::Churn;
use super::level::Flatness;
use super::rewinds::Rewinds;
use super::storms::Storms;
use crate::copies::CopyCost;
use crate::report::{Platform, Skipped};

/// A run. Times are in microseconds, sizes in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StressReport {
    /// Version of this program.
    pub version: String,
    /// Where it ran.
    pub platform: Platform,
    /// Snapshots and restores.
    pub rewinds: Option<Rewinds>,
    /// Clones that come and go.
    pub churn: Option<Churn>,
    /// Many clones at once.
    pub storms: Option<Storms>,
    /// Ways to make a copy that runs.
    pub copies: Vec<CopyCost>,
    /// What was not done, and why.
    pub skipped: Vec<Skipped>,
}

impl StressReport {
    /// One without numbers.
    pub fn new(platform: Platform) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            platform,
            rewinds: None,
            churn: None,
            storms: None,
            copies: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// Whether nothing was done.
    pub fn is_empty(&self) -> bool {
        self.loops().is_empty() && self.copies.is_empty()
    }

    /// The loops that were done: their names, what was wrong, and memory.
    pub fn loops(&self) -> Vec<(&'static str, &[String], &Flatness)> {
        let mut loops: Vec<(&'static str, &[String], &Flatness)> = Vec::new();
        if let Some(it) = &self.rewinds {
            loops.push(("rewinds", &it.wrong, &it.flatness));
        }
        if let Some(it) = &self.churn {
            loops.push(("churn", &it.wrong, &it.flatness));
        }
        if let Some(it) = &self.storms {
            loops.push(("storms", &it.wrong, &it.flatness));
        }
        loops
    }

    /// What was wrong, a line each.
    pub fn wrong(&self) -> Vec<String> {
        let loops = self.loops().into_iter();
        loops
            .flat_map(|(name, wrong, flatness)| {
                let wrong = wrong.iter().map(move |what| format!("{name}: {what}"));
                let grown = flatness.grown.iter();
                wrong.chain(grown.map(move |what| format!("{name}: not flat: {what}")))
            })
            .collect()
    }
}
