//! State of a vCPU that lives nowhere in memory, and that a snapshot must have all the same.
//!
//! All of it is made of the number of the round, and is compared with it a round later. What is to stay in
//! registers in between must be kept from the compiler: the loop is one piece of assembly.

use core::arch::asm;

use super::Vcpu;
use crate::abi::VcpuPage;
use crate::cpu::{self, Feature};

/// What is compared, by the number that the loop ends with.
const COMPARED: [&str; 12] = [
    "the word in memory",
    "mm6",
    "the rounding mode in mxcsr",
    "the rounding mode in the x87 control word",
    "the flags DF and ID",
    "xmm15, lower half",
    "xmm15, upper half",
    "ymm15, upper half",
    "zmm15, upper half",
    "zmm31, lowest lane",
    "zmm31, highest lane",
    "k7",
];

const AVX: u64 = 1;
const AVX512: u64 = 2;

/// Sets and compares, and writes a page every round so that there is something to copy.
pub fn run(vcpu: Vcpu<'_>) -> ! {
    let ground = vcpu.ground(1);
    let end = ground.piece(0) + ground.pieces * ground.stride;
    let mut features = 0;
    if cpu::has(Feature::Avx) {
        features |= AVX;
    }
    if cpu::has(Feature::Avx512) {
        features |= AVX512;
    }
    let page = vcpu.layout().vcpu_page(vcpu.index) as *mut VcpuPage;
    let ops = page as u64 + core::mem::offset_of!(VcpuPage, ops) as u64;
    let mut memory = [0u64; 3];
    let (expected, found, what): (u64, u64, u64);
    // SAFETY: writes `memory`, the pages of this vCPU's own, and its count of operations. The direction flag
    // is clear at the end; what else is not as it was does not matter, since the program ends then.
    unsafe {
        asm!(
            "jmp 8f",
            // Compare: edx has what, rax what is found, rcx what it must be.
            "2:",
            "mov rcx, r12",
            "xor edx, edx",
            "mov rax, [r11]",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "movq rax, mm6",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "mov ecx, r12d",
            "and ecx, 3",
            "shl ecx, 13",
            "or ecx, 0x1f80",
            "stmxcsr [r11 + 8]",
            "mov eax, [r11 + 8]",
            "and eax, 0xffc0",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "mov ecx, r12d",
            "and ecx, 3",
            "shl ecx, 10",
            "or ecx, 0x37f",
            "fnstcw [r11 + 8]",
            "movzx eax, word ptr [r11 + 8]",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "mov rcx, [r11 + 16]",
            "pushfq",
            "pop rax",
            "and eax, 0x200400",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "mov rcx, r12",
            "movq rax, xmm15",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "movhlps xmm0, xmm15",
            "movq rax, xmm0",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "test r8b, 1",
            "jz 8f",
            "vextractf128 xmm0, ymm15, 1",
            "vpextrq rax, xmm0, 1",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "test r8b, 2",
            "jz 8f",
            "vextractf64x4 ymm0, zmm15, 1",
            "vmovq rax, xmm0",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "vextractf32x4 xmm0, zmm31, 0",
            "vmovq rax, xmm0",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "vextractf32x4 xmm0, zmm31, 3",
            "vpextrq rax, xmm0, 1",
            "cmp rax, rcx",
            "jne 9f",
            "inc edx",
            "movzx ecx, r12w",
            "kmovw eax, k7",
            "cmp rax, rcx",
            "jne 9f",
            // Set: memory first, then registers.
            "8:",
            "inc r12",
            "mov [r11], r12",
            "movq mm6, r12",
            "mov ecx, r12d",
            "and ecx, 3",
            "shl ecx, 13",
            "or ecx, 0x1f80",
            "mov [r11 + 8], ecx",
            "ldmxcsr [r11 + 8]",
            "mov ecx, r12d",
            "and ecx, 3",
            "shl ecx, 10",
            "or ecx, 0x37f",
            "mov [r11 + 8], cx",
            "fldcw [r11 + 8]",
            "mov eax, r12d",
            "and eax, 1",
            "shl eax, 10",
            "mov ecx, r12d",
            "and ecx, 2",
            "shl ecx, 20",
            "or eax, ecx",
            "mov [r11 + 16], rax",
            "pushfq",
            "and qword ptr [rsp], -0x200401",
            "or [rsp], rax",
            "popfq",
            // Every 256 rounds vectors are as after a reset for a moment: the CPU saves them in another way
            // then.
            "test r12b, r12b",
            "jnz 3f",
            "test r8b, 1",
            "jz 3f",
            "vzeroall",
            "3:",
            "movq xmm15, r12",
            "punpcklqdq xmm15, xmm15",
            "test r8b, 1",
            "jz 4f",
            "vinsertf128 ymm15, ymm15, xmm15, 1",
            "test r8b, 2",
            "jz 4f",
            "vpbroadcastq zmm15, r12",
            "vpbroadcastq zmm31, r12",
            "kmovw k7, r12d",
            "4:",
            "mov [r13 + 64], r12",
            "add r13, r14",
            "cmp r13, r15",
            "jb 5f",
            "mov r13, rdi",
            "5:",
            "movq mm7, r12",
            "mov [r9], r12",
            "jmp 2b",
            "9:",
            "cld",
            in("r8") features,
            in("r9") ops,
            in("r11") &raw mut memory,
            in("rdi") ground.piece(0),
            inout("r12") 0u64 => _,
            inout("r13") ground.piece(0) => _,
            in("r14") ground.stride,
            in("r15") end,
            lateout("rax") found,
            lateout("rcx") expected,
            lateout("rdx") what,
            out("xmm0") _,
            out("xmm15") _,
            out("mm6") _,
            out("mm7") _,
        );
    }
    vcpu.fail(format_args!(
        "{} is {found:#x}, not {expected:#x}",
        COMPARED[what as usize]
    ))
}
