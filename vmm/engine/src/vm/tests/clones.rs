//! Clones: VMs that run on from a snapshot of another.

use super::*;
use crate::host::{Dumps, Placement, Window};
use crate::memory::{MemoryError, MemoryOptions};
use crate::mm::{PAGE_SIZE, Pfn};

/// Which of a clone's vCPUs come from where.
#[derive(Clone, Copy)]
enum From {
    Builder,
    Shell,
}

fn plain_memory() -> MemoryOptions {
    MemoryOptions::default()
}

/// The memory of a clone of `snapshot`, behind `window`.
fn memory_of(
    frames: &Frames,
    snapshot: &Snapshot,
    window: Arc<Window>,
) -> Result<Memory<Exclusive>, MemoryError> {
    let options = MemoryOptions::default();
    let plain = |window| Box::new(window) as _;
    Memory::clone_of(frames, snapshot.memory(), Exclusive, options, window, plain)
}

/// A clone of `snapshot`, which was taken of `vm`, with a device if `device` gives one. It does not run yet.
fn clone(
    kvm: &Kvm,
    vm: &Vm,
    snapshot: &Snapshot,
    from: From,
    device: impl FnOnce(&Ram) -> Option<FakeDevice>,
) -> Vm {
    let frames = vm.memory().frames();
    let bytes = vm.ram().size();
    let shell = match from {
        From::Builder => None,
        From::Shell => Some(Shell::new(kvm, frames, bytes, snapshot.vcpus().len()).unwrap()),
    };
    let window = match &shell {
        Some(shell) => Arc::clone(shell.window()),
        None => Arc::new(frames.window(bytes, Placement::Anywhere).unwrap()),
    };
    let memory = memory_of(frames, snapshot, window).unwrap();
    let device = device(memory.ram());
    let mut builder = Vm::builder(memory).copy_ahead(false);
    if let Some(device) = device {
        builder = builder.device(Arc::new(device));
    }
    match shell {
        Some(shell) => builder.build_in(shell).unwrap(),
        None => builder.build(kvm, snapshot.vcpus().len()).unwrap(),
    }
}

fn nothing() -> Result<(), Cause> {
    Ok(())
}

fn counts_on(vm: &Vm) {
    let now = counted(vm.ram());
    wait_until("counting on", || counted(vm.ram()) > now + 1000);
}

#[test]
fn a_clone_runs_on_from_its_snapshot_and_neither_shows_in_the_other() {
    let kvm = need_kvm!();
    for from in [From::Builder, From::Shell] {
        let vm = counting(kvm, |_| None);
        let (snapshot, _) = vm.snapshot().unwrap();
        let then = agree(&vm, &snapshot);
        let clone = clone(kvm, &vm, &snapshot, from, |_| None);
        assert_eq!(counted(clone.ram()), then, "it has not run yet");
        // What is written last, before it runs, is its own.
        let name = |vm: &Vm| {
            let mut word = [0; 4];
            vm.ram().read(DATA + 64, &mut word).unwrap();
            word
        };
        let identity = || Ok(clone.ram().write(DATA + 64, b"mine")?);
        clone.start_from(&snapshot, identity).unwrap();
        assert_eq!((&name(&clone), name(&vm)), (b"mine", [0; 4]));
        // All three are what they are by themselves.
        counts_on(&clone);
        counts_on(&vm);
        assert_eq!(agree(&vm, &snapshot), then);
        let (of_clone, _) = clone.snapshot().unwrap();
        assert!(agree(&clone, &of_clone) > then + 1000);
        // The parent's memory is its own again when the others are gone.
        drop((clone, snapshot, of_clone));
        counts_on(&vm);
        let frames = vm.memory().frames().clone();
        drop(vm);
        assert_eq!(frames.pool().leftovers(1), []);
        assert_eq!(frames.budget().used(), 0);
    }
}

/// In one call, with vCPUs that are there and with new ones, and once more of the same snapshot.
#[test]
fn a_running_vm_is_forked_in_one_call() {
    let kvm = need_kvm!();
    let (log, parents) = (Log::default(), Log::default());
    let device = |log: &Log, ram: &Ram| FakeDevice::new("device", log, ram, Fails::Nothing);
    let vm = counting(kvm, |ram| Some(device(&parents, ram)));
    let frames = vm.memory().frames().clone();
    let shell = || Shell::new(kvm, &frames, vm.ram().size(), 1).unwrap();
    let complete = |builder: Builder<'static>| {
        let device = device(&log, builder.ram());
        builder.device(Arc::new(device)).copy_ahead(false)
    };
    let name = |vm: &Vm| {
        let mut name = [0; 4];
        vm.ram().read(DATA + 64, &mut name).unwrap();
        name
    };
    let identity = |clone: &Vm| Ok(clone.ram().write(DATA + 64, b"mine")?);
    for place in [Place::New(kvm), Place::In(shell())] {
        let forked = vm.fork(place, plain_memory(), complete, identity).unwrap();
        assert_eq!((&name(&forked.vm), name(&vm)), (b"mine", [0; 4]));
        let then = agree(&vm, &forked.snapshot);
        counts_on(&forked.vm);
        counts_on(&vm);
        assert!(forked.running > forked.timing.running);
        assert!(forked.vm.ram().prices().whole_price() == vm.ram().prices().whole_price());
        let of = &forked.snapshot;
        let nobody = |_: &Vm| Ok(());
        let (sibling, _) = vm
            .start_clone(of, shell(), plain_memory(), complete, nobody)
            .unwrap();
        assert_eq!(name(&sibling), [0; 4]);
        counts_on(&sibling);
        assert_eq!(agree(&vm, of), then);
    }
    drop(vm);
    assert_eq!(frames.pool().leftovers(1), []);
    assert_eq!(frames.budget().used(), 0);
}

/// Whatever is refused says which step, and leaves nothing.
#[test]
fn a_fork_that_is_refused_leaves_the_vm_as_it_was() {
    let kvm = need_kvm!();
    let vm = counting(kvm, |_| None);
    let frames = vm.memory().frames().clone();
    let plain = |builder: Builder<'static>| builder.copy_ahead(false);
    let nobody = |_: &Vm| Ok(());
    // A shell of other frames; of another size; with another number of vCPUs; a device too many; no name.
    let others = Frames::new(8 << 20).unwrap();
    let other = Shell::new(kvm, &others, vm.ram().size(), 1).unwrap();
    let refused = vm.fork(other, plain_memory(), plain, nobody).unwrap_err();
    let ForkError::Memory(MemoryError::OtherFrames) = refused else {
        panic!("{refused:?}");
    };
    // A quota that is used up at once.
    let account = frames.pool().open_account(Some(0));
    let options = MemoryOptions {
        account: Some(account),
        ..plain_memory()
    };
    let write = |clone: &Vm| Ok(clone.ram().write(DATA + 64, b"mine")?);
    let refused = vm.fork(kvm, options, plain, write).unwrap_err();
    let said = crate::causes::chain(&refused);
    assert!(
        said.ends_with("all 0 frames that the account may have are in use"),
        "{said}"
    );
    let small = Shell::new(kvm, &frames, vm.ram().size() / 2, 1).unwrap();
    let refused = vm.fork(small, plain_memory(), plain, nobody).unwrap_err();
    assert!(matches!(refused, ForkError::Memory(_)), "{refused:?}");
    let two = Shell::new(kvm, &frames, vm.ram().size(), 2).unwrap();
    let refused = vm.fork(two, plain_memory(), plain, nobody).unwrap_err();
    assert!(matches!(refused, ForkError::Start(_)), "{refused:?}");
    let log = Log::default();
    let more = |builder: Builder<'static>| {
        let device = FakeDevice::new("one too many", &log, builder.ram(), Fails::Nothing);
        builder.device(Arc::new(device))
    };
    let refused = vm.fork(kvm, plain_memory(), more, nobody).unwrap_err();
    assert!(matches!(refused, ForkError::Start(_)), "{refused:?}");
    let nameless = |_: &Vm| Err("no name".into());
    let refused = vm.fork(kvm, plain_memory(), plain, nameless).unwrap_err();
    let said = crate::causes::chain(&refused);
    assert_eq!(
        said,
        "cannot start the clone: cannot tell the clone who it is: no name"
    );
    counts_on(&vm);
    vm.machine().stop();
    vm.machine().wait_until_stopped().unwrap();
    let refused = vm.fork(kvm, plain_memory(), plain, nobody).unwrap_err();
    assert!(matches!(refused, ForkError::Take(_)), "{refused:?}");
    drop(vm);
    assert_eq!(frames.pool().leftovers(1), []);
    assert_eq!(frames.budget().used(), 0);
}

#[test]
fn clones_of_clones_outlive_whom_they_are_of() {
    let kvm = need_kvm!();
    let vm = counting(kvm, |_| None);
    let frames = vm.memory().frames().clone();
    let (snapshot, _) = vm.snapshot().unwrap();
    let first = clone(kvm, &vm, &snapshot, From::Builder, |_| None);
    first.start_from(&snapshot, nothing).unwrap();
    counts_on(&first);
    let (later, _) = first.snapshot().unwrap();
    let then = agree(&first, &later);
    let second = clone(kvm, &first, &later, From::Shell, |_| None);
    drop((vm, snapshot));
    second.start_from(&later, nothing).unwrap();
    // The middle goes.
    drop(first);
    assert_eq!(
        {
            let mut word = [0; 8];
            frames.read(later.memory(), DATA, &mut word).unwrap();
            u64::from_le_bytes(word)
        },
        then
    );
    drop(later);
    counts_on(&second);
    drop(second);
    assert_eq!(frames.pool().leftovers(1), []);
}

#[test]
fn the_devices_of_a_clone_become_what_they_were_before_it_runs() {
    let kvm = need_kvm!();
    let (log, parents) = (Log::default(), Log::default());
    let vm = counting(kvm, |ram| {
        Some(FakeDevice::new("parent", &parents, ram, Fails::Nothing))
    });
    let (snapshot, _) = vm.snapshot().unwrap();
    parents.take();
    let device = |ram: &Ram| Some(FakeDevice::new("clone", &log, ram, Fails::Nothing));
    let clone = clone(kvm, &vm, &snapshot, From::Builder, device);
    let identity = || {
        log.note("identity");
        assert!(clone.ram().precedence().is_taken());
        Ok(())
    };
    clone.start_from(&snapshot, identity).unwrap();
    let told = [
        "clone begin_stop",
        "clone finish_stop",
        "clone restore 0 at 0",
        "identity",
        "clone resume",
    ];
    assert_eq!(log.take(), told);
    assert_eq!(parents.take(), [""; 0], "the parent's goes on");
    counts_on(&clone);
}

/// Whatever is refused, the snapshot and the parent are as they were, and another clone can be made.
#[test]
fn a_clone_that_is_not_started_leaves_everybody_as_they_were() {
    let kvm = need_kvm!();
    let log = Log::default();
    let with = |fails| move |ram: &Ram, log: &Log| Some(FakeDevice::new("device", log, ram, fails));
    let vm = counting(kvm, |ram| with(Fails::Nothing)(ram, &log));
    let (snapshot, _) = vm.snapshot().unwrap();
    let then = agree(&vm, &snapshot);
    let other = |vcpus, devices| Snapshot::new(Arc::clone(snapshot.memory()), vcpus, devices);
    let (vcpus, devices) = (snapshot.vcpus().to_vec(), snapshot.devices().to_vec());
    let two = vec![vcpus[0].clone(), vcpus[0].clone()];
    let nonsense = vec![Saved::stored(99, Vec::new())];
    type Is = fn(&CloneError) -> bool;
    let cases: [(Snapshot, Fails, Is); 4] = [
        (other(vcpus.clone(), Vec::new()), Fails::Nothing, |error| {
            matches!(
                error,
                CloneError::DeviceCount {
                    snapshot: 0,
                    clone: 1
                }
            )
        }),
        (other(two, devices.clone()), Fails::Nothing, |error| {
            matches!(
                error,
                CloneError::Vcpus(KvmError::StateCount {
                    states: 2,
                    vcpus: 1
                })
            )
        }),
        (other(nonsense, devices.clone()), Fails::Nothing, |error| {
            matches!(error, CloneError::State { vcpu: 0, .. })
        }),
        (other(vcpus, devices), Fails::Restore, |error| {
            matches!(error, CloneError::Devices(_))
        }),
    ];
    for (of, fails, is_expected) in &cases {
        let clone = clone(kvm, &vm, &snapshot, From::Shell, |ram| {
            with(*fails)(ram, &log)
        });
        let error = clone.start_from(of, nothing).unwrap_err();
        assert!(is_expected(&error), "{error}");
    }
    let refused = clone(kvm, &vm, &snapshot, From::Builder, |ram| {
        with(Fails::Nothing)(ram, &log)
    });
    let error = refused
        .start_from(&snapshot, || Err("no name".into()))
        .unwrap_err();
    assert_eq!(chain(&error), "cannot tell the clone who it is: no name");
    assert_eq!(counted(refused.ram()), then, "it has not run");
    let good = clone(kvm, &vm, &snapshot, From::Builder, |ram| {
        with(Fails::Nothing)(ram, &log)
    });
    good.start_from(&snapshot, nothing).unwrap();
    let again = good.start_from(&snapshot, nothing).unwrap_err();
    let is_started = matches!(again, CloneError::Vcpus(KvmError::AlreadyStarted));
    assert!(is_started, "{again}");
    counts_on(&good);
    counts_on(&vm);
    assert_eq!(agree(&vm, &snapshot), then);
}

#[test]
fn memory_of_others_and_windows_of_other_sizes_are_refused() {
    let kvm = need_kvm!();
    let vm = counting(kvm, |_| None);
    let (snapshot, _) = vm.snapshot().unwrap();
    let frames = vm.memory().frames();
    let clone_in = |frames: &Frames, bytes| {
        let window = Arc::new(frames.window(bytes, Placement::Anywhere).unwrap());
        memory_of(frames, &snapshot, window)
    };
    let other = clone_in(&Frames::new(2 * MEMORY).unwrap(), MEMORY).unwrap_err();
    assert!(matches!(other, MemoryError::OtherFrames), "{other}");
    let small = clone_in(frames, MEMORY - PAGE_SIZE).unwrap_err();
    let is_size = matches!(small, MemoryError::WindowSize { window, snapshot }
        if window + PAGE_SIZE == snapshot);
    assert!(is_size, "{small}");
    // Behind another window than the shell's.
    let memory = clone_in(frames, MEMORY).unwrap();
    let shell = Shell::new(kvm, frames, MEMORY, 1).unwrap();
    let error = Vm::builder(memory).build_in(shell).unwrap_err();
    assert!(matches!(error, BuildError::OtherWindow), "{error}");
}

#[test]
fn shells_are_there_before_they_are_asked_for() {
    let kvm = need_kvm!();
    let vm = counting(kvm, |_| None);
    let (snapshot, _) = vm.snapshot().unwrap();
    let frames = vm.memory().frames();
    let shells = Shells::start(Kvm::open().unwrap(), frames.clone(), MEMORY, 1, 2).unwrap();
    assert_eq!(shells.wait_until_ready(), 2);
    shells.want(0);
    for left in [1, 0, 0] {
        let shell = shells.take().unwrap();
        assert_eq!(shells.ready(), left, "the last one was made on the spot");
        let window = Arc::clone(shell.window());
        let memory = memory_of(frames, &snapshot, window).unwrap();
        let clone = Vm::builder(memory).build_in(shell).unwrap();
        clone.start_from(&snapshot, nothing).unwrap();
        counts_on(&clone);
    }
    shells.want(1);
    assert_eq!(shells.wait_until_ready(), 1);
}

#[test]
fn shells_that_cannot_be_made_keep_nobody_waiting() {
    let _kvm = need_kvm!();
    let frames = Frames::with_limit(64, 64, Dumps::WithoutGuest).unwrap();
    let shells = Shells::start(Kvm::open().unwrap(), frames.clone(), MEMORY, 0, 3).unwrap();
    assert_eq!(shells.wait_until_ready(), 0);
    let error = shells.take().unwrap_err();
    let is_count = matches!(error, ShellError::Kvm(KvmError::VcpuCount { vcpus: 0 }));
    assert!(is_count, "{error}");
    drop(shells);
    assert_eq!(frames.budget().used(), 0);
    assert_eq!(frames.pool().state(Pfn::ZERO).pins(), 0);
}
