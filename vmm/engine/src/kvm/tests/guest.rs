//! A guest, its machine, and what comes out of it.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ::guest::abi::{IMAGE_GPA, PAGE_TABLES_GPA};

use super::memory::{Faults, TestRam};
use super::{MEMORY, PORT_EXIT, SOON};
use crate::kvm::registers::tests::entry;
use crate::kvm::*;

/// Where each vCPU begins: at `rip`.
pub(super) fn from(rip: u64) -> impl Fn(usize) -> EntryState {
    move |vcpu| entry(rip, vcpu as u64)
}

/// Writes down what comes to ports; [`PORT_EXIT`] stops the vCPU.
#[derive(Default)]
pub(super) struct Ports {
    written: Mutex<Vec<(usize, u16, u32)>>,
}

impl Ports {
    pub(super) fn written(&self) -> Vec<(usize, u16, u32)> {
        self.written.lock().unwrap().clone()
    }
}

impl PortHandler for Ports {
    fn out(&self, vcpu: usize, port: u16, value: u32) -> PortAction {
        self.written.lock().unwrap().push((vcpu, port, value));
        if port == PORT_EXIT {
            PortAction::Stop(StopReason::Exit { status: value })
        } else {
            PortAction::Continue
        }
    }
}

/// A guest and its machine. Fields are dropped in this order: the machine before its memory.
pub(super) struct Guest {
    pub(super) machine: Machine,
    pub(super) outcomes: Receiver<(usize, Outcome)>,
    pub(super) ports: Arc<Ports>,
    pub(super) ram: Arc<TestRam>,
}

impl Guest {
    /// A guest with `code` at [`IMAGE_GPA`], not started.
    pub(super) fn new(kvm: &Kvm, vcpus: usize, code: &[&[u8]]) -> Self {
        Self::with(kvm, vcpus, code, Faults::Resolve, Arc::default())
    }

    pub(super) fn with(
        kvm: &Kvm,
        vcpus: usize,
        code: &[&[u8]],
        faults: Faults,
        ports: Arc<Ports>,
    ) -> Self {
        let ram = TestRam::new(MEMORY, faults);
        boot::write_page_tables(&*ram, PAGE_TABLES_GPA, MEMORY).unwrap();
        ram.write(IMAGE_GPA, &code.concat()).unwrap();
        let (machine, outcomes) = machine(kvm, &ram, vcpus, ports.clone());
        Self {
            machine,
            outcomes,
            ports,
            ram,
        }
    }

    pub(super) fn start(&self) {
        self.machine.start(from(IMAGE_GPA)).unwrap();
    }

    pub(super) fn outcome(&self) -> (usize, Outcome) {
        self.outcomes.recv_timeout(SOON).expect("no outcome")
    }

    /// Waits until the guest has exited, and returns its status.
    pub(super) fn exit_status(&self) -> u32 {
        match self.outcome() {
            (_, Outcome::Stopped(StopReason::Exit { status })) => status,
            (vcpu, other) => panic!("vcpu {vcpu}: {other}"),
        }
    }

    /// Waits until the guest has crashed.
    pub(super) fn crash(&self) -> (CrashReason, CrashReport) {
        match self.outcome() {
            (_, Outcome::Crashed { reason, report }) => (reason, *report),
            (vcpu, other) => panic!("vcpu {vcpu}: {other}"),
        }
    }

    /// Waits until the VMM has given up.
    pub(super) fn failure(&self) -> VcpuRunError {
        match self.outcome() {
            (_, Outcome::Failed { error, .. }) => error,
            (vcpu, other) => panic!("vcpu {vcpu}: {other}"),
        }
    }
}

pub(super) fn machine(
    kvm: &Kvm,
    ram: &Arc<TestRam>,
    vcpus: usize,
    handler: Arc<dyn PortHandler>,
) -> (Machine, Receiver<(usize, Outcome)>) {
    let (sender, outcomes) = channel();
    let sender = Mutex::new(sender);
    let on_stop: OnStop = Box::new(move |vcpu, outcome| {
        let _ = sender.lock().unwrap().send((vcpu, outcome));
    });
    let window = Arc::clone(ram) as _;
    let ram: Arc<TestRam> = Arc::clone(ram);
    let machine = Machine::new(kvm, window, ram, vcpus, handler, on_stop).unwrap();
    (machine, outcomes)
}

pub(crate) fn wait_until(what: &str, ready: impl Fn() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < SOON, "no {what}");
        thread::sleep(Duration::from_millis(1));
    }
}
