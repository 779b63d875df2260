//! Keeps mappings of guest memory to this process.
//!
//! A child process would have them, and with them all that the guest has; and a core dump would be as large
//! as all guests together. Both are properties of a mapping, lost with every new one in its place.
#![expect(unsafe_code, reason = "tells the kernel something of a mapping")]

use std::ffi::c_void;
use std::io;

/// Whether a core dump of this process has the guest's memory in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dumps {
    /// It has not.
    WithoutGuest,
    /// It has, for who looks for a fault in there.
    WithGuest,
}

/// Keeps the `len` bytes at `start` from child processes, and from dumps if they are to be without.
///
/// # Safety
/// They are mapped, and mappings of the caller's own.
pub(super) unsafe fn keep_private(start: *mut c_void, len: usize, dumps: Dumps) -> io::Result<()> {
    let dump = match dumps {
        Dumps::WithoutGuest => libc::MADV_DONTDUMP,
        Dumps::WithGuest => libc::MADV_DODUMP,
    };
    for advice in [libc::MADV_DONTFORK, dump] {
        // SAFETY: neither changes what is mapped or what is in it: by the caller's promise it is nobody
        // else's to tell.
        if unsafe { libc::madvise(start, len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
