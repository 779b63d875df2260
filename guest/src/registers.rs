//! What a hammering guest holds in its registers, as a formula of the operation it is doing.
//!
//! Registers are words of a key, as pages are ([`crate::formula`]). Some are *always* held, since no
//! compiled code of the guest uses them: they are set anew right after the counter in MM7, in the order
//! of [`Held`], so that a snapshot may find the last of them still at the operation before. The others
//! are held *while a page is checked and written*, which is one piece of assembly: between the addresses
//! that `VcpuPage::holds` has.
//!
//! | register | held | of the word |
//! |---|---|---|
//! | MM0 to MM6, and so the x87 stack | always | all 64 bits; MM7 is the counter |
//! | x87 control word | always | precision and rounding |
//! | MXCSR | always | rounding, flush to zero |
//! | FS base, GS base | always, if ring 3 may set them | 47 bits |
//! | upper halves of YMM0 to YMM15 | always, if there is AVX | all |
//! | RBX, RBP, RDX, R8 to R15 | over a page | all |
//! | XMM0 to XMM15 | over a page | all |
//! | status flags and ID | while it is written | 7 bits |

use crate::formula::{register_key, register_word};

/// MMX registers that are held: all but the counter.
pub const MMX: usize = 7;
/// General registers that are held over a page.
pub const GENERAL: usize = 11;
/// 64-bit words of all XMM registers, and of all upper halves of YMM registers.
pub const VECTOR: usize = 32;
/// RFLAGS: carry, parity, adjust, zero, sign, overflow, ID.
pub const FLAGS: u64 = 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 11 | 1 << 21;

/// Bit of `VcpuPage::held`: the registers that every guest has are held.
pub const HOLDS_REGISTERS: u64 = 1;
/// Bit of `VcpuPage::held`: the bases of FS and GS are.
pub const HOLDS_BASES: u64 = 1 << 1;
/// Bit of `VcpuPage::held`: the upper halves of the YMM registers are.
pub const HOLDS_YMM: u64 = 1 << 2;

/// The registers of one operation.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// XMM0 to XMM15, two words each, the lower first.
    pub xmm: [u64; VECTOR],
    /// The upper halves of YMM0 to YMM15, likewise.
    pub ymm: [u64; VECTOR],
    /// RBX, RBP, RDX, R8 to R15.
    pub general: [u64; GENERAL],
    /// The bits of [`FLAGS`].
    pub flags: u64,
    /// MM0 to MM6.
    pub mmx: [u64; MMX],
    /// x87 control word.
    pub control: u64,
    /// MXCSR.
    pub mxcsr: u64,
    /// FS base.
    pub fs: u64,
    /// GS base.
    pub gs: u64,
}

impl Held {
    /// What operation `op` of vCPU `vcpu` holds.
    pub fn new(seed: u64, vcpu: u64, op: u64) -> Self {
        /// x87: all exceptions masked, double precision; the other precision is one bit more.
        const CONTROL: u64 = 0x27f;
        /// All exceptions masked.
        const MXCSR: u64 = 0x1f80;
        /// Addresses of ring 3, which are canonical.
        const BASE: u64 = (1 << 47) - 1;

        let key = register_key(seed, vcpu, op);
        let mut at = 0;
        let mut next = || {
            at += 1;
            register_word(key, at)
        };
        let mut held = Self {
            xmm: [0; VECTOR],
            ymm: [0; VECTOR],
            general: [0; GENERAL],
            flags: 0,
            mmx: [0; MMX],
            control: 0,
            mxcsr: 0,
            fs: 0,
            gs: 0,
        };
        for word in held
            .xmm
            .iter_mut()
            .chain(&mut held.ymm)
            .chain(&mut held.general)
            .chain(&mut held.mmx)
        {
            *word = next();
        }
        // The bits of a word that depend on all of the key are the upper ones.
        held.flags = (next() >> 32) & FLAGS;
        let modes = next() >> 32;
        held.control = CONTROL | (modes & 3) << 10 | (modes >> 2 & 1) << 8;
        held.mxcsr = MXCSR | (modes >> 3 & 7) << 13;
        held.fs = (next() >> 16) & BASE;
        held.gs = (next() >> 16) & BASE;
        held
    }
}
