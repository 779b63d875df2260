//! What a Rust program needs under it: an entry point, a panic handler, and the memory functions that the
//! compiler calls.

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

use crate::abi::{BOOT_MAGIC, BootInfo, PORT_EXIT, PORT_PANIC};
use crate::{console, port};

// The stack pointer is 16-byte aligned here, and is to be 8 off that in a function.
global_asm!(".globl _start", "_start:", "call {start}", "ud2", start = sym start);

/// First Rust code of every vCPU: `boot` is what the VMM left in RDI, `vcpu` in RSI.
extern "C" fn start(boot: *const BootInfo, vcpu: u64) -> ! {
    // SAFETY: the VMM has written it before the first instruction, and nobody writes it after.
    let boot = unsafe { &*boot };
    assert!(
        boot.magic == BOOT_MAGIC,
        "boot info has magic {:#x}, not {BOOT_MAGIC:#x}: VMM and guest differ in their ABI",
        boot.magic
    );
    crate::run(boot, vcpu)
}

/// Ends the run for all vCPUs.
pub fn exit(status: u32) -> ! {
    loop {
        port::out(PORT_EXIT, status);
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => console::send(
            PORT_PANIC,
            format_args!("{}:{}: {}", at.file(), at.line(), info.message()),
        ),
        None => console::send(PORT_PANIC, format_args!("{}", info.message())),
    }
    exit(101)
}

// The memory functions are string instructions, because the compiler would make a call of the same
// function out of a loop.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's ranges, as for C's memcpy. The direction flag is clear.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: `to` does not begin inside the source, so that copying upwards is right.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's ranges, as for C's memmove; downwards from their last bytes (there is at least
    // one). The direction flag is clear again at the end.
    unsafe {
        asm!("std", "rep movsb", "cld",
            inout("rcx") count => _,
            inout("rdi") to.add(count - 1) => _,
            inout("rsi") from.add(count - 1) => _,
            options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's range, as for C's memset. The direction flag is clear.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    let (above, below): (u8, u8);
    // SAFETY: the caller's ranges, as for C's memcmp. The direction flag is clear. The first `cmp` makes
    // the flags those of equality, for a count of 0.
    unsafe {
        asm!("cmp rcx, rcx", "repe cmpsb", "seta {above}", "setb {below}",
            above = out(reg_byte) above, below = out(reg_byte) below,
            inout("rcx") count => _, inout("rsi") a => _, inout("rdi") b => _,
            options(nostack, readonly));
    }
    i32::from(above) - i32::from(below)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, count) }
}
