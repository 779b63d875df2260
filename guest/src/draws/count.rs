//! The instruction that counts a draw.

use core::arch::asm;

use crate::abi::Turn;

const _: () = assert!(align_of::<Turn>().is_multiple_of(16));

/// If `turn` is `from`, makes it `to`, in one instruction: whoever is stopped has done all of it or nothing.
/// Says whether it was.
///
/// That holds for who stops this CPU to look, and not for other CPUs: it is not locked.
///
/// # Safety
/// `turn` must be mapped, and reached as plain memory only.
#[allow(unsafe_code, reason = "no function of `core` is this instruction")]
pub unsafe fn count(turn: *mut Turn, from: Turn, to: Turn) -> bool {
    let counted: u8;
    // SAFETY: the turn is mapped, by the caller's promise, and aligned as the instruction demands. RBX, which
    // can't be named as an operand, is swapped in and restored. Memory is clobbered by default, so that the
    // compiler has done all earlier stores and none of the later ones.
    unsafe {
        asm!(
            "xchg rbx, rsi",
            "cmpxchg16b [rdi]",
            "sete r8b",
            "mov rbx, rsi",
            in("rdi") turn,
            inout("rax") from.generation => _,
            inout("rdx") from.count => _,
            inout("rsi") to.generation => _,
            in("rcx") to.count,
            out("r8b") counted,
            options(nostack)
        );
    }
    counted != 0
}

#[cfg(test)]
#[allow(unsafe_code, reason = "calls what is tested")]
mod tests {
    use super::*;

    const TURN: Turn = Turn {
        generation: 0x1234_5678_9abc_def0,
        count: 0x0fed_cba9_8765_4321,
    };
    const NEXT: Turn = Turn {
        count: TURN.count + 1,
        ..TURN
    };

    /// What becomes of a turn between two others, and whether it was counted.
    fn counted(turn: Turn) -> (Turn, bool) {
        let mut turns = [NEXT, turn, NEXT];
        // SAFETY: it is this function's alone.
        let counted = unsafe { count(&raw mut turns[1], TURN, NEXT) };
        assert_eq!([turns[0], turns[2]], [NEXT; 2]);
        (turns[1], counted)
    }

    #[test]
    fn a_draw_is_counted() {
        assert_eq!(counted(TURN), (NEXT, true));
    }

    /// In another generation, or with another count, be it by one bit.
    #[test]
    fn a_draw_of_another_turn_is_not_counted() {
        for bit in 0..64 {
            let generation = TURN.generation ^ 1 << bit;
            let count = TURN.count ^ 1 << bit;
            for other in [Turn { generation, ..TURN }, Turn { count, ..TURN }] {
                assert_eq!(counted(other), (other, false));
            }
        }
    }
}
