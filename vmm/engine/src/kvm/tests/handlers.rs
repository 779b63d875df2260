//! Port handlers that are stuck or panic.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};

use ::guest::abi::IMAGE_GPA;

use super::code::{COUNT, SPIN};
use super::guest::{Guest, from, machine, wait_until};
use super::{DATA, SOON, need_kvm};
use crate::kvm::*;
use crate::vcpus::Capture;

/// A handler that does something else than [`Ports`].
struct Handler<F>(F);

impl<F: Fn() + Send + Sync> PortHandler for Handler<F> {
    fn out(&self, _: usize, _: u16, _: u32) -> PortAction {
        self.0();
        PortAction::Continue
    }
}

/// A handler that says when it is called, and then waits until it is told to go on or nobody is left to tell
/// it.
fn stuck_handler() -> (Arc<dyn PortHandler>, Receiver<()>, Sender<()>) {
    let (enter, entered) = channel();
    let (release, wait) = channel();
    let wait = Mutex::new(wait);
    let handler = Handler(move || {
        let _ = enter.send(());
        let _ = wait.lock().unwrap().recv();
    });
    (Arc::new(handler), entered, release)
}

#[test]
fn a_vcpu_that_does_not_end_is_named_and_given_up() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[&[0xef], SPIN]);
    let (handler, entered, release) = stuck_handler();
    let (machine, outcomes) = machine(kvm, &guest.ram, 2, handler);
    machine.start(from(IMAGE_GPA)).unwrap();
    entered.recv_timeout(SOON).unwrap();
    machine.stop();
    for _ in 0..2 {
        let error = machine.wait_until_stopped().unwrap_err();
        assert!(matches!(error, KvmError::Stuck { .. }), "{error}");
    }
    // It keeps what it uses, and ends as soon as it can.
    drop(machine);
    drop(release);
    wait_until("the end of both", || {
        matches!(outcomes.try_recv(), Err(TryRecvError::Disconnected))
    });
}

#[test]
fn a_stuck_handler_is_named_and_the_machine_runs_on() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    let (handler, entered, release) = stuck_handler();
    // Behind the counting code: out dx, eax; jmp to it.
    let code: &[u8] = &[0xef, 0xe9, 0xfa, 0xfe, 0xff, 0xff];
    guest.ram.write(IMAGE_GPA + 0x100, code).unwrap();
    let (machine, _outcomes) = machine(kvm, &guest.ram, 1, handler);
    machine.start(from(IMAGE_GPA + 0x100)).unwrap();
    entered.recv_timeout(SOON).unwrap();
    assert!(matches!(
        machine.pause(Capture::Registers),
        Err(KvmError::Stuck { vcpu: 0 })
    ));
    release.send(()).unwrap();
    wait_until("counting", || guest.ram.word(DATA) > 1000);
    drop(release);
    let states = machine.pause(Capture::Registers).unwrap().states().unwrap();
    assert!(states[0].mm7() >= 1000);
}

#[test]
fn a_handler_that_panics_ends_its_vcpu() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[&[0xef], SPIN]);
    let handler = Handler(|| panic!("on purpose"));
    let (machine, outcomes) = machine(kvm, &guest.ram, 1, Arc::new(handler));
    machine.start(from(IMAGE_GPA)).unwrap();
    let (vcpu, outcome) = outcomes.recv_timeout(SOON).unwrap();
    assert_eq!(vcpu, 0);
    assert!(matches!(
        outcome,
        Outcome::Failed {
            error: VcpuRunError::Panicked,
            ..
        }
    ));
    assert!(matches!(
        machine.pause(Capture::Registers),
        Err(KvmError::Stopped { vcpu: 0 })
    ));
}
