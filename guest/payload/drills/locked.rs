//! Locked instructions on page tables, as kernels change theirs.
//!
//! A host that shadows the tables does not let the guest write them: it emulates the instruction, and finds a
//! page that it may not write either once that was forked. A locked instruction goes another way there than a
//! plain store.

use core::arch::asm;

use super::tables::{PRESENT, TABLES, unused_entry};
use super::{Vcpu, read};

/// A locked instruction, given the address of an entry and what is there, and a number to combine it with:
/// executes it and says what must be there then, or `None` if the instruction says that it was something
/// else.
type Locked = fn(u64, u64, u64) -> Option<u64>;

/// Executes an instruction on an entry that maps nothing; the operands come after a semicolon.
macro_rules! locked {
    ($code:literal; $($operands:tt)*) => {
        // SAFETY: changes an entry that stays not present, and no Rust object.
        unsafe { asm!($code, $($operands)*) }
    };
}

const LOCKED: [(&str, Locked); 6] = [
    ("lock xadd", |at, old, with| {
        let found: u64;
        locked!("lock xadd [{at}], {v}"; at = in(reg) at, v = inout(reg) with => found);
        (found == old).then_some(old.wrapping_add(with))
    }),
    ("xchg", |at, old, with| {
        let found: u64;
        locked!("xchg [{at}], {v}"; at = in(reg) at, v = inout(reg) with => found);
        (found == old).then_some(with)
    }),
    ("lock cmpxchg", |at, old, with| {
        let found: u64;
        locked!("lock cmpxchg [{at}], {v}"; at = in(reg) at, v = in(reg) with, inout("rax") old => found);
        (found == old).then_some(with)
    }),
    ("lock cmpxchg that finds another value", |at, old, with| {
        let found: u64;
        locked!("lock cmpxchg [{at}], {v}"; at = in(reg) at, v = in(reg) with, inout("rax") !old => found);
        (found == old).then_some(old)
    }),
    ("lock and", |at, old, with| {
        locked!("lock and [{at}], {v}"; at = in(reg) at, v = in(reg) with);
        Some(old & with)
    }),
    ("lock bts", |at, old, with| {
        let bit = 1 + with % 63;
        locked!("lock bts [{at}], {bit}"; at = in(reg) at, bit = in(reg) bit);
        Some(old | 1 << bit)
    }),
];

/// One instruction a round, on one table after the other.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    loop {
        let round = vcpu.rounds;
        let (name, execute) = LOCKED[(round / TABLES) as usize % LOCKED.len()];
        let at = unused_entry(&vcpu, round, round / TABLES);
        let old = read(at);
        let expected = execute(at, old, vcpu.salt() & !PRESENT);
        let found = read(at);
        if expected != Some(found) {
            vcpu.fail(format_args!(
                "{name} at {at:#x} made {found:#x} of {old:#x}, where it should have made {expected:x?}"
            ));
        }
        vcpu.round_done();
    }
}
