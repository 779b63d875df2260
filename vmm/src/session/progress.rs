//! How a run is watched while it goes on.

use std::time::Duration;

use palimpsest::kept;

use super::report::{DirtyCounts, FaultCounts, PinCounts, Violation, ViolationCounts};

/// Counters at one moment of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Time since the guest started.
    pub elapsed: Duration,
    /// Time the run will take, if that is what ends it.
    pub total: Option<Duration>,
    /// Operations of all vCPUs so far.
    pub ops: u64,
    /// Operations a second, lately.
    pub ops_per_s: f64,
    /// Snapshots taken.
    pub snapshots: u64,
    /// Snapshots checked.
    pub checked: u64,
    /// Snapshots restored.
    pub restored: u64,
    /// Pause of the last snapshot; `None` before the first.
    pub last_pause: Option<Duration>,
    /// The longest pause; `None` before the first snapshot.
    pub worst_pause: Option<Duration>,
    /// Page faults.
    pub faults: FaultCounts,
    /// Pages pinned.
    pub pins: PinCounts,
    /// Dirty tracking.
    pub dirty: DirtyCounts,
    /// DMA requests done, in both directions.
    pub dma_requests: u64,
    /// Bytes they transferred.
    pub dma_bytes: u64,
    /// Violations.
    pub violations: ViolationCounts,
    /// Frames in use now.
    pub frames_in_use: u64,
    /// Frames that have memory now, in use or not.
    pub frames_committed: u64,
    /// Mappings of this process now.
    pub vmas: u64,
}

/// Somebody who watches a run.
///
/// A session calls these from its own thread, never from that of a vCPU or a device, and from one thread at a
/// time. None of them may block for long: snapshots wait meanwhile.
pub trait Observer: Send {
    /// Called about ten times a second.
    fn progress(&mut self, progress: &Progress);

    /// The guest printed `text`: any bytes it likes, in pieces that need not be lines.
    fn console(&mut self, text: &str);

    /// An oracle saw `violation`. Called for every one.
    fn violation(&mut self, violation: &Violation);

    /// Something worth a line happened.
    fn note(&mut self, text: &str);

    /// What the run begins with is being loaded. Called for each region.
    fn loading(&mut self, _progress: &kept::Progress) {}

    /// A snapshot is being saved, beside the run. Called about ten times a second.
    fn saving(&mut self, _progress: &kept::Progress) {}
}
