//! Code that lies in page tables: in entries that map nothing, and on the page behind them.
//!
//! A fork write-protects the tables with the rest. So the page that an instruction is fetched from, the
//! tables walked to fetch it and the page that it writes may be the same, and a host that shadows the tables
//! watches all writes to them.

use core::arch::asm;

use super::tables::{PRESENT, TABLES, UNUSED, unused_entry};
use super::{Vcpu, read, write};

/// `mov [rdi], rax; ret` and `mov [rdi], rax; nop; ret`: as entries, both are not present.
const CODE: [u64; 2] = [0x9090_9090_c307_8948, 0x9090_90c3_9007_8948];
const _: () = assert!(CODE[0] & PRESENT == 0 && CODE[1] & PRESENT == 0);
/// Entries with code; what it writes is in those behind.
const CODES: u64 = UNUSED / 2;
/// Rounds for which code stays as it is.
const KEPT: u64 = 64;

/// Writes code now and then, and executes it every round.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    let ground = vcpu.ground(1);
    loop {
        let round = vcpu.rounds;
        let (lap, place) = (round / KEPT, round / TABLES % (UNUSED - CODES));
        let code = unused_entry(&vcpu, round, lap % CODES);
        if round % KEPT < TABLES {
            write(code, CODE[(lap % 2) as usize]);
        }
        let data = [
            unused_entry(&vcpu, round, CODES + place),
            ground.piece(round) + 8 * place,
        ];
        let value = vcpu.salt() & !PRESENT;
        for at in data {
            // SAFETY: stores one word, which is no object and, as an entry, not present.
            unsafe { asm!("call {code}", code = in(reg) code, in("rdi") at, in("rax") value) };
            let found = read(at);
            if found != value {
                vcpu.fail(format_args!(
                    "code at {code:#x} stored {value:#x} to {at:#x}, where {found:#x} is now"
                ));
            }
        }
        vcpu.round_done();
    }
}
