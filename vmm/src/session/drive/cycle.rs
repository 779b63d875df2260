//! The loop: what is due, and in which order.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Drive, TICK};
use crate::session::config::{GuestSource, RunLength};
use crate::session::end::End;
use crate::session::kept::Keeping;
use crate::session::occasion::PATIENCE;
use crate::session::report::EndedBy;

/// Looks the checker may be behind before the next snapshot waits for it.
const MOST_BACKLOG: u64 = 3;

impl Drive<'_> {
    /// Drives the run to its end.
    pub(super) fn drive(&mut self) -> End {
        loop {
            if let Err(end) = self.turn() {
                return end;
            }
        }
    }

    /// Does what is due, and waits for the guest or for what is due next.
    fn turn(&mut self) -> Result<(), End> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(End::fine(EndedBy::CtrlC));
        }
        let now = Instant::now();
        let is_over = match self.config.length {
            RunLength::Duration(length) => {
                (now >= self.started + length).then_some(EndedBy::Duration)
            }
            RunLength::Snapshots(count) => {
                (self.taken - self.taken_before >= count).then_some(EndedBy::Snapshots)
            }
        };
        let ops = self.counters().ops();
        if let Some(by) = is_over
            && self
                .occasion
                .is_over(&ops, &self.vm.requests_by_device(), &self.vm.layout)
            && self.has_kept()?
        {
            return Err(End::fine(by));
        }
        if let Some(why) = self.occasion.overdue() {
            return Err(End::failed(why));
        }
        if is_over.is_some() {
            if let Some(note) = self.occasion.go_on() {
                self.observer.note(&note);
            }
            self.restore_is_due |= self.occasion.lacks_a_restore();
        }
        let is_ripe = self.occasion.is_ripe(&ops);
        self.latch()?;
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.tick();
        }
        self.check_all_are_well()?;
        self.checkpoint(now);
        self.track(now)?;
        if self.restore_is_due && is_ripe {
            return self.restore();
        }
        // What is still missing for the fault does not wait for its time.
        // Nor does the one that is to be saved, if there is none.
        let is_wanted =
            is_over.is_none() || !self.occasion.has_steps() || self.lacks_what_to_save();
        // Nor does the run that only waits for what is being saved.
        let is_saving = matches!(
            self.keeping,
            Some(Keeping::Going(_) | Keeping::Checkpoints(_, Some(_)))
        );
        let due = now >= self.next_snapshot || (is_over.is_some() && is_wanted && !is_saving);
        if due
            && is_ripe
            && is_wanted
            && self.may_be_checked()
            && !self.restore_is_due
            && self.worker.backlog() <= MOST_BACKLOG
            && self.has_room()
        {
            // The next one is due a whole interval from now: a late one is not made up for by a burst.
            self.next_snapshot = now + self.config.snapshot_every;
            self.snapshot()?;
        }
        let mut wake = if due {
            Duration::from_millis(1)
        } else {
            self.next_snapshot.min(self.next_tick) - now
        };
        if let Some(tracker) = &self.tracker {
            wake = wake.min(tracker.next().saturating_duration_since(now));
        }
        match self.inbox.wait(wake.min(TICK)) {
            Some(event) => self.handle(event).map_or(Ok(()), Err),
            None => Ok(()),
        }
    }

    /// Fails if devices, memory or the checker cannot go on.
    fn check_all_are_well(&self) -> Result<(), End> {
        if let Some(error) = self.vm.devices.take_error() {
            return Err(End::error(&error));
        }
        if let Err(error) = self.vm.space().check() {
            return Err(End::error(&error));
        }
        if self.worker.is_dead() {
            return Err(End::failed(self.worker.why_dead()));
        }
        Ok(())
    }

    /// A round of dirty tracking, if one is due. Beside the running guest, if that can be.
    fn track(&mut self, now: Instant) -> Result<(), End> {
        let Some(tracker) = &mut self.tracker else {
            return Ok(());
        };
        if now < tracker.next() {
            return Ok(());
        }
        let parts = self.vm.parts();
        match parts.while_protecting(|| tracker.round(parts.space)) {
            Ok(done) => done.map_err(|error| End::error(&error)),
            Err(error) => Err(self.why_vcpus_ended(error)),
        }
    }

    /// Looks, while the guest runs, whether it says that it follows the formula. What it has said once holds,
    /// whatever a snapshot says.
    fn latch(&mut self) -> Result<(), End> {
        if self.boot.is_some() {
            return Ok(());
        }
        match self.vm.latch() {
            Ok(boot) => {
                self.boot = boot.map(Arc::new);
                self.first_of_boot = self.taken + 1;
            }
            Err(error) => return Err(self.why_vcpus_ended(error.into())),
        }
        let is_late = self.started.elapsed() > PATIENCE;
        if !self.may_be_checked() && is_late {
            return Err(End::failed(format!(
                "the guest has not begun to write memory after {} s",
                PATIENCE.as_secs()
            )));
        }
        Ok(())
    }

    /// Whether a snapshot may be taken. One of the payload waits until the payload follows the formula, by
    /// which it is checked; other guests need not follow any.
    fn may_be_checked(&self) -> bool {
        self.boot.is_some() || self.config.guest != GuestSource::Payload
    }
}
