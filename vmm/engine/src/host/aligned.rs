//! Address ranges: aligned to huge pages, or at addresses that are asked for.
#![expect(
    unsafe_code,
    reason = "maps addresses, and unmaps those it does not need"
)]

use std::io;
use std::ops::Range;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, munmap};

use super::maps;
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

/// Reserves the addresses `range` itself. They show zeros, and can be executed.
///
/// # Errors
/// If there are none in it, something is mapped there already, which is named, or the host maps nothing
/// there.
pub(super) fn reserve_at(range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("there is no memory above {:#x}", range.start),
        ));
    }
    let at = ptr::with_exposed_provenance_mut(range.start as usize);
    let len = (range.end - range.start) as usize;
    // SAFETY: a mapping that replaces nothing: where something is mapped already, the host refuses.
    let made = unsafe {
        mmap_anonymous(
            at,
            len,
            ProtFlags::READ | ProtFlags::EXEC,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE,
        )
    };
    match made {
        Ok(_) => Ok(()),
        Err(Errno::EXIST) => Err(taken(&range)),
        Err(Errno::PERM) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "the host maps nothing at {:#x} (vm.mmap_min_addr)",
                range.start
            ),
        )),
        Err(error) => Err(error.into()),
    }
}

/// Something has addresses that are asked for.
fn taken(range: &Range<u64>) -> io::Error {
    let by = maps::first_in(range.clone()).ok().flatten();
    let by = by.unwrap_or_else(|| "something else".to_owned());
    io::Error::new(
        io::ErrorKind::AddrInUse,
        format!(
            "the addresses {:#x} to {:#x} of this process are taken, by {by}; guest addresses are there \
             once, \
             so a process has one VM without KVM",
            range.start, range.end
        ),
    )
}
