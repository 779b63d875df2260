//! The instruction at RIP, and the memory that it uses.
//!
//! iced-x86 lists what an instruction reads and writes. What it does not list is added here: `clzero`, tile
//! stores, the stack check of `enter`, the reach of bit tests. Addresses in vector registers come from the
//! XSAVE area.

use std::fmt;

use iced_x86::{
    Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::cause::WriteFault;
use super::vector;
use crate::causes::Cause;
use crate::kvm::extended::XSAVE_BYTES;
use crate::kvm::memory::GuestRam;
use crate::kvm::paging::{Touch, Walker};

/// The longest an instruction can be.
const MAX_INSTRUCTION: usize = 15;
/// The most elements a gather or scatter has.
const MAX_ELEMENTS: usize = 16;
/// Rows of a tile, and bytes of each, at most.
const TILE_ROWS: u64 = 16;
const TILE_ROW: u64 = 64;
/// What `clzero` zeroes.
const CACHE_LINE: u64 = 64;

/// An access to memory, by guest-virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GuestAccess {
    pub(super) gva: u64,
    pub(super) len: u64,
    pub(super) touch: Touch,
}

/// Who carries an instruction's store out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kvm) enum StoredBy {
    /// The CPU, as most.
    Cpu,
    /// KVM may have to: ring 3 may not execute it where the host has UMIP.
    Kvm,
}

/// An instruction and the memory it uses.
#[derive(Debug)]
pub(super) struct Decoded {
    /// Its code first, then its operands.
    pub(super) accesses: Vec<GuestAccess>,
    pub(super) stored_by: StoredBy,
    what: What,
}

#[derive(Debug)]
enum What {
    Instruction(String),
    /// RIP is not mapped.
    Unmapped,
    /// The bytes at RIP are no instruction.
    Bytes(Vec<u8>),
    /// Addresses outside of 64-bit mode with paging on are not translated here.
    Mode,
}

impl fmt::Display for Decoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Instruction(name) => f.write_str(name),
            What::Unmapped => f.write_str("not mapped"),
            What::Bytes(bytes) => write!(f, "no instruction: {bytes:02x?}"),
            What::Mode => f.write_str("not in 64-bit mode"),
        }
    }
}

impl Decoded {
    /// The instruction at RIP.
    pub(super) fn at(fault: &WriteFault<'_>, ram: &dyn GuestRam) -> Result<Self, Cause> {
        let walker = Walker::new(ram, fault.sregs);
        let rip = linear_rip(fault.regs, fault.sregs);
        let fetch = |len| GuestAccess {
            gva: rip,
            len,
            touch: Touch::Read,
        };
        let nothing = |what, len| Self {
            accesses: vec![fetch(len)],
            stored_by: StoredBy::Cpu,
            what,
        };
        if !walker.translates() {
            return Ok(nothing(What::Mode, 1));
        }
        let mut code = [0; MAX_INSTRUCTION];
        let count = walker.read(rip, &mut code)?;
        let code = &code[..count];
        if code.is_empty() {
            return Ok(nothing(What::Unmapped, 1));
        }
        let bits = bits(fault.sregs);
        let decoder = Decoder::with_ip(bits, code, fault.regs.rip, DecoderOptions::NONE);
        let instruction = { decoder }.decode();
        if instruction.is_invalid() {
            let len = MAX_INSTRUCTION as u64;
            return Ok(nothing(What::Bytes(code.to_vec()), len));
        }
        let mut accesses = vec![fetch(instruction.len() as u64)];
        add_operands(&instruction, fault, &mut accesses);
        Ok(Self {
            accesses,
            stored_by: stored_by(&instruction),
            what: What::Instruction(mnemonic(&instruction)),
        })
    }
}

/// The top of the stack.
pub(super) fn stack(fault: &WriteFault<'_>) -> GuestAccess {
    GuestAccess {
        gva: fault.regs.rsp.wrapping_sub(8),
        len: 16,
        touch: Touch::Write,
    }
}

/// The linear address of the instruction at RIP.
pub(super) fn linear_rip(regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
    if sregs.cs.l != 0 {
        regs.rip
    } else {
        sregs.cs.base.wrapping_add(regs.rip) & u64::from(u32::MAX)
    }
}

/// Width of the code segment.
fn bits(sregs: &kvm_sregs) -> u32 {
    match (sregs.cs.l, sregs.cs.db) {
        (0, 0) => 16,
        (0, _) => 32,
        _ => 64,
    }
}

/// Instructions that show the kernel's addresses: where the host has UMIP, ring 3 cannot execute them and KVM
/// emulates them.
fn stored_by(instruction: &Instruction) -> StoredBy {
    match instruction.mnemonic() {
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Sldt | Mnemonic::Smsw | Mnemonic::Str => {
            StoredBy::Kvm
        }
        _ => StoredBy::Cpu,
    }
}

/// Adds all memory that `instruction` uses.
fn add_operands(
    instruction: &Instruction,
    fault: &WriteFault<'_>,
    accesses: &mut Vec<GuestAccess>,
) {
    let (regs, sregs) = (fault.regs, fault.sregs);
    let value = |register| register_value(register, regs, sregs);
    let write = |gva, len| GuestAccess {
        gva,
        len,
        touch: Touch::Write,
    };
    match instruction.mnemonic() {
        Mnemonic::Clzero => {
            let line = match instruction.code() {
                Code::Clzerow => Register::AX,
                Code::Clzerod => Register::EAX,
                _ => Register::RAX,
            };
            let base = value(instruction.segment_prefix()).unwrap_or(0);
            let line = value(line).unwrap_or(0).wrapping_add(base);
            accesses.push(write(line - line % CACHE_LINE, CACHE_LINE));
            return;
        }
        // The address of each row is a sum in which the index is how far rows lie apart.
        Mnemonic::Tilestored => {
            let base = value(instruction.memory_base()).unwrap_or(0);
            let start = base.wrapping_add(instruction.memory_displacement64());
            let start = start.wrapping_add(value(instruction.segment_prefix()).unwrap_or(0));
            let stride = value(instruction.memory_index()).unwrap_or(0);
            let stride = stride.wrapping_mul(instruction.memory_index_scale().into());
            accesses.extend((0..TILE_ROWS).map(|row| {
                let row = start.wrapping_add(stride.wrapping_mul(row));
                write(row, TILE_ROW)
            }));
            return;
        }
        _ => {}
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info_options(instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
    for used in info.used_memory() {
        let touch = match used.access() {
            OpAccess::Read | OpAccess::CondRead => Touch::Read,
            OpAccess::Write
            | OpAccess::CondWrite
            | OpAccess::ReadWrite
            | OpAccess::ReadCondWrite => Touch::Write,
            OpAccess::None | OpAccess::NoMemAccess => continue,
        };
        let len = access_len(used, instruction);
        let access = |gva: u64| GuestAccess { gva, len, touch };
        if used.vsib_size() != 0 {
            let xsave = (fault.xsave)();
            let elements = (0..MAX_ELEMENTS).map_while(|element| {
                used.virtual_address(element, |register, element, size| {
                    match (&xsave, register.is_vector_register()) {
                        (Some(xsave), true) => {
                            vector::element(xsave, fault.cpuid, register, element, size)
                        }
                        _ => value(register),
                    }
                })
            });
            accesses.extend(elements.map(access));
        } else if let Some(gva) = used.virtual_address(0, |register, _, _| value(register)) {
            accesses.push(access(gva.wrapping_add(bit_offset(instruction, fault))));
        }
    }
    // `enter` checks that it may write at the stack pointer it ends with, below what it pushes.
    if matches!(
        instruction.code(),
        Code::Enterq_imm16_imm8 | Code::Enterw_imm16_imm8
    ) {
        let pushed = accesses
            .iter()
            .filter(|access| access.touch == Touch::Write)
            .map(|access| access.gva)
            .min()
            .unwrap_or(regs.rsp);
        let top = pushed.wrapping_sub(u64::from(instruction.immediate16()));
        accesses.push(write(top, 1));
    }
}

/// Bytes of an access.
fn access_len(used: &UsedMemory, instruction: &Instruction) -> u64 {
    let sizes = [used.memory_size().size(), instruction.memory_size().size()];
    // A repeated string instruction has no size of its own: one element is what the instruction has. What has
    // none there either is of the XSAVE family, and so no larger than the area that guests may have.
    sizes
        .into_iter()
        .find(|size| *size != 0)
        .unwrap_or(XSAVE_BYTES) as u64
}

/// What is added to the address of `bts [memory], register` and its like: the register is a signed bit
/// number, and may reach far beyond the operand.
fn bit_offset(instruction: &Instruction, fault: &WriteFault<'_>) -> u64 {
    let bit_test = matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    );
    if !bit_test
        || instruction.op0_kind() != OpKind::Memory
        || instruction.op1_kind() != OpKind::Register
    {
        return 0;
    }
    let register = instruction.op1_register();
    let value = register_value(register, fault.regs, fault.sregs).unwrap_or(0);
    let bytes = register.size() as i64;
    let bit = match bytes {
        2 => i64::from(value as i16),
        4 => i64::from(value as i32),
        _ => value as i64,
    };
    (bit.div_euclid(bytes * 8) * bytes) as u64
}

/// The value of a general register, or the base of a segment. `None` for vector registers, and for no
/// register.
fn register_value(register: Register, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<u64> {
    // In 64-bit mode these have no base.
    let flat = |base| if sregs.cs.l != 0 { 0 } else { base };
    let full = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RBX => regs.rbx,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::RSP => regs.rsp,
        Register::RBP => regs.rbp,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        Register::FS => return Some(sregs.fs.base),
        Register::GS => return Some(sregs.gs.base),
        Register::CS => return Some(flat(sregs.cs.base)),
        Register::DS => return Some(flat(sregs.ds.base)),
        Register::ES => return Some(flat(sregs.es.base)),
        Register::SS => return Some(flat(sregs.ss.base)),
        _ => return None,
    };
    // `ah` and its like never are part of an address.
    Some(match register.size() {
        8 => full,
        bytes => full & ((1 << (8 * bytes)) - 1),
    })
}

/// The mnemonic of an instruction, in lower case.
fn mnemonic(instruction: &Instruction) -> String {
    format!("{:?}", instruction.mnemonic()).to_lowercase()
}

/// Up to `len` bytes of code at RIP, for crash reports. Empty if there are none.
pub(in crate::kvm) fn code_at(
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    ram: &dyn GuestRam,
    len: usize,
) -> Vec<u8> {
    let mut code = vec![0; len];
    let at = linear_rip(regs, sregs);
    let walker = Walker::new(ram, sregs);
    let count = walker.read(at, &mut code).unwrap_or(0);
    code.truncate(count);
    code
}
