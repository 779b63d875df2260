//! The physmap: one linear mapping of all frames, the VMM's direct map.
//!
//! | file | concept |
//! |---|---|
//! | `memory` | giving frames memory, in huge pages where the host can |
//! | `bytes` | copying, comparing and zeroing frames |
//! | `backed` | which frames have memory |
//! | `interrupted` | a system call that signals keep from getting done |

#![expect(unsafe_code, reason = "maps the frame pool and hands out parts of it")]

mod backed;
mod bytes;
mod interrupted;
mod memory;

use std::ffi::c_void;
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::{io, thread};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use rustix::process::{Resource, getrlimit};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use self::backed::Backed;
use super::mapping::Mapping;
use super::private::Dumps;
use super::syscalls::{map_again, mmap};
use crate::host::at_once::AtOnce;
use crate::mm::{PAGE_SIZE, Pfn, Protection};

/// The bytes of all frames: an unnamed file in memory, mapped for as long as this lives. Frames get memory by
/// `fallocate` before their first use, so that a host without memory answers with an error and not with a
/// `SIGBUS`. It is known which have it: a frame that has none cannot be reached from here.
#[derive(Debug)]
pub struct PhysMap {
    file: OwnedFd,
    /// All frames, which the VMM reads and writes here.
    writable: Mapping,
    /// All of them once more, read-only, for [`PhysMap::show`].
    read_only: Mapping,
    huge: AtomicBool,
    /// Whether the host has given a huge page.
    has_given_huge: AtomicBool,
    at_once: AtOnce,
    dumps: Dumps,
    backed: Backed,
    /// CPUs that copies are shared out over. Asked for once: files of control groups are read for it, which
    /// is too dear for a guest that stands still.
    cpus: usize,
}

impl PhysMap {
    /// A physmap with room for `frames` frames, none of which has memory yet. Core dumps are without it.
    ///
    /// # Errors
    /// The host's, if it has no memory or address space for the mapping, or lets no file have that length.
    pub fn new(frames: u64) -> io::Result<Arc<Self>> {
        Self::with_dumps(frames, Dumps::WithoutGuest)
    }

    /// The same, and whether core dumps have it, and windows on to it.
    ///
    /// # Errors
    /// As [`PhysMap::new`].
    pub fn with_dumps(frames: u64, dumps: Dumps) -> io::Result<Arc<Self>> {
        let len = frames * PAGE_SIZE;
        // The call that makes the file longer than this ends the process with a signal, if that is not
        // ignored.
        if getrlimit(Resource::Fsize)
            .current
            .is_some_and(|most| most < len)
        {
            return Err(Errno::FBIG.into());
        }
        let file = memfd_create("palimpsest-frames", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, len)?;
        let map = |protection| Mapping::new(file.as_fd(), len, protection, dumps);
        let (writable, read_only) = (
            map(ProtFlags::READ | ProtFlags::WRITE)?,
            map(ProtFlags::READ)?,
        );
        Ok(Arc::new(Self {
            file,
            writable,
            read_only,
            huge: AtomicBool::new(true),
            has_given_huge: AtomicBool::new(false),
            at_once: AtOnce::default(),
            dumps,
            backed: Backed::none(frames),
            cpus: thread::available_parallelism().map_or(1, NonZero::get),
        }))
    }

    /// Lets what windows show from now on be executed: guest code runs as code of this process.
    ///
    /// # Errors
    /// If the host does not let memory be written and executed.
    pub(in crate::host) fn allow_execution(&self) -> io::Result<()> {
        let executable = MprotectFlags::READ | MprotectFlags::EXEC;
        self.read_only.protect(executable)?;
        self.writable.protect(executable | MprotectFlags::WRITE)
    }

    /// Whether core dumps have it.
    pub(in crate::host) fn dumps(&self) -> Dumps {
        self.dumps
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Shows the frames from `first` on in the `len` bytes at `at`, in place of what is there.
    ///
    /// It is another mapping of what is mapped here, and so is kept from children and core dumps as this is.
    ///
    /// # Panics
    /// If there are not as many frames.
    ///
    /// # Safety
    /// Whatever is mapped at `at` is the caller's own, and may go.
    pub(in crate::host) unsafe fn show(
        &self,
        first: Pfn,
        protection: Protection,
        at: *mut c_void,
        len: usize,
    ) -> rustix::io::Result<()> {
        let all = match protection {
            Protection::ReadOnly => &self.read_only,
            Protection::ReadWrite => &self.writable,
        };
        self.check(first, len);
        // SAFETY: just checked: the file is mapped as a whole.
        let from = unsafe { all.base().add(first.offset() as usize) };
        // SAFETY: the caller's.
        unsafe { map_again(from.cast(), at, len) }?;
        Ok(())
    }

    /// As [`PhysMap::show`], where nothing is mapped: `EEXIST` if something is. It is kept from nobody yet.
    ///
    /// # Panics
    /// As there.
    ///
    /// # Safety
    /// What is mapped there is the caller's own.
    pub(in crate::host) unsafe fn show_first(
        &self,
        first: Pfn,
        protection: Protection,
        at: *mut c_void,
        len: usize,
    ) -> rustix::io::Result<()> {
        self.check(first, len);
        let protection = match protection {
            Protection::ReadOnly => ProtFlags::READ,
            Protection::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: it replaces nothing.
        unsafe { mmap(at, len, protection, flags, self.file(), first.offset()) }?;
        Ok(())
    }

    fn check(&self, first: Pfn, len: usize) {
        let end = first.offset().checked_add(len as u64);
        assert!(
            end.is_some_and(|end| end <= self.backed.frames * PAGE_SIZE),
            "{len} bytes from {first:?} on are not all frames"
        );
    }

    /// `len` bytes of frame `pfn`, from byte `offset` on.
    ///
    /// # Panics
    /// If they are not all in the frame, or the frame has no memory or is beyond the end.
    pub fn slice(&self, pfn: Pfn, offset: u64, len: u64) -> VolatileSlice<'_> {
        self.slice_held(pfn, offset, len, ())
    }

    /// As [`PhysMap::slice`], with `held` kept for as long as the slice and its parts are.
    pub(in crate::host) fn slice_held<B: BitmapSlice>(
        &self,
        pfn: Pfn,
        offset: u64,
        len: u64,
        held: B,
    ) -> VolatileSlice<'_, B> {
        assert!(
            offset <= PAGE_SIZE && len <= PAGE_SIZE - offset,
            "{len} bytes at offset {offset} are not in {pfn:?}"
        );
        let frame = self.run(pfn, 1);
        // SAFETY: the range lies in the frame, which lies in the mapping and has memory: both just checked.
        // The mapping lives as long as `self` is borrowed.
        unsafe { VolatileSlice::with_bitmap(frame.add(offset as usize), len as usize, held, None) }
    }

    /// `len` bytes of the frames from `first` on, from byte `offset` of that one on.
    ///
    /// # Panics
    /// If `offset` is not in the frame, or a frame has no memory or is beyond the end.
    pub(in crate::host) fn slice_run(
        &self,
        first: Pfn,
        offset: u64,
        len: u64,
    ) -> VolatileSlice<'_> {
        assert!(offset < PAGE_SIZE, "offset {offset} is not in {first:?}");
        let frames = self.run(first, (offset + len).div_ceil(PAGE_SIZE));
        // SAFETY: the range lies in frames that lie in the mapping and have memory: just checked. The mapping
        // lives as long as `self` is borrowed.
        unsafe { VolatileSlice::new(frames.add(offset as usize), len as usize) }
    }

    #[inline]
    fn frame(&self, pfn: Pfn) -> *mut u8 {
        self.run(pfn, 1)
    }

    /// The bytes of `count` frames from `first` on, all of which have memory.
    #[inline]
    fn run(&self, first: Pfn, count: u64) -> *mut u8 {
        let is_backed = self.backed.are_all(first, count);
        assert!(
            is_backed,
            "{count} frames from {first:?} on have not all got memory"
        );
        // SAFETY: what has memory is inside the mapping.
        unsafe { self.writable.base().add(first.offset() as usize) }
    }
}
