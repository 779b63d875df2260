//! The signals by which a guest comes out, and whose they are.
//!
//! | signal | why |
//! |---|---|
//! | SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP | an instruction of the guest's |
//! | SIGSYS | a system call of the guest's: see `filter` |
//! | [`KICK`] | somebody wants the vCPU out |
//!
//! The handler is the process's, and the first to be asked. What is not a guest's goes to who was there
//! before: a fault of the VMM's own crashes as it should, with a core.
//!
//! The kick is SIGSTKFLT, which Linux never sends. KVM's is SIGURG, whose handler uses thread-local
//! variables: it must not run on a guest's FS base, and does not run here.

#![expect(unsafe_code, reason = "signal handlers")]

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Mutex;
use std::thread::JoinHandle;

/// A handler of signals.
pub(super) type Handler = unsafe extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);

/// Gets a vCPU out of the guest.
pub(super) const KICK: i32 = libc::SIGSTKFLT;

/// Signals about an instruction.
const SYNCHRONOUS: [i32; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGSYS,
];

/// The bit of a signal in a mask of the kernel's.
const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// What is blocked while guest code runs: all that is not about it, since another handler would run with the
/// guest's FS base.
pub(super) fn blocked_in_guest() -> u64 {
    let let_in = SYNCHRONOUS.iter().fold(bit(KICK), |all, &s| all | bit(s));
    !let_in
}

/// How signals were handled before, by their number.
struct Before(UnsafeCell<[MaybeUninit<libc::sigaction>; 32]>);

// SAFETY: written once, by `install`, before any handler that reads it is there.
unsafe impl Sync for Before {}

static BEFORE: Before = Before(UnsafeCell::new([MaybeUninit::uninit(); 32]));

/// Installs `handler` for all of them, once a process. It brings guests out, and passes what is not a guest's
/// to [`not_the_guests`].
///
/// # Errors
/// The host's.
pub(super) fn install(handler: Handler) -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(|e| e.into_inner());
    if *installed {
        return Ok(());
    }
    let signals = || SYNCHRONOUS.into_iter().chain([KICK]);
    for signal in signals() {
        // SAFETY: there is no handler yet that would read it; `sigaction` without an action only asks.
        unsafe {
            let before = (*BEFORE.0.get())[signal as usize].as_mut_ptr();
            before.write_bytes(0, 1);
            if libc::sigaction(signal, ptr::null(), before) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    // SAFETY: plain data, for which zeros are a value; the pieces are filled in.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    // Not blocked meanwhile, so that the mask of the VMM's code is always the same.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: masks are plain data. The handler allocates nothing, takes no lock and uses no thread-local
    // variable before the thread's FS base is the VMM's; what is not a guest's it passes on.
    unsafe {
        libc::sigfillset(&mut action.sa_mask);
        for signal in SYNCHRONOUS {
            libc::sigdelset(&mut action.sa_mask, signal);
        }
        for signal in signals() {
            if libc::sigaction(signal, &action, ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    *installed = true;
    Ok(())
}

/// Blocks on this thread, in VMM code, what is not about an instruction. Kicks are let in when guest code is
/// entered, and others go to other threads.
///
/// # Errors
/// The host's.
pub(super) fn block() -> io::Result<()> {
    // SAFETY: masks are plain data.
    let error = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        for signal in SYNCHRONOUS {
            libc::sigdelset(&mut all, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, ptr::null_mut())
    };
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Sends the kick to a vCPU's thread. One that has ended needs none.
///
/// # Errors
/// If the kernel refuses. It has no reason to, and whoever waits for the vCPU would wait in vain.
pub(crate) fn kick(thread: &JoinHandle<()>) -> io::Result<()> {
    // SAFETY: the thread was not joined, since there is a handle to join it by, so its id is valid even if it
    // has ended.
    match unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK) } {
        0 | libc::ESRCH => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// A signal that did not find its thread in guest code: who was there before is asked. If nobody was, the
/// signal has its default again, and comes back: that ends the process, with a core.
///
/// # Safety
/// Called as a signal handler, on a thread whose FS base is the VMM's.
pub(super) unsafe extern "C" fn not_the_guests(
    signal: i32,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    // SAFETY: `install` has written it before the handler was there. Its handler is called as it asked to be.
    unsafe {
        let before = (*BEFORE.0.get())[signal as usize].assume_init_ref();
        match before.sa_sigaction {
            // A kick that comes late means nothing.
            libc::SIG_DFL | libc::SIG_IGN if signal == KICK => {}
            libc::SIG_IGN if (*info).si_code <= 0 => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, ptr::null_mut());
                // What somebody has sent does not come back by itself, as what an instruction did.
                if (*info).si_code <= 0 {
                    libc::raise(signal);
                }
            }
            handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(i32) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}
