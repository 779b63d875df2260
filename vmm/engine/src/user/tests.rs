//! Guests of a few hand-assembled instructions, as code of this process. There is one machine at a time.

#![expect(unsafe_code, reason = "a fault of the VMM's own")]

use std::cell::Cell;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard};

use ::guest::abi::{IMAGE_GPA, STACKS_GPA};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::causes::chain;
use crate::host::tests::alone_at_guest_addresses;
use crate::host::{LOWEST, Placement, Ram};
use crate::kvm::registers::tests::entry;
use crate::kvm::tests::code::{COUNT, EXIT_42, RDI_DATA, SPIN};
use crate::kvm::tests::guest::wait_until;
use crate::kvm::tests::{DATA, PORT_EVENT, PORT_EXIT, SOON};
use crate::kvm::{CrashReason, Outcome, PortAction, StateError, StateKind, StopReason, VcpuState};
use crate::memory::{Frames, Memory, MemoryError, MemoryOptions};
use crate::mm::Exclusive;
use crate::saved::Saved;
use crate::snapshot::Snapshot;
use crate::vcpus::Capture;
use crate::vm::{BuildError, Vm};

const MEMORY: u64 = 16 << 20;

/// A guest, and the word that there is no other.
struct Guest {
    // Dropped first.
    vm: Vm,
    outcomes: Receiver<(usize, Outcome)>,
    _alone: MutexGuard<'static, ()>,
}

fn memory(placement: Placement) -> Result<Memory, MemoryError> {
    let frames = Frames::new(4 * MEMORY).unwrap();
    let options = MemoryOptions {
        placement,
        ..MemoryOptions::default()
    };
    let plain = |window| Box::new(window) as _;
    Memory::with(&frames, MEMORY, Exclusive, options, plain)
}

/// The handler of this port faults.
const PORT_FAULT: u16 = 0x666;

/// A fault of the VMM's own.
fn fault() -> PortAction {
    // SAFETY: nothing is mapped there, and that is what this is about: it does not come back.
    unsafe { std::ptr::without_provenance::<u8>(8).read_volatile() };
    PortAction::Continue
}

struct Ports;

impl PortHandler for Ports {
    fn out(&self, _vcpu: usize, port: u16, value: u32) -> PortAction {
        match port {
            PORT_EXIT => PortAction::Stop(StopReason::Exit { status: value }),
            0x500 => PortAction::Continue,
            PORT_FAULT => fault(),
            _ => PortAction::Unknown,
        }
    }
}

impl Guest {
    /// A guest with `code` at [`IMAGE_GPA`] that runs.
    fn new(vcpus: usize, code: &[&[u8]]) -> Self {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        Self::with_doorbell(vcpus, code, &event)
    }

    fn with_doorbell(vcpus: usize, code: &[&[u8]], event: &EventFd) -> Self {
        let alone = alone_at_guest_addresses();
        let memory = memory(Placement::AtGuestAddresses).unwrap();
        memory.ram().write(IMAGE_GPA, &code.concat()).unwrap();
        let (sender, outcomes) = channel();
        let sender = Mutex::new(sender);
        let vm = Vm::builder(memory)
            .ports(Arc::new(Ports))
            .doorbell(PORT_EVENT, event)
            .copy_ahead(false)
            .on_stop(move |vcpu, outcome| {
                let _ = sender.lock().unwrap().send((vcpu, outcome));
            })
            .build(&User::open().unwrap(), vcpus)
            .unwrap();
        vm.start(|vcpu| entry(IMAGE_GPA, vcpu as u64)).unwrap();
        Self {
            vm,
            outcomes,
            _alone: alone,
        }
    }

    fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    fn word(&self, gpa: u64) -> u64 {
        let mut word = [0; 8];
        self.ram().read(gpa, &mut word).unwrap();
        u64::from_le_bytes(word)
    }

    fn outcome(&self) -> Outcome {
        self.outcomes.recv_timeout(SOON).expect("no outcome").1
    }

    /// How it crashed, and its registers then.
    fn crash(&self) -> (CrashReason, VcpuState, Vec<u8>) {
        match self.outcome() {
            Outcome::Crashed { reason, report } => (reason, report.state.unwrap(), report.code),
            other => panic!("{other}"),
        }
    }

    /// Registers of all vCPUs at one instant.
    fn states(&self) -> Vec<VcpuState> {
        let paused = self.vm.machine().pause(Capture::Registers).unwrap();
        paused.states().unwrap()
    }
}

/// `mov rsp, gpa`
fn set_rsp(gpa: u64) -> Vec<u8> {
    [&[0x48, 0xbc], &gpa.to_le_bytes()[..]].concat()
}

#[test]
fn a_guest_exits() {
    let guest = Guest::new(1, &[EXIT_42]);
    match guest.outcome() {
        Outcome::Stopped(StopReason::Exit { status }) => assert_eq!(status, 42),
        other => panic!("{other}"),
    }
}

#[test]
fn it_begins_with_the_registers_of_its_entry() {
    let guest = Guest::new(2, &[SPIN]);
    for (vcpu, state) in (0..).zip(guest.states()) {
        let (regs, entry) = (state.regs(), entry(IMAGE_GPA, vcpu));
        assert_eq!((regs.rip, regs.rsp), (entry.rip, entry.rsp));
        assert_eq!([regs.rdi, regs.rsi], entry.arguments);
        assert_eq!([regs.rax, regs.rbx, regs.rbp, regs.r15], [0; 4]);
        assert_eq!(regs.rflags & !(1 << 16), 0x202);
        assert_eq!((state.sregs().fs.base, state.sregs().gs.base), (0, 0));
        let extended = state.extended();
        assert_eq!((extended.control, extended.mxcsr), (0x37f, 0x1f80));
        assert_eq!((extended.xmm, extended.ymm), ([0; 32], [0; 32]));
        assert_eq!(state.kind(), StateKind::User);
    }
}

#[test]
fn what_it_writes_is_in_memory_and_in_no_snapshot_before() {
    let guest = Guest::new(1, &[COUNT]);
    let counted = || guest.word(DATA);
    wait_until("counting", || counted() > 1000);
    let frames = guest.vm.memory().frames();
    let told = |snapshot: &Snapshot| {
        let mut word = [0; 8];
        frames.read(snapshot.memory(), DATA, &mut word).unwrap();
        let in_memory = u64::from_le_bytes(word);
        let state = VcpuState::of_saved(&snapshot.vcpus()[0]).unwrap();
        let (rax, mm7) = (state.regs().rax, state.mm7());
        assert!(rax == mm7 || rax == mm7 + 1, "{rax} {mm7}");
        assert!(
            in_memory == mm7 || in_memory + 1 == mm7,
            "{in_memory} {mm7}"
        );
        in_memory
    };
    let mut snapshots = Vec::new();
    for _ in 0..100 {
        let (snapshot, _) = guest.vm.snapshot().unwrap();
        let at = told(&snapshot);
        snapshots.push((snapshot, at));
        wait_until("more", || counted() > at);
    }
    for (snapshot, at) in &snapshots {
        assert_eq!(told(snapshot), *at);
    }
    assert!(guest.vm.machine().stats().signals >= 100);
    let (first, at) = &snapshots[0];
    let before = counted();
    guest.vm.restore(first).unwrap();
    wait_until("going on", || counted() > *at);
    assert!(before > *at);
    for (snapshot, at) in &snapshots {
        assert_eq!(told(snapshot), *at);
    }
}

#[test]
fn no_kick_and_no_register_is_lost() {
    // Each lap the same number is in RAX, R15, XMM0, MM7, the bases of FS and GS, and the ID flag is set.
    let lap: &[&[u8]] = &[
        &[0x9c, 0x81, 0x0c, 0x24, 0, 0, 0x20, 0], // pushfq; or dword ptr [rsp], 1 << 21
        &[0x9d],                                  // popfq
        &[0x48, 0xff, 0xc0],                      // l: inc rax
        &[0x66, 0x48, 0x0f, 0x6e, 0xc0],          // movq xmm0, rax
        &[0x48, 0x0f, 0x6e, 0xf8],                // movq mm7, rax
        &[0xf3, 0x48, 0x0f, 0xae, 0xd0],          // wrfsbase rax
        &[0xf3, 0x48, 0x0f, 0xae, 0xd8],          // wrgsbase rax
        &[0x49, 0x89, 0xc7],                      // mov r15, rax
        &[0x48, 0x89, 0x04, 0x25, 0, 0, 0x40, 0], // mov [DATA], rax
        &[0xeb, 0xdd],                            // jmp l
    ];
    let guest = Guest::new(2, lap);
    let mut last = [0; 2];
    let mut wait = 1u64;
    for _ in 0..10_000 {
        // Not always at the same moment of what the thread does.
        wait = wait.wrapping_mul(6364136223846793005).wrapping_add(1);
        for _ in 0..wait >> 52 {
            std::hint::spin_loop();
        }
        let (snapshots, states) = (wait.is_multiple_of(16), guest.states());
        for (last, state) in last.iter_mut().zip(&states) {
            let (regs, sregs) = (state.regs(), state.sregs());
            let n = regs.rax;
            let written = [
                state.extended().xmm[0],
                state.mm7(),
                sregs.fs.base,
                sregs.gs.base,
                regs.r15,
            ];
            // In order: from some register on they are of the lap before.
            let new = written.iter().take_while(|value| **value == n).count();
            assert!(
                written[new..].iter().all(|&value| value + 1 == n),
                "{n} {written:x?}"
            );
            assert!(n == 0 || regs.rflags & 1 << 21 != 0);
            assert!(n >= *last, "{n} after {last}");
            *last = n;
        }
        if snapshots {
            guest.vm.snapshot().unwrap();
        }
    }
    assert!(last.iter().all(|&n| n > 0));
    assert!(guest.outcomes.try_recv().is_err());
}

#[test]
fn what_a_guest_must_not_do_is_a_crash_with_a_report() {
    let exception = |code: &[u8], what: &str| {
        let guest = Guest::new(1, &[&[0x90], code, SPIN]);
        let (reason, state, shown) = guest.crash();
        assert_eq!(reason.to_string(), what);
        assert!(shown.len() == 16 && state.kind() == StateKind::User);
        state.rip() - IMAGE_GPA
    };
    let nobody = |what: &str| format!("an exception nobody handles ({what})");
    assert_eq!(exception(&[0x0f, 0x0b], &nobody("an invalid opcode")), 1);
    let system_call = nobody("a system call: there is no kernel here");
    assert_eq!(exception(&[0x0f, 0x05], &system_call), 3);
    assert_eq!(exception(&[0xcd, 0x80], &system_call), 3);
    assert_eq!(exception(&[0xcc], &nobody("a breakpoint or trap")), 2);
    // xor ecx, ecx; div ecx
    let arithmetic = nobody("an arithmetic error");
    assert_eq!(exception(&[0x31, 0xc9, 0xf7, 0xf1], &arithmetic), 3);
    assert_eq!(exception(&[0xfa], &nobody("general protection")), 1);
    assert_eq!(exception(&[0xf4], "halted"), 1);
    assert_eq!(exception(&[0xe4, 0x42], "read from port 0x42"), 1);
    // mov dx, 0x999; out dx, al
    let nobodys = "wrote 0x0 to port 0x999, where nothing listens";
    assert_eq!(exception(&[0x66, 0xba, 0x99, 9, 0xee], nobodys), 5);
    // mov ecx, 3; rep outsd
    let string = "wrote 12 bytes at once to port 0x0";
    assert_eq!(exception(&[0xb9, 3, 0, 0, 0, 0xf3, 0x6f], string), 6);
    // mov [0], eax; mov eax, [MEMORY]
    let null = "wrote to gpa 0x0, where there is no memory";
    assert_eq!(exception(&[0x89, 0x04, 0x25, 0, 0, 0, 0], null), 1);
    let end = "read from gpa 0x1000000, where there is no memory";
    assert_eq!(exception(&[0x8b, 0x04, 0x25, 0, 0, 0, 1], end), 1);
    // mov rax, 1 << 63; mov [rax], eax
    let wild = [&[0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x80], &[0x89, 0x00][..]].concat();
    assert_eq!(exception(&wild, &nobody("general protection")), 11);
    // A trap flag: pushfq; or dword ptr [rsp], 1 << 8; popfq
    let trap = [0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d];
    assert!(exception(&trap, &nobody("a breakpoint or trap")) > 9);
}

#[test]
fn a_guest_that_exhausts_its_stack_or_jumps_into_the_vmms_memory_crashes() {
    // l: push rax; jmp l
    let guest = Guest::new(1, &[&[0x50, 0xeb, 0xfd]]);
    let (reason, state, _) = guest.crash();
    let (gpa, write) = (LOWEST - 8, true);
    assert_eq!(reason, CrashReason::Mmio { gpa, write });
    assert_eq!(state.regs().rsp, LOWEST);
    drop(guest);

    let bytes = Box::new([0xc3; 64]);
    let at = bytes.as_ptr() as u64;
    // mov rax, at; jmp rax
    let guest = Guest::new(1, &[&[0x48, 0xb8], &at.to_le_bytes(), &[0xff, 0xe0]]);
    let (reason, state, code) = guest.crash();
    let (gpa, write) = (at, false);
    assert_eq!(reason, CrashReason::Mmio { gpa, write });
    assert_eq!((state.rip(), code), (at, vec![]));
}

#[test]
fn a_wild_stack_pointer_is_nothing_to_the_vmm() {
    for rsp in [0, 8, 1 << 63, u64::MAX, STACKS_GPA] {
        let guest = Guest::new(1, &[&set_rsp(rsp), COUNT]);
        wait_until("counting", || guest.word(DATA) > 1000);
        let states = guest.states();
        assert_eq!(states[0].regs().rsp, rsp);
        guest.vm.snapshot().unwrap();
        let before = guest.word(DATA);
        wait_until("counting on", || guest.word(DATA) > before);
    }
}

#[test]
fn checks_of_alignment_stop_the_guest_alone() {
    // pushfq; or dword ptr [rsp], 1 << 18; popfq; then it counts, aligned.
    let guest = Guest::new(1, &[&[0x9c, 0x81, 0x0c, 0x24, 0, 0, 4, 0, 0x9d], COUNT]);
    wait_until("counting", || guest.word(DATA) > 1000);
    for _ in 0..20 {
        guest.vm.snapshot().unwrap();
        assert_ne!(guest.states()[0].regs().rflags & 1 << 18, 0);
    }
    drop(guest);
    // The same, and mov eax, [DATA + 1]
    let unaligned = [
        0x9c, 0x81, 0x0c, 0x24, 0, 0, 4, 0, 0x9d, 0x8b, 0x04, 0x25, 1, 0, 0x40, 0,
    ];
    let (reason, ..) = Guest::new(1, &[&unaligned, SPIN]).crash();
    let what = "memory that cannot be accessed so";
    assert_eq!(reason, CrashReason::Exception { what });
}

#[test]
fn a_doorbell_is_heard_and_no_handler_sees_it() {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    // mov dx, PORT_EVENT; out dx, al; out dx, ax; out dx, eax
    let ring: &[u8] = &[0x66, 0xba, 0x20, 0x05, 0xee, 0x66, 0xef, 0xef];
    let guest = Guest::with_doorbell(1, &[ring, EXIT_42], &event);
    assert!(matches!(guest.outcome(), Outcome::Stopped(_)));
    assert_eq!(event.read().unwrap(), 3);
    let again = guest.vm.machine().register_doorbell(PORT_EVENT, &event);
    assert!(matches!(again, Err(KvmError::Doorbell { .. })));
}

#[test]
fn there_is_one_at_a_time_and_the_second_says_why() {
    let guest = Guest::new(1, &[SPIN]);
    let error = chain(&memory(Placement::AtGuestAddresses).unwrap_err());
    assert!(
        error.contains("the addresses 0x10000 to 0x1000000"),
        "{error}"
    );
    assert!(error.contains("are taken, by "), "{error}");
    drop(guest);
    let guest = Guest::new(1, &[EXIT_42]);
    assert!(matches!(guest.outcome(), Outcome::Stopped(_)));
}

#[test]
fn a_window_elsewhere_is_refused() {
    let build = Vm::builder(memory(Placement::Anywhere).unwrap());
    let error = build.build(&User::open().unwrap(), 1).unwrap_err();
    assert!(
        matches!(error, BuildError::Kvm(KvmError::Placement)),
        "{error}"
    );
    if let Some(kvm) = crate::kvm::tests::kvm() {
        let _alone = alone_at_guest_addresses();
        let build = Vm::builder(memory(Placement::AtGuestAddresses).unwrap());
        let error = build.build(kvm, 1).unwrap_err();
        assert!(
            matches!(error, BuildError::Kvm(KvmError::Placement)),
            "{error}"
        );
    }
}

#[test]
fn a_state_of_kvms_is_refused_with_the_reason_and_one_of_ours_is_set_even_if_it_was_stored() {
    let guest = Guest::new(1, &[RDI_DATA, COUNT]);
    wait_until("counting", || guest.word(DATA) > 10);
    let (snapshot, _) = guest.vm.snapshot().unwrap();
    let with = |saved: Saved| Snapshot::new(Arc::clone(snapshot.memory()), vec![saved], Vec::new());
    let state = &snapshot.vcpus()[0];
    let stored = with(Saved::stored(state.version(), state.to_bytes()));
    guest.vm.restore(&stored).unwrap();

    let ours = VcpuState::of_saved(state).unwrap();
    let kvms = VcpuState::of(*ours.regs(), *ours.sregs(), ours.xsave().to_vec());
    let error = chain(&guest.vm.restore(&with(Saved::new(kvms))).unwrap_err());
    assert!(
        error.contains("was run by kvm, and this one is run by user"),
        "{error}"
    );
}

#[test]
fn registers_that_the_host_would_not_take_are_refused() {
    let refused = |change: fn(VcpuState) -> VcpuState| {
        let guest = Guest::new(1, &[SPIN]);
        let paused = guest.vm.machine().pause(Capture::Registers).unwrap();
        let state = change(paused.states().unwrap().remove(0));
        let tables = paused.page_tables().unwrap();
        match paused.restore(&[state], crate::kvm::Clock::Keep, &tables) {
            Err(KvmError::State { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    };
    let base = refused(|state| {
        let (regs, mut sregs) = (*state.regs(), *state.sregs());
        sregs.fs.base = 1 << 63;
        state.with_registers(regs, sregs)
    });
    assert!(
        matches!(base, StateError::Base { what: "fs", .. }),
        "{base}"
    );
    let area = refused(|state| state.with_xsave(vec![0; 100]));
    assert!(matches!(area, StateError::Xsave { .. }), "{area}");
}

#[test]
fn a_guest_that_spins_can_be_stopped() {
    let guest = Guest::new(4, &[SPIN]);
    drop(guest.states());
    guest.vm.machine().stop();
    guest.vm.machine().wait_until_stopped().unwrap();
    // Who is told to stop has no outcome.
    assert!(guest.outcomes.try_recv().is_err());
    assert!(guest.vm.machine().pause(Capture::Nothing).is_err());
}

#[test]
#[ignore = "ends the process: the next test has one for it"]
fn faults_on_a_vcpus_thread() {
    with_core();
    // mov dx, PORT_FAULT; out dx, al
    let guest = Guest::new(1, &[&[0x66, 0xba, 0x66, 0x06, 0xee], SPIN]);
    panic!("{}", guest.outcome());
}

#[test]
#[ignore = "ends the process: the next test has one for it"]
fn faults_beside_a_guest() {
    with_core();
    let guest = Guest::new(1, &[COUNT]);
    wait_until("counting", || guest.word(DATA) > 1000);
    fault();
}

/// Lets this process have as large a core as it may.
fn with_core() {
    let limit = getrlimit(Resource::Core);
    let most = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Core, most).unwrap();
}

/// Whether a core is a file in the folder of whoever crashes.
fn cores_are_files() -> bool {
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let is_name = !pattern.trim().is_empty() && !pattern.starts_with(['|', '/', '@']);
    is_name && getrlimit(Resource::Core).maximum != Some(0)
}

#[test]
fn a_fault_of_the_vmms_own_ends_it_as_ever() {
    for test in ["faults_on_a_vcpus_thread", "faults_beside_a_guest"] {
        let folder = tempfile::tempdir().unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .current_dir(folder.path())
            .args(["--ignored", "--exact", &format!("user::tests::{test}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGSEGV), "{test}: {status}");
        if cores_are_files() {
            assert!(status.core_dumped(), "{test}: {status}");
            let core = fs::read_dir(folder.path()).unwrap().next();
            let core = fs::metadata(core.unwrap().unwrap().path()).unwrap();
            // Without the guest's memory.
            assert!((1..MEMORY).contains(&core.len()), "{test}: {core:?}");
        }
    }
}

/// They have handlers that use thread-local variables, which a guest's FS base is not for.
#[test]
fn signals_of_others_go_to_other_threads() {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    std::thread_local! {
        static HERE: Cell<u64> = const { Cell::new(0) };
    }
    let note = || {
        HERE.set(HERE.get() + 1);
        SEEN.fetch_add(1, Ordering::Relaxed);
    };
    // SAFETY: the handler adds to numbers, and no more.
    unsafe { signal_hook::low_level::register(libc::SIGALRM, note) }.unwrap();
    // Bases of FS and GS that are no addresses of anything, and counting.
    let bases = [
        &[0x48, 0xc7, 0xc3, 8, 0, 0, 0][..], // mov rbx, 8
        &[0xf3, 0x48, 0x0f, 0xae, 0xd3],     // wrfsbase rbx
        &[0xf3, 0x48, 0x0f, 0xae, 0xdb],     // wrgsbase rbx
    ];
    let guest = Guest::new(4, &[&bases.concat(), COUNT]);
    let every = |micros| libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: micros,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: micros,
        },
    };
    let set = |timer: libc::itimerval| {
        // SAFETY: plain data goes in, and nothing comes out.
        let done = unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) };
        assert_eq!(done, 0);
    };
    set(every(200));
    wait_until("signals", || SEEN.load(Ordering::Relaxed) > 500);
    let states = guest.states();
    set(every(0));
    for state in states {
        assert_eq!((state.sregs().fs.base, state.sregs().gs.base), (8, 8));
    }
    let before = guest.word(DATA);
    wait_until("counting on", || guest.word(DATA) > before);
}
