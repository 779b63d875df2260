//! Copies of whole folios, past the caches: nobody reads a snapshot's copy soon, and what the guest has in
//! the caches stays there. A quarter faster than `memcpy` where it was measured (`cargo bench -p benches
//! --bench copy`).
#![expect(unsafe_code, reason = "instructions that have no safe name")]

use std::arch::x86_64::{
    __m128i, _MM_HINT_T0, _mm_load_si128, _mm_prefetch, _mm_sfence, _mm_stream_si128,
};

const LINE: usize = 64;
const WORD: usize = size_of::<__m128i>();
/// How far ahead of the copy memory is asked for, in bytes.
const AHEAD: usize = 8 * LINE;

/// Copies `len` bytes.
///
/// # Safety
/// `from` may be read and `to` written, `len` bytes from there on, and the two do not overlap. Somebody else
/// may write to `from`: the copy is a mixture then.
///
/// # Panics
/// If an address or `len` is no multiple of 64.
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    let is_whole = |n: usize| n.is_multiple_of(LINE);
    assert!(is_whole(from.addr()) && is_whole(to.addr()) && is_whole(len));
    for at in (0..len).step_by(LINE) {
        // SAFETY: the line is within what the caller promises, and aligned. What is asked for ahead may lie
        // beyond it: that is a hint and never a fault.
        unsafe {
            let (from, to) = (from.add(at), to.add(at));
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
            for word in 0..LINE / WORD {
                let value = _mm_load_si128(from.cast::<__m128i>().add(word));
                _mm_stream_si128(to.cast::<__m128i>().add(word), value);
            }
        }
    }
    // These stores are not in the order of others: whoever is told of the copy must find it.
    // SAFETY: it has no conditions.
    unsafe { _mm_sfence() };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Aligned([u8; 4096]);

    #[test]
    fn all_bytes_arrive_and_none_beside_them() {
        let mut from = Aligned([0; 4096]);
        for (n, byte) in from.0.iter_mut().enumerate() {
            *byte = (n * 7 % 251) as u8;
        }
        let mut to = Aligned([9; 4096]);
        // SAFETY: both are arrays of 4096 bytes, of which 64 to 3136 are copied.
        unsafe { copy(from.0.as_ptr().add(64), to.0.as_mut_ptr().add(64), 3072) };
        assert_eq!(to.0[64..3136], from.0[64..3136]);
        assert!(
            to.0[..64]
                .iter()
                .chain(&to.0[3136..])
                .all(|&byte| byte == 9)
        );
    }

    #[test]
    #[should_panic(expected = "is_whole")]
    fn parts_of_a_line_are_refused() {
        let from = Aligned([0; 4096]);
        let mut to = Aligned([0; 4096]);
        // SAFETY: within both arrays.
        unsafe { copy(from.0.as_ptr(), to.0.as_mut_ptr(), 100) };
    }
}
