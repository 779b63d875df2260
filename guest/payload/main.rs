//! The payload: fills guest memory by a formula, checks it by the same formula, and drives DMA devices
//! while it does.
//!
//! After any number of operations the content of every page is known in closed form (see `formula`), so a
//! snapshot taken at any instant can be checked bit for bit.
//!
//! Runs in ring 3 without a kernel under it; see `abi` for the state it starts in. vCPUs share no memory
//! that any of them writes but for the marks they leave each other, and there are no mutable statics.

#![no_std]
#![no_main]

#[allow(dead_code)] // One half of the contract is the VMM's.
#[path = "../src/abi.rs"]
mod abi;
#[path = "../src/draws/mod.rs"]
mod draws;
#[allow(dead_code)] // The VMM uses more of it.
#[path = "../src/formula.rs"]
mod formula;

#[allow(dead_code)] // As for the formulas.
#[path = "../src/registers.rs"]
mod registers;

mod area;
mod chance;
mod console;
mod driver;
mod hammer;
mod hold;
mod port;
mod rt;
mod vcpu;

use abi::{BootInfo, DRAW_EVERY, MAX_DEVICES, Pattern};
use chance::Chance;
use driver::Driver;
use hammer::Hammer;
use vcpu::Vcpu;

/// Operations between two draws, and two looks at the devices.
const BATCH: u64 = DRAW_EVERY;

/// What vCPU `index` does; called by `rt` on every vCPU.
fn run(boot: &BootInfo, index: u64) -> ! {
    let Some(pattern) = Pattern::from_raw(boot.pattern) else {
        panic!("there is no pattern {}", boot.pattern);
    };
    let layout = &boot.layout;
    if index == 0 {
        console::print(format_args!(
            "payload: pattern {}, {} vcpus, {} devices, {} MiB hammered",
            name(pattern),
            layout.vcpus,
            layout.devices,
            (layout.memory - layout.hammer_base) >> 20,
        ));
    }

    // SAFETY: the VMM laid this page out for this vCPU alone.
    let mut vcpu = unsafe { Vcpu::new(boot, index) };
    let mut drivers: [Option<Driver>; MAX_DEVICES as usize] = [const { None }; _];
    for (device, driver) in (0..layout.devices).zip(&mut drivers) {
        if device % layout.vcpus == index {
            // SAFETY: the VMM laid this area out for this device alone, and this vCPU alone drives it.
            *driver = Some(unsafe { Driver::new(boot, device) });
        }
    }
    // SAFETY: this vCPU's turn and log, of which nobody else writes more than the generation.
    let mut chance = unsafe { Chance::new(layout, index) };
    chance.announce();
    // The counter is set, the drivers' notes are in order, nothing is drawn, and the hammered pages are all
    // zero.
    vcpu.announce_formula();
    for driver in drivers.iter_mut().flatten() {
        driver.register_buffers(&mut vcpu);
    }

    // SAFETY: the VMM gave this vCPU these pages of the hammered memory; no other touches them.
    let hammer = unsafe { Hammer::new(boot, pattern, index) };
    loop {
        for _ in 0..BATCH {
            hammer.operate(&mut vcpu);
        }
        chance.draw();
        for driver in drivers.iter_mut().flatten() {
            driver.poll(&mut vcpu);
        }
    }
}

fn name(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Dense => "dense",
        Pattern::Uniform => "uniform",
        Pattern::Hot => "hot",
        Pattern::Sparse => "sparse",
    }
}
