//! Code that another vCPU changes while it is executed, as kernels do all the time.
//!
//! Between a fault and the VMM's look at the instruction that faulted, another one may have taken its place,
//! which writes elsewhere or nothing.

use core::arch::asm;
use core::hint::spin_loop;

use super::{Vcpu, read, spin};
use crate::abi::PAGE_SIZE;

/// `mov [rdi], rax; ret`, `mov [rsi], rax; ret`, `nop [rax]; ret`: of equal length, so that one aligned store
/// changes one to another.
const INSTRUCTIONS: [u32; 3] = [0xc307_8948, 0xc306_8948, 0xc300_1f0f];

/// vCPU 0 executes, vCPU 1 patches.
pub fn run(vcpu: Vcpu<'_>) -> ! {
    // A page that no vCPU's stores are on.
    let code = vcpu.layout().memory - PAGE_SIZE + 64;
    match vcpu.index {
        0 => execute(vcpu, code),
        1 => patch(vcpu, code),
        _ => spin(),
    }
}

fn patch(mut vcpu: Vcpu<'_>, code: u64) -> ! {
    loop {
        let instruction = INSTRUCTIONS[vcpu.rounds as usize % INSTRUCTIONS.len()];
        // SAFETY: memory that holds no Rust object, aligned.
        unsafe { (code as *mut u32).write_volatile(instruction) };
        // Time for the other to execute it.
        for _ in 0..20 {
            spin_loop();
        }
        vcpu.round_done();
    }
}

fn execute(mut vcpu: Vcpu<'_>, code: u64) -> ! {
    let ground = vcpu.ground(2);
    // There is nothing to execute before the other vCPU has written it.
    while read(code) == 0 {
        spin_loop();
    }
    loop {
        let (salt, first) = (
            vcpu.salt(),
            ground.piece(vcpu.rounds % (ground.pieces - 1)) + 128,
        );
        let second = first + PAGE_SIZE;
        let before = (read(first), read(second));
        // SAFETY: what is there stores to one of these two, or nothing, and comes back.
        unsafe {
            asm!("call {code}", code = in(reg) code, in("rdi") first, in("rsi") second, in("rax") salt)
        };
        let after = (read(first), read(second));
        if ![(salt, before.1), (before.0, salt), before].contains(&after) {
            vcpu.fail(format_args!(
                "stores of {salt:#x} to {first:#x} or {second:#x} made {after:#x?} of {before:#x?}"
            ));
        }
        vcpu.round_done();
    }
}
