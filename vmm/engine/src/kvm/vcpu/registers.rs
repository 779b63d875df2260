//! Tasks about the registers of a vCPU while it is parked, and what a crash report has of them.

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::{SyncRegs, Vcpu};
use crate::kvm::control::{Phase, RegisterTask, TaskState};
use crate::kvm::error::{StateError, VcpuRunError};
use crate::kvm::fault;
use crate::kvm::outcome::CrashReport;
use crate::kvm::registers::{self, EntryState};
use crate::kvm::state::{Clock, VcpuState};
use crate::kvm::urgent;
use crate::timeline::span;

/// Bytes of code in a crash report.
const CODE_SHOWN: usize = 16;

impl Vcpu {
    /// The registers at the last exit.
    pub(super) fn exit_registers(&self) -> Result<(kvm_regs, kvm_sregs), VcpuRunError> {
        if self.sync_regs == SyncRegs::Fresh {
            let sync = self.fd.sync_regs();
            return Ok((sync.regs, sync.sregs));
        }
        let error = |what| move |source| VcpuRunError::Registers { what, source };
        Ok((
            self.fd.get_regs().map_err(error("registers"))?,
            self.fd.get_sregs().map_err(error("system registers"))?,
        ))
    }

    /// Stays out of the guest, and does what is asked about the registers, until the command changes.
    pub(super) fn park(&mut self) {
        let _span = span!("parked");
        self.control.enter_phase(self.index, Phase::Parked);
        urgent::begin();
        while let Some(task) = self.control.next_task(self.index) {
            let done = match task {
                RegisterTask::Capture => {
                    let _span = span!("capture");
                    self.capture()
                        .map(|state| TaskState::Captured(Box::new(state)))
                }
                RegisterTask::Restore(state, clock) => {
                    let _span = span!("set registers");
                    self.restore(&state, clock).map(|()| TaskState::Done)
                }
                RegisterTask::Enter(entry) => {
                    self.about_to_set();
                    self.set_entry_state(&entry).map(|()| TaskState::Done)
                }
            };
            let state = done.unwrap_or_else(TaskState::Failed);
            self.control.finish(self.index, state);
        }
    }

    /// Reads all registers.
    pub(super) fn capture(&mut self) -> Result<VcpuState, StateError> {
        let fresh = self.sync_regs == SyncRegs::Fresh;
        let exit = fresh.then(|| self.fd.sync_regs());
        self.capturer.capture(&self.fd, exit)
    }

    /// Sets all registers.
    pub(super) fn restore(&mut self, state: &VcpuState, clock: Clock) -> Result<(), StateError> {
        self.about_to_set();
        // What KVM wrote until now stays pinned until it writes elsewhere.
        let before = self.paravirt.replace(state.msrs(), &*self.ram);
        let before = before.map_err(|source| StateError::Paravirt { source })?;
        state.restore(&self.fd, clock, self.xsave_fits)?;
        drop(before);
        // A clock that stood still says so, if the guest has one: others refuse.
        let _ = self.fd.kvmclock_ctrl();
        Ok(())
    }

    /// Registers are about to change behind the back of what was kept of them.
    pub(super) fn about_to_set(&mut self) {
        self.capturer.forget();
        self.kicked = false;
        self.kicked_at = None;
        if self.sync_regs == SyncRegs::Fresh {
            self.sync_regs = SyncRegs::Stale;
        }
    }

    /// Sets the registers a guest starts with.
    pub(super) fn set_entry_state(&self, entry: &EntryState) -> Result<(), StateError> {
        let fd = &self.fd;
        let reset = fd.get_sregs().map_err(StateError::of("system registers"))?;
        fd.set_sregs(&registers::entry_sregs(entry, &reset, &self.cpuid))
            .map_err(StateError::of("system registers"))?;
        fd.set_regs(&registers::entry_regs(entry))
            .map_err(StateError::of("registers"))?;
        fd.set_fpu(&registers::entry_fpu())
            .map_err(StateError::of("fpu"))?;
        if let Some(xcrs) = registers::entry_xcrs(&self.cpuid) {
            fd.set_xcrs(&xcrs).map_err(StateError::of("xcrs"))?;
        }
        Ok(())
    }

    /// Where the vCPU is.
    pub(super) fn report(&mut self) -> CrashReport {
        let state = self.capture().ok();
        let code = state.as_ref().map_or_else(Vec::new, |state| {
            fault::code_at(state.regs(), state.sregs(), &*self.ram, CODE_SHOWN)
        });
        CrashReport { state, code }
    }
}
