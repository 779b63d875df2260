//! What is done every tenth of a second, and tells the observer how far the run is.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Drive;
use super::counts::{fault_counts, pin_counts};
use crate::session::config::RunLength;
use crate::session::kept::Keeping;
use crate::session::life;
use crate::session::progress::Progress;

impl Drive<'_> {
    /// Looks at what the checker, the guest and the devices have done since the last call, and tells the
    /// observer.
    pub(super) fn tick(&mut self) {
        for violation in self.worker.take_violations() {
            self.violation(&violation);
        }
        let ops = self.counters().ops();
        let patience = life::patience(self.stall.longest());
        if let Some(violation) = self.life.look(&ops, patience) {
            self.violation(&violation);
            self.occasion.give_up();
        }
        self.occasion.look(&ops, patience);
        let requests = self.vm.requests_by_device();
        if let Some(violation) = self.device_life.look(&ops, &requests, patience) {
            self.violation(&violation);
        }
        self.stall.look(self.vm.ram());
        self.collect_mismatches();
        let lost = self.inbox.take_lost();
        self.unheard += lost as u64;
        if lost > 0 {
            self.observer.note(&format!(
                "the guest says more than can be listened to: {lost} messages lost"
            ));
        }
        let progress = self.progress(ops.iter().sum());
        self.observer.progress(&progress);
        if let Some(Keeping::Going(going) | Keeping::Checkpoints(_, Some(going))) = &self.keeping {
            self.observer.saving(&going.progress());
        }
    }

    fn progress(&mut self, ops_now: u64) -> Progress {
        let now = Instant::now();
        let ops = (ops_now + self.ops_undone).saturating_sub(self.ops_before);
        let (then, before, rate) = self.recent_ops;
        let elapsed = (now - then).as_secs_f64();
        if elapsed >= 0.5 {
            self.recent_ops = (now, ops, ops.saturating_sub(before) as f64 / elapsed);
        }
        let (mm, dma) = (self.vm.space().stats(), self.vm.devices.stats());
        let usage = self.vm.frames().pool().usage();
        Progress {
            elapsed: now - self.started,
            total: match self.config.length {
                RunLength::Duration(length) => Some(length),
                RunLength::Snapshots(_) => None,
            },
            ops,
            ops_per_s: rate,
            snapshots: self.taken,
            checked: self.worker.progress().checked,
            restored: self.restored,
            last_pause: self.last_pause,
            worst_pause: self
                .last_pause
                .map(|_| Duration::from_nanos(self.pauses.max())),
            faults: fault_counts(&mm, &self.vm.machine().stats()),
            pins: pin_counts(&mm, dma.registered),
            dirty: self.dirty_counts(),
            dma_requests: dma.to_guest + dma.from_guest,
            dma_bytes: dma.bytes,
            violations: self.violations,
            frames_in_use: usage.in_use,
            frames_committed: usage.committed,
            vmas: self.vm.frames().budget().used(),
        }
    }

    /// Waits for vCPUs that have done nothing since the guest was rewound, as long as they may take, unless
    /// the run is to stop at once.
    pub(super) fn await_life(&mut self) {
        while self.life.is_waiting() && !self.stop.load(Ordering::Relaxed) {
            let patience = life::patience(self.stall.longest());
            let ops = self.counters().ops();
            if let Some(violation) = self.life.look(&ops, patience) {
                self.violation(&violation);
            }
            if let Some(event) = self.inbox.wait(Duration::from_millis(1))
                && self.handle(event).is_some()
            {
                return;
            }
        }
    }
}
