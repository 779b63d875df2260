//! Registers that hold what a formula says (`registers`), so that a snapshot or a
//! restore that loses one is seen.

use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::arch::{asm, global_asm};
use core::mem::offset_of;

use crate::abi::PAGE_SIZE;
use crate::area::Area;
use crate::formula::page_word_from_key;
use crate::registers::{FLAGS, HOLDS_BASES, HOLDS_REGISTERS, HOLDS_YMM, Held, MMX, VECTOR};

/// The words of a page: an arithmetic progression.
#[derive(Clone, Copy)]
pub struct Words {
    first: u64,
    step: u64,
}

impl Words {
    /// Those of a page that nobody has written.
    pub const ZEROS: Self = Self { first: 0, step: 0 };

    /// Those of the page with key `key`.
    pub const fn of_key(key: u64) -> Self {
        let step = page_word_from_key(key, 1).wrapping_sub(key);
        Self { first: key, step }
    }

    /// Word `word`.
    pub const fn word(self, word: u64) -> u64 {
        self.first.wrapping_add(word.wrapping_mul(self.step))
    }
}

/// What became of a page.
pub enum Rewritten {
    /// It held the old words, and holds the new ones.
    Rightly,
    /// The same, but a register has lost what it held meanwhile.
    LostRegister,
    /// It did not hold the old words, and was not written.
    Not,
}

/// Checks that `page` holds the words `old`, and writes `new`, while the registers hold `held`.
pub fn rewrite(page: Area<PAGE_SIZE>, old: Words, new: Words, held: &Held) -> Rewritten {
    let jobs = [old.first, old.step, new.first, new.step];
    // SAFETY: the page is an area of the guest's, as `Area::new` demands; the tables are alive. The
    // function follows the C ABI.
    match unsafe { hold_page(page.gpa(0), &jobs, held) } {
        0 => Rewritten::Rightly,
        1 => Rewritten::Not,
        _ => Rewritten::LostRegister,
    }
}

/// Where the check of a page begins, where writing it does, and where that ends. The registers hold
/// what they should in between.
pub fn addresses() -> [u64; 3] {
    [
        (&raw const hold_check).addr() as u64,
        (&raw const hold_write).addr() as u64,
        (&raw const hold_written).addr() as u64,
    ]
}

unsafe extern "C" {
    fn hold_page(page: u64, jobs: &[u64; 4], held: &Held) -> u64;
    static hold_check: u8;
    static hold_write: u8;
    static hold_written: u8;
}

// RAX, RCX, RSI and RDI go through the page: word, eighths left, step, address. None of the instructions that
// write it changes a flag, and `loop` does not either. RSP is as in the caller, less what is pushed.
global_asm!(
    ".macro eight what:vararg",
    ".irp at, 0, 8, 16, 24, 32, 40, 48, 56",
    "\\what \\at",
    ".endr",
    ".endm",
    ".macro check_word at",
    "cmp [rdi + \\at], rax",
    "jne 7f",
    "lea rax, [rax + rsi]",
    ".endm",
    ".macro write_word at",
    "mov [rdi + \\at], rax",
    "lea rax, [rax + rsi]",
    ".endm",
    ".macro all_xmm what",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "\\what xmm\\n, [r8 + {xmm} + 16 * \\n]",
    ".endr",
    ".endm",
    ".macro all_general what table",
    "\\what rbx, [\\table + {general}]",
    "\\what rbp, [\\table + {general} + 8]",
    "\\what rdx, [\\table + {general} + 16]",
    "\\what r9, [\\table + {general} + 32]",
    "\\what r10, [\\table + {general} + 40]",
    "\\what r11, [\\table + {general} + 48]",
    "\\what r12, [\\table + {general} + 56]",
    "\\what r13, [\\table + {general} + 64]",
    "\\what r14, [\\table + {general} + 72]",
    "\\what r15, [\\table + {general} + 80]",
    "\\what r8, [\\table + {general} + 24]",
    ".endm",
    ".macro compare register, place",
    "cmp \\register, \\place",
    "jne 8f",
    ".endm",
    ".globl hold_page",
    "hold_page:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdx",
    "push rsi",
    "mov r8, rdx",
    "all_xmm movaps",
    "mov rax, [rsi]",
    "mov rsi, [rsi + 8]",
    "mov ecx, 64",
    "all_general mov, r8",
    ".globl hold_check",
    "hold_check:",
    "2:",
    "eight check_word",
    "lea rdi, [rdi + 64]",
    "loop 2b",
    "mov rsi, [rsp]",
    "mov rax, [rsi + 16]",
    "mov rsi, [rsi + 24]",
    "lea rdi, [rdi - 4096]",
    "mov rcx, [rsp + 8]",
    "pushfq",
    "and qword ptr [rsp], {other_flags}",
    "mov rcx, [rcx + {flags}]",
    "or [rsp], rcx",
    "mov ecx, 64",
    "popfq",
    ".globl hold_write",
    "hold_write:",
    "3:",
    "eight write_word",
    "lea rdi, [rdi + 64]",
    "loop 3b",
    ".globl hold_written",
    "hold_written:",
    "pushfq",
    "pop rax",
    "mov rdi, [rsp + 8]",
    "and eax, {all_flags}",
    "compare rax, [rdi + {flags}]",
    "all_general compare, rdi",
    "mov r8, rdi",
    "all_xmm pcmpeqd",
    ".irp n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "pand xmm0, xmm\\n",
    ".endr",
    "pmovmskb eax, xmm0",
    "cmp eax, 0xffff",
    "jne 8f",
    "xor eax, eax",
    "jmp 9f",
    "7:",
    "mov eax, 1",
    "jmp 9f",
    "8:",
    "mov eax, 2",
    "9:",
    "add rsp, 16",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    xmm = const offset_of!(Held, xmm),
    general = const offset_of!(Held, general),
    flags = const offset_of!(Held, flags),
    all_flags = const FLAGS,
    other_flags = const !(FLAGS as i32),
);

/// Which registers this vCPU can hold: bits of `VcpuPage::held`.
pub fn families() -> u64 {
    const XSAVE_IS_ON: u32 = 1 << 27;
    const AVX: u32 = 1 << 28;
    const FSGSBASE: u32 = 1;
    const AVX_STATE: u32 = 0b110;
    let (most, one) = (__cpuid(0).eax, __cpuid(1));
    let mut families = HOLDS_REGISTERS;
    if most >= 7 && __cpuid_count(7, 0).ebx & FSGSBASE != 0 {
        families |= HOLDS_BASES;
    }
    if one.ecx & XSAVE_IS_ON != 0 && one.ecx & AVX != 0 {
        let enabled: u32;
        // SAFETY: the instruction is there, as CPUID says; it reads a register.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _, options(nomem, nostack));
        }
        if enabled & AVX_STATE == AVX_STATE {
            families |= HOLDS_YMM;
        }
    }
    families
}

/// Sets what is always held, in the order in which the VMM expects it.
pub fn set(held: &Held, families: u64) {
    // SAFETY: no compiled code uses these registers, nor does any mode that they set concern it: it has no
    // arithmetic on floating-point numbers.
    unsafe {
        asm!(
            "movq mm0, [{h} + {mmx}]",
            "movq mm1, [{h} + {mmx} + 8]",
            "movq mm2, [{h} + {mmx} + 16]",
            "movq mm3, [{h} + {mmx} + 24]",
            "movq mm4, [{h} + {mmx} + 32]",
            "movq mm5, [{h} + {mmx} + 40]",
            "movq mm6, [{h} + {mmx} + 48]",
            "fldcw [{h} + {control}]",
            "ldmxcsr [{h} + {mxcsr}]",
            h = in(reg) held,
            mmx = const offset_of!(Held, mmx),
            control = const offset_of!(Held, control),
            mxcsr = const offset_of!(Held, mxcsr),
            options(nostack, preserves_flags)
        );
        if families & HOLDS_BASES != 0 {
            asm!("wrfsbase {}", "wrgsbase {}", in(reg) held.fs, in(reg) held.gs,
                options(nostack, preserves_flags));
        }
        if families & HOLDS_YMM != 0 {
            asm!(
                ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
                "vinsertf128 ymm\\n, ymm\\n, [{h} + {ymm} + 16 * \\n], 1",
                ".endr",
                h = in(reg) held,
                ymm = const offset_of!(Held, ymm),
                options(nostack, preserves_flags)
            );
        }
    }
}

/// The first register of those that are always held which is not as it was set: what it
/// should be, and what it is.
pub fn first_lost(held: &Held, families: u64) -> Option<(u64, u64)> {
    let mut found = *held;
    // SAFETY: reads registers into `found`.
    unsafe {
        asm!(
            "movq [{h} + {mmx}], mm0",
            "movq [{h} + {mmx} + 8], mm1",
            "movq [{h} + {mmx} + 16], mm2",
            "movq [{h} + {mmx} + 24], mm3",
            "movq [{h} + {mmx} + 32], mm4",
            "movq [{h} + {mmx} + 40], mm5",
            "movq [{h} + {mmx} + 48], mm6",
            "fnstcw [{h} + {control}]",
            "stmxcsr [{h} + {mxcsr}]",
            h = in(reg) &raw mut found,
            mmx = const offset_of!(Held, mmx),
            control = const offset_of!(Held, control),
            mxcsr = const offset_of!(Held, mxcsr),
            options(nostack, preserves_flags)
        );
        if families & HOLDS_BASES != 0 {
            asm!("rdfsbase {}", "rdgsbase {}", out(reg) found.fs, out(reg) found.gs,
                options(nostack, preserves_flags));
        }
        if families & HOLDS_YMM != 0 {
            asm!(
                ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
                "vextractf128 [{h} + {ymm} + 16 * \\n], ymm\\n, 1",
                ".endr",
                h = in(reg) &raw mut found,
                ymm = const offset_of!(Held, ymm),
                options(nostack, preserves_flags)
            );
        }
    }
    let words = |h: &Held| -> [u64; MMX + VECTOR + 4] {
        let mut words = [0; MMX + VECTOR + 4];
        words[..MMX].copy_from_slice(&h.mmx);
        words[MMX..MMX + VECTOR].copy_from_slice(&h.ymm);
        words[MMX + VECTOR..].copy_from_slice(&[h.control, h.mxcsr, h.fs, h.gs]);
        words
    };
    if found == *held {
        return None;
    }
    let pairs = words(held).into_iter().zip(words(&found));
    pairs
        .into_iter()
        .find(|(expected, found)| expected != found)
}
