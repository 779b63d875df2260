//! The engine's examples do what they say.

mod support;

use std::error::Error;

use support::{PATIENCE, no_kvm, within};

#[allow(dead_code)]
#[path = "../vmm/engine/examples/fork.rs"]
mod fork;
#[allow(dead_code)]
#[path = "../vmm/engine/examples/own_loop.rs"]
mod own_loop;

fn run(example: fn() -> Result<(), Box<dyn Error>>) {
    if !no_kvm() {
        within(PATIENCE, move || example().unwrap());
    }
}

#[test]
fn a_guest_is_forked_and_rewound_by_the_builder() {
    run(fork::main);
}

#[test]
fn a_loop_of_ones_own_runs_on_memory_that_is_forked() {
    run(own_loop::main);
}
