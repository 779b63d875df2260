//! Extended registers, by name: x87, SSE and AVX out of an XSAVE area.
//!
//! The area is in the standard format, as `KVM_GET_XSAVE` gives it. A component that XSTATE_BV does not name
//! is in its initial configuration, and its place in the area holds anything.

/// 32-bit words of the area that `KVM_GET_XSAVE` transfers.
pub(super) const XSAVE_WORDS: usize = 1024;
/// Bytes of that area.
pub(super) const XSAVE_BYTES: usize = XSAVE_WORDS * 4;

/// First 32-bit word of XSTATE_BV.
const XSTATE_BV: usize = 512 / 4;
const X87: u32 = 1;
const SSE: u32 = 1 << 1;
const AVX: u32 = 1 << 2;

/// Extended registers of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extended {
    /// x87 control word.
    pub control: u16,
    /// MXCSR.
    pub mxcsr: u32,
    /// MM0 to MM7.
    pub mmx: [u64; 8],
    /// XMM0 to XMM15, two words each, the lower first.
    pub xmm: [u64; 32],
    /// The upper halves of YMM0 to YMM15, likewise.
    pub ymm: [u64; 32],
}

impl Extended {
    /// Those in `area`. What is missing from an area that is too short reads as zero.
    pub(super) fn of(area: &[u32]) -> Self {
        let word = |at: usize| area.get(at).copied().unwrap_or(0);
        let long = |byte: usize| u64::from(word(byte / 4)) | u64::from(word(byte / 4 + 1)) << 32;
        let has = |component| word(XSTATE_BV) & component != 0;
        // The area has the registers in stack order: ST(i), not MMi. They are the same while the top of the
        // stack is 0, as every MMX instruction leaves it; a guest that does x87 arithmetic moves it.
        let top = (word(0) >> (16 + 11)) as usize % 8;
        let mmx = |n: usize| long(32 + (8 + n - top) % 8 * 16);
        Self {
            control: if has(X87) { word(0) as u16 } else { 0x37f },
            mxcsr: word(24 / 4),
            mmx: std::array::from_fn(|n| if has(X87) { mmx(n) } else { 0 }),
            xmm: std::array::from_fn(|n| if has(SSE) { long(160 + 8 * n) } else { 0 }),
            ymm: std::array::from_fn(|n| if has(AVX) { long(576 + 8 * n) } else { 0 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(components: u32) -> Vec<u32> {
        let mut area: Vec<u32> = (0..1024).collect();
        area[0] = 0x27f;
        area[XSTATE_BV] = components;
        area
    }

    fn long(at: u64) -> u64 {
        at | (at + 1) << 32
    }

    #[test]
    fn registers_are_where_the_manual_says() {
        let found = Extended::of(&area(X87 | SSE | AVX));
        assert_eq!((found.control, found.mxcsr), (0x27f, 6));
        assert_eq!((found.mmx[0], found.mmx[7]), (long(8), long(36)));
        assert_eq!((found.xmm[0], found.xmm[31]), (long(40), long(102)));
        assert_eq!((found.ymm[0], found.ymm[31]), (long(144), long(206)));
    }

    #[test]
    fn what_is_not_in_the_area_is_as_after_a_reset() {
        let found = Extended::of(&area(0));
        assert_eq!(found.control, 0x37f);
        assert_eq!(
            (found.mmx, found.xmm, found.ymm),
            ([0; 8], [0; 32], [0; 32])
        );
        assert_eq!(Extended::of(&[]).mmx, [0; 8]);
    }
}
