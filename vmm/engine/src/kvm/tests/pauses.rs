//! Kicks and pauses.

use std::thread;
use std::time::Duration;
use std::time::Instant;

use ::guest::abi::{PAGE_TABLES_GPA, STACKS_GPA};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::code::{COUNT, SPIN};
use super::guest::{Guest, wait_until};
use super::{DATA, need_kvm};
use crate::kvm::*;
use crate::vcpus::Capture;

/// A signal that is queued would be refused here, as it would be once anybody of the same user has filled the
/// queue.
#[test]
fn kicks_arrive_where_no_signal_can_be_queued() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[SPIN]);
    guest.start();
    let before = getrlimit(Resource::Sigpending);
    let none = Rlimit {
        current: Some(0),
        ..before
    };
    setrlimit(Resource::Sigpending, none).unwrap();
    let pauses = (0..20).map(|_| guest.machine.pause(Capture::Nothing).map(drop));
    let pauses: Result<(), _> = pauses.collect();
    setrlimit(Resource::Sigpending, before).unwrap();
    pauses.unwrap();
}

#[test]
fn a_spinning_guest_pauses_200_times() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[SPIN]);
    guest.start();
    let mut worst = Duration::ZERO;
    for round in 0..200 {
        let capture = if round % 2 == 0 {
            Capture::Registers
        } else {
            Capture::Nothing
        };
        let paused = guest.machine.pause(capture).unwrap();
        worst = worst.max(paused.parked() - paused.kicked());
        if round % 4 == 0 {
            assert_eq!(paused.states().unwrap().len(), 2);
        }
        paused.resume();
    }
    eprintln!("slowest kick to parked: {worst:?}");
    guest.machine.stop();
    wait_until("end", || {
        matches!(
            guest.machine.pause(Capture::Nothing),
            Err(KvmError::Stopped { .. })
        )
    });
    assert!(
        guest.outcomes.try_recv().is_err(),
        "a vcpu that is told to stop has no outcome"
    );
}

#[test]
fn signals_that_mean_nothing_are_passed_over() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    guest.start();
    for _ in 0..500 {
        guest.machine.kick_for_nothing();
        thread::yield_now();
    }
    let before = guest.ram.word(DATA);
    wait_until("counting", || guest.ram.word(DATA) > before + 1000);
    let states = guest.machine.pause(Capture::Registers).unwrap().states();
    assert!(states.unwrap()[0].mm7() > 0);
}

/// What pausing costs here. Not a check: the numbers are for whoever reads them.
#[test]
fn pause_times() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    guest.start();
    let mut times: [Vec<Duration>; 4] = Default::default();
    for _ in 0..200 {
        let paused = guest.machine.pause(Capture::Registers).unwrap();
        let (kicked, parked) = (paused.kicked(), paused.parked());
        paused.states().unwrap();
        let captured = Instant::now();
        let running = paused.resume();
        times[0].push(parked - kicked);
        times[1].push(captured - parked);
        times[2].push(running - captured);
        times[3].push(running - kicked);
        thread::sleep(Duration::from_micros(300));
    }
    for (name, times) in ["parked", "captured", "resumed", "whole"]
        .iter()
        .zip(&mut times)
    {
        times.sort();
        eprintln!("{name}: median {:?}, worst {:?}", times[100], times[199]);
    }
    // The tables and the stack are the guest's, and nothing here has touched them.
    assert_ne!(guest.ram.word(PAGE_TABLES_GPA), 0);
    assert_eq!(guest.ram.word(STACKS_GPA), 0);
}
