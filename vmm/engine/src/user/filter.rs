//! No system call of the guest's reaches the kernel.
//!
//! A vCPU's thread gets a seccomp filter: a system call by an instruction in the guest's window is SIGSYS,
//! and so a crash of the guest with a report. Those of the VMM, whose code lies elsewhere, are as they were:
//! it handles faults on this thread.
//!
//! The filter looks at the instruction pointer, for which `seccompiler`'s rules have no word: so its
//! instructions are written here, as `struct sock_filter`s, and it installs them.
//!
//! It keeps honest guests honest, and no more: one that means harm jumps to a `syscall` of the VMM's.

use std::io;
use std::ops::Range;

use seccompiler::{BpfProgram, apply_filter, sock_filter};

/// `BPF_LD | BPF_W | BPF_ABS`: loads a word of `struct seccomp_data`.
const LOAD: u16 = 0x20;
/// `BPF_JMP | BPF_JGT | BPF_K`.
const IF_ABOVE: u16 = 0x25;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
const IF_EQUAL: u16 = 0x15;
/// `BPF_RET | BPF_K`.
const RETURN: u16 = 0x06;
/// Where `struct seccomp_data` has the lower and the upper half of the instruction pointer.
const IP_LOW: u32 = 8;
const IP_HIGH: u32 = 12;

/// Traps what instructions in `code` do, and lets all others through. The instruction pointer is behind the
/// instruction.
fn program(code: &Range<u64>) -> BpfProgram {
    let halves = |address: u64| ((address >> 32) as u32, address as u32);
    let ((start_high, start_low), (end_high, end_low)) = (halves(code.start), halves(code.end));
    let step = |code, k, jt, jf| sock_filter { code, jt, jf, k };
    vec![
        // Above the end: allow.
        step(LOAD, IP_HIGH, 0, 0),
        step(IF_ABOVE, end_high, 8, 0),
        step(IF_EQUAL, end_high, 0, 2),
        step(LOAD, IP_LOW, 0, 0),
        step(IF_ABOVE, end_low, 5, 0),
        // Above the start: trap.
        step(LOAD, IP_HIGH, 0, 0),
        step(IF_ABOVE, start_high, 4, 0),
        step(IF_EQUAL, start_high, 0, 2),
        step(LOAD, IP_LOW, 0, 0),
        step(IF_ABOVE, start_low, 1, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
        step(RETURN, libc::SECCOMP_RET_TRAP, 0, 0),
    ]
}

/// Has this thread's system calls from addresses in `code` trapped, for as long as it lives.
///
/// # Errors
/// The host's, if it has no seccomp filters or lets this process have none.
pub(super) fn install(code: Range<u64>) -> io::Result<()> {
    apply_filter(&program(&code)).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the filter says of a system call whose instruction ends at `ip`.
    fn says(program: &[sock_filter], ip: u64) -> u32 {
        let (mut at, mut word) = (0, 0);
        loop {
            let step = &program[at];
            at += 1;
            match step.code {
                LOAD if step.k == IP_LOW => word = ip as u32,
                LOAD if step.k == IP_HIGH => word = (ip >> 32) as u32,
                RETURN => return step.k,
                IF_ABOVE if word > step.k => at += usize::from(step.jt),
                IF_EQUAL if word == step.k => at += usize::from(step.jt),
                IF_ABOVE | IF_EQUAL => at += usize::from(step.jf),
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn what_lies_in_the_window_is_trapped_and_nothing_else() {
        for code in [
            0..0x100_0000,
            0..0xffff_ffff,
            0..1 << 32,
            0..(3 << 32) + 0x1000,
            0..128 << 30,
            0x7f12_3450_0000..0x7f12_3460_0000,
            0x7f12_ff00_0000..0x7f13_0100_0000,
            0x7f13_0000_0000..0x7f14_0000_0000,
        ] {
            let program = program(&code);
            let Range { start, end } = code;
            for ip in [
                start.saturating_sub(1),
                start,
                start + 1,
                start + 2,
                (start + end) / 2,
                0x1_0000,
                0xffff_ffff,
                1 << 32,
                end - 1,
                end,
                end + 1,
                end << 1,
                1 << 46,
                (1 << 47) - 1,
            ] {
                let expected = if ip > start && ip <= end {
                    libc::SECCOMP_RET_TRAP
                } else {
                    libc::SECCOMP_RET_ALLOW
                };
                assert_eq!(says(&program, ip), expected, "{ip:#x} with {code:x?}");
            }
        }
    }
}
