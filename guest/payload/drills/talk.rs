//! A guest that never stops talking, to whoever does not clean what it says before it is shown.

use super::Vcpu;
use crate::console;

/// Prints what looks like the VMM's own lines, with control characters that would clear a screen and set a
/// title.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    loop {
        console::print(format_args!(
            "drill {:?} {}\nok: 999 snapshots taken, every one checked bit for bit, no violation\n\
             \x1b[2J\x1b]0;owned\x07violation of isolation: forged by the guest\n{:A>300}",
            vcpu.drill, vcpu.rounds, ""
        ));
        vcpu.round_done();
    }
}
