//! The library without a session: a VM put together by hand, snapshots of it, and what can be done with them.
//!
//! The first half of this file is all a program needs to do to have such a VM.

mod support;

use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{
    IMAGE_GPA, Layout, PAGE_SIZE, PORT_CONSOLE, PORT_DOORBELL_EVENT, PORT_DOORBELL_EXIT, Pattern,
    VcpuPage,
};
use guest::formula::{PAGE_WORDS, Schedule, page_word};
use palimpsest::host::{Ram, Window};
use palimpsest::kvm::{Clock, Kvm, KvmError, PortAction, PortHandler, StopReason, VcpuState};
use palimpsest::memory::{Frames, Memory, MemoryOptions};
use palimpsest::mm::{AddressSpace, Exclusive, Gfn, Mmu, MmuError, Pfn, Protection};
use palimpsest::snapshot::{RewindError, Snapshot, TakeError};
use palimpsest::vcpus::Capture;
use palimpsest::vm::Vm;
use support::program::program;
use support::{PATIENCE, no_kvm, within};
use vmm::boot;
use vmm::dma::DeviceSet;

const MEMORY: u64 = 32 << 20;
const VCPUS: u64 = 2;
const PATTERN: Pattern = Pattern::Hot;
const SEED: u64 = 42;

/// A virtual machine, with what the tests look at. The fields are in the order in which they go.
struct Guest {
    vm: Vm,
    devices: Arc<DeviceSet>,
    frames: Frames,
    layout: Layout,
    /// Why vCPUs have ended. None should.
    ended: Arc<Mutex<Vec<String>>>,
}

impl Guest {
    /// Boots the payload.
    fn boot() -> Self {
        Self::boot_with(guest::PAYLOAD, |window| Box::new(window))
    }

    /// Boots a guest, with something between its memory and its window.
    fn boot_with(
        image: impl Into<Vec<u8>>,
        between: impl FnOnce(Arc<Window>) -> Box<dyn Mmu>,
    ) -> Self {
        let image = boot::parse(image).unwrap();
        let layout = Layout::new(MEMORY, image.end(), VCPUS, 2, 2).unwrap();
        // Room for the guest and for what snapshots need copies of.
        let frames = Frames::new(8 * MEMORY).unwrap();
        let options = MemoryOptions::default();
        let memory = Memory::with(&frames, MEMORY, Exclusive, options, between).unwrap();
        image.load(memory.ram()).unwrap();
        boot::write_first_memory(memory.ram(), layout, SEED, PATTERN).unwrap();

        let devices = Arc::new(DeviceSet::start(memory.ram(), &layout, SEED).unwrap());
        let ended = Arc::new(Mutex::new(Vec::new()));
        let ends = Arc::clone(&ended);
        let mut builder = Vm::builder(memory)
            .ports(Arc::new(Ports(Arc::clone(&devices))))
            .on_stop(move |vcpu, outcome| {
                ends.lock().unwrap().push(format!("vcpu {vcpu}: {outcome}"));
            });
        for (device, port) in devices.devices().iter().zip(PORT_DOORBELL_EVENT..) {
            builder = builder
                .device(Arc::clone(device) as _)
                .doorbell(port, device.doorbell());
        }
        let vm = builder
            .build(&Kvm::open().unwrap(), VCPUS as usize)
            .unwrap();
        vm.start(|vcpu| boot::entry(&layout, image.entry(), vcpu))
            .unwrap();
        Self {
            vm,
            devices,
            frames,
            layout,
            ended,
        }
    }

    fn take(&self) -> Snapshot {
        self.vm.snapshot().unwrap().0
    }

    fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    fn space(&self) -> &AddressSpace<Exclusive> {
        self.vm.memory().space()
    }
}

/// Lets the guest print to nobody and ring its devices. Anything else it says is a failure.
struct Ports(Arc<DeviceSet>);

impl PortHandler for Ports {
    fn out(&self, _vcpu: usize, port: u16, value: u32) -> PortAction {
        if port == PORT_CONSOLE {
            return PortAction::Continue;
        }
        let device = port.checked_sub(PORT_DOORBELL_EXIT).map(usize::from);
        match device.and_then(|device| self.0.devices().get(device)) {
            Some(device) => {
                device.ring_from_vcpu();
                PortAction::Continue
            }
            None => PortAction::Stop(StopReason::Exit { status: value }),
        }
    }
}

/// Operations of each vCPU when `snapshot` was taken.
fn operations(snapshot: &Snapshot) -> Vec<u64> {
    let ops = |saved| VcpuState::of_saved(saved).unwrap().mm7();
    snapshot.vcpus().iter().map(ops).collect()
}

/// Checks that every hammered page is what it must be once the vCPUs have done `ops` operations. `page_at`
/// reads one.
fn assert_follows_formula(
    layout: &Layout,
    ops: &[u64],
    mut page_at: impl FnMut(u64, &mut [u8; PAGE_SIZE as usize]),
) {
    let mut page = [0; PAGE_SIZE as usize];
    let mut written = 0;
    for (vcpu, &ops) in (0..).zip(ops) {
        let slots = layout.slots(PATTERN, vcpu);
        let schedule = Schedule::new(PATTERN, slots, SEED, vcpu);
        for slot in 0..slots {
            let gpa = layout.slot_gpa(PATTERN, vcpu, slot);
            page_at(gpa, &mut page);
            let complete = schedule.last_writer(slot, ops);
            // Operation `ops` has begun, perhaps: then some first words of its page are new already.
            let mut begun = schedule.slot_of(ops) == slot;
            for (word, bytes) in (0..PAGE_WORDS).zip(page.chunks_exact(8)) {
                let found = u64::from_le_bytes(bytes.try_into().unwrap());
                begun &= found == page_word(SEED, vcpu, ops, word);
                let expected = complete.map_or(0, |op| page_word(SEED, vcpu, op, word));
                assert!(
                    begun || found == expected,
                    "word {word} of gpa {gpa:#x} is {found:#x}, not {expected:#x}"
                );
            }
            written += u64::from(complete.is_some());
        }
    }
    assert!(written > 0, "no page was written yet");
}

/// As above, for the memory of a snapshot and the registers in it.
fn assert_right(snapshot: &Snapshot, vm: &Guest) {
    assert_follows_formula(&vm.layout, &operations(snapshot), |gpa, page| {
        vm.frames.read(snapshot.memory(), gpa, page).unwrap();
    });
}

/// Waits until every vCPU has done `more` operations than at `since`.
fn wait_for_operations(vm: &Guest, since: &[u64], more: u64) {
    let deadline = Instant::now() + PATIENCE;
    while (operations_now(vm).iter().zip(since)).any(|(now, since)| *now < since + more) {
        assert_eq!(*vm.ended.lock().unwrap(), Vec::<String>::new());
        assert!(Instant::now() < deadline, "a vcpu does not run on");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What each vCPU has done, as guest memory says.
fn operations_now(vm: &Guest) -> Vec<u64> {
    let ops = |vcpu| {
        let gpa = vm.layout.vcpu_page(vcpu) + offset_of!(VcpuPage, ops) as u64;
        let mut ops = [0; 8];
        vm.ram().read(gpa, &mut ops).unwrap();
        u64::from_le_bytes(ops)
    };
    (0..VCPUS).map(ops).collect()
}

#[test]
fn a_restored_guest_is_the_one_that_was_captured() {
    if no_kvm() {
        return;
    }
    within(PATIENCE, || {
        let vm = Guest::boot();

        let mut snapshots = Vec::<Snapshot>::new();
        for _ in 0..3 {
            let before = snapshots.last().map_or(vec![0; VCPUS as usize], operations);
            wait_for_operations(&vm, &before, 200);
            let (snapshot, timing) = vm.vm.snapshot().unwrap();
            assert!(timing.pause() < PATIENCE);
            assert!(operations(&snapshot) > before, "the guest ran on");
            snapshots.push(snapshot);
        }
        snapshots
            .iter()
            .for_each(|snapshot| assert_right(snapshot, &vm));

        let first = &snapshots[0];
        let restored = vm.vm.parts().restore(first, || {
            // Nothing runs now: guest memory is that of the first snapshot.
            assert_follows_formula(&vm.layout, &operations(first), |gpa, page| {
                vm.ram().read(gpa, page).unwrap();
            });
            Ok(())
        });
        restored.unwrap();

        // The guest runs on from there, and a snapshot of that is right too.
        wait_for_operations(&vm, &operations(first), 200);
        let fourth = vm.take();
        assert!(operations(&fourth) > operations(first));
        assert_right(&fourth, &vm);
        // Nothing of all that shows in the others.
        snapshots
            .iter()
            .for_each(|snapshot| assert_right(snapshot, &vm));

        assert_eq!(*vm.ended.lock().unwrap(), Vec::<String>::new());
        assert_eq!(vm.devices.take_mismatches(), []);
        let (pool, budget) = (Arc::clone(vm.frames.pool()), Arc::clone(vm.frames.budget()));
        drop((snapshots, fourth, vm));
        assert_eq!(pool.leftovers(usize::MAX), []);
        assert_eq!((pool.usage().in_use, budget.used()), (0, 0));
    });
}

/// A snapshot may outlive the VM it is of.
#[test]
fn a_snapshot_holds_its_memory_after_the_guest_is_gone() {
    if no_kvm() {
        return;
    }
    within(PATIENCE, || {
        let vm = Guest::boot();
        wait_for_operations(&vm, &[0; VCPUS as usize], 200);
        let snapshot = vm.take();
        let (ops, layout) = (operations(&snapshot), vm.layout);
        let frames = vm.frames.clone();
        drop(vm);
        assert_follows_formula(&layout, &ops, |gpa, page| {
            frames.read(snapshot.memory(), gpa, page).unwrap();
        });
        drop(snapshot);
        assert_eq!(frames.pool().leftovers(usize::MAX), []);
        assert_eq!(frames.pool().usage().in_use, 0);
    });
}

/// The limits a library user meets first, told in words.
#[test]
fn a_guest_that_has_ended_cannot_be_snapshotted() {
    if no_kvm() {
        return;
    }
    within(PATIENCE, || {
        let vm = Guest::boot();
        wait_for_operations(&vm, &[0; VCPUS as usize], 1);
        vm.vm.machine().stop();
        let deadline = Instant::now() + PATIENCE;
        let error = loop {
            // Its vCPUs take a moment to notice.
            match vm.vm.snapshot() {
                Err(error) => break vmm::cli::chain(&error),
                Ok(_) => assert!(Instant::now() < deadline),
            }
        };
        let expected = "cannot stop and capture the vcpus: vcpu ";
        assert!(
            error.starts_with(expected) && error.ends_with(" has stopped"),
            "{error}"
        );
    });
}

/// A window that from some time on refuses everything, and does not say whether it has changed anything.
struct Failing {
    window: Arc<Window>,
    fails: Arc<AtomicBool>,
}

impl Failing {
    fn look(&self, what: &'static str, first: Gfn, count: u64) -> Result<(), MmuError> {
        if !self.fails.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(MmuError::Torn {
            what,
            first,
            count,
            source: io::ErrorKind::OutOfMemory.into(),
        })
    }
}

impl Mmu for Failing {
    fn map(&self, first: Gfn, frame: Pfn, count: u64, to: Protection) -> Result<(), MmuError> {
        self.look("map", first, count)?;
        self.window.map(first, frame, count, to)
    }
    fn protect(&self, first: Gfn, count: u64, to: Protection) -> Result<(), MmuError> {
        self.look("protect", first, count)?;
        self.window.protect(first, count, to)
    }
}

/// A guest whose window can be told to fail, and what tells it.
fn boot_to_fail() -> (Guest, Arc<AtomicBool>) {
    let fails = Arc::new(AtomicBool::new(false));
    let its = Arc::clone(&fails);
    let vm = Guest::boot_with(guest::PAYLOAD, |window| {
        Box::new(Failing { window, fails: its })
    });
    wait_for_operations(&vm, &[0; VCPUS as usize], 1000);
    (vm, fails)
}

/// None of its vCPUs runs, nor will.
fn assert_stopped(vm: &Guest) {
    let before = operations_now(vm);
    let error = vm
        .vm
        .machine()
        .pause(Capture::Nothing)
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, KvmError::Stopped { .. }), "{error}");
    assert_eq!(operations_now(vm), before);
    assert_eq!(
        *vm.ended.lock().unwrap(),
        [] as [String; 0],
        "by themselves"
    );
}

/// A vCPU may come first and find out by a fault: then it has ended, and the fork is not tried. Now and then,
/// that is.
#[test]
fn a_guest_whose_memory_breaks_in_a_fork_does_not_run_on() {
    if no_kvm() {
        return;
    }
    within(PATIENCE, || {
        let is_stopped = (0..20).any(|_| {
            let (vm, fails) = boot_to_fail();
            let snapshot = vm.take();
            wait_for_operations(&vm, &operations(&snapshot), 1000);
            fails.store(true, Ordering::SeqCst);
            let error = vm.vm.snapshot().unwrap_err();
            assert!(vm.space().check().is_err());
            assert_right(&snapshot, &vm);
            let forked = matches!(error, TakeError::Memory(_));
            if forked && vm.ended.lock().unwrap().is_empty() {
                assert_stopped(&vm);
                return true;
            }
            false
        });
        assert!(is_stopped);
    });
}

#[test]
fn a_guest_that_was_rewound_in_part_does_not_run_on() {
    if no_kvm() {
        return;
    }
    within(PATIENCE, || {
        let (vm, fails) = boot_to_fail();
        let snapshot = vm.take();
        wait_for_operations(&vm, &operations(&snapshot), 1000);
        let restored = vm.vm.parts().restore(&snapshot, || {
            fails.store(true, Ordering::SeqCst);
            let last = Gfn(MEMORY / PAGE_SIZE - 1);
            vm.space().discard(last, 1).unwrap_err();
            Ok(())
        });
        let error = restored.unwrap_err();
        let is_half_way = matches!(error, RewindError::Memory(_) | RewindError::Devices(_));
        assert!(is_half_way, "{error:?}");
        assert_stopped(&vm);
        assert_right(&snapshot, &vm);
    });
}

/// In ring 0, behind a `jmp $` for ring 3: sets MSR_KVM_SYSTEM_TIME_NEW to [`CLOCK`], then reads that clock
/// for ever and counts how often it says that the guest had been stopped.
const CLOCK_READER: &[u8] = &[
    0xeb, 0xfe, // jmp $
    0xb9, 0x01, 0x4d, 0x56, 0x4b, // mov ecx, 0x4b564d01
    0xb8, 0x01, 0x10, 0x60, 0x00, // mov eax, CLOCK | 1
    0x31, 0xd2, 0x0f, 0x30, // xor edx, edx; wrmsr
    0x48, 0xff, 0x04, 0x25, 0x08, 0x20, 0x60, 0x00, // 1: inc qword [ROUNDS]
    0x48, 0x8b, 0x04, 0x25, 0x10, 0x10, 0x60, 0x00, // mov rax, [CLOCK.system_time]
    0x48, 0x89, 0x04, 0x25, 0x10, 0x20, 0x60, 0x00, // mov [TIME], rax
    0xf6, 0x04, 0x25, 0x1d, 0x10, 0x60, 0x00,
    2, // test byte [CLOCK.flags], PVCLOCK_GUEST_STOPPED
    0x74, 0xde, // jz 1b
    0x80, 0x24, 0x25, 0x1d, 0x10, 0x60, 0x00,
    0xfd, // and byte [CLOCK.flags], ~PVCLOCK_GUEST_STOPPED
    0x48, 0xff, 0x04, 0x25, 0x00, 0x20, 0x60, 0x00, // inc qword [STOPS]
    0xeb, 0xcc, // jmp 1b
];
const CLOCK: u64 = 0x60_1000;
const STOPS: u64 = 0x60_2000;
const ROUNDS: u64 = STOPS + 8;
const TIME: u64 = STOPS + 16;

/// What KVM writes to guest memory by itself: the paravirtual clock of a guest that sets its MSR although
/// nobody offers it. After every restore KVM notes in the clock that the guest was stopped, and the guest
/// must see that, whatever snapshots there are.
#[test]
fn a_paravirtual_clock_is_written_where_the_guest_reads_it() {
    if no_kvm() {
        return;
    }
    within(PATIENCE, || {
        let vm = Guest::boot_with(program(CLOCK_READER), |window| Box::new(window));
        let word = |gpa| {
            let mut word = [0; 8];
            vm.ram().read(gpa, &mut word).unwrap();
            u64::from_le_bytes(word)
        };
        let wait_for = |gpa, least: u64| {
            let deadline = Instant::now() + PATIENCE;
            while word(gpa) < least {
                assert_eq!(*vm.ended.lock().unwrap(), Vec::<String>::new());
                assert!(Instant::now() < deadline, "{gpa:#x} stays {}", word(gpa));
                thread::sleep(Duration::from_millis(1));
            }
        };

        // Guests begin in ring 3, where there is no `wrmsr`.
        let paused = vm.vm.machine().pause(Capture::Registers).unwrap();
        let in_ring_0 = |state: VcpuState| {
            let (mut regs, mut sregs) = (*state.regs(), *state.sregs());
            (sregs.cs.dpl, sregs.cs.selector) = (0, 0x10);
            (sregs.ss.dpl, sregs.ss.selector) = (0, 0x18);
            regs.rip = IMAGE_GPA + 2;
            state.with_registers(regs, sregs)
        };
        let mut states = paused.states().unwrap();
        states[0] = in_ring_0(states[0].clone());
        let tables = paused.page_tables().unwrap();
        paused.restore(&states, Clock::Keep, &tables).unwrap();
        drop(paused);
        wait_for(ROUNDS, 1);
        assert_ne!(word(TIME), 0, "the clock was never written");

        let mut snapshots = Vec::new();
        for number in 1..=4 {
            let snapshot = vm.take();
            let eager = vm.space().stats().eager_copied;
            assert!(eager >= number, "the clock's page is shared");
            wait_for(ROUNDS, word(ROUNDS) + 1);
            let clock = snapshot_word(&snapshot, &vm, CLOCK + 16);
            let stops = snapshot_word(&snapshot, &vm, STOPS);
            vm.vm.restore(&snapshot).unwrap();
            wait_for(STOPS, stops + 1);
            snapshots.push((snapshot, clock, stops));
        }
        for (snapshot, clock, stops) in &snapshots {
            assert_eq!(snapshot_word(snapshot, &vm, CLOCK + 16), *clock);
            assert_eq!(snapshot_word(snapshot, &vm, STOPS), *stops);
        }
        let pool = Arc::clone(vm.frames.pool());
        drop((snapshots, vm));
        assert_eq!(
            pool.leftovers(usize::MAX),
            [],
            "the clock's page stays pinned"
        );
    });
}

/// The word at `gpa` in a snapshot.
fn snapshot_word(snapshot: &Snapshot, vm: &Guest, gpa: u64) -> u64 {
    let mut word = [0; 8];
    vm.frames.read(snapshot.memory(), gpa, &mut word).unwrap();
    u64::from_le_bytes(word)
}
