//! What was saved to a store, and loaded from one.

use serde::{Deserialize, Serialize};

/// A snapshot that was saved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SaveCounts {
    /// The store.
    pub store: String,
    /// Its name there.
    pub name: String,
    /// Whether it is there, whole and durable.
    pub is_saved: bool,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Bytes of chunks that were written.
    pub bytes_written: u64,
    /// Chunks that were written.
    pub written: u64,
    /// Chunks that were in the store.
    pub found: u64,
    /// Regions that were known to be the parent's, and were not read.
    pub same: u64,
    /// How long it took, beside the running guest.
    pub seconds: f64,
    /// It was not saved since something has its name that was not there when the run began.
    #[serde(default)]
    pub name_is_taken: bool,
}

/// Snapshots that were saved every so often.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointCounts {
    /// The store.
    pub store: String,
    /// What their names begin with.
    pub name: String,
    /// How many were saved.
    pub saved: u64,
    /// How many could not be, and why the last of these could not.
    pub failed: u64,
    /// See above.
    pub last_failure: Option<String>,
    /// How many were dropped again.
    pub dropped: u64,
    /// How many are there of those that were saved.
    pub kept: u64,
    /// The name of the last.
    pub last: Option<String>,
    /// Bytes of chunks that were written.
    pub bytes_written: u64,
}

/// A snapshot that was loaded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadCounts {
    /// The store.
    pub store: String,
    /// Its name there.
    pub name: String,
    /// Chunks that it is in.
    pub chunks: u64,
    /// Bytes of memory in them.
    pub bytes: u64,
    /// From the first read until the VM was ready to run.
    pub seconds: f64,
    /// Whether chunks were read as somebody wanted them, while the guest ran. If not all were, before it did, and what
    /// follows is 0.
    #[serde(default)]
    pub is_lazy: bool,
    /// Chunks that a vCPU has touched first.
    #[serde(default)]
    pub by_vcpus: u64,
    /// Those that a device, or other host code, has.
    #[serde(default)]
    pub by_host: u64,
    /// Those that who reads snapshots has: the checker, a save.
    #[serde(default)]
    pub by_readers: u64,
    /// Those that were read before anybody wanted them.
    #[serde(default)]
    pub prefetched: u64,
    /// From the first read until the last vCPU was about to run; 0 if none did.
    #[serde(default)]
    pub first_instruction_s: f64,
    /// What vCPUs have waited for chunks that they have touched: in all, and at most for one.
    #[serde(default)]
    pub waited_s: f64,
    /// See there.
    #[serde(default)]
    pub waited_most_s: f64,
}

impl LoadCounts {
    /// Chunks that were read.
    pub fn read(&self) -> u64 {
        match self.is_lazy {
            true => self.by_vcpus + self.by_host + self.by_readers + self.prefetched,
            false => self.chunks,
        }
    }
}
