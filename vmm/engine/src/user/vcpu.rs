//! A vCPU, on the thread that is it: the thread's life.

#![expect(unsafe_code, reason = "enters guest code")]

use std::arch::x86_64::_rdtsc;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::addresses::Addresses;
use super::crossing::Crossing;
use super::doorbells::Doorbells;
use super::exit::{self, Exit};
use super::frame::Gpr;
use super::registers::{self, XstateShape};
use super::{filter, signals};
use crate::host::Window;
use crate::kvm::control::{Control, Phase, RegisterTask, TaskState, VcpuCommand};
use crate::kvm::counters::{Counters, VcpuCounters};
use crate::kvm::memory::GuestRam;
use crate::kvm::urgent;
use crate::kvm::{
    CrashReason, CrashReport, Outcome, PortAction, PortHandler, StateError, VcpuRunError,
    WriteFaultError,
};
use crate::mm::PAGE_SIZE;
use crate::timeline::span;

/// How often in a row a write may fault at a page that is writable already. Another vCPU may have been first,
/// or a fork have taken the page back; not for ever.
const MOST_LOST: u32 = 1000;
/// How often in a row a touch may fault at a page that is shown already: another vCPU may have been first.
const MOST_UNSEEN: u32 = 10;
/// How often in a row an instruction may be one that ring 3 may not execute, and be another when it is looked
/// at: another vCPU may be patching it.
const MOST_PATCHED: u32 = 100;
/// Bytes of the longest store that the kernel carries out for the CPU (`sgdt` under UMIP). It names the
/// first, even if it could not write the last, on the next page.
const EMULATED: u64 = 10;
/// Bytes of code in a crash report.
const CODE_SHOWN: usize = 16;

/// A vCPU and what its thread needs.
pub(super) struct Vcpu {
    pub(super) index: usize,
    pub(super) ram: Arc<dyn GuestRam>,
    /// Kept for as long as the vCPU may go there.
    pub(super) _window: Arc<Window>,
    /// Addresses of the guest's.
    pub(super) addresses: Addresses,
    pub(super) handler: Arc<dyn PortHandler>,
    pub(super) doorbells: Arc<Doorbells>,
    pub(super) control: Arc<Control>,
    pub(super) counters: Arc<Counters>,
}

impl Vcpu {
    /// What it counts.
    fn counters(&self) -> &VcpuCounters {
        self.counters.of(self.index)
    }

    /// The thread's whole life. `None` if the machine told it to stop.
    pub(super) fn run(self) -> Option<Outcome> {
        let (control, index) = (Arc::clone(&self.control), self.index);
        // A handler that panics must not leave a pauser waiting for this vCPU.
        let outcome = catch_unwind(AssertUnwindSafe(|| match Running::new(self) {
            Ok(mut running) => running.run_until_end(),
            Err(error) => Some(Outcome::Failed {
                error,
                report: Box::default(),
            }),
        }));
        control.enter_phase(index, Phase::Ended);
        outcome.unwrap_or_else(|_| {
            Some(Outcome::Failed {
                error: VcpuRunError::Panicked,
                report: Box::default(),
            })
        })
    }
}

/// A vCPU on its thread.
struct Running {
    vcpu: Vcpu,
    crossing: Crossing,
    shape: XstateShape,
    /// Where a write last faulted at a page that was writable, and how often in a row it did.
    lost: (u64, u64, u32),
    /// Where a touch last faulted at a page that was shown already, and how often in a row it did.
    unseen: (u64, u64, u32),
    /// How often in a row the instruction at RIP was not what it had been.
    patched: u32,
}

impl Running {
    /// Makes this thread the vCPU.
    fn new(vcpu: Vcpu) -> Result<Self, VcpuRunError> {
        let error = |what| move |source| VcpuRunError::Prepare { what, source };
        signals::block().map_err(error("block signals on the vcpu's thread"))?;
        let crossing =
            Crossing::new().map_err(error("make an alternate stack for the vcpu's thread"))?;
        let shape = XstateShape::of(&crossing).ok_or_else(|| {
            let source = std::io::ErrorKind::Unsupported.into();
            error("save extended registers by XSAVE")(source)
        })?;
        filter::install(vcpu.addresses.code())
            .map_err(error("keep the guest from making system calls (seccomp)"))?;
        Ok(Self {
            vcpu,
            crossing,
            shape,
            lost: (0, 0, 0),
            unseen: (0, 0, 0),
            patched: 0,
        })
    }

    fn run_until_end(&mut self) -> Option<Outcome> {
        loop {
            // A kick that comes from here on is let in as the guest is entered: the command is not missed.
            match self.vcpu.control.command(self.vcpu.index) {
                VcpuCommand::Run => {}
                VcpuCommand::Pause => {
                    self.park();
                    continue;
                }
                VcpuCommand::Stop => return None,
            }
            let entered = Instant::now();
            // SAFETY: the registers are those of an entry, or of a state that was checked, or what the guest
            // made of them. That the guest's code runs in this process is what this accelerator is: who asks
            // for it trusts the guest.
            let raw = unsafe { self.crossing.enter() };
            urgent::end();
            let Vcpu { ram, addresses, .. } = &self.vcpu;
            let exit = exit::of(raw, self.crossing.frame(), addresses, &**ram);
            if matches!(
                exit,
                Exit::Out { .. } | Exit::WriteFault { .. } | Exit::Touch { .. }
            ) {
                ram.was_entered(entered.elapsed());
            }
            self.vcpu.counters().note_exit();
            if exit != Exit::Protection {
                self.patched = 0;
            }
            match exit {
                Exit::Kicked => {}
                // As a CPU that comes to the instruction anew.
                Exit::Protection if self.patched < MOST_PATCHED => self.patched += 1,
                Exit::Protection => {
                    let what = "general protection";
                    return Some(self.crashed(CrashReason::Exception { what }));
                }
                Exit::Out { port, value, len } => {
                    if let Some(outcome) = self.out(port, value, len) {
                        return Some(outcome);
                    }
                }
                Exit::WriteFault { gfn } => {
                    let _span = span!("fault", address = raw.address);
                    let exited = Instant::now();
                    if let Err(error) = self.write_fault(gfn, raw.address) {
                        return Some(self.failed(error));
                    }
                    self.vcpu.ram.was_handled(exited.elapsed());
                }
                Exit::Touch { gfn, address } => {
                    let _span = span!("touch", address = address);
                    match self.vcpu.ram.touch(gfn) {
                        Ok(true) => self.unseen = (0, 0, 0),
                        // Another vCPU may have been first. If not it is no memory that may be touched so.
                        Ok(false) if self.may_be_shown_by_now(address) => {}
                        Ok(false) => {
                            return Some(self.crashed(CrashReason::Mmio {
                                gpa: address,
                                write: false,
                            }));
                        }
                        Err(source) => {
                            return Some(self.failed(VcpuRunError::Memory { gfn, source }));
                        }
                    }
                }
                Exit::Crash(reason) => return Some(self.crashed(reason)),
                Exit::Refused(raw) => {
                    return Some(self.failed(VcpuRunError::Entry {
                        signal: raw.signal,
                        code: raw.code,
                    }));
                }
            }
        }
    }

    /// What becomes of a port that was written. `None` if the guest runs on.
    fn out(&mut self, port: u16, value: u32, len: u64) -> Option<Outcome> {
        if !self.vcpu.doorbells.ring(port) {
            self.vcpu
                .counters()
                .port_exits
                .fetch_add(1, Ordering::Relaxed);
            match self.vcpu.handler.out(self.vcpu.index, port, value) {
                PortAction::Continue => {}
                PortAction::Stop(reason) => return Some(Outcome::Stopped(reason)),
                PortAction::Unknown => {
                    return Some(self.crashed(CrashReason::PortWrite { port, value }));
                }
            }
        }
        let frame = self.crossing.frame_mut();
        frame.set(Gpr::Rip, frame.gpr(Gpr::Rip).wrapping_add(len));
        None
    }

    /// Makes the page at `gfn` writable, because the guest wrote `address` in it.
    fn write_fault(&mut self, gfn: u64, address: u64) -> Result<(), VcpuRunError> {
        let counters = self.vcpu.counters();
        counters.write_faults.fetch_add(1, Ordering::Relaxed);
        let resolve = |gfn| {
            let resolved = self.vcpu.ram.write_fault(gfn);
            resolved.map_err(|source| VcpuRunError::Memory { gfn, source })
        };
        let last = self.vcpu.addresses.gpa(address + EMULATED - 1);
        let next = last.map(|gpa| gpa / PAGE_SIZE).filter(|last| *last != gfn);
        let mut resolved = resolve(gfn)?;
        if let (false, Some(next)) = (resolved, next) {
            resolved = resolve(next)?;
        }
        if resolved {
            counters.signals.fetch_add(1, Ordering::Relaxed);
            self.lost = (0, 0, 0);
            return Ok(());
        }
        let rip = self.crossing.frame().gpr(Gpr::Rip);
        let times = match self.lost {
            (at, to, times) if (at, to) == (rip, address) => times + 1,
            _ => 1,
        };
        self.lost = (rip, address, times);
        if times < MOST_LOST {
            return Ok(());
        }
        let code = exit::code_at(rip, &self.vcpu.addresses, &*self.vcpu.ram, CODE_SHOWN);
        Err(VcpuRunError::Fault {
            source: WriteFaultError::Stuck {
                rip,
                instruction: format!("{code:02x?}"),
                times,
                tried: format!("the page at {address:#x}"),
            },
        })
    }

    /// Whether a touch of `address`, where nothing is hidden, may have faulted because something was.
    fn may_be_shown_by_now(&mut self, address: u64) -> bool {
        let rip = self.crossing.frame().gpr(Gpr::Rip);
        let times = match self.unseen {
            (at, to, times) if (at, to) == (rip, address) => times + 1,
            _ => 1,
        };
        self.unseen = (rip, address, times);
        times < MOST_UNSEEN
    }

    /// Stays out of the guest, and does what is asked about the registers, until the command changes.
    fn park(&mut self) {
        let (control, index) = (Arc::clone(&self.vcpu.control), self.vcpu.index);
        let _span = span!("parked");
        control.enter_phase(index, Phase::Parked);
        urgent::begin();
        while let Some(task) = control.next_task(index) {
            let done: Result<_, StateError> = match task {
                RegisterTask::Capture => {
                    let _span = span!("capture");
                    Ok(TaskState::Captured(Box::new(self.capture())))
                }
                RegisterTask::Restore(state, _) => {
                    let _span = span!("set registers");
                    registers::restore(&mut self.crossing, &state, &self.shape)
                        .map(|()| TaskState::Done)
                }
                RegisterTask::Enter(entry) => {
                    registers::enter(&mut self.crossing, &entry, &self.shape);
                    Ok(TaskState::Done)
                }
            };
            control.finish(index, done.unwrap_or_else(TaskState::Failed));
        }
    }

    fn capture(&self) -> crate::kvm::VcpuState {
        // SAFETY: it has no conditions.
        let tsc = unsafe { _rdtsc() };
        registers::capture(&self.crossing, &self.shape, tsc)
    }

    /// Where the vCPU is.
    fn report(&self) -> Box<CrashReport> {
        let state = self.capture();
        let code = exit::code_at(
            state.rip(),
            &self.vcpu.addresses,
            &*self.vcpu.ram,
            CODE_SHOWN,
        );
        Box::new(CrashReport {
            state: Some(state),
            code,
        })
    }

    fn crashed(&self, reason: CrashReason) -> Outcome {
        Outcome::Crashed {
            reason,
            report: self.report(),
        }
    }

    fn failed(&self, error: VcpuRunError) -> Outcome {
        Outcome::Failed {
            error,
            report: self.report(),
        }
    }
}
