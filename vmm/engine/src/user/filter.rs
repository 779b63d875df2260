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

/// Lets through what instructions above `end` do. At and below it is the guest: the instruction pointer is
/// behind the instruction.
fn program(end: u64) -> BpfProgram {
    let (high, low) = ((end >> 32) as u32, end as u32);
    let step = |code, k, jt, jf| sock_filter { code, jt, jf, k };
    vec![
        step(LOAD, IP_HIGH, 0, 0),
        step(IF_ABOVE, high, 3, 0), // allow
        step(IF_EQUAL, high, 0, 3), // else trap
        step(LOAD, IP_LOW, 0, 0),
        step(IF_ABOVE, low, 0, 1), // allow, else trap
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
        step(RETURN, libc::SECCOMP_RET_TRAP, 0, 0),
    ]
}

/// Has this thread's system calls from addresses below `end` trapped, for as long as it lives.
///
/// # Errors
/// The host's, if it has no seccomp filters or lets this process have none.
pub(super) fn install(end: u64) -> io::Result<()> {
    apply_filter(&program(end)).map_err(io::Error::other)
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
        for end in [
            0x100_0000,
            0xffff_ffff,
            1 << 32,
            (3 << 32) + 0x1000,
            128 << 30,
        ] {
            let program = program(end);
            for ip in [
                0,
                0x1_0000,
                0xffff_ffff,
                1 << 32,
                end - 1,
                end,
                end + 1,
                end << 1,
                1 << 46,
            ] {
                let expected = if ip <= end {
                    libc::SECCOMP_RET_TRAP
                } else {
                    libc::SECCOMP_RET_ALLOW
                };
                assert_eq!(says(&program, ip), expected, "{ip:#x} with {end:#x}");
            }
        }
    }
}
