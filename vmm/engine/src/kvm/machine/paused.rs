//! A machine none of whose vCPUs runs.

use std::fmt;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Machine;
use crate::kvm::control::{Awaited, RegisterTask, Slot, TaskState, TimedOut};
use crate::kvm::error::KvmError;
use crate::kvm::fault;
use crate::kvm::state::{Clock, VcpuState};
use crate::kvm::table_bits;
use crate::kvm::tables::{PageTables, Translation};
use crate::vcpus::Capture;

impl Machine {
    /// Stops all vCPUs at an instruction boundary.
    ///
    /// Returns when none of them is in the guest or in a handler. If one has ended already, or is stuck in a
    /// handler, the others run on and the error names it. Must not be called on a vCPU's thread.
    ///
    /// # Errors
    /// If the machine was not started, or a vCPU has ended, does not come out within 5 s, or cannot be
    /// kicked. The others run on.
    pub fn pause(&self, capture: Capture) -> Result<PausedMachine<'_>, KvmError> {
        let started = self.started.lock().unwrap_or_else(|e| e.into_inner());
        if !*started {
            return Err(KvmError::NotStarted);
        }
        self.check_alive()?;
        let kicked = Instant::now();
        let running = self.control.give_pause(|| match capture {
            Capture::Registers => TaskState::Queued(RegisterTask::Capture),
            Capture::Nothing => TaskState::Idle,
        });
        let threads = self.threads.iter().zip(running).enumerate();
        for (vcpu, (thread, _)) in threads.filter(|(_, (_, run))| *run) {
            if let Err(source) = self.backend.kick(thread) {
                self.control.give_run();
                return Err(KvmError::Kick { vcpu, source });
            }
            self.counters.kicks.fetch_add(1, Ordering::Relaxed);
        }

        let result = match self.wait(Awaited::Parked) {
            Err(TimedOut { vcpu }) => Err(KvmError::Stuck { vcpu }),
            Ok(()) => self.check_alive(),
        };
        if let Err(error) = result {
            self.control.give_run();
            return Err(error);
        }
        let parked = self.last_change().unwrap_or(kicked);
        Ok(PausedMachine {
            machine: self,
            _driving: started,
            kicked,
            parked,
            runs: false,
        })
    }

    /// [`PausedMachine::keep_tables_writable`], also for a machine that was not started yet.
    pub(crate) fn keep_tables_writable(
        &self,
        gfns: impl Iterator<Item = u64>,
    ) -> Result<(), KvmError> {
        if self.may_lose_write_access() {
            return Ok(());
        }
        let kept = table_bits::keep_writable(&*self.ram, gfns);
        kept.map_err(|source| KvmError::Tables { source })
    }

    /// Shows what KVM reads by itself for vCPUs in these states, where it does, before they run.
    pub(crate) fn show_what_kvm_reads(&self, states: &[VcpuState]) -> Result<(), KvmError> {
        if self.translation == Translation::Nested {
            return Ok(());
        }
        let vcpus = states.iter().map(|state| (state.regs(), state.sregs()));
        let shown = fault::show_all_that_kvm_reads(vcpus, &*self.ram);
        shown
            .map(drop)
            .map_err(|source| KvmError::Tables { source })
    }

    /// The page tables of vCPUs in these states.
    fn page_tables(&self, states: &[VcpuState]) -> Result<PageTables, KvmError> {
        let vcpus = states.iter().map(|state| (state.sregs(), state.confined()));
        PageTables::of(vcpus, &*self.ram).map_err(|source| KvmError::Tables { source })
    }
}

/// A machine none of whose vCPUs runs. Dropping it lets them run on.
#[must_use = "the machine runs on when this is dropped"]
pub struct PausedMachine<'a> {
    machine: &'a Machine,
    _driving: MutexGuard<'a, bool>,
    kicked: Instant,
    parked: Instant,
    /// They run on already.
    runs: bool,
}

impl fmt::Debug for PausedMachine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kicked, parked, .. } = self;
        f.debug_struct("PausedMachine")
            .field("kicked", kicked)
            .field("parked", parked)
            .finish_non_exhaustive()
    }
}

impl PausedMachine<'_> {
    /// When the vCPUs were told to stop.
    pub fn kicked(&self) -> Instant {
        self.kicked
    }

    /// When the last of them had.
    pub fn parked(&self) -> Instant {
        self.parked
    }

    /// The registers of all vCPUs; waits until they are captured.
    ///
    /// # Errors
    /// If those of one cannot be captured.
    pub fn states(&self) -> Result<Vec<VcpuState>, KvmError> {
        let Machine { control, .. } = self.machine;
        self.machine.finish_pending()?;
        let is_asked = |slot: &mut Slot| !matches!(slot.task, TaskState::Idle | TaskState::Done);
        let asked = control.each(is_asked);
        for (vcpu, _) in asked.iter().enumerate().filter(|(_, asked)| !**asked) {
            control.give_task(vcpu, RegisterTask::Capture);
        }
        if asked.contains(&false) {
            self.machine.finish_pending()?;
        }
        let mut states = Vec::with_capacity(asked.len());
        for vcpu in 0..asked.len() {
            let mut slot = control.slot(vcpu);
            match &slot.task {
                TaskState::Captured(state) => states.push((**state).clone()),
                TaskState::Failed(_) => {
                    if let TaskState::Failed(source) =
                        std::mem::replace(&mut slot.task, TaskState::Idle)
                    {
                        return Err(KvmError::State { vcpu, source });
                    }
                }
                // Nobody else gives tasks while the machine is paused.
                TaskState::Idle | TaskState::Done | TaskState::Queued(_) | TaskState::Running => {
                    return Err(KvmError::Stuck { vcpu });
                }
            }
        }
        Ok(states)
    }

    /// The guest's page tables as they are: to be asked for before memory is restored, and handed to
    /// [`PausedMachine::restore`] after.
    ///
    /// # Errors
    /// If registers cannot be captured, or the tables not be read.
    pub fn page_tables(&self) -> Result<PageTables, KvmError> {
        match self.machine.translation {
            Translation::Nested => Ok(PageTables::default()),
            Translation::Shadow | Translation::ShadowOnSvm => {
                self.machine.page_tables(&self.states()?)
            }
        }
    }

    /// Sets the registers of all vCPUs. Memory is the caller's to restore, before; `tables` are those before
    /// that.
    ///
    /// What the vCPUs and KVM keep of the guest's page tables is forgotten, where these are others now.
    ///
    /// If a vCPU refuses, the machine is stopped for good: part of it would be of another time.
    ///
    /// # Errors
    /// If there are not as many states as vCPUs, or the tables cannot be read: no register has changed then.
    /// If a vCPU refuses.
    pub fn restore(
        &self,
        states: &[VcpuState],
        clock: Clock,
        tables: &PageTables,
    ) -> Result<(), KvmError> {
        self.machine.check_count(states)?;
        if self.machine.translation != Translation::Nested
            && !self.machine.page_tables(states)?.are(tables)
        {
            self.machine.backend.forget_tables()?;
        }
        self.machine
            .do_all(|vcpu| RegisterTask::Restore(Box::new(states[vcpu].clone()), clock))
    }

    /// Of pages that are read-only since the vCPUs stand still, or have changed and are read-only, makes
    /// those writable in which KVM may have a bit to set, where it must not find them read-only
    /// ([`Machine::may_lose_write_access`]).
    ///
    /// # Errors
    /// If one cannot be read or made writable. The guest must not run on.
    pub fn keep_tables_writable(&self, gfns: impl Iterator<Item = u64>) -> Result<(), KvmError> {
        self.machine.keep_tables_writable(gfns)
    }

    /// Stops all vCPUs for good: none of them enters the guest again.
    pub fn stop(self) {
        self.machine.stop();
    }

    /// Lets all vCPUs run on. Returns the time when the last of them was about to enter the guest.
    pub fn resume(self) -> Instant {
        self.resume_then(|| ())
    }

    /// The same, and calls `then` when all of them run, or some have waited for a CPU for a millisecond.
    pub fn resume_then(mut self, then: impl FnOnce()) -> Instant {
        self.runs = true;
        self.machine.run_all(then)
    }
}

impl Drop for PausedMachine<'_> {
    fn drop(&mut self) {
        // After `stop` those that are stopped stay so.
        if !self.runs {
            self.machine.run_all(|| ());
        }
    }
}
