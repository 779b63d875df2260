//! What an address space has done so far, counted.

use std::sync::atomic::{AtomicU64 as Counter, Ordering};

use crossbeam_utils::CachePadded;

use super::stripe::Striped;

/// Statistics only: nothing is ordered by them. Each stripe of threads has its own, so that two that resolve
/// faults at once do not fight for a cache line.
#[derive(Default)]
pub(super) struct Counters(Striped<CachePadded<Counts>>);

/// What some threads have counted.
#[derive(Default)]
pub(super) struct Counts {
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
    pub(super) pins_fast: Counter,
    pub(super) pins_slow: Counter,
}

impl Counters {
    /// Those of the calling thread.
    #[inline]
    pub(super) fn mine(&self) -> &Counts {
        self.0.mine()
    }

    pub(super) fn add(counter: &Counter) {
        Self::add_more(counter, 1);
    }

    #[inline]
    pub(super) fn add_more(counter: &Counter, more: u64) {
        counter.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> MmStats {
        let get = |of: fn(&Counts) -> &Counter| {
            let counts = self.0.each().map(|counts| of(counts));
            counts.map(|count| count.load(Ordering::Relaxed)).sum()
        };
        MmStats {
            reused: get(|c| &c.reused),
            writer_moved: get(|c| &c.writer_moved),
            sharers_moved: get(|c| &c.sharers_moved),
            zero_filled: get(|c| &c.zero_filled),
            unshared: get(|c| &c.unshared),
            neighbours: get(|c| &c.neighbours),
            eager_copied: get(|c| &c.eager_copied),
            copied: get(|c| &c.copied),
            whole: get(|c| &c.whole),
            split: get(|c| &c.split),
            formed: get(|c| &c.formed),
            ahead: get(|c| &c.ahead),
            pins_fast: get(|c| &c.pins_fast),
            pins_slow: get(|c| &c.pins_slow),
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
