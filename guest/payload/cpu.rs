//! What the CPU has, as ring 3 can find out.

use core::arch::asm;

/// Some of a CPU's instructions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// `wrfsbase` and its like.
    FsGsBase,
    /// `clzero`.
    Clzero,
    /// `xsave`.
    Xsave,
    /// `xsavec`.
    Xsavec,
    /// AVX, with its registers.
    Avx,
    /// AVX2.
    Avx2,
    /// The foundation of AVX-512, with its registers.
    Avx512,
}

/// State components of XCR0.
const AVX_STATE: u64 = 0b110;
const AVX512_STATE: u64 = 0b1110_0110;

/// Whether the CPU has `feature`, and the VMM lets guests use it.
pub fn has(feature: Feature) -> bool {
    let bit = |word: u32, bit: u32| word >> bit & 1 != 0;
    match feature {
        Feature::FsGsBase => bit(leaf(7, 0).ebx, 0),
        Feature::Clzero => bit(leaf(0x8000_0008, 0).ebx, 0),
        // OSXSAVE: it is on, too.
        Feature::Xsave => bit(leaf(1, 0).ecx, 27),
        Feature::Xsavec => has(Feature::Xsave) && bit(leaf(0xd, 1).eax, 1),
        Feature::Avx => bit(leaf(1, 0).ecx, 28) && has_state(AVX_STATE),
        Feature::Avx2 => bit(leaf(7, 0).ebx, 5) && has_state(AVX_STATE),
        Feature::Avx512 => bit(leaf(7, 0).ebx, 16) && has_state(AVX512_STATE),
    }
}

/// State components that are on; 0 without XSAVE.
pub fn xcr0() -> u64 {
    if !has(Feature::Xsave) {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE is set, so ring 3 may.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

fn has_state(components: u64) -> bool {
    xcr0() & components == components
}

/// Answer of CPUID.
#[derive(Clone, Copy)]
pub struct Leaf {
    /// Register EAX.
    pub eax: u32,
    /// Register EBX.
    pub ebx: u32,
    /// Register ECX.
    pub ecx: u32,
}

/// Leaf `function`, `index` of CPUID; zeros if there is none.
pub fn leaf(function: u32, index: u32) -> Leaf {
    let base = function & 0x8000_0000;
    if function != base && function > leaf(base, 0).eax {
        return Leaf {
            eax: 0,
            ebx: 0,
            ecx: 0,
        };
    }
    let (eax, ebx, ecx): (u32, u64, u32);
    // SAFETY: every x86-64 has it. RBX is the compiler's and swapped out.
    unsafe {
        asm!("mov {b}, rbx", "cpuid", "xchg {b}, rbx", b = out(reg) ebx,
            inout("eax") function => eax, inout("ecx") index => ecx, out("edx") _,
            options(nomem, nostack, preserves_flags));
    }
    Leaf {
        eax,
        ebx: ebx as u32,
        ecx,
    }
}
