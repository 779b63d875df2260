//! What a vCPU could not see: memory that is hidden, because it is loaded as it is used.
//!
//! A touch of what is hidden comes out as a write fault does: `EFAULT`, without an address. So what is hidden of all
//! that the instruction at RIP may have touched is shown, the likely first: what KVM names, the code, what is read and
//! written, the tables on the way, and what the delivery of an event needs. Whatever is shown, the vCPU enters again.
//! If nothing of that is hidden it is a write fault, and the ladder's.
//!
//! Where the MMU is a **shadow** KVM reads the guest's tables by the host's addresses, and if it cannot, it takes them
//! for not present and gives the guest a page fault (`FNAME(walk_addr_generic)` in
//! `arch/x86/kvm/mmu/paging_tmpl.h`); what it emulates reads the I/O bitmap of the task-state segment in the same way.
//! Nobody is told. So these are shown before the first instruction ([`show_all_that_kvm_reads`]), and again if a vCPU
//! has met a triple fault, as a guest does that has no handler for what it was given: RIP is at the instruction still.

use std::collections::HashSet;

use kvm_bindings::{CpuId, kvm_regs, kvm_sregs};

use super::cause::WriteFault;
use super::inspection::Inspection;
use super::rung::Rung;
use crate::causes::Cause;
use crate::kvm::memory::GuestRam;
use crate::kvm::paging::{Touch, Walker};
use crate::kvm::tables::MOST;
use crate::mm::{PAGE_SIZE, REGION_PAGES};

/// The longest instruction.
const LONGEST: u64 = 15;

/// Shows what the vCPU may have touched of what is hidden. `false` if nothing of it is: then somebody else was first,
/// or it was no such touch.
pub(in crate::kvm) fn show(fault: &WriteFault<'_>, ram: &dyn GuestRam) -> Result<bool, Cause> {
    // By whatever has shown it: who walks tables reads them.
    let hidden = ram.hidden();
    if hidden == 0 {
        return Ok(false);
    }
    if let Some(gpas) = &fault.gpas {
        let last = gpas.end.max(gpas.start + 1) - 1;
        show_regions([gpas.start / PAGE_SIZE, last / PAGE_SIZE], ram)?;
    }
    let walker = Walker::new(ram, fault.sregs);
    for gva in [fault.regs.rip, fault.regs.rip.wrapping_add(LONGEST - 1)] {
        if let Some(gpa) = walker.translate(gva, Touch::Read, |_| {})? {
            show_regions([gpa / PAGE_SIZE], ram)?;
        }
    }
    if ram.hidden() < hidden {
        return Ok(true);
    }
    let look = Inspection::new(fault, ram)?;
    for rung in [Rung::Region, Rung::Walk, Rung::Event] {
        show_regions(look.pages(rung)?, ram)?;
        if ram.hidden() < hidden {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Shows all that KVM reads by itself for vCPUs with these registers: their page tables, all of them, and what the
/// delivery of an event needs. Says whether anything of it was hidden.
pub(in crate::kvm) fn show_all_that_kvm_reads<'a>(
    vcpus: impl IntoIterator<Item = (&'a kvm_regs, &'a kvm_sregs)>,
    ram: &dyn GuestRam,
) -> Result<bool, Cause> {
    let hidden = ram.hidden();
    if hidden == 0 {
        return Ok(false);
    }
    let mut seen = HashSet::new();
    for (regs, sregs) in vcpus {
        // Reading shows them.
        Walker::new(ram, sregs).tables(MOST, &mut seen, |_, _| ())?;
        let none = CpuId::new(0).map_err(|error| format!("no room for CPUID: {error:?}"))?;
        let fault = WriteFault {
            regs,
            sregs,
            gpas: None,
            cpuid: &none,
            xsave: &|| None,
        };
        let look = Inspection::new(&fault, ram)?;
        show_regions(look.pages(Rung::Event)?, ram)?;
        let task = [0, u64::from(sregs.tr.limit)].map(|at| sregs.tr.base.wrapping_add(at));
        let walker = Walker::new(ram, sregs);
        for gva in task {
            if let Some(gpa) = walker.translate(gva, Touch::Read, |_| {})? {
                show_regions([gpa / PAGE_SIZE], ram)?;
            }
        }
    }
    Ok(ram.hidden() < hidden)
}

/// Shows the regions that these pages are in.
fn show_regions(gfns: impl IntoIterator<Item = u64>, ram: &dyn GuestRam) -> Result<(), Cause> {
    let end = ram.len() / PAGE_SIZE;
    let mut last = None;
    for gfn in gfns {
        let region = gfn / REGION_PAGES;
        if gfn < end && last.replace(region) != Some(region) {
            ram.touch(gfn)?;
        }
    }
    Ok(())
}
