//! Counters: how often each thing was done, and the memory it took.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What the guest got done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestCounts {
    /// Operations of all vCPUs.
    pub ops: u64,
    /// The same, a second of the run.
    pub ops_per_s: f64,
}

impl GuestCounts {
    /// `ops` operations in `time`.
    pub fn over(ops: u64, time: Duration) -> Self {
        let seconds = time.as_secs_f64();
        Self {
            ops,
            ops_per_s: if seconds > 0.0 {
                (ops as f64 / seconds * 10.0).round() / 10.0
            } else {
                0.0
            },
        }
    }
}

/// Snapshots, by what was done with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotCounts {
    /// Taken.
    pub taken: u64,
    /// Checked, every page of them.
    pub checked: u64,
    /// Restored.
    pub restored: u64,
    /// No longer kept though they should have been: the guest needed the memory.
    #[serde(default)]
    pub dropped: u64,
    /// Those of them in which a device was in the middle of a request: it did not
    /// reach the end of it in time.
    #[serde(default)]
    pub in_flight: u64,
}

/// Page faults, by how they were resolved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCounts {
    /// A write that kept its frame: it was the last owner.
    pub reused: u64,
    /// A write that got a copy.
    pub copied: u64,
    /// A read pin that got a frame of its own.
    pub unshared: u64,
    /// Copies a fork made at once, of pinned pages.
    pub eager_copied: u64,
    /// A write to memory that was never touched.
    pub zero_filled: u64,
    /// Pages copied beside one that was written, with all of their region.
    #[serde(default)]
    pub neighbours: u64,
    /// Regions of 2 MiB that were copied whole.
    #[serde(default)]
    pub whole: u64,
    /// Huge entries that became small ones.
    #[serde(default)]
    pub split: u64,
    /// Pages and regions that were copied ahead of the guest's writes, at no fault.
    #[serde(default)]
    pub ahead: u64,
    /// Faults of vCPUs whose page KVM named.
    #[serde(default)]
    pub by_kvm: u64,
    /// Faults of vCPUs that were about what their instruction wrote.
    #[serde(default)]
    pub by_operand: u64,
    /// Faults of vCPUs that were about a page table walked for their instruction.
    #[serde(default)]
    pub by_walk: u64,
    /// Faults of vCPUs that were about what the delivery of an event needs.
    #[serde(default)]
    pub by_event: u64,
    /// Faults of vCPUs for which the regions around them were made writable.
    #[serde(default)]
    pub by_region: u64,
    /// Faults of vCPUs for which a region farther away was made writable, on the way through all of memory.
    #[serde(default)]
    pub by_all: u64,
    /// Faults of vCPUs whose page a signal named: those of threads of this process.
    #[serde(default)]
    pub by_signal: u64,
    /// Stores that KVM emulated and could not do itself.
    #[serde(default)]
    pub emulated: u64,
}

impl FaultCounts {
    /// Faults of all kinds. Eager copies are none: fork makes them, nobody waits at a page.
    pub const fn total(&self) -> u64 {
        self.reused + self.copied + self.unshared + self.zero_filled
    }
}

/// Pages pinned, by the way it was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinCounts {
    /// Without a lock.
    pub fast: u64,
    /// Under the region's lock.
    pub slow: u64,
    /// For registered buffers.
    pub registered: u64,
}

impl PinCounts {
    /// Pins taken by either path.
    pub const fn total(&self) -> u64 {
        self.fast + self.slow
    }
}

/// Transfers of the devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaCounts {
    /// Requests that wrote guest memory.
    pub to_guest: u64,
    /// Requests that read guest memory.
    pub from_guest: u64,
    /// Bytes of both.
    pub bytes: u64,
}

/// Dirty tracking, beside the running guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyCounts {
    /// How often it was asked which pages were written.
    pub rounds: u64,
    /// Pages in the answers.
    pub pages: u64,
}

/// What a run cost the host at its worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPeaks {
    /// Frames in use at once.
    pub frames_peak: u64,
    /// The same in bytes.
    pub bytes_peak: u64,
    /// Bytes of host memory that frames had at once, in use or not.
    pub committed_peak: u64,
    /// Mappings of this process at once.
    pub vmas_peak: u64,
    /// The most the kernel allows: `vm.max_map_count`.
    pub vmas_limit: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_a_second_is_never_infinite() {
        assert_eq!(GuestCounts::over(5, Duration::ZERO).ops_per_s, 0.0);
        assert_eq!(GuestCounts::over(5, Duration::from_secs(2)).ops_per_s, 2.5);
    }
}
