//! Bit tests with the number of the bit in a register: it is signed, and the operand is wherever that bit is.

use super::store::{Store, across, inside};
use crate::effect::{changes, execute};

/// The stores.
pub const STORES: &[Store] = &[
    inside("btc m64, r64 a terabyte behind its address", |at, _| {
        changes(
            at,
            |old: u64| old ^ 1 << 9,
            |at| {
                execute!("btc [{at}], {bit}";
                    at = in(reg) at.wrapping_sub(1 << 40), bit = in(reg) (8u64 << 40) + 9)
            },
        )
    }),
    inside(
        "lock btc m64, r64 a terabyte before its address",
        |at, _| {
            changes(
                at,
                |old: u64| old ^ 1 << 63,
                |at| {
                    execute!("lock btc [{at}], {bit}";
                        at = in(reg) at.wrapping_add(1 << 40), bit = in(reg) 63 - (8i64 << 40))
                },
            )
        },
    ),
    inside("lock btc m32, r32 128 MiB behind its address", |at, _| {
        // The upper half of the register does not count.
        changes(
            at,
            |old: u32| old ^ 1 << 9,
            |at| {
                execute!("lock btc [{at}], {bit:e}";
                    at = in(reg) at.wrapping_sub(128 << 20), bit = in(reg) 0x55 << 32 | (128u64 << 23) + 9)
            },
        )
    }),
    inside("btc m32, r32 256 MiB before its address", |at, _| {
        changes(
            at,
            |old: u32| old ^ 1,
            |at| {
                execute!("btc [{at}], {bit:e}";
                    at = in(reg) at.wrapping_add(256 << 20), bit = in(reg) 0x8000_0000u64)
            },
        )
    }),
    inside("btc m16, r16 a page behind its address", |at, _| {
        changes(
            at,
            |old: u16| old ^ 1 << 3,
            |at| {
                execute!("btc [{at}], {bit:x}";
                    at = in(reg) at.wrapping_sub(4094), bit = in(reg) 0x5555_0000 | 8 * 4094u64 + 3)
            },
        )
    }),
    inside("btc m16, r16 a page before its address", |at, _| {
        changes(
            at,
            |old: u16| old ^ 1,
            |at| execute!("btc [{at}], {bit:x}"; at = in(reg) at.wrapping_add(4096), bit = in(reg) 0x8000u64),
        )
    }),
    inside(
        "btc m64, imm8 of more bits than the operand has",
        |at, _| {
            changes(
                at,
                |old: u64| old ^ 1 << 7,
                |at| execute!("btc qword ptr [{at}], 71"; at = in(reg) at),
            )
        },
    ),
    across("btc m64, r64 across pages", |at, salt| {
        let bit = salt % 64;
        changes(
            at.wrapping_sub(3),
            |old: u64| old ^ 1 << bit,
            |at| {
                execute!("btc [{at}], {bit}";
                    at = in(reg) at.wrapping_add(1 << 30), bit = in(reg) bit.wrapping_sub(8 << 30))
            },
        )
    }),
];
