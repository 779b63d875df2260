//! Finds the pages of a write fault.
//!
//! KVM says that a vCPU could not write, but not where (`EFAULT`, `exit_reason` 0; see `kvm_handle_error_pfn` in
//! `arch/x86/kvm/mmu/mmu.c`). RIP is at the instruction that faulted, so it is decoded, and every page that it writes is
//! translated through the guest's page tables. The answer may have a page too many, which costs a copy; it has none too few.
//!
//! Two rules keep a fault from becoming a loop: no page found is an error ([`FaultError::NoWrite`]), and so is the same
//! fault over and over with every page writable ([`FaultError::Stuck`]).
//!
//! Not covered: scatter instructions and tile stores, whose addresses are in vector registers, are refused by name.

use guest::abi::PAGE_SIZE;
use iced_x86::{
    Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::memory::{GuestRam, MemoryError};
use super::paging::{Touch, Walker};
use super::state::XSAVE_BYTES;

/// The longest an instruction can be.
const MAX_INSTRUCTION: usize = 15;

/// Why the pages of a write fault could not be found.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// Only 64-bit code is decoded.
    #[error("write fault at rip {rip:#x} outside of 64-bit mode")]
    Mode {
        /// Where.
        rip: u64,
    },
    /// The instruction is not in mapped memory.
    #[error("write fault at rip {rip:#x}, which is not mapped")]
    Fetch {
        /// Where.
        rip: u64,
    },
    /// The bytes are no instruction.
    #[error("write fault at rip {rip:#x}, where there is no instruction: {bytes:02x?}")]
    Decode {
        /// Where.
        rip: u64,
        /// What is there.
        bytes: Vec<u8>,
    },
    /// An instruction whose addresses cannot be computed here.
    #[error("write fault at rip {rip:#x} in an instruction that is not supported: {mnemonic}")]
    Unsupported {
        /// Where.
        rip: u64,
        /// Its mnemonic.
        mnemonic: String,
    },
    /// The instruction writes no memory that is mapped: the fault has another cause.
    #[error("fault at rip {rip:#x}, but its instruction ({mnemonic}) writes no guest memory")]
    NoWrite {
        /// Where.
        rip: u64,
        /// Its mnemonic.
        mnemonic: String,
    },
    /// The fault comes back although everything it could be about is writable.
    #[error(
        "write fault at rip {rip:#x} came back {times} times although its pages are writable: frames {gfns:x?}"
    )]
    Stuck {
        /// Where.
        rip: u64,
        /// How many times.
        times: u32,
        /// The pages.
        gfns: Vec<u64>,
    },
    /// Guest memory could not be read.
    #[error("cannot read guest memory for the write fault at rip {rip:#x}")]
    Memory {
        /// Where the instruction is.
        rip: u64,
        /// What went wrong.
        #[source]
        source: MemoryError,
    },
}

/// Guest frames that the instruction at RIP writes, without repeats, page tables included whose accessed or
/// dirty bits it sets.
///
/// Never empty. A `rep` instruction gives the pages of the element it is at.
pub fn written_frames(
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    ram: &dyn GuestRam,
) -> Result<Vec<u64>, FaultError> {
    let rip = regs.rip;
    const PAGING: u64 = 1 << 31;
    if sregs.cs.l == 0 || sregs.cr0 & PAGING == 0 {
        return Err(FaultError::Mode { rip });
    }
    let mut frames = Frames {
        walker: Walker::new(ram, sregs.cr3, sregs.cr4),
        frames: ram.len().div_ceil(PAGE_SIZE),
        written: Vec::new(),
        found: false,
    };
    let memory = |source| FaultError::Memory { rip, source };

    let mut code = [0; MAX_INSTRUCTION];
    let count = frames.walker.read(rip, &mut code).map_err(memory)?;
    let code = &code[..count];
    if code.is_empty() {
        return Err(FaultError::Fetch { rip });
    }
    let instruction = Decoder::with_ip(64, code, rip, DecoderOptions::NONE).decode();
    if instruction.is_invalid() {
        let bytes = code.to_vec();
        return Err(FaultError::Decode { rip, bytes });
    }

    frames
        .touch(rip, instruction.len() as u64, Touch::Read)
        .map_err(memory)?;
    for access in accesses(&instruction, regs, sregs)? {
        frames
            .touch(access.gva, access.len, access.touch)
            .map_err(memory)?;
    }
    if frames.found {
        Ok(frames.written)
    } else {
        Err(FaultError::NoWrite {
            rip,
            mnemonic: mnemonic(&instruction),
        })
    }
}

/// Up to `len` bytes of code at RIP, for crash reports. Empty if there are none.
pub(super) fn code_at(
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    ram: &dyn GuestRam,
    len: usize,
) -> Vec<u8> {
    let mut code = vec![0; len];
    let walker = Walker::new(ram, sregs.cr3, sregs.cr4);
    let count = walker.read(regs.rip, &mut code).unwrap_or(0);
    code.truncate(count);
    code
}

/// Collects frames.
struct Frames<'a> {
    walker: Walker<'a>,
    /// Frames that guest memory has: what lies beyond is MMIO and cannot be what faulted.
    frames: u64,
    written: Vec<u64>,
    /// Whether a written page, or a page table to be updated, was found in guest memory.
    found: bool,
}

impl Frames<'_> {
    /// Adds what an access to `len` bytes at `gva` writes. What is not mapped is passed over: it would fault in the guest.
    fn touch(&mut self, gva: u64, len: u64, touch: Touch) -> Result<(), MemoryError> {
        let first = gva - gva % PAGE_SIZE;
        let pages = (gva % PAGE_SIZE + len.max(1)).div_ceil(PAGE_SIZE);
        for page in 0..pages {
            let gva = first.wrapping_add(page * PAGE_SIZE);
            let mut tables = Vec::new();
            let gpa = self
                .walker
                .translate(gva, touch, |slot| tables.push(slot))?;
            let page = gpa.filter(|_| touch == Touch::Write);
            for gfn in tables.into_iter().chain(page).map(|gpa| gpa / PAGE_SIZE) {
                if gfn < self.frames {
                    self.found = true;
                    if !self.written.contains(&gfn) {
                        self.written.push(gfn);
                    }
                }
            }
        }
        Ok(())
    }
}

/// An access to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    gva: u64,
    len: u64,
    touch: Touch,
}

/// All memory that `instruction` uses, by guest-virtual address.
fn accesses(
    instruction: &Instruction,
    regs: &kvm_regs,
    sregs: &kvm_sregs,
) -> Result<Vec<Access>, FaultError> {
    let unsupported = || FaultError::Unsupported {
        rip: regs.rip,
        mnemonic: mnemonic(instruction),
    };
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info_options(instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
    let mut accesses = Vec::new();
    for used in info.used_memory() {
        let touch = match used.access() {
            OpAccess::Read | OpAccess::CondRead => Touch::Read,
            OpAccess::Write
            | OpAccess::CondWrite
            | OpAccess::ReadWrite
            | OpAccess::ReadCondWrite => Touch::Write,
            OpAccess::None | OpAccess::NoMemAccess => continue,
        };
        let register = |register, _, _| register_value(register, regs, sregs);
        let gva = used.virtual_address(0, register);
        match (gva, touch) {
            (Some(gva), _) => accesses.push(Access {
                gva: gva.wrapping_add(bit_offset(instruction, regs, sregs)),
                len: access_len(used, instruction),
                touch,
            }),
            // A gather: its reads do not matter here.
            (None, Touch::Read) => {}
            (None, Touch::Write) => return Err(unsupported()),
        }
    }
    // The address of a tile's rows is a sum that depends on the tile's shape.
    if instruction.mnemonic() == Mnemonic::Tilestored {
        return Err(unsupported());
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
        accesses.push(Access {
            gva: pushed.wrapping_sub(u64::from(instruction.immediate16())),
            len: 1,
            touch: Touch::Write,
        });
    }
    Ok(accesses)
}

/// Bytes of an access.
fn access_len(used: &UsedMemory, instruction: &Instruction) -> u64 {
    let sizes = [used.memory_size().size(), instruction.memory_size().size()];
    // A repeated string instruction has no size of its own: one element is what the instruction has. What has none there
    // either is of the XSAVE family, and so no larger than the area that guests may have.
    sizes
        .into_iter()
        .find(|size| *size != 0)
        .unwrap_or(XSAVE_BYTES) as u64
}

/// What is added to the address of `bts [memory], register` and its like: the register is a signed bit number, and may
/// reach far beyond the operand.
fn bit_offset(instruction: &Instruction, regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
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
    let value = register_value(register, regs, sregs).unwrap_or(0);
    let bytes = register.size() as i64;
    let bit = match bytes {
        2 => i64::from(value as i16),
        4 => i64::from(value as i32),
        _ => value as i64,
    };
    (bit.div_euclid(bytes * 8) * bytes) as u64
}

/// The value of a general register, or the base of a segment. `None` for vector registers.
fn register_value(register: Register, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<u64> {
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
        // In 64-bit mode the others have no base.
        Register::CS | Register::DS | Register::ES | Register::SS => return Some(0),
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

/// Counts how often the same fault came back with nothing to do.
///
/// Now and then that is right: another vCPU resolved the same page first. Without end it is a fault that was misunderstood.
#[derive(Debug, Default)]
pub(super) struct Retries {
    /// RIP, and the registers that a repeated string instruction moves.
    place: (u64, u64, u64),
    times: u32,
}

impl Retries {
    /// How often the same fault may come back.
    pub(super) const LIMIT: u32 = 1000;

    /// Notes a fault that was looked at; `resolved` says whether a page of it was made writable.
    pub(super) fn note(
        &mut self,
        regs: &kvm_regs,
        gfns: &[u64],
        resolved: bool,
    ) -> Result<(), FaultError> {
        let place = (regs.rip, regs.rcx, regs.rdi);
        if resolved || place != self.place {
            self.times = 0;
        }
        self.place = place;
        if resolved {
            return Ok(());
        }
        self.times += 1;
        if self.times > Self::LIMIT {
            return Err(FaultError::Stuck {
                rip: regs.rip,
                times: self.times,
                gfns: gfns.to_vec(),
            });
        }
        // Whoever was first may still be at it, on the CPU this thread holds.
        if self.times > 1 {
            std::thread::yield_now();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::paging::tests::Bytes;
    use super::super::paging::write_page_tables;
    use super::super::registers::{entry_regs, entry_sregs};
    use super::*;
    use guest::abi::PAGE_TABLES_GPA;

    const CODE: u64 = 0x20_0000;
    const MEMORY: u64 = 4 << 20;

    /// Guest memory with page tables and `code` at [`CODE`].
    fn guest(code: &[u8]) -> Bytes {
        let ram = Bytes::new(MEMORY);
        write_page_tables(&ram, MEMORY).unwrap();
        ram.write(CODE, code).unwrap();
        ram
    }

    fn sregs() -> kvm_sregs {
        let none = kvm_bindings::CpuId::from_entries(&[]).unwrap();
        entry_sregs(&kvm_sregs::default(), &none)
    }

    /// Frames written by `code`, with registers as `set` leaves them.
    fn frames(code: &[u8], set: impl FnOnce(&mut kvm_regs)) -> Vec<u64> {
        let mut regs = entry_regs(CODE, 0);
        set(&mut regs);
        let mut frames = written_frames(&regs, &sregs(), &guest(code)).unwrap();
        frames.sort_unstable();
        frames
    }

    fn error(code: &[u8], set: impl FnOnce(&mut kvm_regs)) -> FaultError {
        let mut regs = entry_regs(CODE, 0);
        set(&mut regs);
        written_frames(&regs, &sregs(), &guest(code)).unwrap_err()
    }

    #[test]
    fn plain_stores() {
        // mov [rdi], rax
        let mov = [0x48, 0x89, 0x07];
        assert_eq!(frames(&mov, |r| r.rdi = 0x30_0010), [0x300]);
        // Across a page boundary.
        assert_eq!(frames(&mov, |r| r.rdi = 0x30_0ffc), [0x300, 0x301]);
        assert_eq!(frames(&mov, |r| r.rdi = 0x30_0ff8), [0x300]);
        // mov byte ptr [rdi + rcx * 8 + 0x1000], 1
        let mov = [0xc6, 0x84, 0xcf, 0x00, 0x10, 0x00, 0x00, 0x01];
        let set = |r: &mut kvm_regs| (r.rdi, r.rcx) = (0x30_0000, 0x200);
        assert_eq!(frames(&mov, set), [0x302]);
        // mov [r12 - 8], r13d
        let mov = [0x45, 0x89, 0x6c, 0x24, 0xf8];
        assert_eq!(frames(&mov, |r| r.r12 = 0x30_0004), [0x2ff]);
        assert_eq!(frames(&mov, |r| r.r12 = 0x30_0006), [0x2ff, 0x300]);
        // mov [rip + 0x1000], eax: relative to the next instruction.
        let mov = [0x89, 0x05, 0x00, 0x10, 0x00, 0x00];
        assert_eq!(frames(&mov, |_| {}), [0x201]);
        // mov [edi], eax: the upper half of rdi does not count.
        let mov = [0x67, 0x89, 0x07];
        assert_eq!(frames(&mov, |r| r.rdi = 0xdead_0030_0000), [0x300]);
        // movdqu [rdi], xmm0, across a page boundary.
        let mov = [0xf3, 0x0f, 0x7f, 0x07];
        assert_eq!(frames(&mov, |r| r.rdi = 0x30_0ff8), [0x300, 0x301]);
        // movnti [rdi], eax
        let mov = [0x0f, 0xc3, 0x07];
        assert_eq!(frames(&mov, |r| r.rdi = 0x30_0000), [0x300]);
    }

    #[test]
    fn the_stack() {
        let top = |r: &mut kvm_regs| r.rsp = 0x30_0000;
        assert_eq!(frames(&[0x50], top), [0x2ff], "push rax");
        assert_eq!(
            frames(&[0xe8, 0, 0, 0, 0], |r| r.rsp = 0x30_0004),
            [0x2ff, 0x300],
            "call"
        );
        // call [rdi]: the pointer is read, the return address written.
        let set = |r: &mut kvm_regs| (r.rsp, r.rdi) = (0x30_0000, 0x31_0000);
        assert_eq!(frames(&[0xff, 0x17], set), [0x2ff]);
        // pop [rdi]: read from the stack, written to memory.
        assert_eq!(frames(&[0x8f, 0x07], set), [0x310]);
        // push [rdi]
        assert_eq!(frames(&[0xff, 0x37], set), [0x2ff]);
        // pushfq
        assert_eq!(frames(&[0x9c], top), [0x2ff]);
        // enter 0x3000, 0: rbp is pushed, and the new top of the stack is checked.
        assert_eq!(frames(&[0xc8, 0x00, 0x30, 0x00], top), [0x2fc, 0x2ff]);
        // enter 16, 2
        assert_eq!(
            frames(&[0xc8, 0x10, 0x00, 0x02], |r| (r.rsp, r.rbp) =
                (0x30_0008, 0x31_0000)),
            [0x2ff, 0x300]
        );
    }

    #[test]
    fn string_instructions_give_the_current_element() {
        let set = |r: &mut kvm_regs| {
            (r.rdi, r.rsi, r.rcx) = (0x30_0ffc, 0x31_0000, 0x1000);
        };
        assert_eq!(frames(&[0xf3, 0xaa], set), [0x300], "rep stosb");
        assert_eq!(frames(&[0xf3, 0xa4], set), [0x300], "rep movsb");
        assert_eq!(
            frames(&[0xf3, 0x48, 0xab], set),
            [0x300, 0x301],
            "rep stosq"
        );
        assert_eq!(frames(&[0x48, 0xa5], set), [0x300, 0x301], "movsq");
        // Downwards the element is still the one at rdi.
        let down = |r: &mut kvm_regs| {
            set(r);
            r.rflags |= 1 << 10;
        };
        assert_eq!(frames(&[0xf3, 0xaa], down), [0x300]);
        assert_eq!(frames(&[0xf3, 0x48, 0xab], down), [0x300, 0x301]);
    }

    #[test]
    fn read_modify_write() {
        let set = |r: &mut kvm_regs| r.rdi = 0x30_0000;
        assert_eq!(
            frames(&[0xf0, 0x48, 0x0f, 0xc1, 0x07], set),
            [0x300],
            "lock xadd"
        );
        assert_eq!(
            frames(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f], set),
            [0x300],
            "lock cmpxchg16b"
        );
        assert_eq!(
            frames(&[0xf0, 0x0f, 0xb1, 0x0f], set),
            [0x300],
            "lock cmpxchg"
        );
        assert_eq!(frames(&[0x48, 0x87, 0x07], set), [0x300], "xchg");
        assert_eq!(frames(&[0x80, 0x27, 0x01], set), [0x300], "and");
        assert_eq!(frames(&[0x48, 0xff, 0x07], set), [0x300], "inc");
        assert_eq!(frames(&[0x0f, 0x94, 0x07], set), [0x300], "sete");
    }

    #[test]
    fn bit_tests_reach_beyond_their_operand() {
        // bts [rdi], rcx
        let bts = [0x48, 0x0f, 0xab, 0x0f];
        let at = |bit: i64| move |r: &mut kvm_regs| (r.rdi, r.rcx) = (0x30_0000, bit as u64);
        assert_eq!(frames(&bts, at(63)), [0x300]);
        assert_eq!(frames(&bts, at(4096 * 8)), [0x301]);
        assert_eq!(frames(&bts, at(-1)), [0x2ff]);
        // lock btr [rdi], ecx: only 32 bits of the register, with their sign.
        let btr = [0xf0, 0x0f, 0xb3, 0x0f];
        assert_eq!(frames(&btr, at(0xffff_ffff)), [0x2ff]);
        // btc word ptr [rdi], cx
        let btc = [0x66, 0x0f, 0xbb, 0x0f];
        assert_eq!(frames(&btc, at(0x1_0000 + 0x7fff)), [0x300]);
        // bts qword ptr [rdi], 5
        assert_eq!(
            frames(&[0x48, 0x0f, 0xba, 0x2f, 0x05], at(1 << 20)),
            [0x300]
        );
    }

    #[test]
    fn segments_have_bases() {
        // mov fs:[0x10], eax
        let mov = [0x64, 0x89, 0x04, 0x25, 0x10, 0x00, 0x00, 0x00];
        let mut sregs = sregs();
        sregs.fs.base = 0x30_0000;
        let frames = written_frames(&entry_regs(CODE, 0), &sregs, &guest(&mov)).unwrap();
        assert_eq!(frames, [0x300]);
    }

    #[test]
    fn large_and_masked_stores() {
        let set = |r: &mut kvm_regs| r.rdi = 0x30_0ff8;
        assert_eq!(
            frames(&[0x66, 0x0f, 0xf7, 0xc1], set),
            [0x300, 0x301],
            "maskmovdqu"
        );
        // vmaskmovps [rdi], ymm0, ymm1
        assert_eq!(frames(&[0xc4, 0xe2, 0x7d, 0x2e, 0x0f], set), [0x300, 0x301]);
        // fxsave [rdi]
        assert_eq!(
            frames(&[0x0f, 0xae, 0x07], |r| r.rdi = 0x30_0e80),
            [0x300, 0x301]
        );
        // xsave [rdi]: taken for as large as it can be.
        assert_eq!(
            frames(&[0x0f, 0xae, 0x27], |r| r.rdi = 0x30_0040),
            [0x300, 0x301]
        );
        // vmovdqu64 [rdi], zmm0
        assert_eq!(
            frames(&[0x62, 0xf1, 0xfe, 0x48, 0x7f, 0x07], set),
            [0x300, 0x301]
        );
        // fnsave [rdi]
        assert_eq!(frames(&[0xdd, 0x37], |r| r.rdi = 0x30_0fa0), [0x300, 0x301]);
        // movdir64b rdi, [rsi]: written at the register, 64 bytes.
        let set = |r: &mut kvm_regs| (r.rdi, r.rsi) = (0x30_0000, 0x31_0000);
        assert_eq!(frames(&[0x66, 0x0f, 0x38, 0xf8, 0x3e], set), [0x300]);
    }

    #[test]
    fn scatter_is_refused_by_name() {
        // vpscatterdd [rdi + zmm1], zmm0 {k1}
        let scatter = [0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x04, 0x0f];
        let error = error(&scatter, |r| r.rdi = 0x30_0000);
        assert!(
            matches!(&error, FaultError::Unsupported { mnemonic, .. } if mnemonic == "vpscatterdd")
        );
    }

    #[test]
    fn what_writes_nothing_is_an_error() {
        assert!(matches!(error(&[0x90], |_| {}), FaultError::NoWrite { .. }));
        // mov rax, [rdi]; lea; bt [rdi], rcx
        for code in [
            &[0x48, 0x8b, 0x07][..],
            &[0x48, 0x8d, 0x07],
            &[0x48, 0x0f, 0xa3, 0x0f],
        ] {
            let error = error(code, |r| r.rdi = 0x30_0000);
            assert!(matches!(error, FaultError::NoWrite { .. }));
        }
        // A store to what is not mapped, and to what is no memory.
        let mov = [0x48, 0x89, 0x07];
        for gva in [1 << 40, MEMORY, u64::MAX - 7] {
            let error = error(&mov, |r| r.rdi = gva);
            assert!(matches!(error, FaultError::NoWrite { .. }), "{gva:#x}");
        }
    }

    #[test]
    fn bad_code_is_an_error() {
        assert!(matches!(error(&[0x06], |_| {}), FaultError::Decode { .. }));
        let unmapped = error(&[], |r| r.rip = 1 << 40);
        assert!(matches!(unmapped, FaultError::Fetch { .. }));
        let mut sregs = sregs();
        sregs.cs.l = 0;
        let error = written_frames(&entry_regs(CODE, 0), &sregs, &guest(&[0x50])).unwrap_err();
        assert!(matches!(error, FaultError::Mode { .. }));
    }

    #[test]
    fn code_at_the_end_of_mapped_memory_is_decoded() {
        // push rax, in the last byte of memory.
        let ram = guest(&[]);
        ram.write(MEMORY - 1, &[0x50]).unwrap();
        let mut regs = entry_regs(MEMORY - 1, 0);
        regs.rsp = 0x30_0000;
        assert_eq!(written_frames(&regs, &sregs(), &ram).unwrap(), [0x2ff]);
    }

    #[test]
    fn page_tables_without_accessed_and_dirty_bits_are_written_too() {
        // mov [rdi], rax
        let ram = guest(&[0x48, 0x89, 0x07]);
        let mut entry = [0; 8];
        // The directory entry that maps 0x20_0000..0x40_0000, where code and data are.
        let slot = PAGE_TABLES_GPA + 0x2000 + 8;
        ram.read(slot, &mut entry).unwrap();
        let clear_dirty = u64::from_le_bytes(entry) & !(1 << 6);
        ram.put(slot, clear_dirty);
        let mut regs = entry_regs(CODE, 0);
        regs.rdi = 0x30_0000;
        let mut frames = written_frames(&regs, &sregs(), &ram).unwrap();
        frames.sort_unstable();
        assert_eq!(frames, [slot / PAGE_SIZE, 0x300]);
    }

    #[test]
    fn retries_end() {
        let mut retries = Retries::default();
        let mut regs = entry_regs(CODE, 0);
        for _ in 0..Retries::LIMIT {
            retries.note(&regs, &[1], false).unwrap();
        }
        // Another element of the same string instruction is another fault.
        regs.rcx += 1;
        for _ in 0..Retries::LIMIT {
            retries.note(&regs, &[1], false).unwrap();
        }
        retries.note(&regs, &[1], true).unwrap();
        for _ in 0..Retries::LIMIT {
            retries.note(&regs, &[1], false).unwrap();
        }
        let error = retries.note(&regs, &[1], false).unwrap_err();
        assert!(matches!(error, FaultError::Stuck { times: 1001, .. }));
    }
}
