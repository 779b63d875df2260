//! The life of a vCPU's thread.

#![expect(unsafe_code, reason = "the mapping that a kick writes to")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvm_ioctls::SyncReg;
use vmm_sys_util::errno;

use super::exit::Exit;
use super::{SyncRegs, Vcpu};
use crate::kvm::control::{Phase, VcpuCommand};
use crate::kvm::error::VcpuRunError;
use crate::kvm::kick::KickFlag;
use crate::kvm::outcome::{CrashReason, Outcome};
use crate::kvm::port::PortAction;
use crate::kvm::urgent;
use crate::mm::PAGE_SIZE;
use crate::timeline::span;

impl Vcpu {
    /// The thread's whole life. `None` if the machine told it to stop.
    pub(in crate::kvm) fn run(mut self) -> Option<Outcome> {
        let control = Arc::clone(&self.control);
        let index = self.index;
        // A handler that panics must not leave a pauser waiting for this vCPU.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run_until_end()));
        control.enter_phase(index, Phase::Ended);
        outcome.unwrap_or_else(|_| {
            Some(Outcome::Failed {
                error: VcpuRunError::Panicked,
                report: Box::default(),
            })
        })
    }

    fn run_until_end(&mut self) -> Option<Outcome> {
        if self.sync_regs != SyncRegs::Absent {
            self.fd.set_sync_valid_reg(SyncReg::Register);
            self.fd.set_sync_valid_reg(SyncReg::SystemRegister);
            self.fd.set_sync_valid_reg(SyncReg::VcpuEvents);
        }
        // SAFETY: `fd` has the mapping, and outlives the flag: it is a field of `self`.
        let kick = match unsafe { KickFlag::new(self.fd.get_kvm_run()) } {
            Ok(kick) => kick,
            Err(source) => {
                return Some(self.failed(VcpuRunError::Run {
                    source: errno::Error::from(source),
                }));
            }
        };
        // Whether KVM still has to finish an instruction whose exit was handled: to move RIP behind it.
        let mut half_done = false;
        loop {
            kick.clear();
            match self.control.command(self.index) {
                VcpuCommand::Run => {}
                VcpuCommand::Pause if half_done => kick.set(),
                VcpuCommand::Pause => {
                    self.park();
                    continue;
                }
                VcpuCommand::Stop => return None,
            }
            // Now, and not when it was kicked: a snapshot in between would have protected its page again.
            if std::mem::take(&mut self.kicked)
                && let Err(error) = self.help_along()
            {
                return Some(self.failed(error));
            }
            let entered = Instant::now();
            let exit = self.enter_guest();
            urgent::end();
            if matches!(exit, Exit::Out { .. } | Exit::WriteFault(_)) {
                self.ram.was_entered(entered.elapsed());
            }
            if self.sync_regs == SyncRegs::Stale {
                self.sync_regs = SyncRegs::Fresh;
            }
            self.counters().note_exit();
            half_done = matches!(
                exit,
                Exit::Out { .. } | Exit::Store { .. } | Exit::Loaded | Exit::SetMsr { .. }
            );
            if !matches!(exit, Exit::WriteFault(_)) {
                self.ladder.step_down();
            }
            if !matches!(exit, Exit::Crash(_)) {
                self.lost_races = None;
            }
            match exit {
                Exit::Interrupted => self.kicked = true,
                Exit::Loaded => {}
                Exit::NotLoaded { gpa, source } => {
                    return Some(self.failed(VcpuRunError::Memory {
                        gfn: gpa / PAGE_SIZE,
                        source,
                    }));
                }
                Exit::Store { gpa, data, len } => {
                    if let Err(error) = self.store(gpa, &data[..len]) {
                        return Some(self.failed(error));
                    }
                }
                Exit::SetMsr { index, value } => self.set_msr(index, value),
                Exit::Out { port, value } => {
                    self.counters().port_exits.fetch_add(1, Ordering::Relaxed);
                    match self.handler.out(self.index, port, value) {
                        PortAction::Continue => {}
                        PortAction::Stop(reason) => return Some(Outcome::Stopped(reason)),
                        PortAction::Unknown => {
                            return Some(self.crashed(CrashReason::PortWrite { port, value }));
                        }
                    }
                }
                Exit::WriteFault(gpas) => {
                    self.counters().write_faults.fetch_add(1, Ordering::Relaxed);
                    let _span = span!("fault");
                    let exited = Instant::now();
                    if let Err(error) = self.write_fault(gpas) {
                        return Some(self.failed(error));
                    }
                    self.ram.was_handled(exited.elapsed());
                }
                Exit::Crash(reason @ CrashReason::InternalError { suberror: 1 }) => {
                    match self.emulate_again() {
                        Ok(true) => {}
                        Ok(false) => return Some(self.crashed(reason)),
                        Err(error) => return Some(self.failed(error)),
                    }
                }
                Exit::Crash(CrashReason::Shutdown) => match self.recover() {
                    Ok(true) => {}
                    Ok(false) => return Some(self.crashed(CrashReason::Shutdown)),
                    Err(error) => return Some(self.failed(error)),
                },
                Exit::Crash(reason) => return Some(self.crashed(reason)),
                Exit::Error(source) => return Some(self.failed(VcpuRunError::Run { source })),
            }
        }
    }

    fn crashed(&mut self, reason: CrashReason) -> Outcome {
        Outcome::Crashed {
            reason,
            report: Box::new(self.report()),
        }
    }

    fn failed(&mut self, error: VcpuRunError) -> Outcome {
        Outcome::Failed {
            error,
            report: Box::new(self.report()),
        }
    }
}
