//! Ending a run early.
#![expect(unsafe_code, reason = "asks what a signal does, and ignores one")]

use std::{
    io, mem, ptr,
    sync::{Arc, atomic::AtomicBool},
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};

/// A flag that the first SIGINT, SIGTERM or SIGHUP sets. The second one ends the process,
/// as if nobody had caught it.
///
/// One that was ignored when the program started stays ignored: `nohup`, and a shell that puts a program in
/// the background, mean it so.
pub(crate) fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        if is_ignored(signal)? {
            continue;
        }
        // Handlers run in the order they are registered in: this one first, so that a signal finds the flag
        // as the signals before it left it.
        flag::register_conditional_default(signal, Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// Has a file that grows beyond `ulimit -f` be an error of the call that makes it grow, and not the end of
/// the program without a word.
pub(crate) fn ignore_file_size_signal() {
    // SAFETY: no handler is set, so none runs; nothing else in the program sets one for this signal.
    // It fails for signals that cannot be ignored, and this one can.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Whether `signal` is ignored just now.
fn is_ignored(signal: i32) -> io::Result<bool> {
    // SAFETY: all zeros are a value of this plain C type.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: no new action is given, and the old one is written to a place that is ours.
    if unsafe { libc::sigaction(signal, ptr::null(), &mut action) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(action.sa_sigaction == libc::SIG_IGN)
}
