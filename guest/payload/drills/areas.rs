//! Stores of many bytes: cache lines, and areas of state.

use super::store::{Store, across, inside};
use crate::cpu::{self, Feature};
use crate::effect::{execute, puts};

/// Bytes of a cache line.
const LINE: usize = 64;

/// `clzero`.
pub const CLEAR_LINE: &[Store] = &[
    // Anywhere in the line.
    inside("clzero", |at, salt| {
        let inside_line = at.wrapping_add(salt as usize % LINE);
        let good = puts(
            at,
            [0u64; LINE / 8],
            |_| execute!("clzero", "sfence"; in("rax") inside_line),
        );
        good && puts(
            at,
            [salt; LINE / 8],
            |at| execute!("mov ecx, 8", "rep stosq"; inout("rdi") at => _, in("rax") salt, out("rcx") _),
        )
    }),
];

/// `xsave` and its like.
pub const STATE: &[Store] = &[
    across("fxsave64 across pages", |at, salt| {
        saves_the_same(start(at, salt), salt, Format::Legacy)
    }),
    across("xsave64 across pages", |at, salt| {
        saves_the_same(start(at, salt), salt, Format::Standard)
    }),
    across("xsavec64 across pages", |at, salt| {
        !cpu::has(Feature::Xsavec) || saves_the_same(start(at, salt), salt, Format::Compact)
    }),
];

/// Where an area begins: some lines before the next page.
fn start(next_page: *mut u8, salt: u64) -> *mut u8 {
    next_page.wrapping_sub(LINE * (1 + salt as usize % 12))
}

/// How an area is laid out.
#[derive(Clone, Copy, PartialEq)]
enum Format {
    /// x87 and SSE alone.
    Legacy,
    /// Each component where CPUID says.
    Standard,
    /// Each component behind the one before.
    Compact,
}

/// An area of state; none that guests have is larger.
#[repr(C, align(64))]
struct Area([u8; 4096]);

/// Puts some state in registers and saves it twice, on the stack and at `at`. Whether both are the same.
fn saves_the_same(at: *mut u8, salt: u64, format: Format) -> bool {
    let mut there = Area([0; 4096]);
    let (avx, there_at) = (u64::from(cpu::has(Feature::Avx)), &raw mut there);
    macro_rules! save {
        ($there:literal, $here:literal) => {
            execute!(
                "movq xmm7, {v}",
                "punpcklqdq xmm7, xmm7",
                "test {avx}, {avx}",
                "jz 2f",
                "vinsertf128 ymm7, ymm7, xmm7, 1",
                "2:",
                $there,
                $here;
                v = in(reg) salt, avx = in(reg) avx, there = in(reg) there_at, at = in(reg) at,
                in("eax") u32::MAX, in("edx") u32::MAX, out("xmm7") _)
        };
    }
    match format {
        Format::Legacy => save!("fxsave64 [{there}]", "fxsave64 [{at}]"),
        Format::Standard => save!("xsave64 [{there}]", "xsave64 [{at}]"),
        Format::Compact => save!("xsavec64 [{there}]", "xsavec64 [{at}]"),
    }
    // SAFETY: the area lies on pages of this vCPU's own, and `execute` has clobbered memory.
    let here = |byte: usize| unsafe { at.add(byte).read_volatile() };
    let same = |from: usize, len: usize| (from..from + len).all(|byte| there.0[byte] == here(byte));
    // Control, status and tags; MXCSR; ten bytes of each x87 register; XMM. What lies between need not be
    // written.
    let legacy =
        same(0, 5) && same(24, 8) && (0..8).all(|i| same(32 + 16 * i, 10)) && same(160, 256);
    let seen = there.0[160 + 16 * 7..][..8] == salt.to_le_bytes();
    if format == Format::Legacy {
        return legacy && seen;
    }
    // What is not in the compact format is zero: XSTATE_BV says what is. A CPU may find out between two looks
    // that a component is zero.
    let is_saved =
        |component: u32, bit: u8| format == Format::Standard || bit >> component & 1 != 0;
    let mut next = 576usize;
    let mut upper = true;
    for component in (2..8).filter(|id| cpu::xcr0() >> id & 1 != 0) {
        const ALIGNED: u32 = 1 << 1;
        let leaf = cpu::leaf(0xd, component);
        let len = leaf.eax as usize;
        let from = match format {
            Format::Compact if leaf.ecx & ALIGNED != 0 => next.next_multiple_of(LINE),
            Format::Compact => next,
            _ => leaf.ebx as usize,
        };
        next = from + len;
        let masks =
            [there.0[512], here(512)].map(|bits| if is_saved(component, bits) { !0 } else { 0 });
        upper &= (from..next).all(|byte| there.0[byte] & masks[0] == here(byte) & masks[1]);
    }
    legacy && seen && upper
}
