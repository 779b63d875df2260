//! What the guest could not write, and is given.

use std::ops::Range;
use std::sync::atomic::Ordering;

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_sregs};

use super::Vcpu;
use crate::causes::Cause;
use crate::kvm::error::{VcpuRunError, WriteFaultError};
use crate::kvm::fault::{self, StoredBy, WriteFault};
use crate::kvm::msr;
use crate::kvm::tables::Translation;
use crate::mm::PAGE_SIZE;

impl Vcpu {
    /// Shows what the vCPU could not see, or makes writable what it wants to write.
    pub(super) fn write_fault(&mut self, gpas: Option<Range<u64>>) -> Result<(), VcpuRunError> {
        let (regs, sregs) = self.exit_registers()?;
        let xsave = || self.fd.get_xsave().ok();
        let fault = WriteFault {
            regs: &regs,
            sregs: &sregs,
            gpas,
            cpuid: &self.cpuid,
            xsave: &xsave,
        };
        let shown = fault::show(&fault, &*self.ram);
        if shown.map_err(|source| memory_fault(&regs, source))? {
            self.ladder.step_down();
            return Ok(());
        }
        if let Some(rung) = self.ladder.climb(&fault, &*self.ram)? {
            self.counters().rungs.count(rung);
        } else if self.ladder.is_at_a_loss()
            && let Some(gfn) = self.ram.first_hidden(0)
        {
            // Nobody else was first, so it is hidden, wherever it is: in the end all is shown.
            let shown = self.ram.touch(gfn);
            shown.map_err(|source| VcpuRunError::Memory { gfn, source })?;
            self.ladder.was_helped();
        }
        Ok(())
    }

    /// Carries out a store that KVM emulates and may not do itself, since the page is read-only.
    ///
    /// The page is made writable for the guest, so that the next store does not come here, and written where
    /// it then is.
    pub(super) fn store(&self, gpa: u64, data: &[u8]) -> Result<(), VcpuRunError> {
        self.counters()
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
    pub(super) fn help_along(&mut self) -> Result<(), VcpuRunError> {
        let (regs, sregs) = self.exit_registers()?;
        let same = self.kicked_at.replace(regs) == Some(regs);
        let (gfns, stored_by) = self.stalled_on(&regs, &sregs)?;
        if (same || stored_by == StoredBy::Kvm) && fault::resolve(&gfns, &*self.ram)? {
            self.counters().rungs.count(fault::Rung::Operand);
        }
        Ok(())
    }

    /// Shows what is hidden of all that the vCPU, or KVM for it, may have touched. `false` if nothing is.
    fn show(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<bool, VcpuRunError> {
        let fault = WriteFault {
            regs,
            sregs,
            gpas: None,
            cpuid: &self.cpuid,
            xsave: &|| self.fd.get_xsave().ok(),
        };
        let read = fault::show_all_that_kvm_reads([(regs, sregs)], &*self.ram);
        let read = read.map_err(|source| memory_fault(regs, source))?;
        let shown = fault::show(&fault, &*self.ram);
        Ok(shown.map_err(|source| memory_fault(regs, source))? || read)
    }

    pub(super) fn stalled_on(
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
    pub(super) fn set_msr(&mut self, index: u32, value: u64) {
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

    /// Nothing was left to do about a failure at `regs`: whether somebody else may have done it between the
    /// failure and the look.
    pub(super) fn may_have_lost_a_race(&mut self, regs: &kvm_regs) -> bool {
        const MOST: u32 = 10;
        let before = match self.lost_races {
            Some((at, times)) if at == *regs => times,
            _ => 0,
        };
        self.lost_races = Some((*regs, before + 1));
        before < MOST
    }

    /// After an instruction that KVM could not emulate: whether it may now, since what it writes was
    /// read-only and is no more. Only plain stores come out as MMIO; a locked one fails
    /// (`emulator_cmpxchg_emulated` in `arch/x86/kvm/x86.c`).
    pub(super) fn emulate_again(&mut self) -> Result<bool, VcpuRunError> {
        let (regs, sregs) = self.exit_registers()?;
        if self.show(&regs, &sregs)? {
            return Ok(true);
        }
        let (gfns, _) = self.stalled_on(&regs, &sregs)?;
        if fault::resolve(&gfns, &*self.ram)? {
            self.lost_races = None;
            self.counters().write_faults.fetch_add(1, Ordering::Relaxed);
            self.counters().rungs.count(fault::Rung::Operand);
            return Ok(true);
        }
        Ok(self.may_have_lost_a_race(&regs))
    }

    /// After a triple fault: whether it was because a shadow MMU could not set accessed or dirty bits in
    /// tables that were read-only, and are no more. The vCPU then runs on as if nothing had been.
    ///
    /// KVM gives the guest a page fault then (`FNAME(update_accessed_dirty_bits)` in
    /// `arch/x86/kvm/mmu/paging_tmpl.h`), for which a guest without an IDT has no handler. RIP is still at
    /// the instruction.
    pub(super) fn recover(&mut self) -> Result<bool, VcpuRunError> {
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
        // What it was given may be because KVM could not read what was hidden.
        let shown = self.show(&regs, &sregs)?;
        let gfns = fault::tables_to_update(&fault, &*self.ram);
        let gfns = gfns.map_err(|source| VcpuRunError::Fault { source })?;
        if !fault::resolve(&gfns, &*self.ram)? && !shown {
            // Another thread may have made the table writable since, or another vCPU have set the bits. Then
            // there was a page fault just now, which CR2 tells, since it is 0 before; and the tables know no
            // reason for it.
            let is_over = fault::page_fault_is_over(&fault, &*self.ram);
            let is_over = is_over.map_err(|source| VcpuRunError::Fault { source })?;
            if sregs.cr2 == 0 || !is_over || !self.may_have_lost_a_race(&regs) {
                return Ok(false);
            }
        }
        self.counters().write_faults.fetch_add(1, Ordering::Relaxed);
        self.counters().rungs.count(fault::Rung::Walk);
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
}

/// Guest memory could not be had for a fault of the instruction at RIP.
fn memory_fault(regs: &kvm_regs, source: Cause) -> VcpuRunError {
    VcpuRunError::Fault {
        source: WriteFaultError::Memory {
            rip: regs.rip,
            source,
        },
    }
}
