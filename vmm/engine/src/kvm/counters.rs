//! Counts of what vCPUs did.

use std::sync::atomic::{AtomicU64, Ordering};

use super::fault::RungCounters;

/// Counts of what vCPUs did.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) write_faults: AtomicU64,
    pub(crate) rungs: RungCounters,
    pub(crate) emulated_stores: AtomicU64,
    pub(crate) signals: AtomicU64,
    pub(crate) port_exits: AtomicU64,
    pub(crate) kicks: AtomicU64,
    /// Exits of any kind, by vCPU.
    exits: Vec<AtomicU64>,
}

impl Counters {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            exits: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            ..Self::default()
        }
    }

    /// vCPU `vcpu` has come out of the guest.
    pub(crate) fn note_exit(&self, vcpu: usize) {
        self.exits[vcpu].fetch_add(1, Ordering::Relaxed);
    }

    /// How often each vCPU has come out of the guest.
    pub(crate) fn exits(&self) -> Vec<u64> {
        let count = |exits: &AtomicU64| exits.load(Ordering::Relaxed);
        self.exits.iter().map(count).collect()
    }
}
