//! Gives frames memory, and takes it back.
//!
//! Where the host gives it, memory is in **huge pages** of 2 MiB: an `mprotect` of 1 GiB, and KVM's flush
//! with it, takes 0.7 ms then rather than 40 (docs/platforms.md). A memfd has huge pages only if the
//! administrator turns them on; but `MADV_COLLAPSE` makes them of a range that has a page in it, without
//! privilege, and a window that maps the same range at an aligned address gets them as well.

#![expect(unsafe_code, reason = "has the kernel make huge pages of a range")]

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use rustix::time::{ClockId, clock_gettime};

use super::PhysMap;
use super::interrupted::in_spite_of_signals;
use crate::host::aligned::HUGE_PAGE;
use crate::host::syscalls::{collapse, fallocate};
use crate::mm::{PAGE_SIZE, REGION_PAGES};

impl PhysMap {
    /// Asks the host for one huge page, and gives it back.
    ///
    /// # Errors
    /// The host's, if it gives none.
    pub fn try_huge() -> io::Result<()> {
        Self::new(REGION_PAGES)?.allocate_huge(0, HUGE_PAGE)
    }

    /// Whether memory was given in huge pages so far wherever that could be.
    pub fn is_huge(&self) -> bool {
        self.huge.load(Ordering::Relaxed)
    }

    /// Does without huge pages from now on.
    pub fn use_base_pages(&self) {
        self.huge.store(false, Ordering::Relaxed);
    }

    /// Gives the file memory for `len` bytes from `offset` on.
    pub(super) fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let allocate = |offset, len| fallocate(self.file(), FallocateFlags::empty(), offset, len);
        Ok(in_spite_of_signals(offset, len, allocate)?)
    }

    /// Gives memory to whole huge pages from `offset` on, as such.
    fn allocate_huge(&self, offset: u64, len: u64) -> io::Result<()> {
        // A huge page is made of what is there: of nothing, none.
        for offset in (offset..offset + len).step_by(HUGE_PAGE as usize) {
            self.allocate(offset, PAGE_SIZE)?;
        }
        let before = cpu_time();
        // SAFETY: a range of our own mapping.
        unsafe { collapse(self.writable.base().add(offset as usize), len as usize) }?;
        self.at_once
            .took(len / HUGE_PAGE, cpu_time().saturating_sub(before));
        Ok(())
    }

    /// Gives memory to `len` bytes from `start` on, in huge pages where that can be and is wanted.
    pub(super) fn give(&self, start: u64, len: u64) -> io::Result<()> {
        let whole = start.next_multiple_of(HUGE_PAGE)..(start + len) / HUGE_PAGE * HUGE_PAGE;
        if whole.start >= whole.end || !self.is_huge() {
            return self.allocate(start, len);
        }
        if let Err(error) = self.allocate_huge(whole.start, whole.end - whole.start) {
            // EINVAL has two meanings: this one huge page could not be made just now, or this kernel makes
            // none at all. Linux 6.1 says it of the first one, and 6.12 of some.
            if error.raw_os_error() == Some(libc::EINVAL)
                && !self.has_given_huge.load(Ordering::Relaxed)
                && self.huge.swap(false, Ordering::Relaxed)
            {
                tracing::warn!(
                    %error,
                    "the host gives no huge pages: guest memory is in pages of 4 KiB, and snapshots stop \
                     the guest for longer"
                );
            }
            return self.allocate(start, len);
        }
        self.has_given_huge.store(true, Ordering::Relaxed);
        if start < whole.start {
            self.allocate(start, whole.start - start)?;
        }
        if whole.end < start + len {
            self.allocate(whole.end, start + len - whole.end)?;
        }
        Ok(())
    }
}

/// What this thread has had of the CPUs so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
