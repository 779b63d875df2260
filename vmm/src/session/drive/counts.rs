//! How far guest, devices and memory are, as progress and report name it.

use super::Drive;
use crate::session::occasion::GuestCounters;
use crate::session::report::{DirtyCounts, FaultCounts, PinCounts};
use crate::session::tracker::Tracker;
use palimpsest::kvm::{MachineStats, Rung};
use palimpsest::mm::MmStats;

impl Drive<'_> {
    pub(super) fn counters(&self) -> GuestCounters<'_> {
        GuestCounters::of(&self.vm)
    }

    pub(super) fn dirty_counts(&self) -> DirtyCounts {
        self.tracker
            .as_ref()
            .map_or_else(DirtyCounts::default, Tracker::counts)
    }
}

pub(super) fn fault_counts(mm: &MmStats, machine: &MachineStats) -> FaultCounts {
    let by = |rung| machine.rungs.of(rung);
    FaultCounts {
        reused: mm.reused,
        copied: mm.sharers_moved + mm.writer_moved,
        unshared: mm.unshared,
        eager_copied: mm.eager_copied,
        zero_filled: mm.zero_filled,
        neighbours: mm.neighbours,
        whole: mm.whole,
        split: mm.split,
        ahead: mm.ahead,
        by_kvm: by(Rung::Kvm),
        by_operand: by(Rung::Operand),
        by_walk: by(Rung::Walk),
        by_event: by(Rung::Event),
        by_region: by(Rung::Region),
        by_all: by(Rung::All),
        by_signal: machine.signals,
        emulated: machine.emulated_stores,
    }
}

pub(super) fn pin_counts(mm: &MmStats, registered: u64) -> PinCounts {
    PinCounts {
        fast: mm.pins_fast,
        slow: mm.pins_slow,
        registered,
    }
}
