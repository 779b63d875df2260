//! Address ranges aligned to huge pages.
#![expect(
    unsafe_code,
    reason = "maps addresses, and unmaps those it does not need"
)]

use std::io;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, munmap};

use super::syscalls::mmap_anonymous;
use crate::mm::{PAGE_SIZE, REGION_PAGES};

/// Bytes of a huge page of the host.
pub(super) const HUGE_PAGE: u64 = REGION_PAGES * PAGE_SIZE;

/// Reserves `len` bytes of addresses that show zeros, aligned to 2 MiB.
///
/// # Errors
/// The host's, if it has not as many.
pub(super) fn reserve(len: u64) -> io::Result<usize> {
    let align = HUGE_PAGE as usize;
    let len = len as usize;
    let both = len.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            both,
            ProtFlags::READ,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?
    .expose_provenance();
    let base = start.next_multiple_of(align);
    let trim = |from: usize, len: usize| {
        if len == 0 {
            return Ok(());
        }
        // SAFETY: a part of the mapping just made, which nobody else knows of.
        unsafe { munmap(ptr::with_exposed_provenance_mut(from), len) }
    };
    trim(start, base - start)?;
    trim(base + len, start + align - base)?;
    Ok(base)
}
