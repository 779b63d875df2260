//! What it costs to come out of a guest and go in again, with KVM and without: an `out`, a write to a
//! read-only page, a kick. Pages are written one in 2 MiB, which is what costs most.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use guest::abi::{IMAGE_GPA, PORT_CONSOLE, REGION_SIZE};
use palimpsest::kvm::{Kvm, PortAction, PortHandler, StopReason};
use palimpsest::memory::{Frames, Memory, MemoryOptions};
use palimpsest::mm::Exclusive;
use palimpsest::user::User;
use palimpsest::vcpus::Capture;
use palimpsest::vm::{Accelerator, Vm};
use vmm::boot;

const MEMORY: u64 = 512 << 20;
/// Pages that the writing guest writes in a round: one in each region behind its code.
const WRITES: u64 = MEMORY / REGION_SIZE - 2;

/// `mov dx, PORT_CONSOLE; l: out dx, eax; jmp l`
const OUT: &[u8] = &[0x66, 0xba, 0x00, 0x05, 0xef, 0xeb, 0xfd];
/// `jmp $`
const SPIN: &[u8] = &[0xeb, 0xfe];
/// Writes a word in each region, asks by an `out` whether it is to do so again, and does.
const WRITE: &[u8] = &[
    0x48, 0xc7, 0xc7, 0x00, 0x00, 0x40, 0x00, // mov rdi, 0x400000
    0x48, 0x89, 0x3f, // l: mov [rdi], rdi
    0x48, 0x81, 0xc7, 0x00, 0x00, 0x20, 0x00, // add rdi, REGION_SIZE
    0x48, 0x81, 0xff, 0x00, 0x00, 0x00, 0x20, // cmp rdi, MEMORY
    0x72, 0xed, // jb l
    0x66, 0xba, 0x00, 0x05, 0xef, // mov dx, PORT_CONSOLE; out dx, eax
    0xeb, 0xdf, // jmp to the first
];
const _: () = assert!(PORT_CONSOLE == 0x500 && MEMORY == 0x2000_0000);

/// Where the guest waits, in an `out`, until it is let on.
#[derive(Default)]
struct Gate {
    at: Mutex<At>,
    changed: Condvar,
}

#[derive(Default)]
struct At {
    /// How often it is to come here before it waits again.
    left: u64,
    /// When it was let on.
    since: Option<Instant>,
    /// How long it took when it last was.
    spent: Duration,
    waits: bool,
    is_over: bool,
}

impl PortHandler for Gate {
    fn out(&self, _vcpu: usize, _port: u16, _value: u32) -> PortAction {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if at.left > 0 {
            at.left -= 1;
            at.spent = at.since.map_or(Duration::ZERO, |since| since.elapsed());
        }
        if at.left == 0 {
            at.waits = true;
            self.changed.notify_all();
            let wait = |at: &mut At| at.left == 0 && !at.is_over;
            let on = self.changed.wait_while(at, wait);
            at = on.unwrap_or_else(PoisonError::into_inner);
            at.since = Some(Instant::now());
        }
        if at.is_over {
            return PortAction::Stop(StopReason::Exit { status: 0 });
        }
        PortAction::Continue
    }
}

impl Gate {
    /// Lets the guest on until it has come here `times` more. How long that took.
    fn pass(&self, times: u64) -> Duration {
        let at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |at: &mut At| !at.waits;
        let at = self.changed.wait_while(at, waits);
        let mut at = at.unwrap_or_else(PoisonError::into_inner);
        (at.left, at.waits) = (times, false);
        self.changed.notify_all();
        let at = self.changed.wait_while(at, waits);
        at.unwrap_or_else(PoisonError::into_inner).spent
    }

    fn end(&self) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        at.is_over = true;
        self.changed.notify_all();
    }
}

/// A guest, and its gate, which it must not wait at when it is to end.
struct Rig {
    vm: Vm,
    gate: Arc<Gate>,
}

impl Rig {
    fn new(accelerator: &Accelerator, code: &[u8]) -> Self {
        let frames = Frames::new(3 * MEMORY).expect("frames");
        let options = MemoryOptions {
            base_pages: true,
            placement: accelerator.placement(),
            ..MemoryOptions::default()
        };
        let plain = |window| Box::new(window) as _;
        let memory = Memory::with(&frames, MEMORY, Exclusive, options, plain).expect("memory");
        boot::write_page_tables(memory.ram(), MEMORY).expect("page tables");
        memory.ram().write(IMAGE_GPA, code).expect("code");
        let gate = Arc::new(Gate::default());
        let vm = Vm::builder(memory)
            .ports(Arc::clone(&gate) as _)
            .copy_ahead(false)
            .build(accelerator, 1)
            .expect("a virtual machine");
        vm.start(|vcpu| boot::low_entry(IMAGE_GPA, vcpu))
            .expect("a guest");
        Self { vm, gate }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.gate.end();
    }
}

fn exits(c: &mut Criterion) {
    let mut group = c.benchmark_group("exits");
    group.sample_size(10);
    match Kvm::open() {
        Ok(kvm) => all(&mut group, "kvm", &Accelerator::Kvm(kvm)),
        Err(error) => eprintln!("without kvm: {error}"),
    }
    match User::open() {
        Ok(user) => all(&mut group, "user", &Accelerator::User(user)),
        Err(error) => eprintln!("without user: {error}"),
    }
    group.finish();
}

fn all(group: &mut BenchmarkGroup<'_, WallTime>, by: &str, accelerator: &Accelerator) {
    group.throughput(Throughput::Elements(1));
    group.bench_function(format!("out, {by}"), |b| {
        let rig = Rig::new(accelerator, OUT);
        b.iter_custom(|rounds| rig.gate.pass(rounds));
    });
    group.bench_function(format!("kick to parked, {by}"), |b| {
        let rig = Rig::new(accelerator, SPIN);
        b.iter_custom(|rounds| {
            let mut spent = Duration::ZERO;
            for _ in 0..rounds {
                let paused = rig.vm.machine().pause(Capture::Nothing).expect("a pause");
                spent += paused.parked() - paused.kicked();
                paused.resume();
                // Into the guest, so that it is kicked out of there.
                let until = Instant::now() + Duration::from_micros(100);
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
            }
            spent
        });
    });
    group.throughput(Throughput::Elements(WRITES));
    for (name, keeps) in [("reused", false), ("copied", true)] {
        group.bench_function(format!("write faults, {name}, {by}"), |b| {
            let rig = Rig::new(accelerator, WRITE);
            // The first time there are no pages yet.
            rig.gate.pass(1);
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    // The vCPU waits at the gate: it writes nothing meanwhile.
                    let frozen = rig.vm.memory().space().fork().expect("a fork");
                    let kept = keeps.then_some(frozen);
                    spent += rig.gate.pass(1);
                    drop(kept);
                }
                spent
            });
        });
    }
}

criterion_group!(benches, exits);
criterion_main!(benches);
