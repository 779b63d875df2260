//! A VM in a child process, which is a fork of this one. The child has all memory as it was, and makes a VM
//! of KVM's around it: those of its parent are of the parent's memory.
#![expect(unsafe_code, reason = "what a child says is in memory that both have")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use palimpsest::kvm::{Memslot, VcpuState};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use rustix::thread::futex;
use rustix::time::{ClockId, clock_gettime};

use crate::clones::MeasureError;
use crate::clones::bare::{Bare, Exit, Registers};
use crate::clones::gate::PATIENCE;
use crate::technique::{Anonymous, Child, wait_for_the_end};

/// The child has said nothing yet.
const SILENT: u32 = 0;
/// Its guest has run.
const RAN: u32 = 1;
/// Its guest came out of KVM as it should not.
const ASTRAY: u32 = 2;
/// KVM has refused something.
const REFUSED: u32 = 3;

/// What the child says, in memory that both have.
struct Said {
    /// One of the above.
    what: AtomicU32,
    /// When its guest had run, in nanoseconds of the monotonic clock.
    at: AtomicI64,
}

/// Memory of a [`Said`].
struct Shared(NonNull<Said>);

const PAGE: usize = 4096;

impl Shared {
    fn new() -> Result<Self, MeasureError> {
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let mapped = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
        };
        let host = |source: rustix::io::Errno| MeasureError::Host {
            what: "share memory with a child",
            source: source.into(),
        };
        let mapped = mapped.map_err(host)?;
        let said = NonNull::new(mapped.cast()).ok_or(rustix::io::Errno::NOMEM);
        said.map(Self).map_err(host)
    }

    fn said(&self) -> &Said {
        // SAFETY: mapped until `self` is dropped, aligned as pages are, zeros are a `Said`, and all of it is
        // atomic: the other process writes there.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`, of which nothing is borrowed any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

/// A VM in a child process.
pub(super) struct ChildVm {
    // Ends before the memory goes by which it speaks.
    child: Child,
    memory: Arc<Anonymous>,
    shared: Shared,
}

impl ChildVm {
    /// Forks this process while nobody writes to `memory`, and has the child run a VM in `state` on it.
    pub(super) fn fork(
        bare: &Bare,
        memory: &Arc<Anonymous>,
        state: &VcpuState,
    ) -> Result<Self, MeasureError> {
        let registers = Registers::from(state);
        let address = memory.host_address().as_ptr().expose_provenance() as u64;
        let len = Memslot::len(&**memory);
        let shared = Shared::new()?;
        let said = shared.said();
        let child = Child::fork(|| {
            // SAFETY: this process keeps its memory to its end, and touches it by the VM alone.
            let made = unsafe { bare.create(address, len) };
            let ran = made.and_then(|mut vm| {
                vm.set(&registers)?;
                let exit = vm.run()?;
                Ok((vm, exit))
            });
            let what = match &ran {
                Ok((_, Exit::Out)) => RAN,
                Ok((_, Exit::Other)) => ASTRAY,
                Err(_) => REFUSED,
            };
            say(said, what);
            // With its VM.
            wait_for_the_end()
        });
        let child = child.map_err(|source| MeasureError::Host {
            what: "fork the VMM",
            source,
        })?;
        Ok(Self {
            child,
            memory: Arc::clone(memory),
            shared,
        })
    }

    /// Waits until its guest has run. When that was, in nanoseconds of the monotonic clock.
    pub(super) fn first_instruction(&self) -> Result<i64, MeasureError> {
        const LOOK: Duration = Duration::from_secs(1);
        let said = self.shared.said();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match said.what.load(Ordering::Acquire) {
                SILENT => {}
                RAN => return Ok(said.at.load(Ordering::Relaxed)),
                REFUSED => return Err(MeasureError::Ended("kvm refused it to a child".to_owned())),
                _ => return Err(MeasureError::Ended("it came out of kvm astray".to_owned())),
            }
            if self.child.has_ended() {
                return Err(MeasureError::Ended("its process has ended".to_owned()));
            }
            if Instant::now() > deadline {
                return Err(MeasureError::Silent);
            }
            let look = rustix::time::Timespec {
                tv_sec: LOOK.as_secs() as i64,
                tv_nsec: 0,
            };
            // It has spoken meanwhile, or does, or is looked at again.
            let _ = futex::wait(&said.what, futex::Flags::empty(), SILENT, Some(&look));
        }
    }

    /// Copies its memory out.
    pub(super) fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MeasureError> {
        let address = self.memory.base().as_ptr().wrapping_add(gpa as usize);
        let read = self.child.read(address, buf);
        read.map_err(|source| MeasureError::Host {
            what: "read the child's memory",
            source,
        })
    }
}

/// In the child: says `what` happened just now. Allocates nothing.
fn say(said: &Said, what: u32) {
    said.at.store(monotonic(), Ordering::Relaxed);
    said.what.store(what, Ordering::Release);
    let _ = futex::wake(&said.what, futex::Flags::empty(), 1);
}

/// Nanoseconds of the clock that all processes have.
pub(super) fn monotonic() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}
