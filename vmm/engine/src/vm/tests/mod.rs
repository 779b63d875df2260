//! Whole VMs on real KVM.

mod clones;
mod large;
mod lazy;

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, Weak};
use std::time::Instant;

use ::guest::abi::{IMAGE_GPA, PAGE_TABLES_GPA};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::causes::{Cause, chain};
use crate::kvm::registers::tests::entry;
use crate::kvm::tests::code::{EXIT_42, SPIN};
use crate::kvm::tests::guest::wait_until;
use crate::kvm::tests::{DATA, PORT_EVENT, PORT_EXIT, SOON, need_kvm};
use crate::kvm::{PortAction, StopReason, VcpuState, write_page_tables};
use crate::memory::Frames;
use crate::mm::{AddressSpace, PAGE_SIZE, REGION_PAGES};
use crate::saved::Saved;
use crate::snapshot::tests::{Fails, FakeDevice, Log};
use crate::vcpus::{Capture, Vcpus, VcpusError};

const MEMORY: u64 = 16 << 20;
/// `l: inc qword ptr [rsi]; inc rcx; jmp l`, with RSI set before: see [`memory`].
const COUNT: &[u8] = &[0x48, 0xff, 0x06, 0x48, 0xff, 0xc1, 0xeb, 0xf8];
/// `mov rsi, 0x400000`
const RSI_DATA: &[u8] = &[0x48, 0xc7, 0xc6, 0x00, 0x00, 0x40, 0x00];

/// Memory with page tables and `code` in it.
fn memory(code: &[&[u8]]) -> Memory {
    let frames = Frames::new(4 * MEMORY).unwrap();
    let memory = Memory::new(&frames, MEMORY).unwrap();
    write_page_tables(memory.ram(), PAGE_TABLES_GPA, MEMORY).unwrap();
    memory.ram().write(IMAGE_GPA, &code.concat()).unwrap();
    memory
}

/// A VM of one vCPU that counts in memory and in RCX, and has counted a while.
fn counting(kvm: &Kvm, device: impl FnOnce(&Ram) -> Option<FakeDevice>) -> Vm {
    let memory = memory(&[RSI_DATA, COUNT]);
    let device = device(memory.ram());
    let mut builder = Vm::builder(memory);
    if let Some(device) = device {
        builder = builder.device(Arc::new(device));
    }
    let vm = builder.build(kvm, 1).unwrap();
    start(&vm);
    wait_until("counting", || counted(vm.ram()) > 1000);
    vm
}

fn start(vm: &Vm) {
    vm.start(|vcpu| entry(IMAGE_GPA, vcpu as u64)).unwrap();
}

fn counted(ram: &Ram) -> u64 {
    let mut word = [0; 8];
    ram.read(DATA, &mut word).unwrap();
    u64::from_le_bytes(word)
}

/// Memory and registers of `snapshot` are of the same instant. Returns how far the guest had counted.
fn agree(vm: &Vm, snapshot: &Snapshot) -> u64 {
    let mut word = [0; 8];
    let frames = vm.memory().frames();
    frames.read(snapshot.memory(), DATA, &mut word).unwrap();
    let in_memory = u64::from_le_bytes(word);
    let state = VcpuState::of_saved(&snapshot.vcpus()[0]).unwrap();
    let in_rcx = state.regs().rcx;
    assert!(
        in_memory == in_rcx || in_memory == in_rcx + 1,
        "{in_memory} in memory, {in_rcx} in rcx"
    );
    in_memory
}

/// The same snapshot with what is left of its vCPUs when they are stored as `stored` says.
fn stored(snapshot: &Snapshot, stored: impl Fn(&Saved) -> Saved) -> Snapshot {
    Snapshot::new(
        Arc::clone(snapshot.memory()),
        snapshot.vcpus().iter().map(stored).collect(),
        snapshot.devices().to_vec(),
    )
}

fn wait_for_stop(vm: &Vm) {
    wait_until("the end of the vcpu", || {
        matches!(
            vm.snapshot(),
            Err(TakeError::Vcpus(VcpusError::Stopped { vcpu: 0 }))
        )
    });
}

/// Writes down what comes to ports; [`PORT_EXIT`] stops the vCPU.
struct Ports(Mutex<Vec<u16>>);

impl PortHandler for Ports {
    fn out(&self, _vcpu: usize, port: u16, value: u32) -> PortAction {
        self.0.lock().unwrap().push(port);
        match port {
            PORT_EXIT => PortAction::Stop(StopReason::Exit { status: value }),
            _ => PortAction::Continue,
        }
    }
}

#[test]
fn a_vm_without_vcpus_is_refused() {
    let kvm = need_kvm!();
    let error = Vm::builder(memory(&[SPIN])).build(kvm, 0).unwrap_err();
    assert!(
        matches!(error, BuildError::Kvm(KvmError::VcpuCount { vcpus: 0 })),
        "{error}"
    );
}

#[test]
fn a_doorbell_is_heard_and_no_handler_sees_it() {
    let kvm = need_kvm!();
    // mov dx, 0x520; mov ecx, 5; l: out dx, eax; dec ecx; jnz l
    let ring: &[u8] = &[
        0x66, 0xba, 0x20, 0x05, 0xb9, 0x05, 0x00, 0x00, 0x00, 0xef, 0xff, 0xc9, 0x75, 0xfb,
    ];
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let ports = Arc::new(Ports(Mutex::default()));
    let (sender, outcomes): (_, Receiver<Outcome>) = channel();
    let vm = Vm::builder(memory(&[ring, EXIT_42]))
        .doorbell(PORT_EVENT, &event)
        .ports(Arc::clone(&ports) as _)
        .on_stop(move |_, outcome| sender.send(outcome).unwrap())
        .build(kvm, 1)
        .unwrap();
    start(&vm);
    let outcome = outcomes.recv_timeout(SOON).unwrap();
    assert!(
        matches!(outcome, Outcome::Stopped(StopReason::Exit { status: 42 })),
        "{outcome}"
    );
    assert_eq!(event.read().unwrap(), 5);
    assert_eq!(*ports.0.lock().unwrap(), [PORT_EXIT]);

    let error = Vm::builder(memory(&[SPIN]))
        .doorbell(PORT_EVENT, &event)
        .doorbell(PORT_EVENT, &event)
        .build(kvm, 1)
        .unwrap_err();
    let port = matches!(
        error,
        BuildError::Kvm(KvmError::Doorbell {
            port: PORT_EVENT,
            ..
        })
    );
    assert!(port, "{error}");
}

/// Notes when the last share of it goes.
struct Last<T>(T, Log, &'static str);

impl<T> Drop for Last<T> {
    fn drop(&mut self) {
        self.1.note(self.2);
    }
}

impl PortHandler for Last<()> {
    fn out(&self, _vcpu: usize, _port: u16, _value: u32) -> PortAction {
        PortAction::Continue
    }
}

/// A device that is told nothing, and looks whether memory is there when it goes.
struct Leaving {
    log: Log,
    space: Weak<AddressSpace<Exclusive>>,
}

impl Quiesce for Leaving {
    fn begin_stop(&self) {}
    fn finish_stop(&self, _deadline: Instant) -> bool {
        true
    }
    fn resume(&self) {}
    fn capture(&self) -> Saved {
        Saved::stored(0, Vec::new())
    }
    fn release(&self) -> Result<(), Cause> {
        Ok(())
    }
    fn restore(&self, _state: &Saved) -> Result<(), Cause> {
        Ok(())
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let there = self.space.upgrade().is_some();
        self.log.note(format!("device, memory there: {there}"));
    }
}

#[test]
fn vcpus_go_before_devices_and_memory_goes_last() {
    let kvm = need_kvm!();
    let log = Log::default();
    let memory = memory(&[SPIN]);
    let space = Arc::downgrade(memory.space());
    let device = Leaving {
        log: log.clone(),
        space: space.clone(),
    };
    // The threads of vCPUs have a share of it each.
    let handler = Last((), log.clone(), "vcpus");
    let vm = Vm::builder(memory)
        .device(Arc::new(device))
        .ports(Arc::new(handler))
        .build(kvm, 2)
        .unwrap();
    start(&vm);
    drop(vm);
    assert_eq!(log.take(), ["vcpus", "device, memory there: true"]);
    assert!(space.upgrade().is_none());
}

#[test]
fn a_snapshot_is_of_one_instant_and_tells_its_device() {
    let kvm = need_kvm!();
    let log = Log::default();
    let vm = counting(kvm, |ram| {
        Some(FakeDevice::new("device", &log, ram, Fails::Nothing))
    });
    for _ in 0..20 {
        let (snapshot, _) = vm.snapshot().unwrap();
        agree(&vm, &snapshot);
        let told = ["begin_stop", "finish_stop", "capture", "resume"];
        assert_eq!(log.take(), told.map(|what| format!("device {what}")));
    }
}

/// Whether they come from a capture or from bytes.
#[test]
fn restored_registers_are_those_that_were_captured() {
    let kvm = need_kvm!();
    let vm = counting(kvm, |_| None);
    let (snapshot, _) = vm.snapshot().unwrap();
    let from_bytes = |saved: &Saved| Saved::stored(saved.version(), saved.to_bytes());
    for states in [
        snapshot.vcpus().to_vec(),
        snapshot.vcpus().iter().map(from_bytes).collect(),
    ] {
        let then = agree(&vm, &snapshot);
        wait_until("counting on", || counted(vm.ram()) > then + 1000);
        let vcpus: &dyn Vcpus = vm.machine();
        let mut paused = vcpus.pause(Capture::Nothing).unwrap();
        paused.before_restore().unwrap();
        vm.memory().space().restore(snapshot.memory()).unwrap();
        paused.restore(&states).unwrap();
        let now = VcpuState::of_saved(&paused.states().unwrap()[0]).unwrap();
        let before = VcpuState::of_saved(&snapshot.vcpus()[0]).unwrap();
        assert_eq!((now.regs(), now.sregs()), (before.regs(), before.sregs()));
        assert_eq!(now.extended(), before.extended());
        assert_eq!(counted(vm.ram()), then);
        paused.resume(Box::new(|| ()));
    }
}

#[test]
fn a_snapshot_whose_vcpus_were_stored_runs_on_just_the_same() {
    let kvm = need_kvm!();
    let vm = counting(kvm, |_| None);
    let (snapshot, _) = vm.snapshot().unwrap();
    let then = agree(&vm, &snapshot);
    let stored = stored(&snapshot, |saved| {
        Saved::stored(saved.version(), saved.to_bytes())
    });
    for _ in 0..3 {
        wait_until("counting on", || counted(vm.ram()) > then + 100_000);
        let rewound = || {
            assert_eq!(counted(vm.ram()), then);
            Ok(())
        };
        vm.parts().restore(&stored, rewound).unwrap();
        wait_until("counting again", || counted(vm.ram()) > then);
        let (later, _) = vm.snapshot().unwrap();
        assert!(agree(&vm, &later) > then);
    }
}

#[test]
fn stored_vcpus_that_make_no_sense_are_refused_by_name() {
    let kvm = need_kvm!();
    type Damage = fn(u32, Vec<u8>) -> (u32, Vec<u8>);
    let damages: [Damage; 5] = [
        |version, bytes| (version + 1, bytes),
        |_, bytes| (0, bytes),
        |version, bytes| (version, bytes[..bytes.len() - 1].to_vec()),
        |version, bytes| (version, [&bytes[..], &[0]].concat()),
        |version, _| (version, Vec::new()),
    ];
    for damage in damages {
        let vm = counting(kvm, |_| None);
        let (snapshot, _) = vm.snapshot().unwrap();
        let stored = stored(&snapshot, |saved| {
            let (version, bytes) = damage(saved.version(), saved.to_bytes());
            Saved::stored(version, bytes)
        });
        let version = stored.vcpus()[0].version();
        let text = chain(&vm.restore(&stored).unwrap_err());
        let expected =
            format!("registers of vcpu 0: a stored vcpu of version {version} makes no sense here");
        assert!(text.contains(&expected), "{text}");
        // Memory is of another time than the registers by then.
        wait_for_stop(&vm);
    }
}

#[test]
fn a_device_that_is_not_restored_stops_the_vcpus() {
    let kvm = need_kvm!();
    for fails in [Fails::Boundary, Fails::Restore] {
        let log = Log::default();
        let vm = counting(kvm, |ram| Some(FakeDevice::new("device", &log, ram, fails)));
        let (snapshot, _) = vm.snapshot().unwrap();
        let error = vm.restore(&snapshot).unwrap_err();
        assert!(matches!(error, RewindError::Devices(_)), "{error}");
        wait_for_stop(&vm);
    }
}

#[test]
fn a_vm_runs_on_when_a_snapshot_has_another_number_of_devices() {
    let kvm = need_kvm!();
    let vm = counting(kvm, |_| None);
    let (taken, _) = vm.snapshot().unwrap();
    let (memory, vcpus) = (Arc::clone(taken.memory()), taken.vcpus().to_vec());
    let snapshot = Snapshot::new(memory, vcpus, vec![Saved::stored(1, Vec::new())]);
    let error = vm.restore(&snapshot).unwrap_err();
    let counts = matches!(
        error,
        RewindError::DeviceCount {
            snapshot: 1,
            guest: 0
        }
    );
    assert!(counts, "{error}");
    let now = counted(vm.ram());
    wait_until("counting on", || counted(vm.ram()) > now + 1000);
}

/// In the time that nobody wants: before the first snapshot, so that its copies need not wait for the host.
#[test]
fn memory_for_copies_is_there_before_the_first_snapshot() {
    const REGIONS: u64 = 12;
    const REGION_SIZE: u64 = REGION_PAGES * PAGE_SIZE;
    let kvm = need_kvm!();
    let committed = |copies_ahead| {
        let frames = Frames::new(8 * REGIONS * REGION_SIZE).unwrap();
        let memory = Memory::new(&frames, REGIONS * REGION_SIZE).unwrap();
        for region in 0..REGIONS {
            memory.ram().write(region * REGION_SIZE, &[1]).unwrap();
        }
        let before = frames.pool().usage().committed;
        let vm = Vm::builder(memory).copy_ahead(copies_ahead);
        let vm = vm.build(kvm, 1).unwrap();
        let wanted = before + if copies_ahead { 3 * REGION_PAGES } else { 0 };
        wait_until("memory in stock", || {
            frames.pool().usage().committed >= wanted
        });
        drop(vm);
        let after = frames.pool().usage().committed;
        assert_eq!(after, wanted);
    };
    committed(false);
    committed(true);
}
