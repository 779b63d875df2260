//! Guest memory without the engine's: its pages become read-only when a test says so.

#![expect(unsafe_code, reason = "the mappings behind a guest's memory")]

use std::any::Any;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ::guest::abi::{PAGE_SIZE, PAGE_TABLES_GPA};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect, munmap};

use crate::causes::Cause;
use crate::kvm::{GuestRam, Memslot};

/// How [`TestRam::write_fault`] answers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Faults {
    Resolve,
    Fail,
    SayWritable,
}

/// Guest memory in a memfd: mapped once for the VMM, and once as the window, page by page read-only or
/// writable.
pub(super) struct TestRam {
    direct: NonNull<u8>,
    window: NonNull<u8>,
    len: u64,
    writable: Vec<AtomicBool>,
    resolved: AtomicU64,
    /// Held while a page is made writable: whoever finds it so finds it so in the window, too.
    resolving: Mutex<()>,
    faults: Faults,
}

// SAFETY: the pointers are to mappings that live as long as this does, and all access through them is
// volatile.
unsafe impl Send for TestRam {}

// SAFETY: as above.
unsafe impl Sync for TestRam {}

impl TestRam {
    pub(super) fn new(len: u64, faults: Faults) -> Arc<Self> {
        let memfd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, len).unwrap();
        let map = || {
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a new mapping, where the kernel has room.
            let start = unsafe {
                mmap(
                    ptr::null_mut(),
                    len as usize,
                    prot,
                    MapFlags::SHARED,
                    &memfd,
                    0,
                )
            };
            NonNull::new(start.unwrap().cast::<u8>()).unwrap()
        };
        Arc::new(Self {
            direct: map(),
            window: map(),
            len,
            writable: (0..len / PAGE_SIZE)
                .map(|_| AtomicBool::new(true))
                .collect(),
            resolved: AtomicU64::new(0),
            resolving: Mutex::new(()),
            faults,
        })
    }

    pub(super) fn protect(&self, gpa: u64, len: u64, flags: MprotectFlags) {
        assert!(gpa + len <= self.len);
        // SAFETY: inside the window, which nothing but the guest uses.
        unsafe {
            let start = self.window.as_ptr().add(gpa as usize);
            mprotect(start.cast(), len as usize, flags).unwrap();
        }
    }

    /// Makes every page from `gpa` on read-only for the guest.
    pub(super) fn write_protect(&self, gpa: u64) {
        for page in &self.writable[(gpa / PAGE_SIZE) as usize..] {
            page.store(false, Ordering::SeqCst);
        }
        self.protect(gpa, self.len - gpa, MprotectFlags::READ);
    }

    pub(super) fn word(&self, gpa: u64) -> u64 {
        let mut word = [0; 8];
        self.read(gpa, &mut word).unwrap();
        u64::from_le_bytes(word)
    }

    /// Pages made writable that are no page tables: those are written as well where there is nested paging.
    pub(super) fn resolved(&self) -> u64 {
        self.resolved.load(Ordering::SeqCst)
    }

    pub(super) fn make_writable(&self, gfn: u64) -> bool {
        let _resolving = self.resolving.lock().unwrap();
        if self.writable[gfn as usize].swap(true, Ordering::SeqCst) {
            return false;
        }
        let both = MprotectFlags::READ | MprotectFlags::WRITE;
        self.protect(gfn * PAGE_SIZE, PAGE_SIZE, both);
        let tables = PAGE_TABLES_GPA / PAGE_SIZE;
        if !(tables..tables + 3).contains(&gfn) {
            self.resolved.fetch_add(1, Ordering::SeqCst);
        }
        true
    }
}

impl Drop for TestRam {
    fn drop(&mut self) {
        for start in [self.direct, self.window] {
            // SAFETY: mapped in `new`, with this length; the machine that used the window is gone.
            unsafe { munmap(start.as_ptr().cast(), self.len as usize) }.unwrap();
        }
    }
}

// SAFETY: the mapping lives as long as this does, and nothing here reads or writes through it.
unsafe impl Memslot for TestRam {
    fn host_address(&self) -> NonNull<u8> {
        self.window
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl GuestRam for TestRam {
    fn len(&self) -> u64 {
        self.len
    }

    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        match self.faults {
            Faults::Fail => return Err("out of frames".into()),
            Faults::SayWritable => return Ok(false),
            Faults::Resolve => {}
        }
        Ok(self.make_writable(gfn))
    }

    /// What is pinned stays writable here only until it is protected again.
    fn pin(&self, gpa: u64, len: u64) -> Result<Box<dyn Any + Send>, Cause> {
        for gfn in gpa / PAGE_SIZE..(gpa + len).div_ceil(PAGE_SIZE) {
            self.make_writable(gfn);
        }
        Ok(Box::new(()))
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        if gpa + buf.len() as u64 > self.len {
            return Err("outside memory".into());
        }
        for (index, byte) in buf.iter_mut().enumerate() {
            // SAFETY: in bounds, checked above.
            *byte = unsafe {
                self.direct
                    .as_ptr()
                    .add(gpa as usize + index)
                    .read_volatile()
            };
        }
        Ok(())
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        if gpa + buf.len() as u64 > self.len {
            return Err("outside memory".into());
        }
        for (index, byte) in buf.iter().enumerate() {
            // SAFETY: in bounds, checked above.
            unsafe {
                self.direct
                    .as_ptr()
                    .add(gpa as usize + index)
                    .write_volatile(*byte)
            };
        }
        Ok(())
    }
}
