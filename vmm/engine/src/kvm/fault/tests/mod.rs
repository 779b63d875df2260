//! What each rung of the ladder says of hand-assembled instructions, and how a fault climbs.

mod climbing;
mod rungs;
mod stalled;

use guest::abi::PAGE_TABLES_GPA;
use kvm_bindings::{CpuId, kvm_regs, kvm_sregs};

use super::inspection::Inspection;
use super::*;
use crate::kvm::memory::GuestRam;
use crate::kvm::paging::tests::Bytes;
use crate::kvm::paging::write_page_tables;
use crate::kvm::registers::tests::entry;
use crate::kvm::registers::{entry_regs, entry_sregs};

const CODE: u64 = 0x20_0000;

const MEMORY: u64 = 4 << 20;

/// Where the tables of [`guest`] are: PML4, PDPT, page directory.
const TABLES: [u64; 3] = [0x10, 0x11, 0x12];

/// Guest memory with page tables and `code` at [`CODE`].
fn guest(code: &[u8]) -> Bytes {
    let ram = Bytes::new(MEMORY);
    write_page_tables(&ram, PAGE_TABLES_GPA, MEMORY).unwrap();
    ram.write(CODE, code).unwrap();
    ram
}

fn no_cpuid() -> CpuId {
    CpuId::from_entries(&[]).unwrap()
}

fn sregs() -> kvm_sregs {
    entry_sregs(&entry(CODE, 0), &kvm_sregs::default(), &no_cpuid())
}

/// What `rung` says of the instruction at RIP, by number.
fn pages(rung: Rung, regs: &kvm_regs, sregs: &kvm_sregs, ram: &dyn GuestRam) -> Vec<u64> {
    let fault = WriteFault {
        regs,
        sregs,
        gpas: None,
        cpuid: &no_cpuid(),
        xsave: &|| None,
    };
    let mut gfns = Inspection::new(&fault, ram).unwrap().pages(rung).unwrap();
    gfns.sort_unstable();
    gfns
}

/// Frames written by `code`, with registers as `set` leaves them.
fn frames(code: &[u8], set: impl FnOnce(&mut kvm_regs)) -> Vec<u64> {
    frames_of(Rung::Operand, code, set)
}

fn frames_of(rung: Rung, code: &[u8], set: impl FnOnce(&mut kvm_regs)) -> Vec<u64> {
    let mut regs = entry_regs(&entry(CODE, 0));
    set(&mut regs);
    pages(rung, &regs, &sregs(), &guest(code))
}

/// `mov [rdi], rax`
const STORE: &[u8] = &[0x48, 0x89, 0x07];
