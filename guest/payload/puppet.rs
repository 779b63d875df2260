//! A guest that does one access to memory after another, as it is told: a puppet. The ABI (`Mail`) has
//! its half of the contract.
//!
//! It lives in registers alone. It has no stack, no data and nothing to remember, so that the only memory it
//! ever writes, its mailbox aside, is what it was told to write, and it can be started anew at any time. Nor
//! does it care where it is: where its mailbox is it is told as the first argument.

#![no_std]
#![no_main]

#[allow(dead_code)] // One half of the contract is the VMM's, and most of the rest the payload's.
#[path = "../src/abi.rs"]
mod abi;

use core::arch::global_asm;
use core::hint::spin_loop;
use core::mem::offset_of;
use core::panic::PanicInfo;

use abi::{MAIL_READ, MAIL_WRITE, Mail, PORT_MAIL, SAYS_DONE, SAYS_READY};

// A command is one `mov`: a read never writes, and a write that faults is done again whole.
global_asm!(
    ".globl _start",
    "_start:",
    "mov rbx, rdi",
    "mov eax, {ready}",
    "2:",
    "mov edx, {port}",
    "out dx, eax",
    "mov rcx, [rbx + {command}]",
    "mov rdi, [rbx + {address}]",
    "mov rax, [rbx + {word}]",
    "cmp rcx, {read}",
    "je 3f",
    "cmp rcx, {write}",
    "jne 5f",
    "mov [rdi], rax",
    "jmp 4f",
    "3:",
    "mov rax, [rdi]",
    "mov [rbx + {word}], rax",
    "4:",
    "mov eax, {done}",
    "jmp 2b",
    // No such command.
    "5:",
    "ud2",
    port = const PORT_MAIL,
    ready = const SAYS_READY,
    done = const SAYS_DONE,
    read = const MAIL_READ,
    write = const MAIL_WRITE,
    command = const offset_of!(Mail, command),
    address = const offset_of!(Mail, address),
    word = const offset_of!(Mail, word),
);

/// Never called: no Rust code runs here.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        spin_loop();
    }
}
