//! Counts of what vCPUs did.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

use super::fault::{RungCounters, RungCounts};

/// Counts of what vCPUs did: each has its own, and nobody else changes those.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    vcpus: Box<[CachePadded<VcpuCounters>]>,
    /// Changed by who pauses them.
    pub(crate) kicks: AtomicU64,
}

/// What one vCPU did.
#[derive(Debug, Default)]
pub(crate) struct VcpuCounters {
    pub(crate) write_faults: AtomicU64,
    pub(crate) rungs: RungCounters,
    pub(crate) emulated_stores: AtomicU64,
    pub(crate) signals: AtomicU64,
    pub(crate) port_exits: AtomicU64,
    /// Exits of any kind.
    exits: AtomicU64,
}

impl VcpuCounters {
    /// It has come out of the guest.
    pub(crate) fn note_exit(&self) {
        self.exits.fetch_add(1, Ordering::Relaxed);
    }
}

impl Counters {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            vcpus: (0..vcpus).map(|_| CachePadded::default()).collect(),
            ..Self::default()
        }
    }

    /// Those of vCPU `vcpu`.
    pub(crate) fn of(&self, vcpu: usize) -> &VcpuCounters {
        &self.vcpus[vcpu]
    }

    /// How often each vCPU has come out of the guest.
    pub(crate) fn exits(&self) -> Vec<u64> {
        let count = |vcpu: &CachePadded<VcpuCounters>| vcpu.exits.load(Ordering::Relaxed);
        self.vcpus.iter().map(count).collect()
    }

    /// What all vCPUs together have counted.
    pub(crate) fn sum(&self, of: fn(&VcpuCounters) -> &AtomicU64) -> u64 {
        let counts = self.vcpus.iter().map(|vcpu| of(vcpu));
        counts.map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// The same by rungs.
    pub(crate) fn rungs(&self) -> RungCounts {
        let all = self.vcpus.iter().map(|vcpu| vcpu.rungs.now());
        all.fold(RungCounts::default(), RungCounts::plus)
    }
}
