//! Gets a vCPU out of the guest.
//!
//! A signal interrupts `KVM_RUN`, but one that arrives just before the call would be lost. So its handler
//! also sets `immediate_exit` in the vCPU's `kvm_run`, which makes the next `KVM_RUN` return at once.
//!
//! The signal is SIGURG. A real-time signal is queued, and sending one fails once the queue of its user is
//! full, whoever filled it (`ulimit -i`, `__sigqueue_alloc` in `kernel/signal.c`); a standard signal is a
//! bit, which is always there to be set. Nobody else uses this one unless it asks for out-of-band data on a
//! socket, and by default it is ignored.
//!
//! The order that makes this race-free:
//! ```text
//! pauser                     vCPU thread
//! P1 store the command       V1 clear immediate_exit
//! P2 send the signal         V2 load the command
//!                            V3 KVM_RUN
//! ```
//! The handler runs after P1. If it runs after V1, V3 returns at once; if before V1, V2 sees the command.

#![expect(
    unsafe_code,
    reason = "a signal, and its handler that writes into kvm_run"
)]

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::{self, NonNull};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use libc::SIGURG;
use vmm_sys_util::signal::unblock_signal;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, or null. Const and without a destructor, so that
    /// a signal handler may use it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Installs the signal handler, once a process.
pub(super) fn install() -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(|e| e.into_inner());
    if !*installed {
        // SAFETY: the handler reads a thread-local cell that needs no initialisation and stores to an atomic:
        // it allocates nothing, takes no lock and cannot panic.
        unsafe { signal_hook::low_level::register(SIGURG, handle) }?;
        *installed = true;
    }
    Ok(())
}

fn handle() {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `KickFlag` clears the cell before the mapping that this points into goes away, on this same
        // thread.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::SeqCst);
    }
}

/// Sends the signal to a vCPU's thread. One that has ended needs no kick.
///
/// # Errors
/// If the kernel refuses. It has no reason to, and whoever waits for the vCPU would wait in vain.
pub(super) fn kick(thread: &JoinHandle<()>) -> io::Result<()> {
    // SAFETY: the thread was not joined, since there is a handle to join it by, so its id is valid even if it
    // has ended.
    match unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGURG) } {
        0 | libc::ESRCH => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// The `immediate_exit` flag of the vCPU that this thread runs. While it lives, kicks reach this vCPU.
pub(super) struct KickFlag(NonNull<u8>);

impl KickFlag {
    /// Makes this thread one that can be kicked.
    ///
    /// # Safety
    /// `run` must stay mapped while the flag lives.
    pub(super) unsafe fn new(run: &mut kvm_run) -> io::Result<Self> {
        // Threads inherit a mask, and whoever started this one may have blocked the signal.
        unblock_signal(SIGURG).map_err(|error| io::Error::other(error.to_string()))?;
        let flag = NonNull::from(&mut run.immediate_exit);
        IMMEDIATE_EXIT.set(flag.as_ptr());
        Ok(Self(flag))
    }

    /// Clears the flag. SeqCst, as are the stores and loads of commands: see the module's diagram.
    pub(super) fn clear(&self) {
        self.store(0);
    }

    /// Makes the next `KVM_RUN` return at once, with only a port access completed that was half done.
    pub(super) fn set(&self) {
        self.store(1);
    }

    fn store(&self, value: u8) {
        // SAFETY: `new`'s caller keeps it mapped. Besides this thread and its signal handler only the kernel
        // uses it.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr()) }.store(value, Ordering::SeqCst);
    }
}

impl Drop for KickFlag {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
