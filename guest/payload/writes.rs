//! Every kind of instruction that writes memory, on pages of the hammered memory.
//!
//! A VMM that write-protects guest memory has to find out what an instruction was about to write. Here each
//! instruction writes to a page that nothing has written before it, in the open, through an implied operand,
//! or across the boundary to the next page, and is then checked for having had its effect exactly once.

use crate::abi::{Layout, PAGE_SIZE};
use crate::effect::{changes, execute, puts};
use crate::{console, rt};

/// An instruction under test.
struct Write {
    name: &'static str,
    place: Place,
    /// Executes it for the given address, and says whether it did what it should.
    test: fn(*mut u8) -> bool,
}

/// The address a test is given.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// In the middle of a page.
    Inside,
    /// The first byte of the next page: the test begins before it and ends behind.
    Across,
}

/// Where in a page a test that stays inside has its address.
const INSIDE: u64 = 2048;

/// Walks once through the hammered memory, a test a page, until the memory is used up. Every test is done
/// at least once if there are as many pages as tests, which one region has room for.
pub fn write_with_everything(layout: &Layout) {
    let pages = (layout.memory - layout.hammer_base) / PAGE_SIZE;
    for page in 0..pages {
        let mut write = &WRITES[page as usize % WRITES.len()];
        if page == pages - 1 && write.place == Place::Across {
            write = &WRITES[0];
        }
        let offset = match write.place {
            Place::Inside => INSIDE,
            Place::Across => PAGE_SIZE,
        };
        let at = layout.hammer_base + page * PAGE_SIZE + offset;
        if !(write.test)(at as *mut u8) {
            console::print(format_args!(
                "misbehave: {} at {at:#x} did not do what it should",
                write.name
            ));
            rt::exit(1);
        }
    }
    console::print(format_args!(
        "misbehave: {} kinds of write on {pages} pages",
        WRITES.len()
    ));
}

const fn inside(name: &'static str, test: fn(*mut u8) -> bool) -> Write {
    let place = Place::Inside;
    Write { name, place, test }
}

const fn across(name: &'static str, test: fn(*mut u8) -> bool) -> Write {
    let place = Place::Across;
    Write { name, place, test }
}

/// Some word with all its bytes different.
const V: u64 = 0xf1e2_d3c4_b5a6_9788;
/// Sixteen bytes in memory, for the vector registers.
static VECTOR: u128 = 0x0f1e_2d3c_4b5a_6978_8796_a5b4_c3d2_e1f0;
const FOUR: [u64; 4] = [V, !V, V >> 1, V << 1];

const WRITES: &[Write] = &[
    inside("mov m8, imm8", |at| {
        puts(
            at,
            0x5au8,
            |at| execute!("mov byte ptr [{at}], 0x5a"; at = in(reg) at),
        )
    }),
    inside("mov m16, r16", |at| {
        puts(
            at,
            V as u16,
            |at| execute!("mov [{at}], {v:x}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("mov m32, r32", |at| {
        puts(
            at,
            V as u32,
            |at| execute!("mov [{at}], {v:e}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("mov m64, r64", |at| {
        puts(
            at,
            V,
            |at| execute!("mov [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("mov m64, imm32", |at| {
        puts(
            at,
            -3i64,
            |at| execute!("mov qword ptr [{at}], -3"; at = in(reg) at),
        )
    }),
    inside("mov with base, index and displacement", |at| {
        puts(at, V, |at| {
            execute!("mov [{at} + {i}*8 + 0x12340020], {v}";
                at = in(reg) at.wrapping_sub(0x1234_0000), i = in(reg) -4i64, v = in(reg) V)
        })
    }),
    inside("mov with an index and no base", |at| {
        puts(
            at,
            V,
            |at| execute!("mov [{at}*8], {v}"; at = in(reg) at.addr() / 8, v = in(reg) V),
        )
    }),
    inside("mov with a 32-bit address", |at| {
        if at.addr() > u32::MAX as usize {
            return true;
        }
        // The upper half of the register is not part of the address.
        puts(
            at,
            V,
            |at| execute!("mov [{at:e}], {v}"; at = in(reg) at.addr() | 0x1234 << 32, v = in(reg) V),
        )
    }),
    across("mov m64, r64 across pages", |at| {
        puts(
            at.wrapping_sub(3),
            V,
            |at| execute!("mov [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    across("mov m16, r16 across pages", |at| {
        puts(
            at.wrapping_sub(1),
            V as u16,
            |at| execute!("mov [{at}], {v:x}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("movnti m32, r32", |at| {
        puts(
            at,
            V as u32,
            |at| execute!("movnti [{at}], {v:e}", "sfence"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("movnti m64, r64", |at| {
        puts(
            at,
            V,
            |at| execute!("movnti [{at}], {v}", "sfence"; at = in(reg) at, v = in(reg) V),
        )
    }),
    // Arithmetic and logic: each would show being done twice, or not at all.
    inside("add m64, r64", |at| {
        changes(
            at,
            |old: u64| old.wrapping_add(V),
            |at| execute!("add [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("add m8, imm8", |at| {
        changes(
            at,
            |old: u8| old.wrapping_add(7),
            |at| execute!("add byte ptr [{at}], 7"; at = in(reg) at),
        )
    }),
    inside("lock add m32, r32", |at| {
        changes(
            at,
            |old: u32| old.wrapping_add(V as u32),
            |at| execute!("lock add [{at}], {v:e}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    across("add m64, r64 across pages", |at| {
        changes(
            at.wrapping_sub(4),
            |old: u64| old.wrapping_add(V),
            |at| execute!("add [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("adc m64, r64", |at| {
        changes(
            at,
            |old: u64| old.wrapping_add(V).wrapping_add(1),
            |at| execute!("stc", "adc [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("sub m64, r64", |at| {
        changes(
            at,
            |old: u64| old.wrapping_sub(V),
            |at| execute!("sub [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("sbb m64, r64", |at| {
        changes(
            at,
            |old: u64| old.wrapping_sub(V).wrapping_sub(1),
            |at| execute!("stc", "sbb [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("and m64, r64", |at| {
        changes(
            at,
            |old: u64| old & V,
            |at| execute!("and [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("or m64, r64", |at| {
        changes(
            at,
            |old: u64| old | V,
            |at| execute!("or [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("xor m64, r64", |at| {
        changes(
            at,
            |old: u64| old ^ V,
            |at| execute!("xor [{at}], {v}"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("not m64", |at| {
        changes(
            at,
            |old: u64| !old,
            |at| execute!("not qword ptr [{at}]"; at = in(reg) at),
        )
    }),
    inside("neg m64", |at| {
        changes(
            at,
            |old: u64| old.wrapping_neg(),
            |at| execute!("neg qword ptr [{at}]"; at = in(reg) at),
        )
    }),
    inside("inc m32", |at| {
        changes(
            at,
            |old: u32| old.wrapping_add(1),
            |at| execute!("inc dword ptr [{at}]"; at = in(reg) at),
        )
    }),
    inside("lock dec m64", |at| {
        changes(
            at,
            |old: u64| old.wrapping_sub(1),
            |at| execute!("lock dec qword ptr [{at}]"; at = in(reg) at),
        )
    }),
    inside("rcl m64, 1", |at| {
        changes(
            at,
            |old: u64| old << 1 | 1,
            |at| execute!("stc", "rcl qword ptr [{at}], 1"; at = in(reg) at),
        )
    }),
    inside("sar m64, cl", |at| {
        changes(
            at,
            |old: u64| (old as i64 >> 5) as u64,
            |at| execute!("sar qword ptr [{at}], cl"; at = in(reg) at, in("cl") 5u8),
        )
    }),
    inside("shld m64, r64, imm8", |at| {
        changes(
            at,
            |old: u64| old << 12 | V >> 52,
            |at| execute!("shld [{at}], {v}, 12"; at = in(reg) at, v = in(reg) V),
        )
    }),
    inside("shrd m64, r64, cl", |at| {
        changes(
            at,
            |old: u64| old >> 12 | V << 52,
            |at| execute!("shrd [{at}], {v}, cl"; at = in(reg) at, v = in(reg) V, in("cl") 12u8),
        )
    }),
    inside("setc m8", |at| {
        puts(
            at,
            1u8,
            |at| execute!("stc", "setc byte ptr [{at}]"; at = in(reg) at),
        )
    }),
    inside("bts m64, imm8", |at| {
        changes(
            at,
            |old: u64| old | 1 << 45,
            |at| execute!("bts qword ptr [{at}], 45"; at = in(reg) at),
        )
    }),
    // With a register for the bit number, the operand is wherever that bit is.
    inside("bts m64, r64 far behind its address", |at| {
        changes(
            at,
            |old: u64| old | 1 << 9,
            |at| {
                execute!("bts [{at}], {bit}";
                    at = in(reg) at.wrapping_sub(0x4000), bit = in(reg) 8 * 0x4000 + 9i64)
            },
        )
    }),
    inside("btc m32, r32 far before its address", |at| {
        changes(
            at,
            |old: u32| old ^ 1 << 9,
            |at| {
                execute!("btc [{at}], {bit:e}";
                    at = in(reg) at.wrapping_add(0x4000), bit = in(reg) 9 - 8 * 0x4000i64)
            },
        )
    }),
    inside("lock btr m64, r64", |at| {
        changes(
            at.wrapping_add(8),
            |old: u64| old & !(1 << 36),
            |at| execute!("lock btr [{at}], {bit}"; at = in(reg) at.wrapping_sub(8), bit = in(reg) 100u64),
        )
    }),
    // Exchanges.
    inside("xchg m64, r64", |at| {
        let mut old = 0u64;
        let mut before = 1u64;
        changes(
            at,
            |value: u64| {
                before = value;
                V
            },
            |at| execute!("xchg [{at}], {v}"; at = in(reg) at, v = inout(reg) V => old),
        ) && old == before
    }),
    inside("xadd m64, r64", |at| {
        let mut old = 0u64;
        let mut before = 1u64;
        changes(
            at,
            |value: u64| {
                before = value;
                value.wrapping_add(V)
            },
            |at| execute!("xadd [{at}], {v}"; at = in(reg) at, v = inout(reg) V => old),
        ) && old == before
    }),
    inside("lock xadd m32, r32", |at| {
        changes(
            at,
            |old: u32| old.wrapping_add(V as u32),
            |at| execute!("lock xadd [{at}], {v:e}"; at = in(reg) at, v = inout(reg) V => _),
        )
    }),
    across("xadd m64, r64 across pages", |at| {
        changes(
            at.wrapping_sub(5),
            |old: u64| old.wrapping_add(V),
            |at| execute!("xadd [{at}], {v}"; at = in(reg) at, v = inout(reg) V => _),
        )
    }),
    inside("lock cmpxchg m64, r64", |at| {
        let old = first_word(at);
        puts(
            at,
            V,
            |at| execute!("lock cmpxchg [{at}], {v}"; at = in(reg) at, v = in(reg) V, inout("rax") old => _),
        )
    }),
    // Writes the old value back: it needs to be writable all the same.
    inside("cmpxchg m64, r64 that finds another value", |at| {
        let old = first_word(at);
        let mut found = 0u64;
        changes(
            at,
            |old: u64| old,
            |at| execute!("cmpxchg [{at}], {v}"; at = in(reg) at, v = in(reg) V, inout("rax") !old => found),
        ) && found == old
    }),
    inside("lock cmpxchg8b m64", |at| {
        let old = first_word(at);
        puts(at, V, |at| cmpxchg8b(at, old, V))
    }),
    inside("lock cmpxchg16b m128", |at| {
        let old = [first_word(at), first_word(at.wrapping_add(8))];
        puts(at, [V, !V], |at| cmpxchg16b(at, old, [V, !V]))
    }),
    // Strings.
    inside("stosb", |at| {
        puts(
            at,
            V as u8,
            |at| execute!("stosb"; inout("rdi") at => _, in("al") V as u8),
        )
    }),
    inside("stosq downwards", |at| {
        puts(
            at,
            V,
            |at| execute!("std", "stosq", "cld"; inout("rdi") at => _, in("rax") V),
        )
    }),
    across("stosd across pages", |at| {
        puts(
            at.wrapping_sub(2),
            V as u32,
            |at| execute!("stosd"; inout("rdi") at => _, in("eax") V as u32),
        )
    }),
    across("rep stosb across pages", |at| {
        puts(
            at.wrapping_sub(33),
            [V as u8; 99],
            |at| execute!("rep stosb"; inout("rdi") at => _, inout("rcx") 99u64 => _, in("al") V as u8),
        )
    }),
    across("rep stosq across pages, unaligned", |at| {
        puts(
            at.wrapping_sub(21),
            [V; 6],
            |at| execute!("rep stosq"; inout("rdi") at => _, inout("rcx") 6u64 => _, in("rax") V),
        )
    }),
    across("rep stosb downwards across pages", |at| {
        puts(at.wrapping_sub(20), [V as u8; 40], |at| {
            execute!("std", "rep stosb", "cld";
                inout("rdi") at.wrapping_add(39) => _, inout("rcx") 40u64 => _, in("al") V as u8)
        })
    }),
    inside("movsq", |at| {
        puts(
            at,
            FOUR[1],
            |at| execute!("movsq"; inout("rdi") at => _, inout("rsi") &FOUR[1] => _),
        )
    }),
    across("rep movsb across pages", |at| {
        puts(at.wrapping_sub(15), FOUR, |at| {
            execute!("rep movsb";
                inout("rdi") at => _, inout("rsi") &FOUR => _, inout("rcx") 32u64 => _)
        })
    }),
    across("rep movsq downwards across pages", |at| {
        puts(at.wrapping_sub(12), FOUR, |at| {
            execute!("std", "rep movsq", "cld";
                inout("rdi") at.wrapping_add(24) => _, inout("rsi") &FOUR[3] => _,
                inout("rcx") 4u64 => _)
        })
    }),
    // The stack, moved to where the test is.
    inside("push r64", |at| {
        puts(at, V, |at| {
            execute!("xchg rsp, {at}", "push {v}", "mov rsp, {at}";
                at = inout(reg) at.wrapping_add(8) => _, v = in(reg) V)
        })
    }),
    inside("push imm8", |at| {
        puts(at, -7i64, |at| {
            execute!("xchg rsp, {at}", "push -7", "mov rsp, {at}";
                at = inout(reg) at.wrapping_add(8) => _)
        })
    }),
    inside("push r16", |at| {
        puts(at, V as u16, |at| {
            execute!("xchg rsp, {at}", "push {v:x}", "mov rsp, {at}";
                at = inout(reg) at.wrapping_add(2) => _, v = in(reg) V)
        })
    }),
    inside("push m64", |at| {
        puts(at, FOUR[2], |at| {
            execute!("xchg rsp, {at}", "push qword ptr [{p}]", "mov rsp, {at}";
                at = inout(reg) at.wrapping_add(8) => _, p = in(reg) &FOUR[2])
        })
    }),
    across("push r64 across pages", |at| {
        puts(at.wrapping_sub(4), V, |at| {
            execute!("xchg rsp, {at}", "push {v}", "mov rsp, {at}";
                at = inout(reg) at.wrapping_add(8) => _, v = in(reg) V)
        })
    }),
    across("push r64 below a page", |at| {
        puts(at.wrapping_sub(8), V, |at| {
            execute!("xchg rsp, {at}", "push {v}", "mov rsp, {at}";
                at = inout(reg) at.wrapping_add(8) => _, v = in(reg) V)
        })
    }),
    inside("pushfq", |at| {
        const CARRY_AND_FIXED: u64 = 3;
        let mut flags = 0;
        changes(
            at,
            |_| 0u64,
            |at| {
                execute!("xchg rsp, {at}", "stc", "pushfq", "mov {f}, [rsp]",
                    "mov rsp, {at}"; at = inout(reg) at.wrapping_add(8) => _, f = out(reg) flags);
                execute!("mov qword ptr [{at}], 0"; at = in(reg) at);
            },
        ) && flags & CARRY_AND_FIXED == CARRY_AND_FIXED
    }),
    inside("call rel32", |at| {
        let mut back = 0u64;
        test_call(at, |at| {
            execute!("xchg rsp, {at}", "call 2f", "2:", "mov rsp, {at}",
                "lea {back}, [rip + 2b]"; at = inout(reg) at.wrapping_add(8) => _, back = out(reg) back);
            back
        })
    }),
    inside("call r64", |at| {
        let mut back = 0u64;
        test_call(at, |at| {
            execute!("lea {back}, [rip + 2f]", "xchg rsp, {at}", "call {back}",
                "2:", "mov rsp, {at}"; at = inout(reg) at.wrapping_add(8) => _, back = out(reg) back);
            back
        })
    }),
    inside("call m64", |at| {
        let mut target = 0u64;
        test_call(at, |at| {
            execute!("lea {t}, [rip + 2f]", "mov [{p}], {t}", "xchg rsp, {at}",
                "call qword ptr [{p}]", "2:", "mov rsp, {at}"; at = inout(reg) at.wrapping_add(8) => _,
                t = out(reg) _, p = in(reg) &raw mut target);
            target
        })
    }),
    across("call rel32 across pages", |at| {
        let mut back = 0u64;
        test_call(at.wrapping_sub(6), |at| {
            execute!("xchg rsp, {at}", "call 2f", "2:", "mov rsp, {at}",
                "lea {back}, [rip + 2b]"; at = inout(reg) at.wrapping_add(8) => _, back = out(reg) back);
            back
        })
    }),
    inside("enter imm16, 0", |at| {
        puts(at, V, |at| {
            // Named registers, none of which is RBP.
            execute!("xchg rsp, rdi", "xchg rbp, rsi", "enter 32, 0", "mov rbp, rsi", "mov rsp, rdi";
                inout("rdi") at.wrapping_add(8) => _, inout("rsi") V => _)
        })
    }),
    inside("pop m64", |at| {
        puts(
            at,
            V,
            |at| execute!("push {v}", "pop qword ptr [{at}]"; at = in(reg) at, v = in(reg) V),
        )
    }),
    // The address is formed with the stack pointer as it is after the pop.
    inside("pop m64 with the stack pointer as its base", |at| {
        puts(at, V, |at| {
            execute!("sub {i}, rsp", "push {v}", "pop qword ptr [rsp + {i}]";
                i = inout(reg) at => _, v = in(reg) V)
        })
    }),
    // Vectors.
    inside("movd m32, xmm", |at| {
        puts(at, VECTOR as u32, |at| {
            execute!("movdqu {x}, [{p}]", "movd [{at}], {x}";
                at = in(reg) at, p = in(reg) &VECTOR, x = out(xmm_reg) _)
        })
    }),
    inside("movq m64, xmm", |at| {
        puts(at, VECTOR as u64, |at| {
            execute!("movdqu {x}, [{p}]", "movq [{at}], {x}";
                at = in(reg) at, p = in(reg) &VECTOR, x = out(xmm_reg) _)
        })
    }),
    inside("movhps m64, xmm", |at| {
        puts(at, (VECTOR >> 64) as u64, |at| {
            execute!("movdqu {x}, [{p}]", "movhps [{at}], {x}";
                at = in(reg) at, p = in(reg) &VECTOR, x = out(xmm_reg) _)
        })
    }),
    inside("movaps m128, xmm", |at| {
        puts(at, VECTOR, |at| {
            execute!("movdqu {x}, [{p}]", "movaps [{at}], {x}";
                at = in(reg) at, p = in(reg) &VECTOR, x = out(xmm_reg) _)
        })
    }),
    inside("movntdq m128, xmm", |at| {
        puts(at, VECTOR, |at| {
            execute!("movdqu {x}, [{p}]", "movntdq [{at}], {x}", "sfence";
                at = in(reg) at, p = in(reg) &VECTOR, x = out(xmm_reg) _)
        })
    }),
    across("movdqu m128, xmm across pages", |at| {
        puts(at.wrapping_sub(7), VECTOR, |at| {
            execute!("movdqu {x}, [{p}]", "movdqu [{at}], {x}";
                at = in(reg) at, p = in(reg) &VECTOR, x = out(xmm_reg) _)
        })
    }),
    across("movups m128, xmm across pages", |at| {
        puts(at.wrapping_sub(15), VECTOR, |at| {
            execute!("movdqu {x}, [{p}]", "movups [{at}], {x}";
                at = in(reg) at, p = in(reg) &VECTOR, x = out(xmm_reg) _)
        })
    }),
    // Writes where RDI points, the bytes whose mask has its top bit set.
    inside("maskmovdqu", |at| {
        const LOW_BYTES: u128 = 0x8080_8080;
        puts(at, VECTOR as u32, |at| {
            execute!("movdqu {x}, [{p}]", "movdqu {m}, [{q}]", "maskmovdqu {x}, {m}", "sfence";
                p = in(reg) &VECTOR, q = in(reg) &LOW_BYTES, in("rdi") at,
                x = out(xmm_reg) _, m = out(xmm_reg) _)
        })
    }),
    // State.
    inside("stmxcsr m32", |at| {
        let mut control = 0u32;
        execute!("stmxcsr [{at}]"; at = in(reg) &raw mut control);
        puts(
            at,
            control,
            |at| execute!("stmxcsr [{at}]"; at = in(reg) at),
        )
    }),
    inside("fnstcw m16", |at| {
        let mut control = 0u16;
        execute!("fnstcw [{at}]"; at = in(reg) &raw mut control);
        puts(at, control, |at| execute!("fnstcw [{at}]"; at = in(reg) at))
    }),
    inside("fstp m64", |at| {
        const ONE: u64 = 0x3ff0_0000_0000_0000;
        puts(at, ONE, |at| {
            execute!("fld1", "fstp qword ptr [{at}]";
                at = in(reg) at, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _)
        })
    }),
    inside("fxsave m4096", |at| {
        // Its first half kilobyte, of which the rest is left as it was.
        const SAVED: usize = 416;
        #[repr(align(16))]
        struct Image([u8; 512]);
        let mut image = Image([0; 512]);
        execute!("fxsave [{p}]", "fxsave [{at}]"; at = in(reg) at, p = in(reg) &raw mut image);
        (0..SAVED).all(|byte| {
            // SAFETY: half a page lies behind the address of a test that stays inside.
            image.0[byte] == unsafe { at.add(byte).read_volatile() }
        })
    }),
];

fn first_word(at: *mut u8) -> u64 {
    // SAFETY: tests are given addresses in the hammered memory; those inside a page are aligned.
    unsafe { at.cast::<u64>().read_volatile() }
}

/// Whether `call`, which is given `at`, puts its return address there; it says what that should be.
fn test_call(at: *mut u8, call: impl FnOnce(*mut u8) -> u64) -> bool {
    let back = call(at);
    // The call was made already: what is tested here is what it left.
    puts(at, back, |_| ())
}

// RBX can't be named as an operand, so it is swapped in; all others are named, so that none is RBX.

fn cmpxchg8b(at: *mut u8, old: u64, new: u64) {
    execute!("xchg rbx, rsi", "lock cmpxchg8b [rdi]", "mov rbx, rsi";
        in("rdi") at, inout("rsi") new & 0xffff_ffff => _, in("rcx") new >> 32,
        inout("rax") old & 0xffff_ffff => _, inout("rdx") old >> 32 => _)
}

fn cmpxchg16b(at: *mut u8, old: [u64; 2], new: [u64; 2]) {
    execute!("xchg rbx, rsi", "lock cmpxchg16b [rdi]", "mov rbx, rsi";
        in("rdi") at, inout("rsi") new[0] => _, in("rcx") new[1],
        inout("rax") old[0] => _, inout("rdx") old[1] => _)
}
