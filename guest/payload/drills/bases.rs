//! The bases of FS and GS, which nothing but the CPU has.

use super::{Vcpu, write};
use crate::cpu::Feature;
use crate::effect::execute;

/// Sets both to other values every round, and looks whether they are still what they were.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    vcpu.needs(Feature::FsGsBase, "wrfsbase");
    let ground = vcpu.ground(1);
    loop {
        // In the lower half of addresses, and in the upper.
        let round = vcpu.rounds << 4 | vcpu.index;
        let (fs, gs) = (round, round.wrapping_neg());
        execute!("wrfsbase {fs}", "wrgsbase {gs}"; fs = in(reg) fs, gs = in(reg) gs);
        write(ground.piece(vcpu.rounds), round);
        let (fs_now, gs_now): (u64, u64);
        execute!("rdfsbase {fs}", "rdgsbase {gs}"; fs = out(reg) fs_now, gs = out(reg) gs_now);
        if (fs_now, gs_now) != (fs, gs) {
            vcpu.fail(format_args!(
                "bases of fs and gs are {fs_now:#x} and {gs_now:#x}, not {fs:#x} and {gs:#x}"
            ));
        }
        vcpu.round_done();
    }
}
