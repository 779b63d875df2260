//! A mapping of a whole file, for as long as its value lives.
#![expect(unsafe_code, reason = "maps a file, and unmaps it")]

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, munmap};

use super::aligned::reserve;
use super::private::{Dumps, keep_private};
use super::syscalls::{mmap, mprotect};

/// All bytes of a file, mapped shared at an address that is aligned to 2 MiB.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread. Neither field ever changes, and what is done
// with the address is its user's to answer for.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file`, kept from child processes, and from core dumps as `dumps` says.
    ///
    /// # Errors
    /// The host's, if it has no addresses or no mapping left.
    pub(super) fn new(
        file: BorrowedFd<'_>,
        len: u64,
        protection: ProtFlags,
        dumps: Dumps,
    ) -> io::Result<Self> {
        let base = ptr::with_exposed_provenance_mut::<u8>(reserve(len)?);
        let mapping = Self {
            base: NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?,
            len: len as usize,
        };
        let at = base.cast::<c_void>();
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: it replaces addresses that were reserved for it just now.
        unsafe { mmap(at, mapping.len, protection, flags, file, 0) }?;
        // SAFETY: the mapping made just now.
        unsafe { keep_private(at, mapping.len, dumps) }?;
        Ok(mapping)
    }

    /// Changes what all of it may be used for: never to less than its users do with it.
    ///
    /// # Errors
    /// The host's, if it does not let it.
    pub(super) fn protect(&self, flags: MprotectFlags) -> io::Result<()> {
        // SAFETY: a mapping of our own, of which nothing is taken away.
        unsafe { mprotect(self.base.as_ptr().cast(), self.len, flags) }?;
        Ok(())
    }

    /// Its first byte.
    pub(super) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: who uses the address keeps this alive, so nobody does any more.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "cannot unmap a file");
        }
    }
}
