//! A vCPU: its thread, its exits.

#![expect(unsafe_code, reason = "the union of exit data in kvm_run")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvm_bindings::{CpuId, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use rustix::io::Errno;
use vmm_sys_util::errno;

use super::control::{Control, Phase, RegisterTask, TaskState, VcpuCommand};
use super::error::{StateError, VcpuRunError};
use super::fault::{self, Ladder, RungCounters, StoredBy, WriteFault};
use super::kick::KickFlag;
use super::memory::{GuestRam, Memslot};
use super::msr;
use super::outcome::{CrashReason, CrashReport, Outcome};
use super::paravirt::Targets;
use super::port::{PortAction, PortHandler};
use super::registers::{self, EntryState};
use super::state::{Capturer, Clock, VcpuState, XsaveFits};
use super::tables::Translation;
use crate::mm::PAGE_SIZE;

/// Bytes of code in a crash report.
const CODE_SHOWN: usize = 16;

/// Counts of what vCPUs did.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) write_faults: AtomicU64,
    pub(super) rungs: RungCounters,
    pub(super) emulated_stores: AtomicU64,
    pub(super) port_exits: AtomicU64,
    pub(super) kicks: AtomicU64,
    /// Exits of any kind, by vCPU.
    exits: Vec<AtomicU64>,
}

impl Counters {
    pub(super) fn new(vcpus: usize) -> Self {
        Self {
            exits: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            ..Self::default()
        }
    }

    /// vCPU `vcpu` has come out of the guest.
    fn note_exit(&self, vcpu: usize) {
        self.exits[vcpu].fetch_add(1, Ordering::Relaxed);
    }

    /// How often each vCPU has come out of the guest.
    pub(super) fn exits(&self) -> Vec<u64> {
        let count = |exits: &AtomicU64| exits.load(Ordering::Relaxed);
        self.exits.iter().map(count).collect()
    }
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
    /// Kept for as long as the vCPU may go there.
    pub(super) _slot: Arc<dyn Memslot>,
    pub(super) handler: Arc<dyn PortHandler>,
    pub(super) control: Arc<Control>,
    pub(super) counters: Arc<Counters>,
    pub(super) ladder: Ladder,
    /// What KVM writes to memory for this vCPU.
    pub(super) paravirt: Targets,
    pub(super) translation: Translation,
    /// Registers at the last failure that may have been about a page that somebody else made writable
    /// meanwhile, and how often in a row it was the same.
    pub(super) lost_races: Option<(kvm_regs, u32)>,
    /// It came out by a kick, and has not been looked at since.
    pub(super) kicked: bool,
    /// Registers when it was last looked at after a kick.
    pub(super) kicked_at: Option<kvm_regs>,
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
    /// KVM emulates a store to memory that it may not write, and was given it to carry out: see
    /// [`Vcpu::store`].
    Store { gpa: u64, data: [u8; 8], len: usize },
    /// KVM emulates a load from memory, and has been given what is there.
    Loaded,
    /// The guest wants to set an MSR by which KVM writes to memory.
    SetMsr { index: u32, value: u64 },
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
            if matches!(exit, Exit::Out { .. } | Exit::WriteFault(_)) {
                self.ram.was_entered(entered.elapsed());
            }
            if self.sync_regs == SyncRegs::Stale {
                self.sync_regs = SyncRegs::Fresh;
            }
            self.counters.note_exit(self.index);
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
                Exit::Store { gpa, data, len } => {
                    if let Err(error) = self.store(gpa, &data[..len]) {
                        return Some(self.failed(error));
                    }
                }
                Exit::SetMsr { index, value } => self.set_msr(index, value),
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
            Ok(VcpuExit::MmioRead(gpa, data)) => match self.ram.read(gpa, data) {
                Ok(()) => Exit::Loaded,
                Err(_) => Exit::Crash(CrashReason::Mmio { gpa, write: false }),
            },
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                let len = data.len();
                let mut bytes = [0; 8];
                match bytes.get_mut(..len) {
                    Some(bytes) if is_memory(&*self.ram, gpa, len) => bytes.copy_from_slice(data),
                    _ => return Exit::Crash(CrashReason::Mmio { gpa, write: true }),
                }
                Exit::Store {
                    gpa,
                    data: bytes,
                    len,
                }
            }
            Ok(VcpuExit::X86Wrmsr(msr)) => Exit::SetMsr {
                index: msr.index,
                value: msr.data,
            },
            Ok(VcpuExit::FailEntry(reason, _)) => Exit::Crash(CrashReason::FailEntry { reason }),
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit is KVM_EXIT_INTERNAL_ERROR, so this is the field of the union that KVM
                // filled.
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

    /// Makes writable what the vCPU wants to write.
    fn write_fault(&mut self, gpas: Option<std::ops::Range<u64>>) -> Result<(), VcpuRunError> {
        let (regs, sregs) = self.exit_registers()?;
        let xsave = || self.fd.get_xsave().ok();
        let fault = WriteFault {
            regs: &regs,
            sregs: &sregs,
            gpas,
            cpuid: &self.cpuid,
            xsave: &xsave,
        };
        if let Some(rung) = self.ladder.climb(&fault, &*self.ram)? {
            self.counters.rungs.count(rung);
        }
        Ok(())
    }

    /// Carries out a store that KVM emulates and may not do itself, since the page is read-only.
    ///
    /// The page is made writable for the guest, so that the next store does not come here, and written where
    /// it then is.
    fn store(&self, gpa: u64, data: &[u8]) -> Result<(), VcpuRunError> {
        self.counters
            .emulated_stores
            .fetch_add(1, Ordering::Relaxed);
        let gfns = Vec::from_iter(gpa / PAGE_SIZE..(gpa + data.len() as u64).div_ceil(PAGE_SIZE));
        fault::resolve(&gfns, &*self.ram)?;
        let written = self.ram.write(gpa, data);
        written.map_err(|source| VcpuRunError::Memory {
            gfn: gpa / PAGE_SIZE,
            source,
        })
    }

    /// After a kick: makes writable what the instruction at RIP writes, as if it had faulted, if KVM may keep
    /// the vCPU from getting on: it emulates the instruction's store, or the vCPU was kicked out twice in a
    /// row with the same registers.
    fn help_along(&mut self) -> Result<(), VcpuRunError> {
        let (regs, sregs) = self.exit_registers()?;
        let same = self.kicked_at.replace(regs) == Some(regs);
        let (gfns, stored_by) = self.stalled_on(&regs, &sregs)?;
        if (same || stored_by == StoredBy::Kvm) && fault::resolve(&gfns, &*self.ram)? {
            self.counters.rungs.count(fault::Rung::Operand);
        }
        Ok(())
    }

    fn stalled_on(
        &self,
        regs: &kvm_regs,
        sregs: &kvm_sregs,
    ) -> Result<(Vec<u64>, StoredBy), VcpuRunError> {
        let fault = WriteFault {
            regs,
            sregs,
            gpas: None,
            cpuid: &self.cpuid,
            xsave: &|| self.fd.get_xsave().ok(),
        };
        fault::stalled_on(&fault, &*self.ram).map_err(|source| VcpuRunError::Fault { source })
    }

    /// Sets an MSR by which KVM writes to memory, with the page pinned. If that cannot be, the guest gets a
    /// #GP, as for any value that an MSR does not take.
    fn set_msr(&mut self, index: u32, value: u64) {
        let entry = kvm_msr_entry {
            index,
            data: value,
            ..Default::default()
        };
        let done = match self.paravirt.pin(index, value, &*self.ram) {
            Ok(pinned) => {
                let set = msr::write(&self.fd, &[entry]).is_ok();
                if set {
                    self.paravirt.has_set(index, pinned);
                }
                set
            }
            Err(_) => false,
        };
        self.capturer.forget();
        // The exit is KVM_EXIT_X86_WRMSR, so `msr` is the field of the union that KVM reads.
        self.fd.get_kvm_run().__bindgen_anon_1.msr.error = u8::from(!done);
    }

    /// After an instruction that KVM could not emulate: whether it may now, since what it writes was
    /// read-only and is no more. Only plain stores come out as MMIO; a locked one fails
    /// (`emulator_cmpxchg_emulated` in `arch/x86/kvm/x86.c`).
    fn emulate_again(&mut self) -> Result<bool, VcpuRunError> {
        let (regs, sregs) = self.exit_registers()?;
        let (gfns, _) = self.stalled_on(&regs, &sregs)?;
        if fault::resolve(&gfns, &*self.ram)? {
            self.lost_races = None;
            self.counters.write_faults.fetch_add(1, Ordering::Relaxed);
            self.counters.rungs.count(fault::Rung::Operand);
            return Ok(true);
        }
        Ok(self.may_have_lost_a_race(&regs))
    }

    /// Nothing was left to do about a failure at `regs`: whether somebody else may have done it between the
    /// failure and the look.
    fn may_have_lost_a_race(&mut self, regs: &kvm_regs) -> bool {
        const MOST: u32 = 10;
        let before = match self.lost_races {
            Some((at, times)) if at == *regs => times,
            _ => 0,
        };
        self.lost_races = Some((*regs, before + 1));
        before < MOST
    }

    /// After a triple fault: whether it was because a shadow MMU could not set accessed or dirty bits in
    /// tables that were read-only, and are no more. The vCPU then runs on as if nothing had been.
    ///
    /// KVM gives the guest a page fault then (`FNAME(update_accessed_dirty_bits)` in
    /// `arch/x86/kvm/mmu/paging_tmpl.h`), for which a guest without an IDT has no handler. RIP is still at
    /// the instruction.
    fn recover(&mut self) -> Result<bool, VcpuRunError> {
        if self.translation != Translation::Shadow {
            return Ok(false);
        }
        let (mut regs, mut sregs) = self.exit_registers()?;
        let xsave = || self.fd.get_xsave().ok();
        let fault = WriteFault {
            regs: &regs,
            sregs: &sregs,
            gpas: None,
            cpuid: &self.cpuid,
            xsave: &xsave,
        };
        let gfns = fault::tables_to_update(&fault, &*self.ram);
        let gfns = gfns.map_err(|source| VcpuRunError::Fault { source })?;
        if !fault::resolve(&gfns, &*self.ram)? {
            // Another thread may have made the table writable since, or another vCPU have set the bits. Then
            // there was a page fault just now, which CR2 tells, since it is 0 before; and the tables know no
            // reason for it.
            let is_over = fault::page_fault_is_over(&fault, &*self.ram);
            let is_over = is_over.map_err(|source| VcpuRunError::Fault { source })?;
            if sregs.cr2 == 0 || !is_over || !self.may_have_lost_a_race(&regs) {
                return Ok(false);
            }
        }
        self.counters.write_faults.fetch_add(1, Ordering::Relaxed);
        self.counters.rungs.count(fault::Rung::Walk);
        let error = |what| move |source| VcpuRunError::Registers { what, source };
        let mut events = self.fd.get_vcpu_events().map_err(error("events"))?;
        events.exception = Default::default();
        // What it has set as it began to deliver the exception.
        const RESUME_FLAG: u64 = 1 << 16;
        regs.rflags &= !RESUME_FLAG;
        sregs.cr2 = 0;
        self.about_to_set();
        self.fd
            .set_sregs(&sregs)
            .map_err(error("system registers"))?;
        self.fd.set_regs(&regs).map_err(error("registers"))?;
        self.fd.set_vcpu_events(&events).map_err(error("events"))?;
        Ok(true)
    }

    /// The registers at the last exit.
    fn exit_registers(&self) -> Result<(kvm_regs, kvm_sregs), VcpuRunError> {
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
    fn park(&mut self) {
        self.control.enter_phase(self.index, Phase::Parked);
        while let Some(task) = self.control.next_task(self.index) {
            let done = match task {
                RegisterTask::Capture => self
                    .capture()
                    .map(|state| TaskState::Captured(Box::new(state))),
                RegisterTask::Restore(state, clock) => {
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
    fn capture(&mut self) -> Result<VcpuState, StateError> {
        let fresh = self.sync_regs == SyncRegs::Fresh;
        let exit = fresh.then(|| self.fd.sync_regs());
        self.capturer.capture(&self.fd, exit)
    }

    /// Sets all registers.
    fn restore(&mut self, state: &VcpuState, clock: Clock) -> Result<(), StateError> {
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
    fn about_to_set(&mut self) {
        self.capturer.forget();
        self.kicked = false;
        self.kicked_at = None;
        if self.sync_regs == SyncRegs::Fresh {
            self.sync_regs = SyncRegs::Stale;
        }
    }

    /// Sets the registers a guest starts with.
    fn set_entry_state(&self, entry: &EntryState) -> Result<(), StateError> {
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

    /// Where the vCPU is.
    fn report(&mut self) -> CrashReport {
        let state = self.capture().ok();
        let code = state.as_ref().map_or_else(Vec::new, |state| {
            fault::code_at(state.regs(), state.sregs(), &*self.ram, CODE_SHOWN)
        });
        CrashReport { state, code }
    }
}

/// Whether guest memory has `len` bytes at `gpa`.
fn is_memory(ram: &dyn GuestRam, gpa: u64, len: usize) -> bool {
    gpa.checked_add(len as u64)
        .is_some_and(|end| end <= ram.len())
}
