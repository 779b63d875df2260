//! How a family is watched while it lives.

use std::time::Duration;

use crate::check::{Violation, ViolationCounts};

/// What a family is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The root runs by itself.
    WarmingUp,
    /// Clones are made.
    Forking {
        /// Of which generation, from 1.
        generation: u64,
    },
    /// All run.
    Running,
    /// The root is dropped, and every third of the others; the rest runs on.
    Shrinking,
    /// Everything is checked once more, and taken apart.
    Ending,
}

/// One machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemberProgress {
    /// Its number: the root's is 0.
    pub id: usize,
    /// Whose clone it is.
    pub parent: Option<usize>,
    /// Generations from the root.
    pub depth: u64,
    /// Operations it has done, and its ancestors before it was made.
    pub ops: u64,
    /// Operations a second, lately.
    pub ops_per_s: f64,
}

/// A family at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct FamilyProgress {
    /// Time since the root was started.
    pub elapsed: Duration,
    /// What it is at.
    pub phase: Phase,
    /// The machines that live, by number.
    pub members: Vec<MemberProgress>,
    /// How many machines there are to be.
    pub wanted: u64,
    /// Snapshots taken.
    pub snapshots: u64,
    /// Snapshots checked.
    pub checked: u64,
    /// Violations.
    pub violations: ViolationCounts,
    /// Bytes of frames in use.
    pub bytes_in_use: u64,
    /// Bytes of frames that may be.
    pub bytes_limit: u64,
}

/// Somebody who watches a family. Called from one thread, and may not block for long.
pub trait FamilyObserver: Send {
    /// Called about ten times a second.
    fn progress(&mut self, progress: &FamilyProgress);

    /// The guest of a machine printed `text`.
    fn console(&mut self, machine: usize, text: &str);

    /// An oracle saw `violation`, of a machine if it is one's.
    fn violation(&mut self, machine: Option<usize>, violation: &Violation);

    /// Something worth a line happened.
    fn note(&mut self, text: &str);

    /// What the root begins with is being loaded. Called for each region.
    fn loading(&mut self, _progress: &palimpsest::kept::Progress) {}
}
