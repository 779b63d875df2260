//! `fork()` of the VMM: the child is the snapshot. The kernel write-protects and shares every page, and
//! copies it when a vCPU writes it, inside KVM_RUN: nothing of ours is in the way.
//!
//! With transparent huge pages the fork copies 512 times fewer entries. The first write to a shared huge
//! page splits it, and from then on its 4 KiB pages are copied one by one. Between two measurements it is
//! put together again (`settle`), so that the pause is that of a guest in huge pages every time: khugepaged
//! would need minutes for that.
//!
//! A device that writes through the mapping has no guarantee here: what it writes between the fork and the
//! first fault of its page is right, but a page that the *kernel* holds for it (io_uring, vhost, VFIO) would
//! be the matter of Linux's own rules.
#![expect(
    unsafe_code,
    reason = "forks a process with many threads, and reads another's memory"
)]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use palimpsest::kvm::{GuestRam, Memslot};

use super::anonymous::{Anonymous, PageSize, PlainDevice};
use super::{BenchDevice, SnapshotMemory, Technique, TechniqueError, host};

pub(super) struct Fork {
    memory: Arc<Anonymous>,
    pages: PageSize,
}

impl Fork {
    pub(super) fn new(memory: u64, pages: PageSize) -> Result<Self, TechniqueError> {
        Ok(Self {
            memory: Anonymous::new(memory, pages)?,
            pages,
        })
    }
}

impl Technique for Fork {
    fn slot(&self) -> Arc<dyn Memslot> {
        Arc::clone(&self.memory) as _
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        Arc::clone(&self.memory) as _
    }

    fn populate(&self, gpas: Range<u64>) -> Result<(), TechniqueError> {
        self.memory.populate(gpas)
    }

    fn snapshot(&self) -> Result<Box<dyn SnapshotMemory + '_>, TechniqueError> {
        let child = Child::fork(hold).map_err(host("fork the VMM"))?;
        Ok(Box::new(Forked {
            memory: &self.memory,
            child,
        }))
    }

    /// The kernel does not say. Whoever wants to know looks at how much memory the two processes
    /// have that they do not share.
    fn copied(&self) -> Option<u64> {
        None
    }

    fn settle(&self) -> Result<(), TechniqueError> {
        match self.pages {
            PageSize::Small => Ok(()),
            PageSize::Huge => self.memory.collapse(),
        }
    }

    fn device(&self, _gpas: Range<u64>) -> Result<Box<dyn BenchDevice>, TechniqueError> {
        Ok(Box::new(PlainDevice(Arc::clone(&self.memory))))
    }
}

/// A process that has a copy of this one's memory.
pub(crate) struct Child {
    pid: libc::pid_t,
}

impl Child {
    /// Forks this process, and has `life` be what the child does; it ends when that returns, when this is
    /// dropped, or with the thread that called. `life` must allocate nothing and take no lock: another thread
    /// may have been holding it when the process was copied.
    pub(crate) fn fork(life: impl FnOnce()) -> io::Result<Self> {
        // SAFETY: asks for nothing but a number.
        let parent = unsafe { libc::syscall(libc::SYS_getpid) };
        // SAFETY: as fork(2), without what the C library does around it: no handlers run and no locks are
        // taken, in neither process. The child runs on a copy of this stack, and never returns from here.
        match unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                if is_child_of(parent) {
                    life();
                }
                leave()
            }
            pid => Ok(Self {
                pid: pid as libc::pid_t,
            }),
        }
    }
}

/// In the child: has it end with its parent. Whether that lives.
fn is_child_of(parent: libc::c_long) -> bool {
    // SAFETY: system calls with numbers for arguments.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // The parent may have died before that.
        libc::syscall(libc::SYS_getppid) == parent
    }
}

/// Closes all files, and waits for the end.
fn hold() {
    // SAFETY: system calls with numbers for arguments. Descriptors are closed in this process alone; nothing
    // here uses them, and so no file, pipe or VM is kept open by the snapshot.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
    wait_for_the_end();
}

/// Waits, in a child, until it is ended. Allocates nothing.
pub(crate) fn wait_for_the_end() -> ! {
    loop {
        // SAFETY: a system call without arguments.
        unsafe { libc::syscall(libc::SYS_pause) };
    }
}

fn leave() -> ! {
    // SAFETY: a system call with a number for an argument.
    unsafe { libc::syscall(libc::SYS_exit_group, 0) };
    // Not reached; `exit_group` does not return.
    loop {
        std::hint::spin_loop();
    }
}

impl Child {
    /// Copies `buf.len()` bytes at `address` of the child out.
    ///
    /// # Errors
    /// If it has no such memory, or has ended.
    pub(crate) fn read(&self, address: *const u8, buf: &mut [u8]) -> io::Result<()> {
        let local = libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        let remote = libc::iovec {
            iov_base: address.cast_mut().cast(),
            iov_len: buf.len(),
        };
        // SAFETY: writes to `buf` alone. The address is one of the child's, which the kernel checks.
        let read = unsafe { libc::process_vm_readv(self.pid, &local, 1, &remote, 1, 0) };
        match read {
            -1 => Err(io::Error::last_os_error()),
            count if count as usize == buf.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        let id = self.pid as libc::id_t;
        // SAFETY: the kernel writes to `info`, which is that large. The child is left to be waited for.
        unsafe {
            libc::waitid(libc::P_PID, id, info.as_mut_ptr(), flags) != 0
                || info.assume_init().si_pid() != 0
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a child of this process that nobody else waits for, so the number is still its.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            while libc::waitpid(self.pid, std::ptr::null_mut(), 0) == -1
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
        }
    }
}

struct Forked<'a> {
    memory: &'a Anonymous,
    child: Child,
}

impl SnapshotMemory for Forked<'_> {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), TechniqueError> {
        let address = self.memory.base().as_ptr().wrapping_add(gpa as usize);
        self.child
            .read(address, buf)
            .map_err(host("read the child's memory"))
    }

    fn process(&self) -> Option<i32> {
        Some(self.child.pid)
    }
}
