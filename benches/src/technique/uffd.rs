//! userfaultfd write-protect: QEMU's background snapshot (`migration/ram.c`,
//! `ram_write_tracking_start`), and what forkd does.
//!
//! While vCPUs are stopped all of memory is write-protected with one ioctl. A vCPU that writes then waits in
//! the kernel, inside KVM_RUN; a thread of the VMM reads the faults, as many at a time as there are, copies
//! each page to the snapshot and takes its protection away, which wakes the vCPU.
//!
//! What QEMU does beside is left out, to its advantage: it also walks all of memory and writes it to a file,
//! on the same thread that resolves faults.
#![expect(
    unsafe_code,
    reason = "userfaultfd's ioctls, and copies of guest memory"
)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use guest::abi::PAGE_SIZE;
use palimpsest::kvm::{GuestRam, Memslot};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use super::anonymous::{Anonymous, PageSize, PlainDevice};
use super::{BenchDevice, SnapshotMemory, Technique, TechniqueError, host};

// include/uapi/linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(0xaa, 0x00);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<UffdioWriteprotect>(0xaa, 0x06);

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// Faults read at a time.
const BATCH: usize = 64;
/// How often the handler looks whether it is to end, in milliseconds.
const LOOK_UP: i32 = 50;

pub(super) struct Uffd {
    shared: Arc<FaultHandler>,
    pages: PageSize,
    handler: Option<JoinHandle<()>>,
}

/// The side of the handler thread, which the snapshots share.
struct FaultHandler {
    uffd: OwnedFd,
    memory: Arc<Anonymous>,
    /// The snapshot's copies, at the same offsets. What was not copied has no memory here.
    copies: Arc<Anonymous>,
    /// Also what makes a snapshot one instant: a fault is resolved before it, or after it.
    state: Mutex<SnapshotState>,
    copied: AtomicU64,
    stop: AtomicBool,
}

struct SnapshotState {
    /// There is a snapshot.
    active: bool,
    /// By page, whether it was copied for the snapshot.
    copied: Vec<bool>,
}

impl Uffd {
    pub(super) fn new(memory: u64, pages: PageSize) -> Result<Self, TechniqueError> {
        let shared = Arc::new(FaultHandler {
            uffd: open()?,
            memory: Anonymous::new(memory, pages)?,
            copies: Anonymous::new(memory, PageSize::Small)?,
            state: Mutex::new(SnapshotState {
                active: false,
                copied: vec![false; (memory / PAGE_SIZE) as usize],
            }),
            copied: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let mut register = UffdioRegister {
            start: shared.start(),
            len: memory,
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: the struct is the ioctl's; the range is guest memory, whose faults the handler
        // resolves until it is gone.
        unsafe {
            ioctl(
                &shared.uffd,
                Updater::<UFFDIO_REGISTER, _>::new(&mut register),
            )
        }
        .map_err(host("register guest memory with userfaultfd"))?;
        let handler = thread::Builder::new()
            .name("uffd".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.serve()
            })
            .map_err(host("start the fault handler"))?;
        Ok(Self {
            shared,
            pages,
            handler: Some(handler),
        })
    }
}

/// A userfaultfd that tells of write-protect faults, the kernel's own accesses (KVM's) included.
fn open() -> Result<OwnedFd, TechniqueError> {
    let unavailable = |why: String| TechniqueError::Unavailable { why };
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: it does nothing until memory is registered.
    let uffd = unsafe { userfaultfd(flags) }.map_err(|error| match error {
        Errno::PERM => unavailable(
            "userfaultfd is not allowed: run as root, or set vm.unprivileged_userfaultfd to 1"
                .to_owned(),
        ),
        Errno::NOSYS => unavailable("this kernel has no userfaultfd".to_owned()),
        error => host("open a userfaultfd")(error),
    })?;
    let mut api = UffdioApi {
        api: UFFD_API,
        features: UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        ioctls: 0,
    };
    // SAFETY: the struct is the ioctl's.
    match unsafe { ioctl(&uffd, Updater::<UFFDIO_API, _>::new(&mut api)) } {
        Ok(()) => Ok(uffd),
        Err(Errno::INVAL) => Err(unavailable(
            "this kernel's userfaultfd cannot write-protect".to_owned(),
        )),
        Err(error) => Err(host("set up a userfaultfd")(error)),
    }
}

impl FaultHandler {
    fn start(&self) -> u64 {
        self.memory.base().as_ptr().expose_provenance() as u64
    }

    fn lock(&self) -> MutexGuard<'_, SnapshotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Protects `range`, or takes its protection away and wakes who waits for that.
    fn protect(&self, range: Range<u64>, mode: u64) -> io::Result<()> {
        loop {
            let mut protect = UffdioWriteprotect {
                start: self.start() + range.start,
                len: range.end - range.start,
                mode,
            };
            // SAFETY: the struct is the ioctl's, the range is registered, and no byte changes.
            let done = unsafe {
                ioctl(
                    &self.uffd,
                    Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut protect),
                )
            };
            match done {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The handler thread's life.
    fn serve(&self) {
        let mut messages = [Message::default(); BATCH];
        while !self.stop.load(Ordering::Relaxed) {
            let mut poll = libc::pollfd {
                fd: self.uffd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd.
            if unsafe { libc::poll(&mut poll, 1, LOOK_UP) } <= 0 {
                continue;
            }
            // SAFETY: any bytes are a message, and as many are written as fit.
            let read = unsafe {
                libc::read(
                    self.uffd.as_raw_fd(),
                    messages.as_mut_ptr().cast(),
                    size_of_val(&messages),
                )
            };
            let count = read.max(0) as usize / size_of::<Message>();
            for message in &messages[..count] {
                if message.event == UFFD_EVENT_PAGEFAULT
                    && message.flags & UFFD_PAGEFAULT_FLAG_WP != 0
                    && let Err(error) = self.resolve(message.address)
                {
                    // The vCPU waits for ever: whoever measures will run out of patience, and this says why.
                    eprintln!(
                        "error: cannot resolve the fault at {:#x}: {error}",
                        message.address
                    );
                }
            }
        }
    }

    /// Copies the page at host address `address` to the snapshot, if there is one that lacks
    /// it, and lets it be written.
    fn resolve(&self, address: u64) -> io::Result<()> {
        let offset = (address - self.start()) / PAGE_SIZE * PAGE_SIZE;
        let mut state = self.lock();
        let page = (offset / PAGE_SIZE) as usize;
        if state.active && !state.copied[page] {
            // SAFETY: the page is in both mappings, which do not overlap. It is protected, so nobody writes
            // to it; the copy is looked at with `state` locked only.
            unsafe {
                ptr::copy_nonoverlapping(
                    self.memory.base().as_ptr().add(offset as usize),
                    self.copies.base().as_ptr().add(offset as usize),
                    PAGE_SIZE as usize,
                );
            }
            state.copied[page] = true;
            self.copied.fetch_add(PAGE_SIZE, Ordering::Relaxed);
        }
        self.protect(offset..offset + PAGE_SIZE, 0)
    }
}

impl Technique for Uffd {
    fn slot(&self) -> Arc<dyn Memslot> {
        Arc::clone(&self.shared.memory) as _
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        Arc::clone(&self.shared.memory) as _
    }

    /// All of memory must be there before it is protected: what is not is not protected either.
    /// QEMU reads every page first.
    fn populate(&self, gpas: Range<u64>) -> Result<(), TechniqueError> {
        self.shared.memory.populate(gpas)
    }

    fn snapshot(&self) -> Result<Box<dyn SnapshotMemory + '_>, TechniqueError> {
        let mut state = self.shared.lock();
        if state.active {
            return Err(TechniqueError::Busy);
        }
        self.shared
            .protect(0..self.shared.memory.bytes(), UFFDIO_WRITEPROTECT_MODE_WP)
            .map_err(host("write-protect guest memory with userfaultfd"))?;
        state.active = true;
        Ok(Box::new(Protected(&self.shared)))
    }

    fn copied(&self) -> Option<u64> {
        Some(self.shared.copied.load(Ordering::Relaxed))
    }

    /// As QEMU ends a snapshot: all protection goes.
    fn settle(&self) -> Result<(), TechniqueError> {
        let shared = &self.shared;
        shared
            .protect(0..shared.memory.bytes(), 0)
            .map_err(host("take guest memory's protection away"))?;
        match self.pages {
            PageSize::Small => Ok(()),
            PageSize::Huge => shared.memory.collapse(),
        }
    }

    fn device(&self, _gpas: Range<u64>) -> Result<Box<dyn BenchDevice>, TechniqueError> {
        Ok(Box::new(PlainDevice(Arc::clone(&self.shared.memory))))
    }
}

impl Drop for Uffd {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(handler) = self.handler.take() {
            let _ = handler.join();
        }
    }
}

/// The snapshot: what was copied, and for the rest guest memory, which is still protected.
struct Protected<'a>(&'a FaultHandler);

impl SnapshotMemory for Protected<'_> {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), TechniqueError> {
        let state = self.0.lock();
        let mut done = 0;
        while done < buf.len() {
            let at = gpa + done as u64;
            let end = buf.len().min(done + (PAGE_SIZE - at % PAGE_SIZE) as usize);
            let copied = state.copied.get((at / PAGE_SIZE) as usize).copied();
            let memory = match copied {
                Some(true) => &self.0.copies,
                _ => &self.0.memory,
            };
            memory
                .read(at, &mut buf[done..end])
                .map_err(TechniqueError::Memory)?;
            done = end;
        }
        Ok(())
    }
}

impl Drop for Protected<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.active = false;
        state.copied.fill(false);
        drop(state);
        // Pages that are protected still are let go when they are written, and are protected again by
        // the next snapshot anyway.
        if let Err(error) = self.0.copies.discard() {
            eprintln!("warning: {error}");
        }
    }
}
