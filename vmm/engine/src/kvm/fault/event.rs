//! What the delivery of an exception or interrupt needs of memory.
//!
//! The CPU reads a gate of the IDT, a segment of the GDT and a stack pointer of the TSS, and pushes a frame
//! on the stack that they choose (Intel SDM 6.14, *Exception and Interrupt Handling in 64-bit Mode*). With
//! nested paging the walks to all of these are writes to the page tables. A task's TSS and descriptors may be
//! written, too: busy and accessed bits.

use super::cause::WriteFault;
use super::decode::GuestAccess;
use super::pages::Pages;
use crate::causes::Cause;
use crate::kvm::memory::GuestRam;
use crate::kvm::paging::{Touch, Walker};

/// The most that is pushed: SS, RSP, RFLAGS, CS, RIP and an error code, below an aligned stack pointer.
const FRAME: u64 = 6 * 8 + 16;
/// Bytes of a TSS in 64-bit mode, without its I/O bitmap.
const TSS: u64 = 104;
/// Where its stack pointers are: RSP0 to RSP2, and IST1 to IST7.
const STACKS: [u64; 10] = [4, 12, 20, 36, 44, 52, 60, 68, 76, 84];

/// Adds all pages that the delivery of an event may write or walk.
pub(super) fn delivery(
    fault: &WriteFault<'_>,
    ram: &dyn GuestRam,
    pages: &mut Pages<'_>,
) -> Result<(), Cause> {
    let sregs = fault.sregs;
    let table = |base, limit: u64| GuestAccess {
        gva: base,
        len: limit + 1,
        touch: Touch::Write,
    };
    let mut accesses = vec![below(fault.regs.rsp)];
    for descriptors in [&sregs.gdt, &sregs.idt] {
        if descriptors.limit != 0 {
            accesses.push(table(descriptors.base, descriptors.limit.into()));
        }
    }
    if sregs.tr.unusable == 0 && sregs.tr.present != 0 {
        accesses.push(table(sregs.tr.base, TSS - 1));
        let walker = Walker::new(ram, sregs);
        for slot in STACKS {
            let mut pointer = [0; 8];
            let read = walker.read(sregs.tr.base.wrapping_add(slot), &mut pointer)?;
            let pointer = u64::from_le_bytes(pointer);
            if read == pointer.to_le_bytes().len() && pointer != 0 {
                accesses.push(below(pointer));
            }
        }
    }
    for access in &accesses {
        pages.walked(access)?;
        pages.written(access)?;
    }
    Ok(())
}

/// The frame below a stack pointer.
fn below(rsp: u64) -> GuestAccess {
    GuestAccess {
        gva: rsp.wrapping_sub(FRAME),
        len: FRAME,
        touch: Touch::Write,
    }
}
