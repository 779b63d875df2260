//! Stores by FS and GS: their bases are added behind the address, which a prefix cuts to 32 bits before that.

use super::store::{Store, across, inside};
use crate::effect::{changes, execute, puts};

/// What is in the upper half of a register of which only the lower is part of an address.
const GARBAGE: u64 = 0x1234_5678 << 32;

/// The stores.
pub const STORES: &[Store] = &[
    inside("mov fs:[disp32], r64", |at, salt| {
        set_fs(at.wrapping_sub(64));
        puts(at, salt, |_| execute!("mov fs:[64], {v}"; v = in(reg) salt))
    }),
    inside(
        "mov fs:[disp32], r64 with a negative displacement",
        |at, salt| {
            set_fs(at.wrapping_add(0x1000));
            puts(
                at,
                salt,
                |_| execute!("mov fs:[-0x1000], {v}"; v = in(reg) salt),
            )
        },
    ),
    inside("mov gs:[base + index*8 + disp32], r64", |at, salt| {
        set_gs(at.wrapping_sub(0x5000));
        puts(at, salt, |_| {
            execute!("mov gs:[{b} + {i}*8 + 0x3000], {v}";
                b = in(reg) 0x2100u64, i = in(reg) -0x20i64, v = in(reg) salt)
        })
    }),
    inside("mov fs:[r32], r64", |at, salt| {
        set_fs(at.wrapping_sub(0xffff_f000));
        puts(
            at,
            salt,
            |_| execute!("mov fs:[{o:e}], {v}"; o = in(reg) GARBAGE | 0xffff_f000, v = in(reg) salt),
        )
    }),
    inside(
        "add gs:[r32 + r32*4], r64 with a sum beyond 32 bits",
        |at, salt| {
            set_gs(at.wrapping_sub(0x30));
            changes(
                at,
                |old: u64| old.wrapping_add(salt),
                |_| {
                    execute!("add gs:[{b:e} + {i:e}*4], {v}";
                        b = in(reg) GARBAGE | 0xffff_fff0, i = in(reg) GARBAGE | 0x10, v = in(reg) salt)
                },
            )
        },
    ),
    inside("lock xadd fs:[r32 + disp8], r64", |at, salt| {
        set_fs(at.wrapping_sub(0x20));
        changes(
            at,
            |old: u64| old.wrapping_add(salt),
            |_| {
                execute!("lock xadd fs:[{o:e} + 0x10], {v}";
                    o = in(reg) GARBAGE | 0x10, v = inout(reg) salt => _)
            },
        )
    }),
    inside("mov fs:[moffs64], rax", |at, salt| {
        set_fs(at.wrapping_sub(0x1_2345_6789));
        // The displacement has all its 64 bits in this form.
        puts(
            at,
            salt,
            |_| execute!(".byte 0x64, 0x48, 0xa3", ".quad 0x123456789"; in("rax") salt),
        )
    }),
    inside("stosq with an FS that does not count", |at, salt| {
        set_fs(0x7777_0000_0000usize as *mut u8);
        puts(
            at,
            salt,
            |at| execute!("fs stosq"; inout("rdi") at => _, in("rax") salt),
        )
    }),
    across("movsq from gs:[rsi] across pages", |at, salt| {
        let at = at.wrapping_sub(3);
        set_gs(0x6666_0000usize as *mut u8);
        let from = (&raw const salt).wrapping_byte_sub(0x6666_0000);
        puts(
            at,
            salt,
            |at| execute!("movsq [rdi], gs:[rsi]"; inout("rdi") at => _, inout("rsi") from => _),
        )
    }),
    across("mov gs:[r32], r64 across pages", |at, salt| {
        let at = at.wrapping_sub(5);
        set_gs(at.wrapping_sub(0x8000_0000));
        puts(
            at,
            salt,
            |_| execute!("mov gs:[{o:e}], {v}"; o = in(reg) GARBAGE | 0x8000_0000, v = in(reg) salt),
        )
    }),
];

fn set_fs(base: *mut u8) {
    execute!("wrfsbase {b}"; b = in(reg) base)
}

fn set_gs(base: *mut u8) {
    execute!("wrgsbase {b}"; b = in(reg) base)
}
