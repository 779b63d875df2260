//! Counters that lie across two pages, and that all vCPUs add to. A snapshot that took one page from before
//! and one from after an addition would have a count that never was.

use core::arch::asm;

use super::{Vcpu, read, write};
use crate::abi::{PAGE_SIZE, REGION_SIZE};

/// Adds one to each counter every round, and compares it with what the vCPUs say that they have added.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    let base = vcpu.layout().hammer_base;
    // Across pages of one region, and across regions. Carries cross the boundary every 256 additions, or
    // 65,536.
    let counters = [base + 5 * PAGE_SIZE - 1, base + REGION_SIZE - 2];
    // Additions of one vCPU to one counter.
    let added = |vcpu: u64, counter: usize| base + (8 + vcpu) * PAGE_SIZE + counter as u64 * 8;
    let vcpus = vcpu.layout().vcpus;
    loop {
        for (number, counter) in counters.into_iter().enumerate() {
            if vcpu.rounds % 2 == 0 {
                // SAFETY: hammered memory that no Rust object lies in; here, and in the other branch.
                unsafe { asm!("lock inc qword ptr [{}]", in(reg) counter) };
            } else {
                compare_and_add(counter);
            }
            write(added(vcpu.index, number), vcpu.rounds + 1);
            // What others have not said yet is one each at most. Each is read before the counter, and behind
            // it.
            let sum = || {
                (0..vcpus)
                    .map(|vcpu| read(added(vcpu, number)))
                    .sum::<u64>()
            };
            let least = sum();
            let found = load(counter);
            let most = sum() + vcpus - 1;
            if !(least..=most).contains(&found) {
                vcpu.fail(format_args!(
                    "the counter at {counter:#x} is {found}, not {least} to {most}"
                ));
            }
        }
        vcpu.round_done();
    }
}

/// Adds one by `lock cmpxchg`.
fn compare_and_add(counter: u64) {
    // SAFETY: as for `lock inc`.
    unsafe {
        asm!("mov rax, [{c}]", "2:", "lea {n}, [rax + 1]", "lock cmpxchg [{c}], {n}", "jne 2b",
            c = in(reg) counter, n = out(reg) _, out("rax") _)
    };
}

/// The counter at one instant: a plain load may have one half before an addition and one after.
fn load(counter: u64) -> u64 {
    let value;
    // SAFETY: as for `lock inc`.
    unsafe { asm!("lock xadd [{c}], {v}", c = in(reg) counter, v = inout(reg) 0u64 => value) };
    value
}
