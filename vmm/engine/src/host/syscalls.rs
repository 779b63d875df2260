//! The system calls that change memory, in one place: where tests, and a build with debug assertions that is
//! told to, have them refused (`refusals`). Otherwise they are the calls themselves.
#![expect(unsafe_code, reason = "passes system calls on, with their conditions")]

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, Result};
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use super::call::Call;
#[cfg(debug_assertions)]
use super::refusals::refusable;

/// What `call` says of `len` bytes.
#[cfg(not(debug_assertions))]
#[inline]
fn refusable<T>(_: Call, len: usize, call: impl Fn(usize) -> Result<T>) -> Result<T> {
    call(len)
}

/// [`rustix::mm::mmap`]. What is to replace nothing is at `at`, or `EEXIST`.
///
/// # Safety
/// As there.
pub(super) unsafe fn mmap(
    at: *mut c_void,
    len: usize,
    prot: ProtFlags,
    flags: MapFlags,
    file: BorrowedFd<'_>,
    offset: u64,
) -> Result<*mut c_void> {
    refusable(Call::Map, len, |len| {
        // SAFETY: the caller's; less than was asked for is a part of it.
        let made = unsafe { rustix::mm::mmap(at, len, prot, flags, file, offset) }?;
        at_or_nowhere(made, at, len, flags)
    })
}

/// Before Linux 4.17 it is not known that a mapping is to replace nothing, and the address is a wish.
fn at_or_nowhere(
    made: *mut c_void,
    at: *mut c_void,
    len: usize,
    flags: MapFlags,
) -> Result<*mut c_void> {
    if made == at || !flags.contains(MapFlags::FIXED_NOREPLACE) {
        return Ok(made);
    }
    // SAFETY: the mapping just made, which nobody else knows of.
    unsafe { rustix::mm::munmap(made, len) }?;
    Err(Errno::EXIST)
}

/// [`rustix::mm::mmap_anonymous`], as [`mmap`] is.
///
/// # Safety
/// As there.
pub(super) unsafe fn mmap_anonymous(
    at: *mut c_void,
    len: usize,
    prot: ProtFlags,
    flags: MapFlags,
) -> Result<*mut c_void> {
    refusable(Call::Map, len, |len| {
        // SAFETY: as above.
        let made = unsafe { rustix::mm::mmap_anonymous(at, len, prot, flags) }?;
        at_or_nowhere(made, at, len, flags)
    })
}

/// Maps at `at` what the shared mapping at `from` shows, with everything that was ever said of that one: its
/// protection, and whether children and core dumps have it. That is what [`rustix::mm::mremap_fixed`] does
/// with nothing (mremap(2): "if the value of `old_size` is zero").
///
/// # Safety
/// As for [`rustix::mm::mmap`] of `len` bytes at `at`; and there are as many mapped at `from`.
pub(super) unsafe fn map_again(
    from: *mut c_void,
    at: *mut c_void,
    len: usize,
) -> Result<*mut c_void> {
    refusable(Call::Map, len, |len| {
        // SAFETY: the caller's; less than was asked for is a part of it. Nothing goes away at `from`.
        unsafe { rustix::mm::mremap_fixed(from, 0, len, MremapFlags::MAYMOVE, at) }
    })
}

/// [`rustix::mm::mprotect`].
///
/// # Safety
/// As there.
pub(super) unsafe fn mprotect(at: *mut c_void, len: usize, flags: MprotectFlags) -> Result<()> {
    refusable(Call::Protect, len, |len| {
        // SAFETY: as above.
        unsafe { rustix::mm::mprotect(at, len, flags) }
    })
}

/// [`rustix::fs::fallocate`].
pub(super) fn fallocate(
    file: BorrowedFd<'_>,
    mode: FallocateFlags,
    offset: u64,
    len: u64,
) -> Result<()> {
    let call = if mode.contains(FallocateFlags::PUNCH_HOLE) {
        Call::PunchHole
    } else {
        Call::Allocate
    };
    refusable(call, len as usize, |len| {
        rustix::fs::fallocate(file, mode, offset, len as u64)
    })
}

/// `madvise(MADV_COLLAPSE)`.
///
/// # Safety
/// The range is a mapping of the caller's.
pub(super) unsafe fn collapse(at: *mut u8, len: usize) -> io::Result<()> {
    let collapse = |len| {
        // SAFETY: the caller's. What is in the range stays what it is.
        match unsafe { libc::madvise(at.cast(), len, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
        }
    };
    Ok(refusable(Call::Collapse, len, collapse)?)
}
