//! A guest to measure with: every vCPU writes one word a page over its share of memory for ever,
//! as fast as it can, and keeps what it saw of the time. The shared file `sweep` has the order of
//! the writes and the notes.
//!
//! It has nothing to check and no devices to drive, so that a pause or a fault is all that can slow it down.

#![no_std]
#![no_main]

#[allow(dead_code)] // One half of the contract is the VMM's, and much of the rest the payload's.
#[path = "../src/abi.rs"]
mod abi;
#[allow(dead_code)] // The VMM uses more of it.
#[path = "../src/sweep.rs"]
mod sweep;

#[allow(dead_code)] // It panics and says nothing else.
mod console;
mod port;
mod rt;

use core::arch::x86_64::_rdtsc;

use abi::{BootInfo, PAGE_SIZE};
use sweep::{LAPS, Lap, Route, SweepOrders, SweepPage};

/// What vCPU `index` does; called by `rt` on every vCPU.
fn run(boot: &BootInfo, index: u64) -> ! {
    let page = boot.layout.vcpu_page(index) as *mut SweepPage;
    // SAFETY: the VMM laid this page out for this vCPU alone and has written its orders.
    let orders = unsafe { (&raw const (*page).orders).read() };
    let Some(mut route) = Route::new(orders.choice) else {
        panic!("no order of writes is {:?}", orders.choice);
    };
    if orders.lap == 0 {
        panic!("a lap must have writes");
    }

    for page in 0..orders.resident {
        write(&orders, page, 1);
    }
    // SAFETY: as above. Volatile, here and below: the VMM reads it meanwhile.
    unsafe { (&raw mut (*page).resident).write_volatile(1) };

    let mut lap = Lap {
        start: now(),
        ..Lap::default()
    };
    let mut last = lap.start;
    for laps in 0.. {
        for _ in 0..orders.lap {
            lap.ops += 1;
            write(&orders, route.next_page(), lap.ops);
            // SAFETY: as above.
            unsafe { (&raw mut (*page).ops).write_volatile(lap.ops) };
            let at = now();
            lap.longest_gap = lap.longest_gap.max(at.wrapping_sub(last));
            last = at;
        }
        lap.end = last;
        // SAFETY: as above. The lap is written before the number that says so: x86 stores in order.
        unsafe {
            (&raw mut (*page).ring[(laps % LAPS) as usize]).write_volatile(lap);
            (&raw mut (*page).laps).write_volatile(laps + 1);
        }
        lap.start = lap.end;
        lap.longest_gap = 0;
    }
    panic!("the laps are used up");
}

/// Writes a word in page `page` of this vCPU's share: another one from page to page, so that not all
/// are in the same cache set.
#[inline]
fn write(orders: &SweepOrders, page: u64, word: u64) {
    let gpa = orders.first + page * PAGE_SIZE + page % 64 * 64;
    // SAFETY: the VMM gave this vCPU these pages, and no other touches them.
    unsafe { (gpa as *mut u64).write_volatile(word) };
}

#[inline]
fn now() -> u64 {
    // SAFETY: every x86-64 has the instruction, and nothing forbids it here.
    unsafe { _rdtsc() }
}
