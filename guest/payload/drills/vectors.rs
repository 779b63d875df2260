//! Stores of vector registers of which each element may be on another page, or none.
//!
//! The registers are named: the compiler, which knows of neither AVX nor AVX-512 here, knows them by their
//! lowest lanes.

use super::store::{Store, across, inside};
use crate::abi::PAGE_SIZE;
use crate::effect::{changes, execute, puts};

/// AVX and AVX2.
pub const MASKED: &[Store] = &[
    across("vmovdqu m256, ymm across pages", |at, salt| {
        let value = words(salt);
        puts(at.wrapping_sub(9), value, |at| {
            execute!("vmovdqu ymm1, [{p}]", "vmovdqu [{at}], ymm1";
                p = in(reg) &value, at = in(reg) at, out("xmm1") _)
        })
    }),
    inside("vmovntdq m256, ymm", |at, salt| {
        let value = words(salt);
        puts(at, value, |at| {
            execute!("vmovdqu ymm1, [{p}]", "vmovntdq [{at}], ymm1", "sfence";
                p = in(reg) &value, at = in(reg) at, out("xmm1") _)
        })
    }),
    inside("vextracti128 m128, ymm, imm8", |at, salt| {
        let value = words(salt);
        puts(at, [value[2], value[3]], |at| {
            execute!("vmovdqu ymm1, [{p}]", "vextracti128 [{at}], ymm1, 1";
                p = in(reg) &value, at = in(reg) at, out("xmm1") _)
        })
    }),
    // Elements that are masked off must not be written, wherever they are.
    across("vpmaskmovq m256, ymm, ymm across pages", |at, salt| {
        masked(at.wrapping_sub(12), salt, salt >> 40 & 15)
    }),
    across(
        "vpmaskmovq with all its elements on one page of two",
        |at, salt| {
            masked(
                at.wrapping_sub(16),
                salt,
                if salt & 1 == 0 { 0b1100 } else { 0b0011 },
            )
        },
    ),
];

fn masked(at: *mut u8, salt: u64, mask: u64) -> bool {
    let value = words(salt);
    let masks: [u64; 4] = core::array::from_fn(|i| (mask >> i & 1) << 63);
    changes(
        at,
        |old: [u64; 4]| {
            core::array::from_fn(|i| if mask >> i & 1 != 0 { value[i] } else { old[i] })
        },
        |at| {
            execute!("vmovdqu ymm1, [{p}]", "vmovdqu ymm2, [{m}]", "vpmaskmovq [{at}], ymm2, ymm1";
                p = in(reg) &value, m = in(reg) &masks, at = in(reg) at, out("xmm1") _, out("xmm2") _)
        },
    )
}

/// Pages that a scatter writes.
pub const SCATTERED_PAGES: u64 = 16;

/// AVX-512.
pub const SCATTER: &[Store] = &[
    inside("vpscatterqq to 8 pages", |at, salt| {
        let places = places::<8>(at, salt);
        let value: [u64; 8] = core::array::from_fn(|i| salt.rotate_left(i as u32));
        let offsets: [i64; 8] =
            core::array::from_fn(|i| (places[i].addr() as i64 - at.addr() as i64) / 8);
        let mask = salt >> 40 & 0xff;
        scatters(&places, &value, mask, || {
            let left: u64;
            execute!("vmovdqu64 zmm1, [{p}]", "vmovdqu64 zmm2, [{o}]", "kmovw k1, {m:e}",
                "vpscatterqq [{at} + zmm2*8]{{k1}}, zmm1", "kmovw {left:e}, k1";
                p = in(reg) &value, o = in(reg) &offsets, m = in(reg) mask, at = in(reg) at,
                left = out(reg) left,
                out("xmm1") _, out("xmm2") _);
            left
        }) && gathers(at, &offsets, &places)
    }),
    inside("vpscatterdd to 16 pages", |at, salt| {
        let places = places::<16>(at, salt);
        let value: [u32; 16] = core::array::from_fn(|i| salt.rotate_left(3 * i as u32) as u32);
        let offsets: [i32; 16] =
            core::array::from_fn(|i| (places[i].addr() as i64 - at.addr() as i64) as i32);
        let mask = salt >> 40 & 0xffff;
        scatters(&places, &value, mask, || {
            let left: u64;
            execute!("vmovdqu32 zmm1, [{p}]", "vmovdqu32 zmm2, [{o}]", "kmovw k1, {m:e}",
                "vpscatterdd [{at} + zmm2]{{k1}}, zmm1", "kmovw {left:e}, k1";
                p = in(reg) &value, o = in(reg) &offsets, m = in(reg) mask, at = in(reg) at,
                left = out(reg) left,
                out("xmm1") _, out("xmm2") _);
            left
        })
    }),
    // Addresses in a register that only the upper 16 of AVX-512 are; half as many elements as the lanes have.
    inside("vpscatterdq to 8 pages by zmm17", |at, salt| {
        let places = places::<8>(at, salt);
        let value: [u64; 8] = core::array::from_fn(|i| salt.rotate_left(5 * i as u32));
        let offsets: [i32; 8] =
            core::array::from_fn(|i| (places[i].addr() as i64 - at.addr() as i64) as i32);
        let mask = salt >> 40 & 0xff;
        scatters(&places, &value, mask, || {
            let left: u64;
            execute!("vmovdqu64 zmm1, [{p}]", "vbroadcasti64x4 zmm17, [{o}]", "kmovw k1, {m:e}",
                "vpscatterdq [{at} + ymm17]{{k1}}, zmm1", "kmovw {left:e}, k1";
                p = in(reg) &value, o = in(reg) &offsets, m = in(reg) mask, at = in(reg) at,
                left = out(reg) left,
                out("xmm1") _);
            left
        })
    }),
    across("vpcompressq m512, zmm across pages", |at, salt| {
        let value: [u64; 8] = core::array::from_fn(|i| salt.rotate_left(i as u32));
        let mask = salt >> 40 & 0xff;
        changes(
            at.wrapping_sub(20),
            |old: [u64; 8]| {
                let mut new = old;
                let kept = (0..8).filter(|i| mask >> i & 1 != 0);
                kept.enumerate()
                    .for_each(|(place, i)| new[place] = value[i]);
                new
            },
            |at| {
                execute!("vmovdqu64 zmm1, [{p}]", "kmovw k1, {m:e}", "vpcompressq [{at}]{{k1}}, zmm1";
            p = in(reg) &value, m = in(reg) mask, at = in(reg) at, out("xmm1") _)
            },
        )
    }),
    across(
        "vmovdqu64 m512, zmm under a mask across pages",
        |at, salt| {
            let value: [u64; 8] = core::array::from_fn(|i| salt.rotate_left(i as u32));
            let mask = salt >> 40 & 0xff;
            changes(
                at.wrapping_sub(28),
                |old: [u64; 8]| {
                    core::array::from_fn(|i| if mask >> i & 1 != 0 { value[i] } else { old[i] })
                },
                |at| {
                    execute!("vmovdqu64 zmm1, [{p}]", "kmovw k1, {m:e}", "vmovdqu64 [{at}]{{k1}}, zmm1";
            p = in(reg) &value, m = in(reg) mask, at = in(reg) at, out("xmm1") _)
                },
            )
        },
    ),
];

/// Four words made of `salt`.
fn words(salt: u64) -> [u64; 4] {
    [salt, !salt, salt >> 1, salt << 1]
}

/// A place on each of `N` pages around `at`, which is in the middle of sixteen.
fn places<const N: usize>(at: *mut u8, salt: u64) -> [*mut u8; N] {
    core::array::from_fn(|i| {
        let page = i as isize + 1 - N as isize / 2;
        let word = (salt as usize).wrapping_add(i) % 64;
        at.wrapping_offset(page * PAGE_SIZE as isize)
            .wrapping_add(8 * word)
    })
}

/// Whether `scatter` puts `value` at `places`, where the mask says so, leaves what is there else, and leaves
/// nothing of the mask.
fn scatters<T: Copy + PartialEq, const N: usize>(
    places: &[*mut u8; N],
    value: &[T; N],
    mask: u64,
    scatter: impl FnOnce() -> u64,
) -> bool {
    // SAFETY: the places are on pages of this vCPU's own, aligned to words.
    let now = || places.map(|place| unsafe { place.cast::<T>().read_volatile() });
    let before = now();
    let left = scatter();
    let after = now();
    let right = |i: usize| {
        after[i]
            == if mask >> i & 1 != 0 {
                value[i]
            } else {
                before[i]
            }
    };
    left == 0 && (0..N).all(right)
}

/// Whether a gather finds at `places`, by their distance from `at` in words, what is there.
fn gathers(at: *mut u8, offsets: &[i64; 8], places: &[*mut u8; 8]) -> bool {
    let mut gathered = [0u64; 8];
    execute!("vmovdqu64 zmm2, [{o}]", "kxnorw k1, k1, k1", "vpgatherqq zmm1{{k1}}, [{at} + zmm2*8]",
        "vmovdqu64 [{g}], zmm1";
        o = in(reg) offsets, g = in(reg) &raw mut gathered, at = in(reg) at, out("xmm1") _, out("xmm2") _);
    // SAFETY: as for scatters.
    gathered == places.map(|place| unsafe { place.cast::<u64>().read_volatile() })
}
