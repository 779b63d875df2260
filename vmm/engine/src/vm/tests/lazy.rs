//! VMs whose memory is read from a store as they use it, on real KVM.

use std::fs;
use std::sync::mpsc::channel;

use super::*;
use crate::host::Placement;
use crate::kept::store::{Compression, Facts, Kept, Machine, Store};
use crate::kept::{BroughtCounts, Chunks, LazyOptions, Saver, lazily, may_be_lazy, snapshot_of};
use crate::kvm::{Paging, Rung};
use crate::memory::MemoryOptions;

/// Where the guest waits until it is told to go on.
const FLAG: u64 = 0x30_0000;
/// A region for each thing that it does.
const READ: u64 = 0x40_0000;
const WRITTEN: u64 = 0x60_0000;
const CODE: u64 = 0x80_0000;
const STACK: u64 = 0xa0_0000;
const UNTOUCHED: u64 = 0xc0_0000;
const VALUE: u32 = 0x1234_5670;

/// Waits for the flag; adds what is read to what is written; pushes it, and goes on elsewhere, where it is popped and
/// the exit.
fn program() -> Vec<u8> {
    let address = |gpa: u64| (gpa as u32).to_le_bytes();
    [
        // w: cmp dword ptr [FLAG], 0; je w
        &[0x83, 0x3c, 0x25][..],
        &address(FLAG),
        &[0x00, 0x74, 0xf6],
        // mov eax, [READ]; add [WRITTEN], eax; mov eax, [WRITTEN]
        &[0x8b, 0x04, 0x25],
        &address(READ),
        &[0x01, 0x04, 0x25],
        &address(WRITTEN),
        &[0x8b, 0x04, 0x25],
        &address(WRITTEN),
        // mov esp, STACK + 0x1000; push rax; mov ecx, CODE; jmp rcx
        &[0xbc],
        &address(STACK + 0x1000),
        &[0x50, 0xb9],
        &address(CODE),
        &[0xff, 0xe1],
    ]
    .concat()
}

/// `pop rax; mov dx, 0x501; out dx, eax; jmp $`
const END: &[u8] = &[0x58, 0x66, 0xba, 0x01, 0x05, 0xef, 0xeb, 0xfe];

/// A store with a snapshot of a guest that waits.
fn saved(kvm: &Kvm, vcpus: usize) -> (tempfile::TempDir, Arc<Kept>) {
    let memory = memory(&[&program()]);
    let ram = memory.ram();
    ram.write(READ, &VALUE.to_le_bytes()).unwrap();
    ram.write(WRITTEN, &1u32.to_le_bytes()).unwrap();
    ram.write(CODE, END).unwrap();
    ram.write(STACK, &[1]).unwrap();
    ram.write(UNTOUCHED, &[2]).unwrap();
    let vm = Vm::builder(memory).build(kvm, vcpus).unwrap();
    start(&vm);
    let (snapshot, _) = vm.snapshot().unwrap();
    assert!(may_be_lazy(kvm, &snapshot).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(&dir.path().join("store")).unwrap();
    let saver = Saver {
        store: &store,
        name: "a".parse().unwrap(),
        snapshot: &snapshot,
        frames: vm.memory().frames(),
        base: None,
        parent: None,
        compression: Compression::None,
        aside: None,
        most_a_second: None,
        facts: Facts {
            machine: Machine {
                vcpus: vcpus as u32,
                ..Machine::default()
            },
            ..Facts::default()
        },
        parts: Vec::new(),
    };
    saver.save(&mut |_| true).unwrap();
    let kept = store.read(&"a".parse().unwrap()).unwrap();
    (dir, Arc::new(kept))
}

/// Runs on from `kept` in frames of its own, none of which is read before. Says how it ended, and what was read.
struct Run {
    frames: Frames,
    chunks: Arc<Chunks>,
    vm: Vm,
    outcomes: Receiver<Outcome>,
}

fn run(kvm: &Kvm, kept: &Arc<Kept>) -> Run {
    let frames = Frames::new(4 * MEMORY).unwrap();
    let (frozen, chunks) = lazily(kept, &frames, LazyOptions::default()).unwrap();
    let window = Arc::new(frames.window(MEMORY, Placement::Anywhere).unwrap());
    let plain = |window| Box::new(window) as _;
    let options = MemoryOptions::default();
    let memory = Memory::clone_of(&frames, &frozen, Exclusive, options, window, plain).unwrap();
    let (sender, outcomes) = channel();
    let snapshot = snapshot_of(kept, frozen).unwrap();
    let vm = Vm::builder(memory)
        .ports(Arc::new(Ports(Mutex::default())))
        .on_stop(move |_, outcome| sender.send(outcome).unwrap())
        .build(kvm, snapshot.vcpus().len())
        .unwrap();
    vm.start_from(&snapshot, || Ok(())).unwrap();
    Run {
        frames,
        chunks,
        vm,
        outcomes,
    }
}

impl Run {
    fn go(&self) -> Outcome {
        self.vm.ram().write(FLAG, &[1]).unwrap();
        self.outcomes.recv_timeout(SOON).unwrap()
    }

    fn settle(self) -> BroughtCounts {
        let Self {
            frames, chunks, vm, ..
        } = self;
        drop(vm);
        assert_eq!(frames.pool().leftovers(1), []);
        assert_eq!(frames.budget().used(), 0);
        chunks.counts()
    }
}

fn chunk_of(kept: &Kept, gpa: u64) -> std::path::PathBuf {
    let hash = kept.index().get(gpa / (2 << 20)).unwrap().to_string();
    let chunks = kept.store().path().join("chunks");
    chunks.join(&hash[..2]).join(hash)
}

/// It reads, writes, pushes and executes what is not there, and what it does not touch is never read.
#[test]
fn a_guest_finds_all_that_it_touches_and_the_rest_is_not_read() {
    let kvm = need_kvm!();
    for vcpus in [1, 2] {
        let (_dir, kept) = saved(kvm, vcpus);
        let run = run(kvm, &kept);
        let before = run.chunks.counts().brought();
        assert!(before <= 2, "{before}");
        let end = run.go();
        // Two of them may have added what they read before either looks at the sum.
        let is_right = |outcome: &Outcome| {
            matches!(outcome, Outcome::Stopped(StopReason::Exit { status })
                if [VALUE + 1, 2 * VALUE + 1].contains(status))
        };
        assert!(is_right(&end), "{end}");
        for _ in 1..vcpus {
            let end = run.outcomes.recv_timeout(SOON).unwrap();
            assert!(is_right(&end), "{end}");
        }
        assert_eq!(run.vm.memory().space().hidden(), 1);
        // What KVM reads by itself it has found: no vCPU had to be recovered.
        if kvm.platform().paging == Paging::Shadow {
            assert_eq!(run.vm.machine().stats().rungs.of(Rung::Walk), 0);
        }
        let counts = run.settle();
        assert_eq!((counts.chunks, counts.brought()), (7, 6), "{counts:?}");
        assert!(counts.by_vcpus >= 3, "{counts:?}");
    }
}

/// A chunk that is damaged ends the machine that touches it, with the chunk's name, and no other; and not before it
/// touches it.
#[test]
fn a_damaged_chunk_ends_the_machine_that_touches_it_and_no_other() {
    let kvm = need_kvm!();
    let (_good, whole) = saved(kvm, 1);
    for gpa in [READ, WRITTEN, CODE, STACK] {
        let (_dir, kept) = saved(kvm, 1);
        let (other, broken) = (run(kvm, &whole), run(kvm, &kept));
        let file = chunk_of(&kept, gpa);
        let mut content = fs::read(&file).unwrap();
        content[1 << 20] ^= 1;
        fs::write(&file, &content).unwrap();
        let end = broken.go();
        let said = match &end {
            Outcome::Failed { error, .. } => chain(error),
            other => panic!("{gpa:#x}: {other}"),
        };
        let file = file.to_str().unwrap();
        assert!(said.contains(file) && said.contains("byte 0"), "{said}");
        broken.settle();
        // What is damaged and not touched harms nobody.
        let end = other.go();
        assert!(
            matches!(end, Outcome::Stopped(StopReason::Exit { status }) if status == VALUE + 1),
            "{end}"
        );
        other.settle();
    }
    let file = chunk_of(&whole, UNTOUCHED);
    fs::remove_file(file).unwrap();
    let fine = run(kvm, &whole);
    assert!(matches!(fine.go(), Outcome::Stopped(_)));
    fine.settle();
}

/// A machine that was loaded lazily is forked, and so is its fork, while what is in it was not read: all find it.
#[test]
fn a_clone_of_what_was_loaded_lazily_finds_what_nobody_has_touched() {
    let kvm = need_kvm!();
    let (_dir, kept) = saved(kvm, 1);
    let run = run(kvm, &kept);
    let (snapshot, _) = run.vm.snapshot().unwrap();
    let window = Arc::new(run.frames.window(MEMORY, Placement::Anywhere).unwrap());
    let plain = |window| Box::new(window) as _;
    let options = MemoryOptions::default();
    let memory = snapshot.memory();
    let memory = Memory::clone_of(&run.frames, memory, Exclusive, options, window, plain).unwrap();
    let (sender, outcomes) = channel();
    let clone = Vm::builder(memory)
        .ports(Arc::new(Ports(Mutex::default())))
        .on_stop(move |_, outcome| sender.send(outcome).unwrap())
        .build(kvm, 1)
        .unwrap();
    clone.start_from(&snapshot, || Ok(())).unwrap();
    for (ram, outcomes) in [(clone.ram(), &outcomes), (run.vm.ram(), &run.outcomes)] {
        ram.write(FLAG, &[1]).unwrap();
        let end = outcomes.recv_timeout(SOON).unwrap();
        assert!(
            matches!(end, Outcome::Stopped(StopReason::Exit { status }) if status == VALUE + 1),
            "{end}"
        );
    }
    drop((clone, snapshot));
    // Each chunk once, for both.
    assert_eq!(run.settle().brought(), 6);
}
