//! Work on a stack whose pages are shared with snapshots: every push may fault, and `enter` looks farther
//! than it writes.

use super::store::{Store, across, inside};
use crate::abi::PAGE_SIZE;
use crate::effect::{changes, execute, puts};

/// What RBP is in front of `enter`, for frames that are not linked.
const FRAME: u64 = 0x1122_3344_5566_7788;

/// The stores.
pub const STORES: &[Store] = &[
    // Pushes RBP, two frame pointers from below where it points, and the new one.
    inside("enter imm16, 3", |at, salt| {
        let frames = [salt, !salt];
        let rbp = (&raw const frames).cast::<u64>().wrapping_add(2);
        let top = at.wrapping_add(32);
        let pushed = at.wrapping_add(24).addr() as u64;
        puts(
            at,
            [pushed, frames[0], frames[1], rbp.addr() as u64],
            |_| {
                execute!("xchg rsp, rdi", "xchg rbp, rsi", "enter 64, 3", "mov rbp, rsi", "mov rsp, rdi";
                    inout("rdi") top => _, inout("rsi") rbp => _)
            },
        )
    }),
    across("enter imm16, 2 across pages", |at, salt| {
        let at = at.wrapping_sub(12);
        let rbp = (&raw const salt).wrapping_add(1);
        let top = at.wrapping_add(24);
        let pushed = at.wrapping_add(16).addr() as u64;
        puts(at, [pushed, salt, rbp.addr() as u64], |_| {
            execute!("xchg rsp, rdi", "xchg rbp, rsi", "enter 64, 2", "mov rbp, rsi", "mov rsp, rdi";
                inout("rdi") top => _, inout("rsi") rbp => _)
        })
    }),
    // The CPU looks whether it may write at the new top, two pages below, and writes nothing there.
    inside("enter with a frame of two pages", |at, salt| {
        let (frame, top) = (FRAME ^ salt, at.wrapping_sub(2 * PAGE_SIZE as usize));
        let mut pushed = false;
        let untouched = changes(
            top,
            |old: u64| old,
            |_| {
                pushed = puts(at, frame, |_| {
                    execute!("xchg rsp, rdi", "xchg rbp, rsi", "enter 8192, 0", "mov rbp, rsi",
                        "mov rsp, rdi";
                    inout("rdi") at.wrapping_add(8) => _, inout("rsi") frame => _)
                });
            },
        );
        untouched && pushed
    }),
    inside("recursion over two pages", |at, salt| {
        recurse(at, 300 + salt % 100)
    }),
    across("recursion over two pages, unaligned", |at, salt| {
        recurse(at.wrapping_add(4), 300 + salt % 100)
    }),
    across("push and pop across pages", |at, salt| {
        let mut popped = 0u64;
        puts(at.wrapping_sub(2), salt, |at| {
            execute!("xchg rsp, {at}", "push {v}", "pop {p}", "mov rsp, {at}";
                at = inout(reg) at.wrapping_add(8) => _, v = in(reg) salt, p = out(reg) popped)
        }) && popped == salt
    }),
    across("push fs across pages", |at, salt| {
        let mut fs = 0u64;
        // Not what the last one left. The assembler takes `push fs` for the form of 16 bits.
        let spoiled = puts(
            at.wrapping_sub(4),
            salt,
            |at| execute!("mov [{at}], {v}"; at = in(reg) at, v = in(reg) salt),
        );
        execute!("mov {fs:e}, fs"; fs = out(reg) fs);
        spoiled
            && puts(at.wrapping_sub(4), fs, |at| {
                execute!("xchg rsp, {at}", ".byte 0x0f, 0xa0", "mov rsp, {at}";
                    at = inout(reg) at.wrapping_add(8) => _)
            })
    }),
    across("call and ret across pages", |at, salt| {
        let mut sum = 0u64;
        // The return address is taken off again, by which it was right.
        execute!("xchg rsp, {at}", "call 2f", "jmp 3f", "2:", "lea {s}, [{v} + 1]", "ret", "3:",
            "mov rsp, {at}";
            at = inout(reg) at.wrapping_add(4) => _, v = in(reg) salt, s = out(reg) sum);
        sum == salt.wrapping_add(1)
    }),
];

/// Calls itself `depth` deep on a stack that begins at `top`, and adds up on the way back what it pushed on
/// the way there. Whether the sum is right.
fn recurse(top: *mut u8, depth: u64) -> bool {
    let sum: u64;
    execute!(
        "xchg rsp, rdi",
        "call 2f",
        "jmp 4f",
        "2:",
        "dec rcx",
        "jz 3f",
        "push rcx",
        "call 2b",
        "pop rdx",
        "add rax, rdx",
        "3:",
        "ret",
        "4:",
        "mov rsp, rdi";
        inout("rdi") top => _, inout("rcx") depth => _, inout("rax") 0u64 => sum, out("rdx") _);
    sum == depth * (depth - 1) / 2
}
