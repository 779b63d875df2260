//! A guest that does one wrong thing, to test how the VMM takes it; `misbehaviour` lists them.

#![no_std]
#![no_main]

#[allow(dead_code)] // One half of the contract is the VMM's.
#[path = "../src/abi.rs"]
mod abi;
#[path = "../src/misbehaviour.rs"]
mod misbehaviour;

#[allow(dead_code)] // The payload uses more of it.
mod area;
mod console;
mod effect;
mod garbage;
mod port;
mod rt;
mod writes;

use core::arch::asm;
use core::hint::spin_loop;

use abi::{
    BootInfo, Failure, FailureKind, Layout, PAGE_TABLES_GPA, PORT_CONSOLE, PORT_DOORBELL_EVENT,
    PORT_DOORBELL_EXIT, PORT_FAILURE, REGION_SIZE, Text,
};
use misbehaviour::Misbehaviour;

/// What vCPU `index` does; called by `rt` on every vCPU.
fn run(boot: &BootInfo, index: u64) -> ! {
    if index != 0 {
        spin();
    }
    let layout = &boot.layout;
    match Misbehaviour::from_raw(boot.seed) {
        None => panic!("there is no misbehaviour {}", boot.seed),
        Some(Misbehaviour::InvalidOpcode) => {
            // SAFETY: does not come back.
            unsafe { asm!("ud2", options(noreturn)) }
        }
        Some(Misbehaviour::Spin) => spin(),
        Some(Misbehaviour::Panic) => panic!("asked to panic"),
        Some(Misbehaviour::ExitSeven) => rt::exit(7),
        Some(Misbehaviour::Bye) => console::print(format_args!("bye")),
        Some(Misbehaviour::StoreBeyondMemory) => store(beyond_memory(layout)),
        Some(Misbehaviour::UnknownPort) => port::out(0x999, 0),
        Some(Misbehaviour::WildText) => print_wild_texts(layout),
        Some(Misbehaviour::WildDoorbell) => {
            port::out(PORT_DOORBELL_EXIT + layout.devices as u16, 0);
            port::out(PORT_DOORBELL_EVENT + layout.devices as u16, 0);
        }
        Some(Misbehaviour::GarbageQueue) => garbage::post(layout),
        Some(Misbehaviour::FalseFailure) => {
            report_false_failure(layout);
            spin();
        }
        Some(Misbehaviour::WriteWithEverything) => writes::write_with_everything(layout),
        Some(Misbehaviour::StoreNonCanonical) => store(1 << 63),
    }
    rt::exit(0)
}

fn spin() -> ! {
    loop {
        spin_loop();
    }
}

/// Stores a word at `gva`, come what may.
fn store(gva: u64) {
    // SAFETY: the run should end here; if it goes on, nothing of this program was at the address.
    unsafe { asm!("mov qword ptr [{}], -1", in(reg) gva, options(nostack, preserves_flags)) }
}

/// An address that is not memory: one that is mapped all the same, if the last page table leads there.
fn beyond_memory(layout: &Layout) -> u64 {
    if is_mapped(layout.memory) {
        layout.memory
    } else {
        layout.memory + 8 * REGION_SIZE
    }
}

/// Whether the page tables, which the VMM keeps at a known place, map `gva`.
fn is_mapped(gva: u64) -> bool {
    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let mut table = PAGE_TABLES_GPA;
    for shift in [39, 30, 21, 12] {
        let entry = table + 8 * (gva >> shift & 511);
        // SAFETY: page tables lie in guest memory, which is mapped, and are 8-byte aligned.
        let entry = unsafe { (entry as *const u64).read_volatile() };
        if entry & PRESENT == 0 {
            return false;
        }
        if entry & LARGE != 0 {
            break;
        }
        table = entry & ADDRESS;
    }
    true
}

fn print_wild_texts(layout: &Layout) {
    let beyond = Text {
        gpa: layout.memory + 0x1000,
        len: u64::MAX,
    };
    port::out_pointer(PORT_CONSOLE, &beyond);
    let across = Text {
        gpa: layout.memory - 16,
        len: 4096,
    };
    port::out_pointer(PORT_CONSOLE, &across);
    port::out(PORT_CONSOLE, u32::MAX);
}

fn report_false_failure(layout: &Layout) {
    let failure = Failure {
        kind: FailureKind::Page as u64,
        vcpu: 0,
        op: 11,
        gpa: layout.hammer_base,
        expected: 0x1111_1111_1111_1111,
        found: 0x2222_2222_2222_2222,
        device: 0,
        seq: 0,
    };
    port::out_pointer(PORT_FAILURE, &failure);
}
