//! Page tables that change all the time, under a guest that is rewound.
//!
//! What is mapped where is chosen by the clock, so that a guest that is rewound chooses otherwise the second
//! time: a translation that a CPU, or a shadow of the tables, has kept from before the restore then leads to
//! the wrong page.

use core::arch::x86_64::_rdtsc;

use super::tables::{
    ACCESSED, ANY_USE, Batch, DIRTY, ENTRIES, FRESH_TABLES, FreshAddresses, LARGE,
};
use super::{Vcpu, read, write};
use crate::abi::{PAGE_SIZE, REGION_SIZE};
use crate::{console, rt};

/// Pages of a piece: the first has the tables and the notes, others are mapped.
const PIECE: u64 = 16;
/// Small frames to choose from: those of four pieces.
const FRAMES: u64 = 4 * PIECE;
/// Bits that keep the CPU from writing to an entry.
const USED: u64 = ANY_USE | ACCESSED | DIRTY;

/// Addresses of one size: what is mapped at each, by what the guest itself noted.
struct Mapped {
    batch: Batch,
    /// Where the notes are: for each address the place that it maps, as one would reach it without.
    notes: u64,
}

impl Mapped {
    /// Maps `place`, whose page begins at `page`.
    fn map(&self, slot: u64, page: u64, place: u64, bits: u64) {
        write(self.notes + 8 * slot, place);
        self.batch.set_entry(slot, page | USED | bits);
    }

    /// Fails unless address `slot` leads to the place it is noted for. A place begins with its own address.
    fn check(&self, vcpu: &Vcpu<'_>, slot: u64, page_size: u64) {
        let place = read(self.notes + 8 * slot);
        let gva = self.batch.gva(slot) + place % page_size;
        let found = read(gva);
        if found != place {
            vcpu.fail(format_args!(
                "address {gva:#x} leads to {found:#x}, but is mapped to {place:#x}"
            ));
        }
        let salt = vcpu.salt();
        write(gva + 8, salt);
        let found = read(place + 8);
        if found != salt {
            vcpu.fail(format_args!(
                "{salt:#x} was written by address {gva:#x}, but at {place:#x} is {found:#x}"
            ));
        }
    }
}

/// Maps one page a round, and reads and writes by two.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    let layout = vcpu.layout();
    let (hammer_base, regions) = (
        layout.hammer_base,
        (layout.memory - layout.hammer_base) / REGION_SIZE,
    );
    let ground = vcpu.ground(PIECE);
    let small_place = |frame: u64| ground.piece(1 + frame / PIECE) + frame % PIECE * PAGE_SIZE;
    // In each region the last page of this vCPU's first piece there.
    let large_place = |region: u64| {
        let start = hammer_base + region * REGION_SIZE;
        let piece = start.saturating_sub(ground.base).div_ceil(ground.stride);
        ground.piece(piece) + (PIECE - 1) * PAGE_SIZE + 1024
    };
    for place in (0..FRAMES)
        .map(small_place)
        .chain((0..regions).map(large_place))
    {
        write(place, place);
    }

    let tables = ground.piece(0);
    let notes = tables + FRESH_TABLES * PAGE_SIZE;
    let mut addresses = FreshAddresses::new(vcpu.index, tables);
    let nothing = |_| 0;
    let (Some(small), Some(large)) = (
        addresses.next_pages(ACCESSED, nothing),
        addresses.next_large_pages(ACCESSED, nothing),
    ) else {
        panic!("a new window has no addresses");
    };
    let mut small = Mapped {
        batch: small,
        notes,
    };
    let mut large = Mapped {
        batch: large,
        notes: notes + PAGE_SIZE,
    };
    loop {
        let (slot, is_large) = (vcpu.rounds / 2 % ENTRIES, vcpu.rounds % 2 == 1);
        if slot == 0 && vcpu.rounds >= 2 * ENTRIES {
            let next = if is_large {
                addresses.next_large_pages(ACCESSED, nothing)
            } else {
                addresses.next_pages(ACCESSED, nothing)
            };
            let Some(batch) = next else {
                console::print(format_args!(
                    "drill {:?}: no fresh addresses are left",
                    vcpu.drill
                ));
                rt::exit(0);
            };
            let mapped = if is_large { &mut large } else { &mut small };
            mapped.batch = batch;
        }
        let chance = chance();
        let earlier = (chance >> 32) % (slot + 1);
        if is_large {
            let place = large_place(chance % regions);
            large.map(slot, place - place % REGION_SIZE, place, LARGE);
            large.check(&vcpu, slot, REGION_SIZE);
            large.check(&vcpu, earlier, REGION_SIZE);
        } else {
            let place = small_place(chance % FRAMES);
            small.map(slot, place, place, 0);
            small.check(&vcpu, slot, PAGE_SIZE);
            small.check(&vcpu, earlier, PAGE_SIZE);
        }
        vcpu.round_done();
    }
}

/// A number that a guest which is rewound does not get again.
fn chance() -> u64 {
    // SAFETY: every x86-64 has the instruction, and nothing forbids it here.
    let ticks = unsafe { _rdtsc() };
    let mixed = ticks.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 29
}
