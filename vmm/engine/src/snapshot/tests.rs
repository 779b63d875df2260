//! In which order the parts of a VM are stopped, captured and set back, as fake vCPUs and devices see it.

use std::sync::{Arc, Mutex};

use super::*;
use crate::causes::{Cause, chain};
use crate::host::Ram;
use crate::memory::{Frames, Memory};
use crate::mm::{Exclusive, PAGE_SIZE};
use crate::saved::State;
use crate::vcpus::{Capture, Paused, VcpusError};

/// What the parts of a VM were told, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    /// What was noted since this was asked last.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// What a fake device does not do as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fails {
    Nothing,
    /// It is in the middle of a request whenever it is stopped.
    Boundary,
    Restore,
}

/// A device that notes what it is told, and the first word of guest memory when it is.
pub(crate) struct FakeDevice {
    name: &'static str,
    log: Log,
    ram: Ram,
    fails: Fails,
}

/// The first word of memory when a fake device was captured.
#[derive(Debug, PartialEq)]
struct Captured(u64);

impl State for Captured {
    fn version(&self) -> u32 {
        1
    }

    fn to_bytes(&self) -> Vec<u8> {
        self.0.to_le_bytes().to_vec()
    }
}

impl FakeDevice {
    pub(crate) fn new(name: &'static str, log: &Log, ram: &Ram, fails: Fails) -> Self {
        let (log, ram) = (log.clone(), ram.clone());
        Self {
            name,
            log,
            ram,
            fails,
        }
    }

    fn note(&self, what: &str) {
        self.log.note(format!("{} {what}", self.name));
    }
}

impl Quiesce for FakeDevice {
    fn begin_stop(&self) {
        self.note("begin_stop");
    }

    fn finish_stop(&self, _deadline: Instant) -> bool {
        self.note("finish_stop");
        self.fails != Fails::Boundary
    }

    fn resume(&self) {
        self.note("resume");
    }

    fn capture(&self) -> Saved {
        self.note("capture");
        Saved::new(Captured(word(&self.ram)))
    }

    fn release(&self) -> Result<(), Cause> {
        self.note(&format!("release at {}", word(&self.ram)));
        match self.fails {
            Fails::Boundary => Err("a request is on its way".into()),
            Fails::Nothing | Fails::Restore => Ok(()),
        }
    }

    fn restore(&self, state: &Saved) -> Result<(), Cause> {
        let Captured(then) = state.get().ok_or("not captured here")?;
        self.note(&format!("restore {then} at {}", word(&self.ram)));
        match self.fails {
            Fails::Restore => Err("it does not want to".into()),
            Fails::Nothing | Fails::Boundary => Ok(()),
        }
    }
}

fn word(ram: &Ram) -> u64 {
    let mut word = [0; 8];
    ram.read(0, &mut word).unwrap();
    u64::from_le_bytes(word)
}

/// vCPUs that note what they are told, one of them.
struct FakeVcpus {
    log: Log,
    has_states: bool,
}

struct FakePaused<'a> {
    log: &'a Log,
    has_states: bool,
    /// What dropping notes.
    end: &'static str,
}

impl Vcpus for FakeVcpus {
    fn pause(&self, _capture: Capture) -> Result<Box<dyn Paused + '_>, VcpusError> {
        self.log.note("vcpus pause");
        Ok(Box::new(FakePaused {
            log: &self.log,
            has_states: self.has_states,
            end: "vcpus run on",
        }))
    }
}

impl Paused for FakePaused<'_> {
    fn kicked(&self) -> Instant {
        Instant::now()
    }

    fn states(&mut self) -> Result<Vec<Saved>, VcpusError> {
        self.log.note("vcpus states");
        if self.has_states {
            Ok(vec![Saved::new(Captured(7))])
        } else {
            Err(VcpusError::Failed("no registers".into()))
        }
    }

    fn has_protected(&mut self, _gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError> {
        self.log.note("vcpus has_protected");
        Ok(())
    }

    fn before_restore(&mut self) -> Result<(), VcpusError> {
        self.log.note("vcpus before_restore");
        Ok(())
    }

    fn restore(&mut self, states: &[Saved]) -> Result<(), VcpusError> {
        assert_eq!(states[0].get(), Some(&Captured(7)));
        self.log.note("vcpus restore");
        Ok(())
    }

    fn stop(mut self: Box<Self>) {
        self.end = "vcpus stop";
    }

    fn resume(mut self: Box<Self>, then: Box<dyn FnOnce() + '_>) -> Instant {
        self.end = "vcpus resumed";
        self.log.note("vcpus resume");
        then();
        Instant::now()
    }
}

impl Drop for FakePaused<'_> {
    fn drop(&mut self) {
        self.log.note(self.end);
    }
}

/// A VM of fake vCPUs and two fake devices, with memory.
struct FakeVm {
    log: Log,
    vcpus: FakeVcpus,
    devices: [FakeDevice; 2],
    memory: Memory,
}

impl FakeVm {
    /// One whose second device fails.
    fn new(fails: Fails) -> Self {
        let frames = Frames::new(8 << 20).unwrap();
        let memory = Memory::new(&frames, 4 * PAGE_SIZE).unwrap();
        let log = Log::default();
        let device = |name, fails| FakeDevice::new(name, &log, memory.ram(), fails);
        Self {
            vcpus: FakeVcpus {
                log: log.clone(),
                has_states: true,
            },
            devices: [device("a", Fails::Nothing), device("b", fails)],
            log,
            memory,
        }
    }

    fn parts(&self) -> Parts<'_, Exclusive> {
        Parts {
            vcpus: &self.vcpus,
            devices: self.devices.iter().map(|device| device as _).collect(),
            space: self.memory.space(),
            ahead: None,
            aside: None,
            precedence: Some(self.memory.ram().precedence()),
        }
    }

    fn write(&self, word: u64) {
        self.memory.ram().write(0, &word.to_le_bytes()).unwrap();
    }

    fn take(&self) -> Snapshot {
        let note = || self.log.note("memory");
        let taken = self
            .parts()
            .take_with(Preparation::Early, &|| true, note)
            .unwrap();
        taken.0
    }

    fn restore(&self, snapshot: &Snapshot) -> Result<Timing, RewindError> {
        self.parts().restore(snapshot, || {
            self.log.note("memory");
            Ok(())
        })
    }
}

const STOPPED: [&str; 5] = [
    "vcpus pause",
    "a begin_stop",
    "b begin_stop",
    "a finish_stop",
    "b finish_stop",
];

#[test]
fn the_steps_follow_each_other_and_are_the_pause() {
    let began = Instant::now();
    let after = |micros| began + Duration::from_micros(micros);
    let timing = Timing {
        began,
        kicked: after(1),
        parked: after(3),
        quiesced: after(6),
        memory: after(10),
        registers: after(15),
        running: after(21),
    };
    let of = timing.steps();
    let pause = [of.park, of.devices, of.memory, of.registers, of.resume];
    assert_eq!(pause.map(|step| step.as_micros()), [2, 3, 4, 5, 6]);
    assert_eq!(of.prepare, Duration::from_micros(1));
    assert_eq!(timing.pause(), pause.iter().sum::<Duration>());
    // vCPUs that run before they are let.
    let early = Timing {
        running: after(4),
        ..timing
    };
    assert_eq!(early.steps().resume, Duration::ZERO);

    let (_, taken) = FakeVm::new(Fails::Nothing).parts().take().unwrap();
    let Timing {
        parked, quiesced, ..
    } = taken;
    assert!(parked <= quiesced && quiesced <= taken.memory && taken.memory <= taken.registers);
}

#[test]
fn a_snapshot_is_taken_when_vcpus_and_then_devices_stand_still() {
    let vm = FakeVm::new(Fails::Nothing);
    vm.write(1);
    let snapshot = vm.take();
    let then = [
        "a capture",
        "b capture",
        "memory",
        "vcpus has_protected",
        "vcpus states",
        "vcpus resume",
        "a resume",
        "b resume",
        "vcpus resumed",
    ];
    assert_eq!(vm.log.take(), [&STOPPED[..], &then].concat());
    let captured = snapshot.devices().iter().map(Saved::get);
    assert_eq!(Vec::from_iter(captured), [Some(&Captured(1)); 2]);
    assert_eq!(snapshot.vcpus()[0].get(), Some(&Captured(7)));
}

#[test]
fn a_restore_releases_devices_before_memory_and_restores_them_after() {
    let vm = FakeVm::new(Fails::Nothing);
    vm.write(1);
    let snapshot = vm.take();
    vm.write(2);
    vm.log.take();
    vm.restore(&snapshot).unwrap();
    let then = [
        "a release at 2",
        "b release at 2",
        "vcpus before_restore",
        "memory",
        "a restore 1 at 1",
        "b restore 1 at 1",
        "vcpus restore",
        "vcpus has_protected",
        "vcpus resume",
        "a resume",
        "b resume",
        "vcpus resumed",
    ];
    assert_eq!(vm.log.take(), [&STOPPED[..], &then].concat());
}

/// From before anything is done until all runs, or it is called off.
#[test]
fn a_snapshot_and_a_restore_come_before_other_machines() {
    let vm = FakeVm::new(Fails::Nothing);
    let precedence = vm.memory.ram().precedence();
    let is_taken = || precedence.is_taken();
    let called_off = vm.parts().take_with(
        Preparation::Early,
        &|| {
            assert!(is_taken());
            false
        },
        || (),
    );
    assert!(matches!(called_off, Err(TakeError::CalledOff)));
    assert!(!is_taken());
    let after_memory = || assert!(is_taken());
    let taken = vm
        .parts()
        .take_with(Preparation::Early, &is_taken, after_memory);
    let (snapshot, _) = taken.unwrap();
    assert!(!is_taken());
    let last_changes = || {
        assert!(is_taken());
        Ok(())
    };
    vm.parts().restore(&snapshot, last_changes).unwrap();
    assert!(!is_taken());
}

/// A snapshot records it as it is; a restore cannot give up what it is in the middle of.
#[test]
fn a_device_that_reaches_no_boundary_is_captured_and_not_restored() {
    let vm = FakeVm::new(Fails::Boundary);
    vm.write(1);
    let snapshot = vm.take();
    assert_eq!(snapshot.devices().len(), 2);
    assert!(vm.log.take().contains(&"vcpus resume".to_owned()));

    vm.write(2);
    let error = vm.restore(&snapshot).unwrap_err();
    assert!(matches!(error, RewindError::Devices(_)), "{error}");
    // The vCPUs are stopped before the devices go on.
    let then = [
        "a release at 2",
        "b release at 2",
        "vcpus stop",
        "a resume",
        "b resume",
    ];
    assert_eq!(vm.log.take(), [&STOPPED[..], &then].concat());
    assert_eq!(word(vm.memory.ram()), 2, "memory was not restored");
}

#[test]
fn a_device_that_is_not_restored_stops_the_vm() {
    let vm = FakeVm::new(Fails::Restore);
    vm.write(1);
    let snapshot = vm.take();
    vm.write(2);
    vm.log.take();
    let error = vm.restore(&snapshot).unwrap_err();
    assert!(matches!(error, RewindError::Devices(_)), "{error}");
    let log = vm.log.take();
    assert_eq!(log[log.len() - 3..], ["vcpus stop", "a resume", "b resume"]);
    assert!(!log.contains(&"vcpus restore".to_owned()));
}

/// As a guest that would run on as another does.
#[test]
fn memory_that_cannot_be_made_ready_stops_the_vm() {
    let vm = FakeVm::new(Fails::Nothing);
    vm.write(1);
    let snapshot = vm.take();
    vm.write(2);
    vm.log.take();
    let refused = || {
        assert_eq!(word(vm.memory.ram()), 1, "memory is back");
        Err("no room".into())
    };
    let error = vm.parts().restore(&snapshot, refused).unwrap_err();
    assert!(matches!(error, RewindError::AfterMemory(_)), "{error}");
    assert!(chain(&error).ends_with(": no room"), "{}", chain(&error));
    let log = vm.log.take();
    assert_eq!(log[log.len() - 3..], ["vcpus stop", "a resume", "b resume"]);
    assert!(!log.iter().any(|said| said.contains(" restore")), "{log:?}");
}

#[test]
fn a_snapshot_with_another_number_of_devices_is_refused_and_nothing_is_told() {
    let vm = FakeVm::new(Fails::Nothing);
    let taken = vm.take();
    let (memory, vcpus) = (Arc::clone(taken.memory()), taken.vcpus().to_vec());
    let snapshot = Snapshot::new(memory, vcpus, taken.devices()[..1].to_vec());
    vm.log.take();
    let error = vm.restore(&snapshot).unwrap_err();
    let counts = matches!(
        error,
        RewindError::DeviceCount {
            snapshot: 1,
            guest: 2
        }
    );
    assert!(counts, "{error}");
    assert_eq!(vm.log.take(), [""; 0]);
}

#[test]
fn a_snapshot_that_is_called_off_stops_no_device() {
    let vm = FakeVm::new(Fails::Nothing);
    let error = vm
        .parts()
        .take_with(Preparation::None, &|| false, || panic!("not forked"))
        .unwrap_err();
    assert!(matches!(error, TakeError::CalledOff), "{error}");
    assert_eq!(vm.log.take(), ["vcpus pause", "vcpus run on"]);
}

#[test]
fn registers_that_cannot_be_captured_let_the_vm_run_on() {
    let mut vm = FakeVm::new(Fails::Nothing);
    vm.vcpus.has_states = false;
    let error = vm.parts().take().unwrap_err();
    assert!(matches!(error, TakeError::Vcpus(_)), "{error}");
    let log = vm.log.take();
    let end = ["vcpus states", "a resume", "b resume", "vcpus run on"];
    assert_eq!(log[log.len() - 4..], end);
}
