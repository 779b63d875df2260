//! Taking a snapshot, with the fault that is injected into it.

use std::cell::{Cell, OnceCell, RefCell};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::Drive;
use super::room::room_for;
use crate::check::Look;
use crate::dma::{DeviceSet, DeviceState};
use crate::run_snapshot::RunSnapshot;
use crate::session::config::Injection;
use crate::session::end::End;
use crate::session::faults::{AtLarge, Late, Leaky, Old, Stale};
use crate::session::occasion::{GuestCounters, overdue, wait_until};
use crate::session::skew::SkewedMemory;
use crate::session::vm::leaky_pages;
use palimpsest::kvm::VcpuState;
use palimpsest::mm::ForkError;
use palimpsest::snapshot::{self, Preparation, TakeError, Timing};

impl Drive<'_> {
    /// Takes a snapshot, hands it to the checker, retires an old one, and maybe rewinds.
    pub(super) fn snapshot(&mut self) -> Result<(), End> {
        self.stall.before_snapshot(self.vm.ram());
        let number = self.taken + 1;
        let parent = self.parent.as_ref().map(|p| p.number());
        let Some((snapshot, timing)) = self.take()? else {
            return Ok(());
        };
        self.taken = number;
        self.note_pause(timing);
        let snapshot = RunSnapshot::new(number, parent, snapshot);
        let snapshot = snapshot.map_err(|error| End::error(&error))?;
        let snapshot = Arc::new(snapshot.of(Arc::clone(&self.vm.incarnation)));
        let tracked = self.tracker.as_mut().and_then(|t| t.at(&snapshot));
        let is_in_flight = |state: &DeviceState| state.in_flight.is_some();
        self.in_flight += u64::from(snapshot.devices().iter().any(is_in_flight));
        let look = Look {
            boot: self.boot.clone(),
            parent: self.parent.clone(),
            tracked,
        };
        self.worker.first_look(&snapshot, look);
        self.parent = Some(Arc::clone(&snapshot));
        self.kept.push_back(snapshot);
        while self.kept.len() > self.config.keep {
            self.retire_oldest();
        }
        if self.config.inject == Some(Injection::LeakPin) && !self.leaked {
            self.leaked = true;
            self.vm.devices.leak_one_pin().map_err(|e| End::error(&e))?;
        }
        self.occasion
            .snapshot(self.counters().ops(), self.vm.requests_by_device());
        let every = self.config.restore_every;
        self.restore_is_due = every > 0 && number.is_multiple_of(every);
        // With a fault in the run, the guest does something first.
        if self.restore_is_due && self.config.inject.is_none() {
            return self.restore();
        }
        Ok(())
    }

    /// Has the engine take a snapshot, with a round of dirty tracking at its instant. `None` if there was no
    /// room for it after all: it is taken later, or an old one went to make room.
    fn take(&mut self) -> Result<Option<(snapshot::Snapshot, Timing)>, End> {
        let (counters, devices) = (GuestCounters::of(&self.vm), &self.vm.devices);
        let waited_in_vain = Cell::new(false);
        let run_on = || waited_in_vain.set(!counters.wait_for_ops(self.stop));
        let go_on = || waited_in_vain.set(!wait_for_a_completion(devices, self.stop));
        let (ram, layout, config) = (self.vm.ram(), &self.vm.layout, self.config);
        let skewed = RefCell::new(SkewedMemory::default());
        let set_back = |older: &VcpuState| {
            let done = counters.ops().first().copied().unwrap_or(0);
            skewed.replace(SkewedMemory::new(ram, layout, config, older, done));
        };
        let preparation = match self.room() {
            2.. => Preparation::Early,
            _ => Preparation::None,
        };
        let (space, tracker) = (self.vm.space(), &mut self.tracker);
        let mut tracked = Ok(());
        let mut parts = self.vm.parts();
        let vcpus = parts.vcpus;
        let late = Late {
            vcpus,
            run_on: &run_on,
        };
        let stale = Stale {
            vcpus,
            run_on: &run_on,
            old: match config.inject {
                Some(Injection::SkewVcpus) => Old::All,
                _ => Old::Extended,
            },
            older: OnceCell::new(),
        };
        let leaky = Leaky {
            vcpus,
            writable: leaky_pages(&self.vm.layout),
        };
        let at_large;
        match config.inject {
            Some(Injection::RunDevices) => {
                at_large = AtLarge::of(&parts.devices, go_on);
                parts.devices = at_large.iter().map(|device| device as _).collect();
            }
            Some(Injection::SkipWriteProtect) => parts.vcpus = &leaky,
            Some(Injection::LateRegisters) => parts.vcpus = &late,
            Some(Injection::StaleRegisters | Injection::SkewVcpus) => parts.vcpus = &stale,
            _ => {}
        }
        // The guest has run on since there was room, and written.
        let nothing_to_drop = self.kept.is_empty() && self.parent.is_none();
        let (pool, pages) = (self.vm.frames().pool(), space.pages());
        let set_back_to = || stale.older.get().filter(|_| stale.old == Old::All);
        let may_fork = || {
            let has_room = nothing_to_drop || room_for(pool.usage(), pages) > 0;
            // The last thing before the fork, which must find memory set back. It is put right after.
            if has_room && let Some(older) = set_back_to() {
                set_back(older);
            }
            has_room
        };
        let taken = parts.take_with(preparation, &may_fork, || {
            skewed.take().undo(ram);
            tracked = tracker.as_mut().map_or(Ok(()), |t| t.round(space));
        });
        let is_set_back = set_back_to().is_some();
        let taken = match taken {
            Ok(taken) => taken,
            // Memory was set back for a snapshot that is not: the guest has run on in it.
            Err(error @ TakeError::Memory(_)) if is_set_back => return Err(End::error(&error)),
            Err(TakeError::Vcpus(error)) => return Err(self.why_vcpus_ended(error)),
            Err(TakeError::CalledOff) => {
                self.next_snapshot = Instant::now();
                return Ok(None);
            }
            // The VM is as it was. This ends: sooner or later there is none left to drop.
            Err(TakeError::Memory(ForkError::EagerCopy { .. })) if !self.kept.is_empty() => {
                self.drop_oldest();
                return Ok(None);
            }
            Err(error) => return Err(End::error(&error)),
        };
        if let (true, Some(fault)) = (waited_in_vain.get(), self.config.inject) {
            return Err(End::failed(overdue(fault)));
        }
        tracked.map_err(|error| End::error(&error))?;
        if let Some(error) = self.vm.devices.take_error() {
            // A request was lost to it, so the snapshot would not pass: this is the better reason.
            return Err(End::error(&error));
        }
        Ok(Some(taken))
    }

    fn note_pause(&mut self, timing: Timing) {
        let pause = timing.pause();
        self.pauses.saturating_record(pause.as_nanos() as u64);
        self.steps.record(timing.steps());
        self.last_pause = Some(pause);
    }
}

/// Waits until a device has completed a request more than now, as [`wait_until`] does.
fn wait_for_a_completion(devices: &DeviceSet, stop: &AtomicBool) -> bool {
    let completed = || {
        let devices = devices.devices().iter();
        let next_used = devices.map(|device| device.state().queue.next_used);
        next_used.collect::<Vec<_>>()
    };
    let before = completed();
    wait_until(stop, || {
        let pairs = before.iter().zip(completed());
        pairs.into_iter().any(|(before, now)| *before != now)
    })
}
