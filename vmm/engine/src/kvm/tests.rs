//! Tests on real KVM, with guests of a few hand-assembled instructions.
//!
//! Without a usable `/dev/kvm` they say that they were skipped; with `CI=true` in the environment that is a
//! failure.

#![expect(unsafe_code, reason = "the mappings behind a guest's memory")]

use std::any::Any;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{IMAGE_GPA, PAGE_SIZE, PAGE_TABLES_GPA, STACKS_GPA};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect, munmap};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::registers::tests::entry;
use super::*;
use crate::causes::Cause;
use crate::vcpus::Capture;

/// Memory of most guests here. Not a multiple of 2 MiB: the page tables map 3 MiB more than there is.
const MEMORY: u64 = 9 << 20;
/// Where guests here have their data.
const DATA: u64 = 0x40_0000;
const PORT_EXIT: u16 = 0x501;
const PORT_DATA: u16 = 0x500;
const PORT_EVENT: u16 = 0x520;
/// Longer than anything here takes.
const SOON: Duration = Duration::from_secs(60);

/// KVM, or `None` if the test is to be skipped.
fn kvm() -> Option<&'static Kvm> {
    static KVM: OnceLock<Result<Kvm, PlatformError>> = OnceLock::new();
    match KVM.get_or_init(Kvm::open) {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
            assert!(!in_ci, "kvm is needed in CI: {error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// The KVM of this test, or the test returns.
macro_rules! need_kvm {
    () => {
        match kvm() {
            Some(kvm) => kvm,
            None => return,
        }
    };
}

/// How [`Ram::write_fault`] answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Faults {
    Resolve,
    Fail,
    SayWritable,
}

/// Where each vCPU begins: at `rip`.
fn from(rip: u64) -> impl Fn(usize) -> EntryState {
    move |vcpu| entry(rip, vcpu as u64)
}

/// Guest memory in a memfd: mapped once for the VMM, and once as the window, page by page read-only or
/// writable.
struct Ram {
    direct: NonNull<u8>,
    window: NonNull<u8>,
    len: u64,
    writable: Vec<AtomicBool>,
    resolved: AtomicU64,
    /// Held while a page is made writable: whoever finds it so finds it so in the window, too.
    resolving: Mutex<()>,
    faults: Faults,
}

// SAFETY: the pointers are to mappings that live as long as this does, and all access through them is
// volatile.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    fn new(len: u64, faults: Faults) -> Arc<Self> {
        let memfd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, len).unwrap();
        let map = || {
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a new mapping, where the kernel has room.
            let start = unsafe {
                mmap(
                    ptr::null_mut(),
                    len as usize,
                    prot,
                    MapFlags::SHARED,
                    &memfd,
                    0,
                )
            };
            NonNull::new(start.unwrap().cast::<u8>()).unwrap()
        };
        Arc::new(Self {
            direct: map(),
            window: map(),
            len,
            writable: (0..len / PAGE_SIZE)
                .map(|_| AtomicBool::new(true))
                .collect(),
            resolved: AtomicU64::new(0),
            resolving: Mutex::new(()),
            faults,
        })
    }

    fn protect(&self, gpa: u64, len: u64, flags: MprotectFlags) {
        assert!(gpa + len <= self.len);
        // SAFETY: inside the window, which nothing but the guest uses.
        unsafe {
            let start = self.window.as_ptr().add(gpa as usize);
            mprotect(start.cast(), len as usize, flags).unwrap();
        }
    }

    /// Makes every page from `gpa` on read-only for the guest.
    fn write_protect(&self, gpa: u64) {
        for page in &self.writable[(gpa / PAGE_SIZE) as usize..] {
            page.store(false, Ordering::SeqCst);
        }
        self.protect(gpa, self.len - gpa, MprotectFlags::READ);
    }

    fn word(&self, gpa: u64) -> u64 {
        let mut word = [0; 8];
        self.read(gpa, &mut word).unwrap();
        u64::from_le_bytes(word)
    }

    /// Pages made writable that are no page tables: those are written as well where there is nested paging.
    fn resolved(&self) -> u64 {
        self.resolved.load(Ordering::SeqCst)
    }

    fn make_writable(&self, gfn: u64) -> bool {
        let _resolving = self.resolving.lock().unwrap();
        if self.writable[gfn as usize].swap(true, Ordering::SeqCst) {
            return false;
        }
        let both = MprotectFlags::READ | MprotectFlags::WRITE;
        self.protect(gfn * PAGE_SIZE, PAGE_SIZE, both);
        let tables = PAGE_TABLES_GPA / PAGE_SIZE;
        if !(tables..tables + 3).contains(&gfn) {
            self.resolved.fetch_add(1, Ordering::SeqCst);
        }
        true
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        for start in [self.direct, self.window] {
            // SAFETY: mapped in `new`, with this length; the machine that used the window is gone.
            unsafe { munmap(start.as_ptr().cast(), self.len as usize) }.unwrap();
        }
    }
}

// SAFETY: the mapping lives as long as this does, and nothing here reads or writes through it.
unsafe impl Memslot for Ram {
    fn host_address(&self) -> NonNull<u8> {
        self.window
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl GuestRam for Ram {
    fn len(&self) -> u64 {
        self.len
    }

    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        match self.faults {
            Faults::Fail => return Err("out of frames".into()),
            Faults::SayWritable => return Ok(false),
            Faults::Resolve => {}
        }
        Ok(self.make_writable(gfn))
    }

    /// What is pinned stays writable here only until it is protected again.
    fn pin(&self, gpa: u64, len: u64) -> Result<Box<dyn Any + Send>, Cause> {
        for gfn in gpa / PAGE_SIZE..(gpa + len).div_ceil(PAGE_SIZE) {
            self.make_writable(gfn);
        }
        Ok(Box::new(()))
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        if gpa + buf.len() as u64 > self.len {
            return Err("outside memory".into());
        }
        for (index, byte) in buf.iter_mut().enumerate() {
            // SAFETY: in bounds, checked above.
            *byte = unsafe {
                self.direct
                    .as_ptr()
                    .add(gpa as usize + index)
                    .read_volatile()
            };
        }
        Ok(())
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        if gpa + buf.len() as u64 > self.len {
            return Err("outside memory".into());
        }
        for (index, byte) in buf.iter().enumerate() {
            // SAFETY: in bounds, checked above.
            unsafe {
                self.direct
                    .as_ptr()
                    .add(gpa as usize + index)
                    .write_volatile(*byte)
            };
        }
        Ok(())
    }
}

/// Writes down what comes to ports; [`PORT_EXIT`] stops the vCPU.
#[derive(Default)]
struct Ports {
    written: Mutex<Vec<(usize, u16, u32)>>,
}

impl Ports {
    fn written(&self) -> Vec<(usize, u16, u32)> {
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
struct Guest {
    machine: Machine,
    outcomes: Receiver<(usize, Outcome)>,
    ports: Arc<Ports>,
    ram: Arc<Ram>,
}

impl Guest {
    /// A guest with `code` at [`IMAGE_GPA`], not started.
    fn new(kvm: &Kvm, vcpus: usize, code: &[&[u8]]) -> Self {
        Self::with(kvm, vcpus, code, Faults::Resolve, Arc::default())
    }

    fn with(kvm: &Kvm, vcpus: usize, code: &[&[u8]], faults: Faults, ports: Arc<Ports>) -> Self {
        let ram = Ram::new(MEMORY, faults);
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

    fn start(&self) {
        self.machine.start(from(IMAGE_GPA)).unwrap();
    }

    fn outcome(&self) -> (usize, Outcome) {
        self.outcomes.recv_timeout(SOON).expect("no outcome")
    }

    /// Waits until the guest has exited, and returns its status.
    fn exit_status(&self) -> u32 {
        match self.outcome() {
            (_, Outcome::Stopped(StopReason::Exit { status })) => status,
            (vcpu, other) => panic!("vcpu {vcpu}: {other}"),
        }
    }

    /// Waits until the guest has crashed.
    fn crash(&self) -> (CrashReason, CrashReport) {
        match self.outcome() {
            (_, Outcome::Crashed { reason, report }) => (reason, *report),
            (vcpu, other) => panic!("vcpu {vcpu}: {other}"),
        }
    }

    /// Waits until the VMM has given up.
    fn failure(&self) -> VcpuRunError {
        match self.outcome() {
            (_, Outcome::Failed { error, .. }) => error,
            (vcpu, other) => panic!("vcpu {vcpu}: {other}"),
        }
    }
}

fn machine(
    kvm: &Kvm,
    ram: &Arc<Ram>,
    vcpus: usize,
    handler: Arc<dyn PortHandler>,
) -> (Machine, Receiver<(usize, Outcome)>) {
    let (sender, outcomes) = channel();
    let sender = Mutex::new(sender);
    let on_stop: OnStop = Box::new(move |vcpu, outcome| {
        let _ = sender.lock().unwrap().send((vcpu, outcome));
    });
    let window = Arc::clone(ram) as _;
    let ram: Arc<Ram> = Arc::clone(ram);
    let machine = Machine::new(kvm, window, ram, vcpus, handler, on_stop).unwrap();
    (machine, outcomes)
}

fn wait_until(what: &str, ready: impl Fn() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < SOON, "no {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

// Pieces of guest code.

/// `mov dx, 0x501; mov eax, 42; out dx, eax; jmp $`
const EXIT_42: &[u8] = &[0x66, 0xba, 0x01, 0x05, 0xb8, 42, 0, 0, 0, 0xef, 0xeb, 0xfe];
/// `mov rdi, 0x400000`
const RDI_DATA: &[u8] = &[0x48, 0xc7, 0xc7, 0x00, 0x00, 0x40, 0x00];
/// `jmp $`
const SPIN: &[u8] = &[0xeb, 0xfe];
/// `l: inc rax; movq mm7, rax; mov [0x400000], rax; jmp l`
const COUNT: &[u8] = &[
    0x48, 0xff, 0xc0, 0x48, 0x0f, 0x6e, 0xf8, 0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00, 0xeb,
    0xef,
];

#[test]
fn boots_in_ring_3_and_exits() {
    let kvm = need_kvm!();
    eprintln!("{}", kvm.platform());
    // mov ax, cs; mov dx, 0x500; out dx, ax; mov al, 0xfe; out dx, al
    let code: &[u8] = &[
        0x66, 0x8c, 0xc8, 0x66, 0xba, 0x00, 0x05, 0x66, 0xef, 0xb0, 0xfe, 0xee,
    ];
    let guest = Guest::new(kvm, 1, &[code, EXIT_42]);
    eprintln!("msrs left out: {:x?}", guest.machine.left_out());
    assert!(matches!(
        guest.machine.pause(Capture::Nothing),
        Err(KvmError::NotStarted)
    ));
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    let written = guest.ports.written();
    let [(0, PORT_DATA, cs), (0, PORT_DATA, 0xfe), (0, PORT_EXIT, 42)] = written[..] else {
        panic!("{written:x?}");
    };
    assert_eq!(cs & 3, 3, "ring of the code segment");
    assert_eq!(guest.machine.stats().port_exits, 3);
    assert!(matches!(
        guest.machine.start(from(IMAGE_GPA)),
        Err(KvmError::AlreadyStarted)
    ));
    assert!(matches!(
        guest.machine.pause(Capture::Nothing),
        Err(KvmError::Stopped { vcpu: 0 })
    ));
}

#[test]
fn entry_state_is_what_the_abi_says() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[SPIN]);
    guest.start();
    let states = guest.machine.pause(Capture::Registers).unwrap().states();
    for (vcpu, state) in states.unwrap().iter().enumerate() {
        assert_eq!(state.rip(), IMAGE_GPA);
        let regs = state.regs();
        assert_eq!(regs.rdi, guest::abi::BOOT_INFO_GPA);
        assert_eq!(regs.rsi, vcpu as u64);
        assert_eq!(regs.rsp, guest::abi::stack_top(vcpu as u64));
        // Interrupts on. The I/O privilege level is not looked at: PVM does not keep it.
        assert_eq!(regs.rflags & 0x202, 0x202, "{:x}", regs.rflags);
        let rest = [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rbp, regs.r8, regs.r15,
        ];
        assert_eq!(rest, [0; 7]);
        assert_eq!(state.mm7(), 0);
        assert!(
            state.is_confined_to_ring_3(),
            "captures would read everything every time"
        );
    }
}

#[test]
fn a_write_fault_a_page() {
    let kvm = need_kvm!();
    // mov ecx, 256; l: mov [rdi], rcx; add rdi, 4096; dec ecx; jnz l
    let code: &[u8] = &[
        0xb9, 0x00, 0x01, 0x00, 0x00, 0x48, 0x89, 0x0f, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,
        0xff, 0xc9, 0x75, 0xf2,
    ];
    let guest = Guest::new(kvm, 1, &[RDI_DATA, code, EXIT_42]);
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    assert_eq!(guest.ram.resolved(), 256);
    let stats = guest.machine.stats();
    assert_eq!(stats.rungs.of(Rung::Operand), 256);
    assert!((256..260).contains(&stats.write_faults), "{stats:?}");
    for page in 0..256 {
        assert_eq!(guest.ram.word(DATA + page * PAGE_SIZE), 256 - page);
    }
}

/// Every way of storing, from pages that are all read-only. What counts is that the guest gets through.
#[test]
fn every_kind_of_store_is_resolved() {
    let kvm = need_kvm!();
    // mov rdi, 0x400000, moved on by `page` pages and `offset`.
    let at = |page: u32, offset: u32| {
        let address = DATA as u32 + page * 4096 + offset;
        [&[0x48, 0xc7, 0xc7][..], &address.to_le_bytes()].concat()
    };
    let mut page = 0;
    let mut code = Vec::new();
    let mut expected = 0;
    // Offset in the page, instruction, pages written.
    let stores: &[(u32, &[u8], u64)] = &[
        (8, &[0x48, 0x89, 0x07], 1),                         // mov [rdi], rax
        (4092, &[0x48, 0x89, 0x07], 2),                      // the same across pages
        (4090, &[0xf3, 0x0f, 0x7f, 0x07], 2),                // movdqu [rdi], xmm0
        (0, &[0x66, 0x0f, 0x7f, 0x07], 1),                   // movdqa [rdi], xmm0
        (0, &[0xf0, 0x48, 0x0f, 0xc1, 0x07], 1),             // lock xadd [rdi], rax
        (0, &[0xf0, 0x48, 0x0f, 0xc7, 0x0f], 1),             // lock cmpxchg16b [rdi]
        (0, &[0xf0, 0x0f, 0xb1, 0x07], 1),                   // lock cmpxchg [rdi], eax
        (0, &[0x48, 0x87, 0x07], 1),                         // xchg [rdi], rax
        (0, &[0xff, 0x07], 1),                               // inc dword [rdi]
        (0, &[0x80, 0x27, 0x01], 1),                         // and byte [rdi], 1
        (0, &[0x0f, 0x94, 0x07], 1),                         // sete [rdi]
        (0, &[0x0f, 0xc3, 0x07], 1),                         // movnti [rdi], eax
        (4088, &[0x66, 0x0f, 0xf7, 0xc0], 0), // maskmovdqu xmm0, xmm0: all masked out
        (0, &[0xb9, 0x00, 0x30, 0x00, 0x00, 0xf3, 0xaa], 3), // mov ecx, 0x3000; rep stosb
        // mov esi, 0x200000; mov ecx, 0x400; rep movsq
        (
            0,
            &[0xbe, 0, 0, 0x20, 0, 0xb9, 0, 4, 0, 0, 0xf3, 0x48, 0xa5],
            2,
        ),
        // std; mov ecx, 0x201; rep stosq; cld: downwards, into the page below.
        (
            4096,
            &[0xfd, 0xb9, 0x01, 0x02, 0, 0, 0xf3, 0x48, 0xab, 0xfc],
            2,
        ),
        // mov ecx, 0x8000; bts [rdi], rcx: the page behind.
        (
            0,
            &[0xb9, 0x00, 0x80, 0x00, 0x00, 0x48, 0x0f, 0xab, 0x0f],
            1,
        ),
        // mov rcx, -1; lock btc [rdi], rcx: the page below.
        (
            4096,
            &[
                0x48, 0xc7, 0xc1, 0xff, 0xff, 0xff, 0xff, 0xf0, 0x48, 0x0f, 0xbb, 0x0f,
            ],
            1,
        ),
        // mov rsp, rdi; push rax; call $+5
        (4096 + 4, &[0x48, 0x89, 0xfc, 0x50, 0xe8, 0, 0, 0, 0], 2),
        // lea rsp, [rdi + 0x2008]; enter 0x1000, 0
        (
            0,
            &[0x48, 0x8d, 0xa7, 0x08, 0x20, 0, 0, 0xc8, 0x00, 0x10, 0x00],
            2,
        ),
        (0, &[0x0f, 0xae, 0x07], 1),                   // fxsave [rdi]
        (0, &[0xdd, 0x37], 1),                         // fnsave [rdi]
        (0, &[0x0f, 0xae, 0x1f], 1),                   // stmxcsr [rdi]
        (0, &[0xdb, 0xe3, 0xd9, 0xe8, 0xdb, 0x3f], 1), // fninit; fld1; fstp tbyte [rdi]
        (0, &[0x48, 0x0f, 0x7f, 0x3f], 1),             // movq [rdi], mm7
    ];
    for (offset, store, pages) in stores {
        code.push(at(page, *offset));
        code.push(store.to_vec());
        expected += pages;
        page += 4;
    }
    let code: Vec<&[u8]> = code.iter().map(Vec::as_slice).chain([EXIT_42]).collect();
    let guest = Guest::new(kvm, 1, &code);
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    // A masked-out store may fault or not, which is up to the CPU.
    let found = guest.ram.resolved();
    assert!(
        (expected..=expected + 2).contains(&found),
        "{found} pages, {expected} expected"
    );
}

#[test]
fn avx_and_xsave_stores_are_resolved() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[SPIN]);
    guest.start();
    let paused = guest.machine.pause(Capture::Nothing).unwrap();
    let osxsave = paused.states().unwrap()[0].sregs().cr4 & (1 << 18) != 0;
    paused.resume();
    drop(guest);
    if !osxsave {
        eprintln!("skipped: guests have no xsave");
        return;
    }
    let code: &[u8] = &[
        0x31, 0xc9, 0x0f, 0x01, 0xd0, // xor ecx, ecx; xgetbv
        0x66, 0xba, 0x00, 0x05, 0xef, // mov dx, 0x500; out dx, eax
        0xb8, 0x03, 0x00, 0x00, 0x00, 0x31, 0xd2, // mov eax, 3; xor edx, edx
        0x0f, 0xae, 0x27, // xsave [rdi]
        0x48, 0x81, 0xc7, 0xf0, 0x2f, 0x00, 0x00, // add rdi, 0x2ff0
        0xf3, 0x0f, 0x7f, 0x07, // movdqu [rdi], xmm0
    ];
    let guest = Guest::new(kvm, 1, &[RDI_DATA, code, EXIT_42]);
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    let xcr0 = guest.ports.written()[0].2;
    eprintln!("guest xcr0: {xcr0:#x}");
    assert_eq!(xcr0 & 3, 3);
    assert_ne!(
        guest.ram.word(DATA + 24) as u32,
        0,
        "mxcsr in the xsave area"
    );
    if xcr0 & 4 == 0 {
        return;
    }
    // lea rax, [rdi - 8]; vpcmpeqd ymm0, ymm0, ymm0; vmovdqu [rax + 4096], ymm0; vmaskmovps [rax + 0x4000],
    // ymm0, ymm0
    let code: &[u8] = &[
        0x48, 0x8d, 0x47, 0xf8, 0xc5, 0xfd, 0x76, 0xc0, 0xc5, 0xfe, 0x7f, 0x80, 0x00, 0x10, 0x00,
        0x00, 0xc4, 0xe2, 0x7d, 0x2e, 0x80, 0x00, 0x40, 0x00, 0x00,
    ];
    let guest = Guest::new(kvm, 1, &[RDI_DATA, code, EXIT_42]);
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    assert_eq!(guest.ram.resolved(), 4);
}

#[test]
fn pause_captures_and_restore_rewinds() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    guest.start();
    wait_until("counting", || guest.ram.word(DATA) > 1000);

    let paused = guest.machine.pause(Capture::Registers).unwrap();
    let first = paused.states().unwrap();
    let memory = guest.ram.word(DATA);
    let (rax, mm7) = (first[0].regs().rax, first[0].mm7());
    assert!(rax > 1000);
    assert!(mm7 == rax || mm7 == rax - 1, "mm7 {mm7}, rax {rax}");
    assert!(
        memory == mm7 || memory == mm7 - 1,
        "memory {memory}, mm7 {mm7}"
    );
    thread::sleep(Duration::from_millis(20));
    assert_eq!(
        guest.ram.word(DATA),
        memory,
        "the guest ran while it was paused"
    );
    assert!(paused.kicked() <= paused.parked());
    let running = paused.resume();
    assert!(running <= Instant::now());

    wait_until("running on", || guest.ram.word(DATA) > rax + 1000);
    let paused = guest.machine.pause(Capture::Nothing).unwrap();
    let later = paused.states().unwrap();
    assert!(later[0].mm7() > mm7);
    let tables = paused.page_tables().unwrap();
    paused.restore(&first, Clock::Keep, &tables).unwrap();
    let again = paused.states().unwrap();
    assert_eq!(again[0].regs(), first[0].regs());
    assert_eq!(again[0].sregs(), first[0].sregs());
    assert_eq!(again[0].mm7(), mm7);
    assert!(again[0].tsc() > later[0].tsc() || later[0].tsc().is_none());
    // `later` was captured with the privileged registers kept from `first`, `again` with all of them read.
    let steady = |state: &VcpuState| {
        let value = serde_json::to_value(state).unwrap();
        ["xcrs", "debug", "mp_state", "events", "left_out"].map(|name| value[name].clone())
    };
    assert_eq!(steady(&again[0]), steady(&later[0]));
    guest.ram.write(DATA, &0_u64.to_le_bytes()).unwrap();
    drop(paused);
    // It counts on from where it was rewound to.
    wait_until("counting again", || guest.ram.word(DATA) > 0);
    assert!(guest.ram.word(DATA) >= mm7);

    assert!(matches!(
        guest.machine.pause(Capture::Nothing).unwrap().restore(
            &[],
            Clock::Keep,
            &PageTables::default()
        ),
        Err(KvmError::StateCount {
            states: 0,
            vcpus: 1
        })
    ));
}

#[test]
fn a_captured_guest_runs_on_in_another_machine() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[COUNT]);
    guest.start();
    wait_until("counting", || guest.ram.word(DATA) > 1000);
    let paused = guest.machine.pause(Capture::Registers).unwrap();
    let states = paused.states().unwrap();
    let text = serde_json::to_string(&states).unwrap();
    let states: Vec<VcpuState> = serde_json::from_str(&text).unwrap();
    let ram = Ram::new(MEMORY, Faults::Resolve);
    let mut bytes = vec![0; MEMORY as usize];
    guest.ram.read(0, &mut bytes).unwrap();
    ram.write(0, &bytes).unwrap();

    let (clone, _outcomes) = machine(kvm, &ram, 2, Arc::new(Ports::default()));
    assert!(matches!(
        clone.start_from(&states[..1], Clock::Rewind),
        Err(KvmError::StateCount { .. })
    ));
    clone.start_from(&states, Clock::Rewind).unwrap();
    let before = states.iter().map(VcpuState::mm7).max().unwrap();
    wait_until("the clone's counting", || ram.word(DATA) > before + 1000);
    // Both write the same word, so that it says nothing of the slower one.
    wait_until("both vcpus' counting", || {
        let now = clone.pause(Capture::Registers).unwrap().states().unwrap();
        let mut pairs = states.iter().zip(&now);
        pairs.all(|(state, now)| now.mm7() > state.mm7() && now.tsc() >= state.tsc())
    });
}

#[test]
fn a_state_that_kvm_refuses_stops_the_machine() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    guest.start();
    let paused = guest.machine.pause(Capture::Registers).unwrap();
    let text = serde_json::to_string(&paused.states().unwrap()).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value[0]["xsave"] = serde_json::json!([1, 2, 3]);
    let states: Vec<VcpuState> = serde_json::from_value(value).unwrap();
    let error = paused
        .restore(&states, Clock::Keep, &PageTables::default())
        .unwrap_err();
    assert!(matches!(
        error,
        KvmError::State {
            vcpu: 0,
            source: StateError::XsaveSize { words: 3 }
        }
    ));
    drop(paused);
    wait_until("end", || {
        matches!(
            guest.machine.pause(Capture::Nothing),
            Err(KvmError::Stopped { vcpu: 0 })
        )
    });
}

/// A vCPU that is stopped at an `out` has done all of it or nothing: after every pause, and after every
/// restore of what was just captured, the numbers go on without a gap or a repeat.
#[test]
fn no_port_write_is_lost_or_repeated() {
    let kvm = need_kvm!();
    // mov dx, 0x500; l: out dx, eax; inc eax; jmp l
    let code: &[u8] = &[0x66, 0xba, 0x00, 0x05, 0xef, 0xff, 0xc0, 0xeb, 0xfb];
    let guest = Guest::new(kvm, 1, &[code]);
    guest.start();
    for round in 0..200 {
        let paused = guest.machine.pause(Capture::Registers).unwrap();
        let states = paused.states().unwrap();
        let written = guest.ports.written().len() as u64;
        let past_out = states[0].rip() == IMAGE_GPA + 5;
        assert_eq!(states[0].regs().rax + u64::from(past_out), written);
        if round % 2 == 0 {
            paused
                .restore(&states, Clock::Keep, &PageTables::default())
                .unwrap();
        }
        drop(paused);
        thread::sleep(Duration::from_micros(200));
    }
    for (index, (_, _, value)) in guest.ports.written().into_iter().enumerate() {
        assert_eq!(value as usize, index);
    }
}

#[test]
fn an_exception_is_a_crash_with_its_code() {
    let kvm = need_kvm!();
    // nop; ud2
    let guest = Guest::new(kvm, 1, &[&[0x90, 0x0f, 0x0b, 0x48, 0x89, 0x07]]);
    guest.start();
    let (reason, report) = guest.crash();
    assert_eq!(reason, CrashReason::Shutdown);
    if kvm.platform().kvm == "svm" {
        let text = report.to_string();
        assert!(
            text.starts_with("where it was this host does not tell"),
            "{text}"
        );
        return;
    }
    let state = report.state.as_ref().unwrap();
    assert_eq!(state.rip(), IMAGE_GPA + 1);
    assert_eq!(report.code.len(), 16);
    assert_eq!(report.code[..5], [0x0f, 0x0b, 0x48, 0x89, 0x07]);
    let text = report.to_string();
    assert!(text.contains("rip 0000000000200001"), "{text}");
    assert!(text.contains("code at rip: 0f 0b 48"), "{text}");
}

#[test]
fn what_guests_must_not_do_is_a_crash() {
    let kvm = need_kvm!();
    let crash = |code: &[u8]| {
        let guest = Guest::new(kvm, 1, &[code, SPIN]);
        guest.start();
        guest.crash().0
    };
    // in al, 0x60
    assert_eq!(crash(&[0xe4, 0x60]), CrashReason::PortRead { port: 0x60 });
    // mov [0x9f0000], eax; mov eax, [0x9f0000]: mapped, but behind the end of memory.
    let gpa = MEMORY + 0xf_0000;
    assert_eq!(
        crash(&[0x89, 0x04, 0x25, 0x00, 0x00, 0x9f, 0x00]),
        CrashReason::Mmio { gpa, write: true }
    );
    assert_eq!(
        crash(&[0x8b, 0x04, 0x25, 0x00, 0x00, 0x9f, 0x00]),
        CrashReason::Mmio { gpa, write: false }
    );
    // hlt is for ring 0; a load from what is not mapped; a jump to nowhere.
    assert_eq!(crash(&[0xf4]), CrashReason::Shutdown);
    assert_eq!(
        crash(&[0x8b, 0x04, 0x25, 0, 0, 0, 0x70]),
        CrashReason::Shutdown
    );
    assert_eq!(
        crash(&[0x31, 0xc0, 0x48, 0xf7, 0xd0, 0xff, 0xe0]),
        CrashReason::Shutdown
    );
}

#[test]
fn a_fault_that_is_no_write_is_a_failure() {
    let kvm = need_kvm!();
    // mov rax, [rdi]
    let guest = Guest::new(kvm, 1, &[RDI_DATA, &[0x48, 0x8b, 0x07], SPIN]);
    guest.ram.protect(DATA, PAGE_SIZE, MprotectFlags::empty());
    guest.start();
    assert!(matches!(
        guest.failure(),
        VcpuRunError::Fault { source: WriteFaultError::Stuck { instruction, .. } } if instruction == "mov"
    ));
}

#[test]
fn a_fault_that_comes_back_for_ever_is_a_failure() {
    let kvm = need_kvm!();
    let store = [RDI_DATA, &[0x48, 0x89, 0x07], SPIN];
    let guest = Guest::with(kvm, 1, &store, Faults::SayWritable, Arc::default());
    guest.ram.write_protect(DATA);
    guest.start();
    assert!(matches!(
        guest.failure(),
        VcpuRunError::Fault { source: WriteFaultError::Stuck { tried, .. } }
            if tried.contains("operands (1 pages)")
    ));
    let guest = Guest::with(kvm, 1, &store, Faults::Fail, Arc::default());
    guest.ram.write_protect(DATA);
    guest.start();
    assert!(matches!(
        guest.failure(),
        VcpuRunError::Memory { gfn, .. } if gfn == DATA / PAGE_SIZE
    ));
}

/// Instructions that ring 3 may not execute where the host has UMIP, and that KVM then emulates: stores of 2
/// bytes come to the VMM as MMIO at an address that is memory, those of descriptor tables are tried again
/// inside `KVM_RUN` until the page is writable.
#[test]
fn stores_that_kvm_emulates_are_carried_out() {
    let kvm = need_kvm!();
    let stores: [(&str, &[u8], u64); 5] = [
        ("sldt", &[0x66, 0x0f, 0x00, 0x07], 2),
        ("str", &[0x66, 0x0f, 0x00, 0x0f], 2),
        ("smsw", &[0x66, 0x0f, 0x01, 0x27], 2),
        ("sgdt", &[0x0f, 0x01, 0x07], 10),
        ("sidt", &[0x0f, 0x01, 0x0f], 10),
    ];
    for (name, store, len) in stores {
        let guest = Guest::new(kvm, 1, &[RDI_DATA, store, EXIT_42]);
        let before = 0x5555_5555_5555_5555_u64;
        for word in 0..3 {
            guest
                .ram
                .write(DATA + word * 8, &before.to_le_bytes())
                .unwrap();
        }
        guest.ram.write_protect(DATA);
        guest.start();
        assert_eq!(guest.exit_status(), 42, "{name}");
        assert!(guest.ram.resolved() > 0, "{name}");
        let mut stored = [0; 24];
        guest.ram.read(DATA, &mut stored).unwrap();
        let (stored, rest) = stored.split_at(len as usize);
        assert_ne!(
            stored,
            &before.to_le_bytes().repeat(2)[..len as usize],
            "{name}"
        );
        assert!(rest.iter().all(|byte| *byte == 0x55), "{name}: {rest:x?}");
        let stats = guest.machine.stats();
        let found = stats.emulated_stores + stats.rungs.of(Rung::Operand);
        assert!(found > 0, "{name}: {stats:?}");
    }
}

/// A guest that waits for a word at [`FLAG`]. At 1 it sets the entry of its page directory that maps
/// [`ELSEWHERE`] to the word at [`ENTRY`]; at 1 and at 3 it tells at [`FOUND`] what it reads there, and sets
/// the flag to 2.
const TABLE_CHANGER: &[u8] = &[
    0x8b, 0x04, 0x25, 0x00, 0x10, 0x80, 0x00, // wait: mov eax, [FLAG]
    0x83, 0xf8, 0x01, 0x74, 0x09, // cmp eax, 1; je change
    0x83, 0xf8, 0x03, 0x74, 0x14, // cmp eax, 3; je look
    0xf3, 0x90, 0xeb, 0xeb, // pause; jmp wait
    0x48, 0x8b, 0x1c, 0x25, 0x10, 0x10, 0x80, 0x00, // change: mov rbx, [ENTRY]
    0x48, 0x89, 0x1c, 0x25, 0x20, 0x23, 0x01, 0x00, // mov [SLOT], rbx
    0x48, 0x8b, 0x1c, 0x25, 0x00, 0x00, 0x80, 0x0c, // look: mov rbx, [ELSEWHERE]
    0x48, 0x89, 0x1c, 0x25, 0x08, 0x10, 0x80, 0x00, // mov [FOUND], rbx
    0xc7, 0x04, 0x25, 0x00, 0x10, 0x80, 0x00, 2, 0, 0, 0, // mov dword [FLAG], 2
    0xeb, 0xbe, // jmp wait
];
const FLAG: u64 = 0x80_1000;
const FOUND: u64 = FLAG + 8;
const ENTRY: u64 = FLAG + 16;
/// The entry of the page directory for 2 MiB that have no memory of their own.
const SLOT: u64 = PAGE_TABLES_GPA + 0x2000 + 100 * 8;

/// The guest reads by the tables it has after a restore: neither a vCPU's TLB nor KVM's shadow of other
/// tables is left.
#[test]
fn a_restore_of_page_tables_is_seen() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[TABLE_CHANGER]);
    let put = |gpa, word: u64| guest.ram.write(gpa, &word.to_le_bytes()).unwrap();
    // Present, writable, for ring 3, accessed, dirty, huge.
    let to = |gpa: u64| gpa | 0b1110_0111;
    put(DATA, 0xaaaa);
    put(DATA + 0x20_0000, 0xbbbb);
    put(SLOT, to(DATA));
    put(ENTRY, to(DATA + 0x20_0000));
    guest.start();
    let paused = guest.machine.pause(Capture::Registers).unwrap();
    let states = paused.states().unwrap();
    drop(paused);
    // Nothing was read there before the change, so that no old translation can be left that only `invlpg`
    // would end.
    put(FLAG, 1);
    wait_until("change", || guest.ram.word(FLAG) == 2);
    assert_eq!(guest.ram.word(FOUND), 0xbbbb);

    let paused = guest.machine.pause(Capture::Nothing).unwrap();
    let tables = paused.page_tables().unwrap();
    put(SLOT, to(DATA));
    put(FLAG, 3);
    paused.restore(&states, Clock::Keep, &tables).unwrap();
    drop(paused);
    wait_until("look", || guest.ram.word(FLAG) == 2);
    assert_eq!(guest.ram.word(FOUND), 0xaaaa);
}

#[test]
fn a_scatter_reaches_read_only_pages() {
    let kvm = need_kvm!();
    if !std::arch::is_x86_feature_detected!("avx512f") {
        eprintln!("skipped: this cpu has no scatter");
        return;
    }
    // kxnorw k1, k1, k1; vmovdqu32 zmm1, [rdi + 0x100]; vpbroadcastd zmm0, edi; vpscatterdd [rdi + zmm1]
    // {k1}, zmm0
    let code: &[u8] = &[
        0xc5, 0xf4, 0x46, 0xc9, 0x62, 0xf1, 0x7e, 0x48, 0x6f, 0x4f, 0x04, 0x62, 0xf2, 0x7d, 0x48,
        0x7c, 0xc7, 0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x04, 0x0f,
    ];
    let guest = Guest::new(kvm, 1, &[RDI_DATA, code, EXIT_42]);
    for index in 0..16_u64 {
        let offset = (index * 3 * PAGE_SIZE) as u32;
        guest
            .ram
            .write(DATA + 0x100 + index * 4, &offset.to_le_bytes())
            .unwrap();
    }
    guest.ram.write_protect(DATA);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    for index in 0..16 {
        let gpa = DATA + index * 3 * PAGE_SIZE;
        assert_eq!(guest.ram.word(gpa) as u32, DATA as u32, "element {index}");
    }
    assert_eq!(guest.ram.resolved(), 16);
}

/// A CPU, or the shadow MMU in its place, that must set accessed and dirty bits in tables that are read-only.
#[test]
fn accessed_and_dirty_bits_are_set_in_read_only_tables() {
    let kvm = need_kvm!();
    // mov eax, [rdi]; mov [rdi + 8], eax
    let guest = Guest::new(
        kvm,
        1,
        &[RDI_DATA, &[0x8b, 0x07, 0x89, 0x47, 0x08], EXIT_42],
    );
    let slot = PAGE_TABLES_GPA + 0x2000 + 2 * 8;
    let clear = guest.ram.word(slot) & !0b110_0000;
    guest.ram.write(slot, &clear.to_le_bytes()).unwrap();
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    assert_eq!(guest.ram.word(slot), clear | 0b110_0000);
}

/// A signal that is queued would be refused here, as it would be once anybody of the same user has filled the
/// queue.
#[test]
fn kicks_arrive_where_no_signal_can_be_queued() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[SPIN]);
    guest.start();
    let before = getrlimit(Resource::Sigpending);
    let none = Rlimit {
        current: Some(0),
        ..before
    };
    setrlimit(Resource::Sigpending, none).unwrap();
    let pauses = (0..20).map(|_| guest.machine.pause(Capture::Nothing).map(drop));
    let pauses: Result<(), _> = pauses.collect();
    setrlimit(Resource::Sigpending, before).unwrap();
    pauses.unwrap();
}

#[test]
fn a_spinning_guest_pauses_200_times() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[SPIN]);
    guest.start();
    let mut worst = Duration::ZERO;
    for round in 0..200 {
        let capture = if round % 2 == 0 {
            Capture::Registers
        } else {
            Capture::Nothing
        };
        let paused = guest.machine.pause(capture).unwrap();
        worst = worst.max(paused.parked() - paused.kicked());
        if round % 4 == 0 {
            assert_eq!(paused.states().unwrap().len(), 2);
        }
        paused.resume();
    }
    eprintln!("slowest kick to parked: {worst:?}");
    guest.machine.stop();
    wait_until("end", || {
        matches!(
            guest.machine.pause(Capture::Nothing),
            Err(KvmError::Stopped { .. })
        )
    });
    assert!(
        guest.outcomes.try_recv().is_err(),
        "a vcpu that is told to stop has no outcome"
    );
}

#[test]
fn signals_that_mean_nothing_are_passed_over() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    guest.start();
    for _ in 0..500 {
        guest.machine.kick_for_nothing();
        thread::yield_now();
    }
    let before = guest.ram.word(DATA);
    wait_until("counting", || guest.ram.word(DATA) > before + 1000);
    let states = guest.machine.pause(Capture::Registers).unwrap().states();
    assert!(states.unwrap()[0].mm7() > 0);
}

#[test]
fn a_doorbell_signals_an_event() {
    let kvm = need_kvm!();
    // mov dx, 0x520; mov ecx, 5; l: out dx, eax; dec ecx; jnz l
    let code: &[u8] = &[
        0x66, 0xba, 0x20, 0x05, 0xb9, 0x05, 0x00, 0x00, 0x00, 0xef, 0xff, 0xc9, 0x75, 0xfb,
    ];
    let guest = Guest::new(kvm, 1, &[code, EXIT_42]);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.machine.register_doorbell(PORT_EVENT, &event).unwrap();
    assert!(matches!(
        guest.machine.register_doorbell(PORT_EVENT, &event),
        Err(KvmError::Doorbell {
            port: PORT_EVENT,
            ..
        })
    ));
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    assert_eq!(event.read().unwrap(), 5);
    assert_eq!(guest.ports.written(), [(0, PORT_EXIT, 42)]);
}

/// Two vCPUs write the same pages while these are write-protected again and again. At every pause registers
/// and memory agree on how often.
#[test]
fn two_vcpus_lose_no_increment() {
    let kvm = need_kvm!();
    // l: mov eax, ecx; and eax, 0x3f; shl eax, 12; lock inc qword [rdi + rax]; inc rcx; jmp l
    let code: &[u8] = &[
        0x89, 0xc8, 0x83, 0xe0, 0x3f, 0xc1, 0xe0, 0x0c, 0xf0, 0x48, 0xff, 0x04, 0x07, 0x48, 0xff,
        0xc1, 0xeb, 0xee,
    ];
    let guest = Guest::new(kvm, 2, &[RDI_DATA, code]);
    guest.start();
    for _ in 0..200 {
        let paused = guest.machine.pause(Capture::Registers).unwrap();
        let states = paused.states().unwrap();
        let counted: u64 = states.iter().map(|state| state.regs().rcx).sum();
        let done: u64 = (0..64)
            .map(|page| guest.ram.word(DATA + page * PAGE_SIZE))
            .sum();
        // Each vCPU may stand between its increment of memory and that of its register.
        assert!(
            (counted..=counted + 2).contains(&done),
            "{done} done, {counted} counted"
        );
        guest.ram.write_protect(DATA);
        let resolved = guest.ram.resolved();
        drop(paused);
        thread::sleep(Duration::from_millis(1));
        // On a busy host that may not have been enough for a single store.
        wait_until("fault", || guest.ram.resolved() > resolved);
    }
    let stats = guest.machine.stats();
    assert!(stats.write_faults >= guest.ram.resolved() / 2 && guest.ram.resolved() >= 200);
    // A vCPU that is still parked is not kicked, which here is none of them.
    assert_eq!(stats.kicks, 400);
}

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
fn vcpus_that_end_are_waited_for() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[SPIN]);
    guest.start();
    guest.machine.stop();
    guest.machine.wait_until_stopped().unwrap();
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

#[test]
fn machines_that_never_start_are_dropped() {
    let kvm = need_kvm!();
    for vcpus in [1, 2, 16] {
        drop(Guest::new(kvm, vcpus, &[SPIN]));
    }
    let ram = Ram::new(MEMORY, Faults::Resolve);
    for vcpus in [0, MAX_VCPUS + 1] {
        let ram: Arc<Ram> = Arc::clone(&ram);
        let ports = Arc::new(Ports::default());
        let error = Machine::new(
            kvm,
            Arc::clone(&ram) as _,
            ram,
            vcpus,
            ports,
            Box::new(|_, _| {}),
        )
        .unwrap_err();
        assert!(matches!(error, KvmError::VcpuCount { .. }));
    }
}

/// What pausing costs here. Not a check: the numbers are for whoever reads them.
#[test]
fn pause_times() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    guest.start();
    let mut times: [Vec<Duration>; 4] = Default::default();
    for _ in 0..200 {
        let paused = guest.machine.pause(Capture::Registers).unwrap();
        let (kicked, parked) = (paused.kicked(), paused.parked());
        paused.states().unwrap();
        let captured = Instant::now();
        let running = paused.resume();
        times[0].push(parked - kicked);
        times[1].push(captured - parked);
        times[2].push(running - captured);
        times[3].push(running - kicked);
        thread::sleep(Duration::from_micros(300));
    }
    for (name, times) in ["parked", "captured", "resumed", "whole"]
        .iter()
        .zip(&mut times)
    {
        times.sort();
        eprintln!("{name}: median {:?}, worst {:?}", times[100], times[199]);
    }
    // The tables and the stack are the guest's, and nothing here has touched them.
    assert_ne!(guest.ram.word(PAGE_TABLES_GPA), 0);
    assert_eq!(guest.ram.word(STACKS_GPA), 0);
}
