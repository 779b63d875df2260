//! Starts vCPUs, gives them tasks while they are parked, and lets them run.

use std::time::{Duration, Instant};

use super::Machine;
use crate::kvm::control::{Awaited, Phase, RegisterTask, TaskState, TimedOut, VcpuCommand};
use crate::kvm::error::{KvmError, PATIENCE};
use crate::kvm::registers::EntryState;
use crate::kvm::state::{Clock, VcpuState};

/// How long a vCPU that may run is waited for before whatever else is to go on does: many times what it takes
/// where there is a CPU for it.
const MOMENT: Duration = Duration::from_millis(1);

impl Machine {
    /// Starts all vCPUs, each where `entry` of its number says.
    ///
    /// # Errors
    /// If the machine was started before. If KVM refuses the registers, the machine is stopped for good.
    pub fn start(&self, entry: impl Fn(usize) -> EntryState) -> Result<(), KvmError> {
        self.start_with(|vcpu| RegisterTask::Enter(entry(vcpu)), || ())
            .map(|_| ())
    }

    /// Starts the vCPUs where they were captured.
    ///
    /// # Errors
    /// As [`Machine::start`]; or if there are not as many states as vCPUs.
    pub fn start_from(&self, states: &[VcpuState], clock: Clock) -> Result<(), KvmError> {
        self.start_from_then(states, clock, || ()).map(|_| ())
    }

    /// The same, and calls `then` when all of them run, or, if they are several, some have waited for a CPU for a
    /// millisecond. Returns when the last of them was about to enter the guest.
    ///
    /// # Errors
    /// As [`Machine::start_from`]. `then` is not called, but dropped.
    pub fn start_from_then(
        &self,
        states: &[VcpuState],
        clock: Clock,
        then: impl FnOnce(),
    ) -> Result<Instant, KvmError> {
        self.check_count(states)?;
        let restore = |vcpu: usize| RegisterTask::Restore(Box::new(states[vcpu].clone()), clock);
        self.start_with(restore, then)
    }

    fn start_with(
        &self,
        mut task: impl FnMut(usize) -> RegisterTask,
        then: impl FnOnce(),
    ) -> Result<Instant, KvmError> {
        let mut started = self.started.lock().unwrap_or_else(|e| e.into_inner());
        if *started {
            return Err(KvmError::AlreadyStarted);
        }
        if self.vcpus() == 1 {
            self.start_alone(task(0))?;
            *started = true;
            then();
            return Ok(self.last_change().unwrap_or_else(Instant::now));
        }
        // None runs before the registers of all are set.
        self.do_all(task)?;
        *started = true;
        Ok(self.run_all(then))
    }

    /// Has the only vCPU do `task` and run. Returns when it is about to enter the guest.
    fn start_alone(&self, task: RegisterTask) -> Result<(), KvmError> {
        self.finish_pending()?;
        self.control.give_start(task);
        if self.control.wait(1, Awaited::Running, MOMENT).is_err() {
            self.control.let_loose();
            if let Err(TimedOut { vcpu }) = self.wait(Awaited::Running) {
                // It must not run when it comes to it after all.
                self.control.give(VcpuCommand::Stop);
                return Err(KvmError::Stuck { vcpu });
            }
        }
        let mut slot = self.control.slot(0);
        match std::mem::replace(&mut slot.task, TaskState::Idle) {
            TaskState::Failed(source) => {
                drop(slot);
                self.control.give(VcpuCommand::Stop);
                Err(KvmError::State { vcpu: 0, source })
            }
            // It has ended before it came to that.
            TaskState::Queued(_) | TaskState::Running => Err(KvmError::Stopped { vcpu: 0 }),
            TaskState::Idle | TaskState::Captured(_) | TaskState::Done => Ok(()),
        }
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
        self.finish_pending()?;
        for vcpu in 0..self.vcpus() {
            self.control.give_task(vcpu, task(vcpu));
        }
        self.finish_pending()?;
        for vcpu in 0..self.vcpus() {
            let mut slot = self.control.slot(vcpu);
            if let TaskState::Failed(source) = std::mem::replace(&mut slot.task, TaskState::Idle) {
                drop(slot);
                self.control.give(VcpuCommand::Stop);
                return Err(KvmError::State { vcpu, source });
            }
        }
        Ok(())
    }

    /// Waits until no vCPU has a task left.
    pub(super) fn finish_pending(&self) -> Result<(), KvmError> {
        let done = self.wait(Awaited::WithoutTask);
        self.check_alive()?;
        done.map_err(|TimedOut { vcpu }| KvmError::Stuck { vcpu })
    }

    /// Lets all vCPUs run, and calls `then` when they do, or when some have waited for a CPU for a moment.
    /// Returns when the last of them was about to enter the guest.
    pub(super) fn run_all(&self, then: impl FnOnce()) -> Instant {
        self.control.give_run();
        let vcpus = self.vcpus();
        let late = self.control.wait(vcpus, Awaited::Running, MOMENT).is_err();
        if late {
            self.control.let_loose();
        }
        then();
        if late && let Err(TimedOut { vcpu }) = self.wait(Awaited::Running) {
            tracing::warn!("vcpu {vcpu} was told to run, and has not begun");
        }
        self.last_change().unwrap_or_else(Instant::now)
    }

    /// Waits until all vCPUs are what is `awaited` of them.
    pub(super) fn wait(&self, awaited: Awaited) -> Result<(), TimedOut> {
        self.control.wait(self.vcpus(), awaited, PATIENCE)
    }

    /// Fails if a vCPU has ended.
    pub(super) fn check_alive(&self) -> Result<(), KvmError> {
        let ended = self.control.each(|slot| slot.phase == Phase::Ended);
        match ended.iter().position(|ended| *ended) {
            Some(vcpu) => Err(KvmError::Stopped { vcpu }),
            None => Ok(()),
        }
    }

    /// When the last vCPU changed its phase.
    pub(super) fn last_change(&self) -> Option<Instant> {
        self.control.each(|slot| slot.since).into_iter().max()
    }
}
