//! The faults on vCPUs and devices that write down what is asked of them.

use std::cell::{Cell, OnceCell, RefCell};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_sregs};
use palimpsest::causes::Cause;
use palimpsest::device::{Quiesce, Stopped};
use palimpsest::kvm::VcpuState;
use palimpsest::saved::Saved;
use palimpsest::vcpus::{Capture, Paused, Vcpus, VcpusError};

use super::{AtLarge, Late, Leaky, Old, Stale};

/// What was asked of [`Fake`] vCPUs, and how they went on.
#[derive(Clone, Debug, PartialEq)]
enum Call {
    Pause(Capture),
    States,
    HasProtected(Vec<u64>),
    BeforeRestore,
    Restore(usize),
    Stop,
    Resume,
    /// They were let go without a word.
    Drop,
    RunOn,
}
use Call::{
    BeforeRestore, Drop as Dropped, HasProtected, Pause, Restore, Resume, RunOn, States, Stop,
};

#[test]
fn of_pages_that_stay_writable_nobody_is_told_that_they_do_not() {
    let fake = Fake::new();
    let leaky = Leaky {
        vcpus: &fake,
        writable: 5..7,
    };
    let mut paused = leaky.pause(Capture::Registers).unwrap();
    paused.has_protected(&mut [3, 5, 6, 7].into_iter()).unwrap();
    paused.states().unwrap();
    paused.resume(Box::new(|| ()));
    let told = HasProtected(vec![3, 7]);
    assert_eq!(
        fake.calls(),
        [Pause(Capture::Registers), told, States, Resume]
    );
}

/// Two vCPUs that count operations.
struct Fake {
    calls: RefCell<Vec<Call>>,
    ops: Cell<u64>,
    /// Pauses that go well. After them a vCPU has ended.
    pauses: Cell<usize>,
    may_lose_write_access: bool,
    started: Instant,
}

impl Fake {
    fn new() -> Self {
        Self {
            calls: RefCell::new(Vec::new()),
            ops: Cell::new(7),
            pauses: Cell::new(usize::MAX),
            may_lose_write_access: true,
            started: Instant::now(),
        }
    }

    fn note(&self, call: Call) {
        self.calls.borrow_mut().push(call);
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.borrow().clone()
    }

    fn last(&self) -> Option<Call> {
        self.calls.borrow().last().cloned()
    }

    fn run_on(&self) {
        self.note(RunOn);
        self.ops.set(self.ops.get() + 5);
    }

    /// A time of its own for each number of calls.
    fn time(&self) -> Instant {
        self.started + Duration::from_secs(self.calls.borrow().len() as u64)
    }
}

impl Vcpus for Fake {
    fn pause(&self, capture: Capture) -> Result<Box<dyn Paused + '_>, VcpusError> {
        self.note(Pause(capture));
        let Some(left) = self.pauses.get().checked_sub(1) else {
            return Err(VcpusError::Stopped { vcpu: 1 });
        };
        self.pauses.set(left);
        Ok(Box::new(FakePaused {
            fake: self,
            kicked: self.time(),
            is_let_go: false,
        }))
    }

    fn may_lose_write_access(&self) -> bool {
        self.may_lose_write_access
    }
}

struct FakePaused<'a> {
    fake: &'a Fake,
    kicked: Instant,
    is_let_go: bool,
}

impl Paused for FakePaused<'_> {
    fn kicked(&self) -> Instant {
        self.kicked
    }

    fn states(&mut self) -> Result<Vec<Saved>, VcpusError> {
        self.fake.note(States);
        let state = || Saved::new(registers(self.fake.ops.get()));
        Ok(vec![state(), state()])
    }

    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError> {
        self.fake.note(HasProtected(gfns.collect()));
        Ok(())
    }

    fn before_restore(&mut self) -> Result<(), VcpusError> {
        self.fake.note(BeforeRestore);
        Ok(())
    }

    fn restore(&mut self, states: &[Saved]) -> Result<(), VcpusError> {
        self.fake.note(Restore(states.len()));
        Ok(())
    }

    fn stop(mut self: Box<Self>) {
        self.is_let_go = true;
        self.fake.note(Stop);
    }

    fn resume(mut self: Box<Self>, then: Box<dyn FnOnce() + '_>) -> Instant {
        self.is_let_go = true;
        self.fake.note(Resume);
        then();
        self.fake.time()
    }
}

impl Drop for FakePaused<'_> {
    fn drop(&mut self) {
        if !self.is_let_go {
            self.fake.note(Dropped);
        }
    }
}

/// Registers of a vCPU that has done `ops` operations, which all of them show: RIP, MM7 and XMM0.
fn registers(ops: u64) -> VcpuState {
    let regs = kvm_regs {
        rip: ops,
        ..kvm_regs::default()
    };
    let mut area = vec![0; 1024];
    // ST(7), XMM0, and that there is x87 and SSE state.
    (area[36], area[40], area[128]) = (ops as u32, ops as u32, 3);
    VcpuState::of(regs, kvm_sregs::default(), area)
}

/// RIP, MM7 and XMM0 of each.
fn seen(states: &[Saved]) -> Vec<[u64; 3]> {
    let seen = |saved| {
        let state = VcpuState::of_saved(saved).unwrap();
        [state.rip(), state.mm7(), state.extended().xmm[0]]
    };
    states.iter().map(seen).collect()
}

#[test]
fn late_registers_are_captured_after_the_vcpus_ran_on() {
    let fake = Fake::new();
    let run_on = || fake.run_on();
    let late = Late {
        vcpus: &fake,
        run_on: &run_on,
    };
    let mut paused = late.pause(Capture::Registers).unwrap();
    let kicked = paused.kicked();
    assert_eq!(fake.calls(), [Pause(Capture::Nothing)]);
    assert_eq!(seen(&paused.states().unwrap()), [[12; 3]; 2]);
    let running = paused.resume(Box::new(|| ()));
    let first = Capture::Nothing;
    let second = Capture::Registers;
    let calls = [Pause(first), Resume, RunOn, Pause(second), States, Resume];
    assert_eq!(fake.calls(), calls);
    // The pause that counts is the first one.
    assert_eq!(kicked, fake.started + Duration::from_secs(1));
    assert_eq!(running, fake.started + Duration::from_secs(2));
}

#[test]
fn stale_extended_registers_keep_the_counter() {
    let (states, _) = stale_states(Old::Extended);
    assert_eq!(seen(&states), [[12, 12, 7], [12; 3]]);
}

#[test]
fn stale_registers_are_all_old_of_one_vcpu() {
    let (states, older) = stale_states(Old::All);
    assert_eq!(seen(&states), [[7; 3], [12; 3]]);
    assert_eq!(VcpuState::of_saved(&states[0]).unwrap(), older);
}

/// What is captured of vCPUs that do five operations meanwhile, and what was before.
fn stale_states(old: Old) -> (Vec<Saved>, VcpuState) {
    let fake = Fake::new();
    let run_on = || fake.run_on();
    let stale = Stale {
        vcpus: &fake,
        run_on: &run_on,
        old,
        older: OnceCell::new(),
    };
    let mut paused = stale.pause(Capture::Nothing).unwrap();
    let first = Capture::Registers;
    let second = Capture::Nothing;
    let calls = [Pause(first), States, Resume, RunOn, Pause(second)];
    assert_eq!(fake.calls(), calls);
    // The pause that counts is the second one.
    assert_eq!(paused.kicked(), fake.started + Duration::from_secs(5));
    let older = stale.older.get().unwrap().clone();
    assert_eq!(older, registers(7));
    let states = paused.states().unwrap();
    assert_eq!(fake.last(), Some(States));
    assert_eq!(
        paused.resume(Box::new(|| ())),
        fake.started + Duration::from_secs(7)
    );
    assert_eq!(fake.last(), Some(Resume));
    (states, older)
}

/// Calls `with` for the vCPUs of each fault.
fn of_each(mut with: impl FnMut(&Fake, &dyn Vcpus)) {
    let fake = Fake::new();
    let run_on = || fake.run_on();
    let late = Late {
        vcpus: &fake,
        run_on: &run_on,
    };
    with(&fake, &late);
    let fake = Fake::new();
    let run_on = || fake.run_on();
    let stale = Stale {
        vcpus: &fake,
        run_on: &run_on,
        old: Old::All,
        older: OnceCell::new(),
    };
    with(&fake, &stale);
}

#[test]
fn stopping_resuming_and_dropping_reach_the_vcpus() {
    of_each(|fake, vcpus| {
        for call in [Stop, Resume, Dropped] {
            for has_captured in [false, true] {
                let mut paused = vcpus.pause(Capture::Registers).unwrap();
                if has_captured {
                    paused.states().unwrap();
                }
                let before = fake.calls().len();
                match call {
                    Stop => paused.stop(),
                    Resume => {
                        paused.resume(Box::new(|| ()));
                    }
                    _ => drop(paused),
                }
                assert_eq!(fake.calls()[before..], *std::slice::from_ref(&call));
            }
        }
    });
}

#[test]
fn what_is_asked_of_paused_vcpus_reaches_them() {
    of_each(|fake, vcpus| {
        let mut paused = vcpus.pause(Capture::Nothing).unwrap();
        paused.has_protected(&mut [3, 5].into_iter()).unwrap();
        assert_eq!(fake.last(), Some(HasProtected(vec![3, 5])));
        paused.before_restore().unwrap();
        assert_eq!(fake.last(), Some(BeforeRestore));
        paused.restore(&[Saved::stored(1, vec![])]).unwrap();
        assert_eq!(fake.last(), Some(Restore(1)));
    });
}

#[test]
fn vcpus_that_may_not_lose_write_access_say_so() {
    for may in [false, true] {
        let fake = Fake {
            may_lose_write_access: may,
            ..Fake::new()
        };
        let run_on = || ();
        let late = Late {
            vcpus: &fake,
            run_on: &run_on,
        };
        let stale = Stale {
            vcpus: &fake,
            run_on: &run_on,
            old: Old::All,
            older: OnceCell::new(),
        };
        assert_eq!(late.may_lose_write_access(), may);
        assert_eq!(stale.may_lose_write_access(), may);
    }
}

#[test]
fn a_vcpu_that_ends_while_late_ones_run_on_is_an_error_and_the_rest_runs() {
    let fake = Fake::new();
    fake.pauses.set(1);
    let run_on = || fake.run_on();
    let late = Late {
        vcpus: &fake,
        run_on: &run_on,
    };
    let mut paused = late.pause(Capture::Registers).unwrap();
    let ended = paused.states().unwrap_err();
    assert!(matches!(ended, VcpusError::Stopped { vcpu: 1 }), "{ended}");
    // They run: nothing is done to them, and nobody is told that it was.
    let calls = fake.calls();
    assert!(paused.has_protected(&mut [1].into_iter()).is_err());
    assert!(paused.before_restore().is_err());
    assert!(paused.restore(&[]).is_err());
    assert_eq!(
        paused.resume(Box::new(|| ())),
        fake.started + Duration::from_secs(2)
    );
    assert_eq!(fake.calls(), calls);
}

#[test]
fn vcpus_that_end_before_or_while_stale_ones_run_on_are_an_error() {
    for pauses in [0, 1] {
        let fake = Fake::new();
        fake.pauses.set(pauses);
        let run_on = || fake.run_on();
        let stale = Stale {
            vcpus: &fake,
            run_on: &run_on,
            old: Old::Extended,
            older: OnceCell::new(),
        };
        let ended = stale.pause(Capture::Registers).err().unwrap();
        assert!(matches!(ended, VcpusError::Stopped { vcpu: 1 }), "{ended}");
        assert_eq!(fake.calls().contains(&RunOn), pauses == 1);
        assert_eq!(stale.older.get().is_some(), pauses == 1);
    }
}

/// A device whose state is a number, and that writes down what is asked of it.
struct FakeDevice {
    number: AtomicU8,
    calls: Mutex<Vec<&'static str>>,
}

impl FakeDevice {
    fn note(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }

    fn take_calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Quiesce for FakeDevice {
    fn begin_stop(&self) {
        self.note("begin_stop");
    }

    fn finish_stop(&self, _deadline: Instant) -> bool {
        self.note("finish_stop");
        false
    }

    fn resume(&self) {
        self.note("resume");
    }

    fn capture(&self) -> Saved {
        self.note("capture");
        Saved::stored(1, vec![self.number.load(Ordering::Relaxed)])
    }

    fn release(&self) -> Result<(), Cause> {
        self.note("release");
        Err("it is not stopped".into())
    }

    fn restore(&self, state: &Saved) -> Result<(), Cause> {
        self.note("restore");
        self.number.store(state.to_bytes()[0], Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn a_device_at_large_is_never_stopped_and_has_the_state_from_before() {
    let [one, other] = [1, 2].map(|number| FakeDevice {
        number: AtomicU8::new(number),
        calls: Mutex::default(),
    });
    let at_large = AtLarge::of(&[&one, &other], || {
        for device in [&one, &other] {
            assert_eq!(device.take_calls(), ["capture"]);
            device.number.fetch_add(10, Ordering::Relaxed);
        }
    });
    let devices = at_large.iter().map(|device| device as &dyn Quiesce);
    let stopped = Stopped::stop(devices.collect(), Instant::now());
    assert!(stopped.all_reached());
    let states: Vec<_> = at_large.iter().map(|d| d.capture().to_bytes()).collect();
    assert_eq!(states, [[1], [2]]);
    stopped.resume();
    for device in [&one, &other] {
        assert_eq!(device.take_calls(), [""; 0]);
    }
    // What would need a device that is stopped is left to the device.
    assert!(at_large[0].release().is_err());
    at_large[1].restore(&Saved::stored(1, vec![9])).unwrap();
    assert_eq!(
        (one.take_calls(), other.take_calls()),
        (vec!["release"], vec!["restore"])
    );
    assert_eq!(other.number.load(Ordering::Relaxed), 9);
}
