//! What the guest felt: the longest gap between two operations of one vCPU around a snapshot.
//!
//! The guest measures by its own TSC and keeps the longest gap of each stretch of time
//! (`guest::abi::VcpuPage::gaps`). A snapshot's stall is the longest gap that ended between it and the one
//! after, faults that it caused included. The guest keeps times to the stretch, about 2 ms: a gap that ended
//! so little before a snapshot counts for it too.
//!
//! A guest that was rewound takes its first operation for one that comes after the last before the snapshot: that
//! gap is no gap of the guest's, whenever it ends.

use std::mem::offset_of;
use std::time::Duration;

use guest::abi::{GAP_BUCKETS, GAP_SHIFT, Gap, Layout, VcpuPage};
use hdrhistogram::Histogram;

use super::report::nanoseconds;
use palimpsest::host::Ram;

/// Follows the gaps of a guest from snapshot to snapshot.
#[derive(Debug)]
pub(super) struct StallMeter {
    tsc_khz: u64,
    layout: Layout,
    /// By vCPU, the stretch of time from which on gaps count; `None` until a snapshot was taken.
    since: Option<Vec<u64>>,
    /// By vCPU, the TSC at the last operation that was not undone when it was last rewound; none if it never was.
    rewound_to: Vec<u64>,
    longest_ticks: u64,
    stalls: Histogram<u64>,
}

impl StallMeter {
    pub(super) fn new(layout: Layout, tsc_khz: u32) -> Self {
        Self {
            tsc_khz: u64::from(tsc_khz),
            layout,
            since: None,
            rewound_to: Vec::new(),
            longest_ticks: 0,
            stalls: nanoseconds(),
        }
    }

    /// A snapshot is about to be taken: what was seen since the one before was that one's stall.
    pub(super) fn before_snapshot(&mut self, ram: &Ram) {
        self.finish(ram);
        self.since = Some(self.stretches(ram));
    }

    /// The guest is about to be rewound, and its clock jumps. Nothing counts until the next snapshot.
    pub(super) fn before_restore(&mut self, ram: &Ram) {
        self.finish(ram);
    }

    /// The guest was rewound, and nothing of it runs yet.
    pub(super) fn rewound(&mut self, ram: &Ram) {
        self.rewound_to = self.last_operations(ram);
    }

    /// Records the stall of the last snapshot, as far as it was seen.
    pub(super) fn finish(&mut self, ram: &Ram) {
        self.look(ram);
        if self.since.take().is_some() && self.longest_ticks > 0 && self.tsc_khz > 0 {
            let ns = u128::from(self.longest_ticks) * 1_000_000 / u128::from(self.tsc_khz);
            self.stalls.saturating_record(ns as u64);
        }
        self.longest_ticks = 0;
    }

    /// Looks at the gaps there are. To be called at least once a second, before old ones are overwritten.
    pub(super) fn look(&mut self, ram: &Ram) {
        let Some(since) = &self.since else { return };
        let mut bytes = vec![0u8; GAP_BUCKETS * size_of::<Gap>()];
        for (vcpu, &since) in since.iter().enumerate() {
            let rewound_to = self.rewound_to.get(vcpu).copied();
            let vcpu = vcpu as u64;
            let gaps = self.layout.vcpu_page(vcpu) + offset_of!(VcpuPage, gaps) as u64;
            if ram.read(gaps, &mut bytes).is_err() {
                continue;
            }
            for gap in bytes.chunks_exact(size_of::<Gap>()) {
                let tag = word(gap, offset_of!(Gap, tag));
                let ticks = word(gap, offset_of!(Gap, ticks));
                if tag >= since && !began_before(tag, ticks, rewound_to) {
                    self.longest_ticks = self.longest_ticks.max(ticks);
                }
            }
        }
    }

    /// The stretch of time each vCPU is in.
    fn stretches(&self, ram: &Ram) -> Vec<u64> {
        let last = self.last_operations(ram);
        last.into_iter().map(|tsc| tsc >> GAP_SHIFT).collect()
    }

    /// The TSC at the last operation of each vCPU.
    fn last_operations(&self, ram: &Ram) -> Vec<u64> {
        (0..self.layout.vcpus)
            .map(|vcpu| {
                let gpa = self.layout.vcpu_page(vcpu) + offset_of!(VcpuPage, last_tsc) as u64;
                let mut tsc = [0u8; 8];
                let read = ram.read(gpa, &mut tsc);
                read.map_or(u64::MAX, |()| u64::from_le_bytes(tsc))
            })
            .collect()
    }

    /// The longest of all.
    pub(super) fn longest(&self) -> Duration {
        Duration::from_nanos(self.stalls.max())
    }

    pub(super) fn stalls(&self) -> &Histogram<u64> {
        &self.stalls
    }
}

/// Whether a gap of so many ticks that ended in the stretch `tag` may have begun at `rewound_to`: then it is not the
/// guest's. (No other begins before the guest is rewound, which is later.)
fn began_before(tag: u64, ticks: u64, rewound_to: Option<u64>) -> bool {
    rewound_to.is_some_and(|tsc| (tag << GAP_SHIFT).saturating_sub(ticks) <= tsc)
}

fn word(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..offset + 8]
        .iter()
        .rev()
        .fold(0, |word, &byte| word << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRETCH: u64 = 1 << GAP_SHIFT;

    #[test]
    fn the_gap_from_the_snapshot_on_is_not_the_guests() {
        let last = 100 * STRETCH + 5;
        // From there to wherever in its stretch the first operation is.
        for end in [
            100 * STRETCH + 6,
            120 * STRETCH,
            121 * STRETCH - 1,
            300 * STRETCH,
        ] {
            assert!(began_before(end >> GAP_SHIFT, end - last, Some(last)));
            assert!(!began_before(end >> GAP_SHIFT, end - last, None));
        }
        // It ran on at stretch 119.
        let next = 119 * STRETCH;
        for end in [next + 7, 120 * STRETCH, 300 * STRETCH] {
            assert!(!began_before(end >> GAP_SHIFT, end - next, Some(last)));
        }
    }
}
