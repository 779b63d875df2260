//! vCPUs that KVM keeps from getting on without a write fault that it says anything of.

use super::cause::{WriteFault, frames};
use super::decode::StoredBy;
use super::inspection::Inspection;
use super::pages::Pages;
use super::rung::Rung;
use crate::kvm::error::WriteFaultError;
use crate::kvm::memory::GuestRam;
use crate::kvm::paging::Walker;
use crate::mm::REGION_PAGES;

/// What a vCPU that KVM keeps from getting on wants to write, by the instruction at RIP. Nothing if that
/// writes no memory.
///
/// KVM retries for ever inside `KVM_RUN` an instruction whose store it emulates to a page that it may not
/// write (`sgdt` on PVM). Of such a store the whole region is named: the next of them would be stuck as well.
pub(in crate::kvm) fn stalled_on(
    fault: &WriteFault<'_>,
    ram: &dyn GuestRam,
) -> Result<(Vec<u64>, StoredBy), WriteFaultError> {
    let rip = fault.regs.rip;
    let memory = |source| WriteFaultError::Memory { rip, source };
    let look = Inspection::new(fault, ram).map_err(memory)?;
    let written = look.pages(Rung::Operand).map_err(memory)?;
    let by = look.decoded.stored_by;
    let gfns = match by {
        StoredBy::Cpu => written,
        StoredBy::Kvm => written
            .into_iter()
            .flat_map(|gfn| {
                let first = gfn - gfn % REGION_PAGES;
                first..(first + REGION_PAGES).min(frames(ram))
            })
            .collect(),
    };
    Ok((gfns, by))
}

/// The page tables in which the instruction at RIP sets accessed or dirty bits.
pub(in crate::kvm) fn tables_to_update(
    fault: &WriteFault<'_>,
    ram: &dyn GuestRam,
) -> Result<Vec<u64>, WriteFaultError> {
    let rip = fault.regs.rip;
    let memory = |source| WriteFaultError::Memory { rip, source };
    let look = Inspection::new(fault, ram).map_err(memory)?;
    let mut pages = Pages::new(ram, fault.sregs);
    for access in &look.decoded.accesses {
        pages.told(access).map_err(memory)?;
    }
    Ok(pages.into_gfns())
}

/// Whether the page fault at CR2 is one of the instruction at RIP that the page tables have no reason for:
/// whatever was missing when it was raised is there now.
pub(in crate::kvm) fn page_fault_is_over(
    fault: &WriteFault<'_>,
    ram: &dyn GuestRam,
) -> Result<bool, WriteFaultError> {
    let (rip, at) = (fault.regs.rip, fault.sregs.cr2);
    let memory = |source| WriteFaultError::Memory { rip, source };
    let look = Inspection::new(fault, ram).map_err(memory)?;
    let walker = Walker::new(ram, fault.sregs);
    for access in &look.decoded.accesses {
        let touched = at.wrapping_sub(access.gva) < access.len;
        if touched && walker.allows(at, access.touch).map_err(memory)? {
            return Ok(true);
        }
    }
    Ok(false)
}
