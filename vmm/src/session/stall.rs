//! What the guest felt: the longest gap between two operations of one vCPU around a snapshot.
//!
//! The guest measures by its own TSC and keeps the longest gap of each stretch of time
//! (`guest::abi::VcpuPage::gaps`). A snapshot's stall is the longest gap that ended between it and the one
//! after, faults that it caused included. The guest keeps times to the stretch, about 2 ms: a gap that ended
//! so little before a snapshot counts for it too.

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
    longest_ticks: u64,
    stalls: Histogram<u64>,
}

impl StallMeter {
    pub(super) fn new(layout: Layout, tsc_khz: u32) -> Self {
        Self {
            tsc_khz: u64::from(tsc_khz),
            layout,
            since: None,
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
        for (vcpu, &since) in (0..).zip(since) {
            let gaps = self.layout.vcpu_page(vcpu) + offset_of!(VcpuPage, gaps) as u64;
            if ram.read(gaps, &mut bytes).is_err() {
                continue;
            }
            for gap in bytes.chunks_exact(size_of::<Gap>()) {
                let tag = word(gap, offset_of!(Gap, tag));
                if tag >= since {
                    self.longest_ticks = self.longest_ticks.max(word(gap, offset_of!(Gap, ticks)));
                }
            }
        }
    }

    /// The stretch of time each vCPU is in.
    fn stretches(&self, ram: &Ram) -> Vec<u64> {
        (0..self.layout.vcpus)
            .map(|vcpu| {
                let gpa = self.layout.vcpu_page(vcpu) + offset_of!(VcpuPage, last_tsc) as u64;
                let mut tsc = [0u8; 8];
                match ram.read(gpa, &mut tsc) {
                    Ok(()) => u64::from_le_bytes(tsc) >> GAP_SHIFT,
                    Err(_) => u64::MAX,
                }
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

fn word(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..offset + 8]
        .iter()
        .rev()
        .fold(0, |word, &byte| word << 8 | u64::from(byte))
}
