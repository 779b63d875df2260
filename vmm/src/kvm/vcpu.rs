//! A vCPU: its thread, its exits.

#![expect(unsafe_code, reason = "the union of exit data in kvm_run")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use guest::abi::PAGE_SIZE;
use kvm_bindings::{CpuId, kvm_regs, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use rustix::io::Errno;
use vmm_sys_util::errno;

use super::control::{Control, Job, Order, Phase, Work};
use super::fault::{self, Retries};
use super::kick::KickFlag;
use super::memory::GuestRam;
use super::outcome::{CrashReason, Outcome, Report, RunError};
use super::port::{PortAction, PortHandler};
use super::registers;
use super::state::{Capturer, StateError, VcpuState, XsaveFits};

/// Bytes of code in a crash report.
const CODE_SHOWN: usize = 16;

/// Counts of what vCPUs did.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) write_faults: AtomicU64,
    pub(super) port_exits: AtomicU64,
    pub(super) kicks: AtomicU64,
}

/// A vCPU and what its thread needs.
pub(super) struct Vcpu {
    pub(super) index: usize,
    pub(super) fd: VcpuFd,
    pub(super) cpuid: CpuId,
    pub(super) capturer: Capturer,
    pub(super) xsave_fits: XsaveFits,
    pub(super) sync_regs: SyncRegs,
    pub(super) ram: Arc<dyn GuestRam>,
    pub(super) handler: Arc<dyn PortHandler>,
    pub(super) control: Arc<Control>,
    pub(super) counters: Arc<Counters>,
}

/// Whether registers come with every exit at no cost (`KVM_CAP_SYNC_REGS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncRegs {
    /// They do not: they have to be asked for.
    Absent,
    /// They do, but there was no exit since they were set.
    Stale,
    /// They are those of the last exit.
    Fresh,
}

/// An exit from the guest, without the borrows of KVM's.
enum Exit {
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// A port was written.
    Out { port: u16, value: u32 },
    /// A write fault, with the gpas it is about if KVM says so.
    WriteFault(Option<std::ops::Range<u64>>),
    /// What a guest must not do.
    Crash(CrashReason),
    /// `KVM_RUN` failed.
    Error(errno::Error),
}

impl Vcpu {
    /// The thread's whole life. `None` if the machine told it to stop.
    pub(super) fn run(mut self) -> Option<Outcome> {
        let control = Arc::clone(&self.control);
        let index = self.index;
        // A handler that panics must not leave a pauser waiting for this vCPU.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run_until_end()));
        control.enter_phase(index, Phase::Ended);
        outcome.unwrap_or_else(|_| {
            Some(Outcome::Failed {
                error: RunError::Panicked,
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
                return Some(self.failed(RunError::Run {
                    source: errno::Error::from(source),
                }));
            }
        };
        let mut retries = Retries::default();
        // Whether KVM still has to move RIP behind an `out` that was handled.
        let mut out_pending = false;
        loop {
            kick.clear();
            match self.control.order(self.index) {
                Order::Run => {}
                Order::Pause if out_pending => kick.set(),
                Order::Pause => {
                    self.park();
                    continue;
                }
                Order::Stop => return None,
            }
            let entered = Instant::now();
            let exit = self.enter_guest();
            if matches!(exit, Exit::Out { .. } | Exit::WriteFault(_)) {
                self.ram.was_entered(entered.elapsed());
            }
            if self.sync_regs == SyncRegs::Stale {
                self.sync_regs = SyncRegs::Fresh;
            }
            out_pending = matches!(exit, Exit::Out { .. });
            match exit {
                Exit::Interrupted => {}
                Exit::Out { port, value } => {
                    self.counters.port_exits.fetch_add(1, Ordering::Relaxed);
                    match self.handler.out(self.index, port, value) {
                        PortAction::Continue => {}
                        PortAction::Stop(reason) => return Some(Outcome::Stopped(reason)),
                        PortAction::Unknown => {
                            return Some(self.crashed(CrashReason::PortWrite { port, value }));
                        }
                    }
                }
                Exit::WriteFault(gpas) => {
                    self.counters.write_faults.fetch_add(1, Ordering::Relaxed);
                    let exited = Instant::now();
                    if let Err(error) = self.write_fault(gpas, &mut retries) {
                        return Some(self.failed(error));
                    }
                    self.ram.was_handled(exited.elapsed());
                }
                Exit::Crash(reason) => return Some(self.crashed(reason)),
                Exit::Error(source) => return Some(self.failed(RunError::Run { source })),
            }
        }
    }

    /// Runs the guest until it exits.
    fn enter_guest(&mut self) -> Exit {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => match *data {
                [a] => Exit::Out {
                    port,
                    value: a.into(),
                },
                [a, b] => Exit::Out {
                    port,
                    value: u16::from_le_bytes([a, b]).into(),
                },
                [a, b, c, d] => Exit::Out {
                    port,
                    value: u32::from_le_bytes([a, b, c, d]),
                },
                _ => Exit::Crash(CrashReason::PortString {
                    port,
                    len: data.len(),
                }),
            },
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                Exit::WriteFault(Some(gpa..gpa.saturating_add(size.max(1))))
            }
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => Exit::Crash(CrashReason::Shutdown),
            Ok(VcpuExit::Hlt) => Exit::Crash(CrashReason::Halt),
            Ok(VcpuExit::IoIn(port, _)) => Exit::Crash(CrashReason::PortRead { port }),
            Ok(VcpuExit::MmioRead(gpa, _)) => Exit::Crash(CrashReason::Mmio { gpa, write: false }),
            Ok(VcpuExit::MmioWrite(gpa, _)) => Exit::Crash(CrashReason::Mmio { gpa, write: true }),
            Ok(VcpuExit::FailEntry(reason, _)) => Exit::Crash(CrashReason::FailEntry { reason }),
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit is KVM_EXIT_INTERNAL_ERROR, so this is the field of the union that KVM filled.
                let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                Exit::Crash(CrashReason::InternalError { suberror })
            }
            Ok(_) => {
                let reason = self.fd.get_kvm_run().exit_reason;
                Exit::Crash(CrashReason::Unexpected { reason })
            }
            Err(error) => match Errno::from_raw_os_error(error.errno()) {
                Errno::INTR => Exit::Interrupted,
                Errno::FAULT => Exit::WriteFault(None),
                _ => Exit::Error(error),
            },
        }
    }

    /// Makes writable what the instruction at RIP wants to write.
    fn write_fault(
        &mut self,
        gpas: Option<std::ops::Range<u64>>,
        retries: &mut Retries,
    ) -> Result<(), RunError> {
        let (regs, sregs) = self.exit_registers()?;
        let fault = |source| RunError::Fault { source };
        let gfns = match gpas {
            Some(gpas) => (gpas.start / PAGE_SIZE..gpas.end.div_ceil(PAGE_SIZE)).collect(),
            None => fault::written_frames(&regs, &sregs, &*self.ram).map_err(fault)?,
        };
        let mut resolved = false;
        for &gfn in &gfns {
            let first = self.ram.write_fault(gfn);
            resolved |= first.map_err(|source| RunError::Memory { gfn, source })?;
        }
        retries.note(&regs, &gfns, resolved).map_err(fault)
    }

    /// The registers at the last exit.
    fn exit_registers(&self) -> Result<(kvm_regs, kvm_sregs), RunError> {
        if self.sync_regs == SyncRegs::Fresh {
            let sync = self.fd.sync_regs();
            return Ok((sync.regs, sync.sregs));
        }
        let error = |what| move |source| RunError::Registers { what, source };
        Ok((
            self.fd.get_regs().map_err(error("registers"))?,
            self.fd.get_sregs().map_err(error("system registers"))?,
        ))
    }

    /// Stays out of the guest, and does what is asked about the registers, until the order changes.
    fn park(&mut self) {
        self.control.enter_phase(self.index, Phase::Parked);
        while let Some(job) = self.control.next_job(self.index) {
            let done = match job {
                Job::Capture => self.capture().map(|state| Work::Captured(Box::new(state))),
                Job::Restore(state, clock) => {
                    self.about_to_set();
                    let restored = state.restore(&self.fd, clock, self.xsave_fits);
                    restored.map(|()| Work::Done)
                }
                Job::Enter { entry } => {
                    self.about_to_set();
                    self.set_entry_state(entry).map(|()| Work::Done)
                }
            };
            let work = done.unwrap_or_else(Work::Failed);
            self.control.finish(self.index, work);
        }
    }

    /// Reads all registers.
    fn capture(&mut self) -> Result<VcpuState, StateError> {
        let fresh = self.sync_regs == SyncRegs::Fresh;
        let exit = fresh.then(|| self.fd.sync_regs());
        self.capturer.capture(&self.fd, exit)
    }

    /// Registers are about to change behind the back of what was kept of them.
    fn about_to_set(&mut self) {
        self.capturer.forget();
        if self.sync_regs == SyncRegs::Fresh {
            self.sync_regs = SyncRegs::Stale;
        }
    }

    /// Sets the registers a guest starts with.
    fn set_entry_state(&self, entry: u64) -> Result<(), StateError> {
        let fd = &self.fd;
        let reset = fd.get_sregs().map_err(StateError::of("system registers"))?;
        fd.set_sregs(&registers::entry_sregs(&reset, &self.cpuid))
            .map_err(StateError::of("system registers"))?;
        fd.set_regs(&registers::entry_regs(entry, self.index as u64))
            .map_err(StateError::of("registers"))?;
        fd.set_fpu(&registers::entry_fpu())
            .map_err(StateError::of("fpu"))?;
        if let Some(xcrs) = registers::entry_xcrs(&self.cpuid) {
            fd.set_xcrs(&xcrs).map_err(StateError::of("xcrs"))?;
        }
        Ok(())
    }

    fn crashed(&mut self, reason: CrashReason) -> Outcome {
        Outcome::Crashed {
            reason,
            report: Box::new(self.report()),
        }
    }

    fn failed(&mut self, error: RunError) -> Outcome {
        Outcome::Failed {
            error,
            report: Box::new(self.report()),
        }
    }

    /// Where the vCPU is.
    fn report(&mut self) -> Report {
        let state = self.capture().ok();
        let code = state.as_ref().map_or_else(Vec::new, |state| {
            fault::code_at(state.regs(), state.sregs(), &*self.ram, CODE_SHOWN)
        });
        Report { state, code }
    }
}
