//! Guest memory as most VMMs have it: anonymous and private, mapped once, writable.
#![expect(
    unsafe_code,
    reason = "maps guest memory and copies out of and into it"
)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use guest::abi::{PAGE_SIZE, REGION_SIZE};
use palimpsest::causes::Cause;
use palimpsest::kvm::{GuestRam, Memslot};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::{BenchDevice, TechniqueError, host};

/// `MADV_COLLAPSE` (Linux 6.1), which rustix does not name.
const MADV_COLLAPSE: i32 = 25;
/// How often a collapse into a huge page is tried.
const COLLAPSE_TRIES: u32 = 4;

/// The pages the host is asked to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// Transparent huge pages of 2 MiB.
    Huge,
}

/// An anonymous private mapping, aligned to 2 MiB.
#[derive(Debug)]
pub(crate) struct Anonymous {
    /// The whole mapping, which is longer than what is used of it.
    mapped: Range<usize>,
    base: NonNull<u8>,
    len: u64,
}

// SAFETY: the mapping belongs to the process and stays where it is; all access is through raw pointers.
unsafe impl Send for Anonymous {}
// SAFETY: as above.
unsafe impl Sync for Anonymous {}

// SAFETY: mapped until `self` is dropped; nothing else is ever mapped there, and there are no references to
// it.
unsafe impl Memslot for Anonymous {
    fn host_address(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl Anonymous {
    /// `len` bytes that read as zeros.
    pub(crate) fn new(len: u64, pages: PageSize) -> Result<Arc<Self>, TechniqueError> {
        Self::map(len, pages)
            .map(Arc::new)
            .map_err(host("map guest memory"))
    }

    fn map(len: u64, pages: PageSize) -> io::Result<Self> {
        let reserved = (len + REGION_SIZE) as usize;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                reserved,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?
        .expose_provenance();
        let base = start.next_multiple_of(REGION_SIZE as usize);
        let memory = Self {
            mapped: start..start + reserved,
            base: NonNull::new(ptr::with_exposed_provenance_mut(base))
                .ok_or(io::ErrorKind::OutOfMemory)?,
            len,
        };
        let advice = match pages {
            PageSize::Small => Advice::LinuxNoHugepage,
            PageSize::Huge => Advice::LinuxHugepage,
        };
        // SAFETY: the mapping just made; the advice changes no byte.
        match unsafe { madvise(memory.base.as_ptr().cast(), len as usize, advice) } {
            Ok(()) => {}
            // A kernel without transparent huge pages has small ones.
            Err(rustix::io::Errno::INVAL) if pages == PageSize::Small => {}
            Err(error) => return Err(error.into()),
        }
        Ok(memory)
    }

    /// The first `len` bytes of `file`, privately: what is written here is not written there.
    pub(crate) fn of_file(file: &File, len: u64) -> Result<Arc<Self>, TechniqueError> {
        let memory = Self::map(len, PageSize::Small).map_err(host("map guest memory"))?;
        // SAFETY: replaces what `memory` has mapped, of which nobody knows yet.
        let mapped = unsafe {
            mmap(
                memory.base.as_ptr().cast(),
                len as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                file,
                0,
            )
        };
        mapped.map_err(host("map the file with a guest's memory"))?;
        Ok(Arc::new(memory))
    }

    /// Writes all of it to `file`, from its beginning on. Nobody may write here meanwhile.
    pub(crate) fn write_to(&self, file: &File) -> Result<(), TechniqueError> {
        // SAFETY: all of it is mapped, and by the caller's word nobody writes there.
        let bytes = unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len as usize) };
        let written = file.write_all_at(bytes, 0);
        written.map_err(host("write a guest's memory to a file"))
    }

    /// The first byte.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.len
    }

    /// Puts memory behind `range`.
    pub(crate) fn populate(&self, range: Range<u64>) -> Result<(), TechniqueError> {
        self.advise(range, libc::MADV_POPULATE_WRITE)
            .map_err(host("populate guest memory"))
    }

    /// Makes every 2 MiB that is in small pages one huge page again. A page that somebody holds just then is
    /// tried again, and left as it is if that does not help: khugepaged would come back to it too.
    pub(crate) fn collapse(&self) -> Result<(), TechniqueError> {
        let regions = (0..self.len).step_by(REGION_SIZE as usize);
        // A last part of a region has no huge page.
        for start in regions.take((self.len / REGION_SIZE) as usize) {
            for _ in 0..COLLAPSE_TRIES {
                match self.advise(start..start + REGION_SIZE, MADV_COLLAPSE) {
                    Err(error)
                        if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {}
                    Err(error) => {
                        return Err(host("collapse guest memory into huge pages")(error));
                    }
                    Ok(()) => break,
                }
            }
        }
        Ok(())
    }

    /// Gives the memory behind all of it back: it reads as zeros then.
    pub(super) fn discard(&self) -> Result<(), TechniqueError> {
        self.advise(0..self.len, libc::MADV_DONTNEED)
            .map_err(host("give memory back"))
    }

    fn advise(&self, range: Range<u64>, advice: i32) -> io::Result<()> {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:x?} is not in the memory"
        );
        loop {
            // SAFETY: the range is in the mapping. What is dropped by an advice is nobody's: there
            // are no references into it.
            let done = unsafe {
                libc::madvise(
                    self.base.as_ptr().add(range.start as usize).cast(),
                    (range.end - range.start) as usize,
                    advice,
                )
            };
            match done {
                0 => return Ok(()),
                _ => match io::Error::last_os_error() {
                    // A large range takes long, and signals come in between.
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }

    fn at(&self, gpa: u64, len: usize) -> Result<*mut u8, Cause> {
        match gpa.checked_add(len as u64) {
            // SAFETY: just checked to be inside the mapping.
            Some(end) if end <= self.len => Ok(unsafe { self.base.as_ptr().add(gpa as usize) }),
            _ => Err(format!("guest memory has no {len} bytes at {gpa:#x}").into()),
        }
    }

    /// Copies memory out.
    pub(super) fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        let from = self.at(gpa, buf.len())?;
        for (offset, byte) in buf.iter_mut().enumerate() {
            // SAFETY: in the mapping. Volatile: vCPUs may be writing.
            *byte = unsafe { from.add(offset).read_volatile() };
        }
        Ok(())
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        let start = ptr::with_exposed_provenance_mut(self.mapped.start);
        // SAFETY: the mapping is this object's own, and nobody borrows from it any more.
        if let Err(error) = unsafe { munmap(start, self.mapped.len()) } {
            eprintln!("warning: cannot unmap guest memory: {error}");
        }
    }
}

impl GuestRam for Anonymous {
    fn len(&self) -> u64 {
        self.len
    }

    /// All of the window is writable, always, and KVM waits for the host's own fault handler by itself. It is
    /// asked for all the same: of a vCPU that was kicked twice while it waited for that.
    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        self.at(gfn.saturating_mul(PAGE_SIZE), PAGE_SIZE as usize)?;
        Ok(false)
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        // Aligned words in one piece: what the guest publishes is words.
        if gpa.is_multiple_of(8) && buf.len().is_multiple_of(8) {
            let from = self.at(gpa, buf.len())?.cast::<u64>();
            for (word, bytes) in buf.chunks_exact_mut(8).enumerate() {
                // SAFETY: in the mapping, and aligned as the base is. Volatile: vCPUs may be writing.
                let value = unsafe { from.add(word).read_volatile() };
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            return Ok(());
        }
        self.read(gpa, buf)
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        let to = self.at(gpa, buf.len())?;
        for (offset, &byte) in buf.iter().enumerate() {
            // SAFETY: as for reading.
            unsafe { to.add(offset).write_volatile(byte) };
        }
        Ok(())
    }
}

/// A device with no other way to guest memory than the mapping.
pub(super) struct PlainDevice(pub(super) Arc<Anonymous>);

impl BenchDevice for PlainDevice {
    fn write_page(&mut self, gpa: u64, word: u64) -> Result<(), TechniqueError> {
        let to = self
            .0
            .at(gpa, PAGE_SIZE as usize)
            .map_err(TechniqueError::Memory)?
            .cast::<u64>();
        for index in 0..PAGE_SIZE as usize / 8 {
            // SAFETY: in the mapping, and aligned: pages are. Volatile: vCPUs may be reading.
            unsafe { to.add(index).write_volatile(word) };
        }
        Ok(())
    }
}
