//! A guest that does one thing over and over which is hard on a VMM, and checks itself; `drill` lists them.

#![no_std]
#![no_main]

#[allow(dead_code)] // One half of the contract is the VMM's.
#[path = "../src/abi.rs"]
mod abi;
#[allow(dead_code)] // The tests use more of it.
#[path = "../src/drill.rs"]
mod drill;
#[allow(dead_code)] // The payload uses more of it.
#[path = "../src/formula.rs"]
mod formula;

#[allow(dead_code)] // The payload uses more of it.
mod area;
mod console;
mod cpu;
mod drills;
mod effect;
mod port;
mod rt;

use abi::BootInfo;
use drill::Drill;

/// What vCPU `index` does; called by `rt` on every vCPU.
fn run(boot: &BootInfo, index: u64) -> ! {
    match Drill::from_raw(boot.seed) {
        None => panic!("there is no drill {}", boot.seed),
        Some(drill) => drills::run(drill, boot, index),
    }
}
