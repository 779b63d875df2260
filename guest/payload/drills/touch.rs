//! Clears the accessed and dirty bits of the page tables that the guest stands on, and waits for the CPU to
//! set them again.
//!
//! Ring 3 cannot flush a translation that the CPU has. It is gone with the next snapshot at the latest, for
//! then the host takes away the right to write: so every bit comes back sooner or later.

use core::mem::offset_of;
use core::sync::atomic::AtomicU64;

use super::tables::{ACCESSED, DIRTY};
use super::{Vcpu, read, write};
use crate::abi::{MAX_VCPUS, PAGE_SIZE, PAGE_TABLES_GPA, REGION_SIZE, STACK_SIZE, VcpuPage};

/// A word for each vCPU in the program's own region.
static IN_IMAGE: [AtomicU64; MAX_VCPUS as usize] =
    [const { AtomicU64::new(0) }; MAX_VCPUS as usize];

/// Regions that are looked at, at most.
const MOST: usize = 64;

/// Clears all bits at once, and touches a word in every region until all are set.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    let (layout, index) = (vcpu.layout(), vcpu.index);
    let ground = vcpu.ground(1);
    // One word in each region that is this vCPU's alone: the far end of its stack, its own here, one of its
    // page, and then one in each region of hammered memory.
    let below = [
        layout.stack_top(index) - STACK_SIZE,
        IN_IMAGE[index as usize].as_ptr().addr() as u64,
        layout.vcpu_page(index) + offset_of!(VcpuPage, reserved) as u64,
    ];
    let hammered = (layout.hammer_base..layout.memory)
        .step_by(REGION_SIZE as usize)
        .map(|region| region + ground.base % REGION_SIZE);
    let mut words = [0; MOST];
    let mut count = 0;
    for (slot, word) in words.iter_mut().zip(below.into_iter().chain(hammered)) {
        *slot = word;
        count += 1;
    }
    let words = &words[..count];

    // Tables lie one behind the other: the root, its only child, directories.
    let root = PAGE_TABLES_GPA;
    let gib = |word: u64| PAGE_TABLES_GPA + PAGE_SIZE + 8 * (word >> 30);
    let region = |word: u64| PAGE_TABLES_GPA + 2 * PAGE_SIZE + 8 * (word / REGION_SIZE);
    // Entries, and the bits that must come back in each.
    let entries = |word: u64| {
        [
            (root, ACCESSED),
            (gib(word), ACCESSED),
            (region(word), ACCESSED | DIRTY),
        ]
    };
    let mut mapped = [[0; 3]; MOST];
    for (mapped, &word) in mapped.iter_mut().zip(words) {
        *mapped = entries(word).map(|(entry, _)| read(entry) & !(ACCESSED | DIRTY));
    }
    loop {
        for &word in words {
            for (entry, bits) in entries(word) {
                // A bit that the CPU sets in between is lost, and set again with the others.
                write(entry, read(entry) & !bits);
            }
        }
        let mut is_complete = false;
        while !is_complete {
            is_complete = true;
            for (&word, mapped) in words.iter().zip(&mapped) {
                let salt = vcpu.salt() ^ word;
                write(word, salt);
                let found = read(word);
                if found != salt {
                    vcpu.fail(format_args!(
                        "{salt:#x} written to {word:#x} reads {found:#x}"
                    ));
                }
                for ((entry, bits), mapped) in entries(word).into_iter().zip(mapped) {
                    let found = read(entry);
                    if found & !(ACCESSED | DIRTY) != *mapped {
                        vcpu.fail(format_args!(
                            "the page-table entry at {entry:#x} is {found:#x}, not {mapped:#x}"
                        ));
                    }
                    is_complete &= found & bits == bits;
                }
            }
        }
        vcpu.round_done();
    }
}
