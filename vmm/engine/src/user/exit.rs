//! Why a guest came out, in terms of what it did.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::addresses::Addresses;
use super::crossing::RawExit;
use super::frame::{Frame, Gpr};
use super::signals::KICK;
use crate::kvm::CrashReason;
use crate::kvm::memory::GuestRam;
use crate::mm::PAGE_SIZE;

/// The longest instruction.
const LONGEST: usize = 15;
/// Vectors of exceptions.
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;
/// Error code of a page fault: it was a write.
const WRITE: u64 = 1 << 1;

/// An exit from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// Somebody kicked it.
    Kicked,
    /// It wrote a page that its window shows read-only.
    WriteFault { gfn: u64 },
    /// It read or executed a page that its window does not show, or that is no memory.
    Touch { gfn: u64, address: u64 },
    /// It wrote a port by an instruction of so many bytes.
    Out { port: u16, value: u32, len: u64 },
    /// Ring 3 may not do it, and what stands at RIP is nothing of that kind.
    Protection,
    /// It did what a guest must not do.
    Crash(CrashReason),
    /// The host refused to enter.
    Refused(RawExit),
}

/// What `raw` means of a guest with the registers in `frame`, whose memory is at `addresses`.
pub(super) fn of(raw: RawExit, frame: &Frame, addresses: &Addresses, ram: &dyn GuestRam) -> Exit {
    if raw.refused || raw.overflow {
        return Exit::Refused(raw);
    }
    let crash = |what| Exit::Crash(CrashReason::Exception { what });
    match raw.signal {
        KICK => Exit::Kicked,
        libc::SIGSEGV if frame.gpr(Gpr::Vector) == PAGE_FAULT => {
            let write = frame.gpr(Gpr::Error) & WRITE != 0;
            match addresses.gpa(raw.address) {
                Some(gpa) if write => Exit::WriteFault {
                    gfn: gpa / PAGE_SIZE,
                },
                Some(gpa) => Exit::Touch {
                    gfn: gpa / PAGE_SIZE,
                    address: raw.address,
                },
                None => Exit::Crash(CrashReason::Mmio {
                    gpa: raw.address,
                    write,
                }),
            }
        }
        libc::SIGSEGV if frame.gpr(Gpr::Vector) == GENERAL_PROTECTION => {
            privileged(frame, addresses, ram)
        }
        libc::SIGSEGV => crash("a fault of memory that has no address"),
        libc::SIGBUS => crash("memory that cannot be accessed so"),
        libc::SIGILL => crash("an invalid opcode"),
        libc::SIGFPE => crash("an arithmetic error"),
        libc::SIGTRAP => crash("a breakpoint or trap"),
        libc::SIGSYS => crash("a system call: there is no kernel here"),
        _ => crash("a signal that a guest does not get"),
    }
}

/// What the instruction at RIP, which ring 3 may not execute, is to the VMM.
fn privileged(frame: &Frame, addresses: &Addresses, ram: &dyn GuestRam) -> Exit {
    let Some(instruction) = instruction_at(frame.gpr(Gpr::Rip), addresses, ram) else {
        return Exit::Protection;
    };
    let len = instruction.len() as u64;
    let dx = frame.gpr(Gpr::Rdx) as u16;
    let port = |operand| match instruction.op_kind(operand) {
        OpKind::Immediate8 => instruction.immediate8().into(),
        _ => dx,
    };
    let rax = frame.gpr(Gpr::Rax);
    let string = |bytes: u64| {
        let times = if instruction.has_rep_prefix() {
            frame.gpr(Gpr::Rcx)
        } else {
            1
        };
        CrashReason::PortString {
            port: dx,
            len: bytes.saturating_mul(times) as usize,
        }
    };
    Exit::Crash(match instruction.mnemonic() {
        Mnemonic::Out => {
            let value = match instruction.op1_register() {
                Register::AL => rax as u8 as u32,
                Register::AX => rax as u16 as u32,
                _ => rax as u32,
            };
            let port = port(0);
            return Exit::Out { port, value, len };
        }
        Mnemonic::In => CrashReason::PortRead { port: port(1) },
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => CrashReason::PortRead { port: dx },
        Mnemonic::Outsb => string(1),
        Mnemonic::Outsw => string(2),
        Mnemonic::Outsd => string(4),
        Mnemonic::Hlt => CrashReason::Halt,
        _ => return Exit::Protection,
    })
}

/// The instruction at `rip`, if guest memory has one there.
fn instruction_at(rip: u64, addresses: &Addresses, ram: &dyn GuestRam) -> Option<Instruction> {
    let code = code_at(rip, addresses, ram, LONGEST);
    let instruction = Decoder::with_ip(64, &code, rip, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// Up to `len` bytes of guest memory at `rip`.
pub(super) fn code_at(rip: u64, addresses: &Addresses, ram: &dyn GuestRam, len: usize) -> Vec<u8> {
    let Some(gpa) = addresses.gpa(rip) else {
        return Vec::new();
    };
    let there = ram.len().saturating_sub(gpa).min(len as u64) as usize;
    let mut code = vec![0; there];
    match ram.read(gpa, &mut code) {
        Ok(()) => code,
        Err(_) => Vec::new(),
    }
}
