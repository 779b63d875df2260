//! Starts vCPUs, gives them tasks while they are parked, and lets them run.

use std::sync::MutexGuard;
use std::time::Instant;

use super::Machine;
use crate::kvm::control::{Phase, RegisterTask, Slot, TaskState, VcpuCommand};
use crate::kvm::error::{KvmError, PATIENCE};
use crate::kvm::registers::EntryState;
use crate::kvm::state::{Clock, VcpuState};

impl Machine {
    /// Starts all vCPUs, each where `entry` of its number says.
    ///
    /// # Errors
    /// If the machine was started before. If KVM refuses the registers, the machine is stopped for good.
    pub fn start(&self, entry: impl Fn(usize) -> EntryState) -> Result<(), KvmError> {
        self.start_with(|vcpu| RegisterTask::Enter(entry(vcpu)))
    }

    /// Starts the vCPUs where they were captured.
    ///
    /// # Errors
    /// As [`Machine::start`]; or if there are not as many states as vCPUs.
    pub fn start_from(&self, states: &[VcpuState], clock: Clock) -> Result<(), KvmError> {
        self.check_count(states)?;
        self.start_with(|vcpu| RegisterTask::Restore(Box::new(states[vcpu].clone()), clock))
    }

    fn start_with(&self, task: impl FnMut(usize) -> RegisterTask) -> Result<(), KvmError> {
        let mut started = self.started.lock().unwrap_or_else(|e| e.into_inner());
        if *started {
            return Err(KvmError::AlreadyStarted);
        }
        self.do_all(task)?;
        *started = true;
        self.run_all();
        Ok(())
    }

    pub(super) fn check_count(&self, states: &[VcpuState]) -> Result<(), KvmError> {
        let (states, vcpus) = (states.len(), self.vcpus());
        if states == vcpus {
            Ok(())
        } else {
            Err(KvmError::StateCount { states, vcpus })
        }
    }

    /// Gives every parked vCPU a task, and waits for all. If one fails, the machine is stopped: its vCPUs are
    /// of different times now.
    pub(super) fn do_all(
        &self,
        mut task: impl FnMut(usize) -> RegisterTask,
    ) -> Result<(), KvmError> {
        let mut slots = self.finish_pending()?;
        for (vcpu, slot) in slots.iter_mut().enumerate() {
            slot.task = TaskState::Queued(task(vcpu));
        }
        drop(slots);
        self.control.task_given();
        let mut slots = self.finish_pending()?;
        for (vcpu, slot) in slots.iter_mut().enumerate() {
            if let TaskState::Failed(source) = std::mem::replace(&mut slot.task, TaskState::Idle) {
                self.control.give(&mut slots, VcpuCommand::Stop);
                return Err(KvmError::State { vcpu, source });
            }
        }
        Ok(())
    }

    /// Waits until no vCPU has a task left.
    pub(super) fn finish_pending(&self) -> Result<MutexGuard<'_, Vec<Slot>>, KvmError> {
        let (slots, in_time) = self.control.wait(self.control.lock(), PATIENCE, |slots| {
            slots
                .iter()
                .all(|slot| !slot.task.is_pending() || slot.phase == Phase::Ended)
        });
        check_alive(&slots)?;
        let pending = slots.iter().position(|slot| slot.task.is_pending());
        match (in_time, pending) {
            (Err(_), Some(vcpu)) => Err(KvmError::Stuck { vcpu }),
            _ => Ok(slots),
        }
    }

    /// Lets all vCPUs run. Returns when the last of them was about to enter the guest.
    pub(super) fn run_all(&self) -> Instant {
        let mut slots = self.control.lock();
        self.control.give(&mut slots, VcpuCommand::Run);
        let (slots, in_time) = self.control.wait(slots, PATIENCE, |slots| {
            slots.iter().all(|slot| slot.phase != Phase::Parked)
        });
        let parked = slots.iter().position(|slot| slot.phase == Phase::Parked);
        if let (Err(_), Some(vcpu)) = (in_time, parked) {
            tracing::warn!("vcpu {vcpu} was told to run, and has not begun");
        }
        last_change(&slots).unwrap_or_else(Instant::now)
    }
}

/// Fails if a vCPU has ended.
pub(super) fn check_alive(slots: &[Slot]) -> Result<(), KvmError> {
    match slots.iter().position(|slot| slot.phase == Phase::Ended) {
        Some(vcpu) => Err(KvmError::Stopped { vcpu }),
        None => Ok(()),
    }
}

/// When the last vCPU changed its phase.
pub(super) fn last_change(slots: &[Slot]) -> Option<Instant> {
    slots.iter().map(|slot| slot.since).max()
}
