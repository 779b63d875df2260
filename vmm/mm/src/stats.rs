//! What an address space has done so far, counted.

use std::sync::atomic::{AtomicU64 as Counter, Ordering};

use super::stripe::StripedCounter;

/// Statistics only: nothing is ordered by them.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) reused: Counter,
    pub(super) writer_moved: Counter,
    pub(super) sharers_moved: Counter,
    pub(super) zero_filled: Counter,
    pub(super) unshared: Counter,
    pub(super) neighbours: Counter,
    pub(super) eager_copied: Counter,
    pub(super) copied: Counter,
    pub(super) whole: Counter,
    pub(super) split: Counter,
    pub(super) formed: Counter,
    pub(super) ahead: Counter,
    /// The one that counts what has no lock.
    pub(super) pins_fast: StripedCounter,
    pub(super) pins_slow: Counter,
}

impl Counters {
    pub(super) fn add(counter: &Counter) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> MmStats {
        let get = |c: &Counter| c.load(Ordering::Relaxed);
        MmStats {
            reused: get(&self.reused),
            writer_moved: get(&self.writer_moved),
            sharers_moved: get(&self.sharers_moved),
            zero_filled: get(&self.zero_filled),
            unshared: get(&self.unshared),
            neighbours: get(&self.neighbours),
            eager_copied: get(&self.eager_copied),
            copied: get(&self.copied),
            whole: get(&self.whole),
            split: get(&self.split),
            formed: get(&self.formed),
            ahead: get(&self.ahead),
            pins_fast: self.pins_fast.sum(),
            pins_slow: get(&self.pins_slow),
        }
    }
}

/// What an address space has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmStats {
    /// Write faults that found the frame exclusive, or its holder the last, and copied nothing.
    pub reused: u64,
    /// COW breaks that gave the writer the copy.
    pub writer_moved: u64,
    /// COW breaks that gave the snapshots the copy.
    pub sharers_moved: u64,
    /// First writes to memory that was never touched.
    pub zero_filled: u64,
    /// COW breaks and first touches on behalf of a reading pin.
    pub unshared: u64,
    /// Pages resolved beside one that faulted, to save faults or mappings.
    pub neighbours: u64,
    /// Pages that fork copied because a device held them.
    pub eager_copied: u64,
    /// Pages that breaks copied, for whoever they were.
    pub copied: u64,
    /// Regions that were broken whole.
    pub whole: u64,
    /// Huge entries that became small ones.
    pub split: u64,
    /// Small entries of a region that became a huge one again.
    pub formed: u64,
    /// Pages, and regions that a huge entry maps, that were broken before the guest wrote to them.
    pub ahead: u64,
    /// Pins taken without a lock.
    pub pins_fast: u64,
    /// Pins that had to take the lock.
    pub pins_slow: u64,
}
