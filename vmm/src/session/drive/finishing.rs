//! The end: everything is taken apart, looked at once more, and written down.

use std::time::Duration;

use guest::abi::PAGE_SIZE;

use super::Drive;
use super::counts::{fault_counts, pin_counts};
use crate::check::account;
use crate::session::config::Injection;
use crate::session::end::End;
use crate::session::kept::Keeping;
use crate::session::ports::Event;
use crate::session::report::{
    DmaCounts, EndedBy, GuestCounts, MemoryPeaks, Quantiles, Report, SnapshotCounts, Verdict,
};

impl Drive<'_> {
    /// Takes everything apart, looks at what is left, and writes it all down.
    pub(super) fn finish(mut self, mut end: End, duration: Duration, policy: &str) -> Report {
        let platform = self.accelerator.platform();
        self.stall.finish(self.vm.ram());
        let ops = self.counters().ops();
        let ops = (ops.iter().sum::<u64>() + self.ops_undone).saturating_sub(self.ops_before);
        // The guest is stopped first. The snapshots that have their last look now had it run beside them so
        // far.
        self.vm.machine().stop();
        let stopped = self.vm.machine().wait_until_stopped();
        if stopped.is_ok() {
            self.look_at_last_draws();
        }
        let (mm, dma) = (self.vm.space().stats(), self.vm.devices.stats());
        let faults = fault_counts(&mm, &self.vm.machine().stats());
        let dirty = self.dirty_counts();
        // All hold snapshots.
        (self.parent, self.tracker, self.base) = (None, None, None);
        while !self.kept.is_empty() {
            self.retire_oldest();
        }
        let (violations, finished) = self.worker.finish();
        for violation in violations {
            self.violation(&violation);
        }
        let late = finished.map_err(|error| End::error(&error)).and_then(|()| {
            self.vm
                .devices
                .take_error()
                .map_or(Ok(()), |e| Err(End::error(&e)))
        });
        if let (None, Err(late)) = (&end.error, late) {
            end = late;
        }
        let checks = self.worker.progress();
        if checks.checked == 0 {
            self.unchecked.push(no_snapshot(end.by).to_owned());
        }
        // What vCPUs said last.
        while let Some(event) = self.inbox.wait(Duration::ZERO) {
            if !matches!(event, Event::Ended(..)) {
                self.handle(event);
            }
        }

        if let (Some(loading), Some(loaded)) = (self.loading.take(), &mut self.loaded) {
            loading.finish(loaded);
        }
        let Self {
            config,
            observer,
            vm,
            mut violations,
            taken,
            restored,
            dropped,
            mut unchecked,
            unheard,
            in_flight,
            pauses,
            steps,
            stall,
            loaded,
            keeping,
            checkpoints,
            ..
        } = self;
        let frames = vm.frames().clone();
        let usage = frames.pool().usage();
        drop(vm);
        match stopped {
            Ok(()) => {
                for violation in account(frames.pool(), frames.budget()) {
                    violations.add(violation.oracle);
                    observer.violation(&violation);
                }
            }
            // What a vCPU that is stuck holds is not lost: there is nothing to account for before it lets go.
            Err(stuck) if end.error.is_none() => end = End::error(&stuck),
            Err(_) => {}
        }

        if let Some(fault) = config.inject
            && violations.total() == 0
        {
            unchecked.push(not_caught(fault, end.by));
        }
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            platform: platform.into(),
            config: config.clone(),
            policy: policy.to_owned(),
            verdict: Verdict::of(&violations, end.error.as_deref(), &unchecked),
            error: end.error,
            unchecked,
            ended_by: end.by,
            duration_s: duration.as_secs_f64(),
            guest: GuestCounts::over(ops, duration),
            stall_us: Quantiles::of(stall.stalls()),
            snapshots: SnapshotCounts {
                taken,
                checked: checks.checked,
                restored,
                dropped,
                in_flight,
            },
            pause_us: Quantiles::of(&pauses),
            steps_us: steps.quantiles(),
            faults,
            pins: pin_counts(&mm, dma.registered),
            dma: DmaCounts {
                to_guest: dma.to_guest,
                from_guest: dma.from_guest,
                bytes: dma.bytes,
            },
            dirty,
            checked_pages: checks.pages,
            checked_draws: checks.draws,
            violations,
            memory: MemoryPeaks {
                frames_peak: usage.peak,
                bytes_peak: usage.peak * PAGE_SIZE,
                committed_peak: usage.committed_peak * PAGE_SIZE,
                vmas_peak: frames.budget().peak(),
                vmas_limit: frames.budget().limit(),
            },
            lines_lost: unheard,
            loaded,
            saved: match keeping {
                Some(Keeping::Done(counts)) => Some(counts),
                _ => None,
            },
            checkpoints,
        }
    }
}

/// Why a run that ended like this has not taken a single snapshot.
fn no_snapshot(by: EndedBy) -> &'static str {
    match by {
        EndedBy::GuestExit => "no snapshot was taken before the guest exited",
        EndedBy::CtrlC => "no snapshot was taken before the run was ended",
        _ => {
            "no snapshot was taken: run for longer (--duration), or take them more often (--snapshot-every)"
        }
    }
}

/// Says that no oracle has seen the fault that was injected.
fn not_caught(fault: Injection, by: EndedBy) -> String {
    let oracle = fault.caught_by();
    match by {
        EndedBy::CtrlC => {
            format!("the run was ended before {oracle} could catch the injected {fault}")
        }
        _ => format!("the injected {fault} was NOT caught by {oracle}"),
    }
}
