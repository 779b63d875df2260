//! The physmap: one linear mapping of all frames, the VMM's direct map.
//!
//! Where the host gives it, memory is in **huge pages** of 2 MiB: an `mprotect` of 1 GiB, and KVM's flush
//! with it, takes 0.7 ms then rather than 40 (PLATFORM.md). A memfd has huge pages only if the administrator
//! turns them on; but `MADV_COLLAPSE` makes them of a range that has a page in it, without privilege, and a
//! window that maps the same range at an aligned address gets them as well.
#![expect(unsafe_code, reason = "maps the frame pool and hands out parts of it")]

use std::ffi::c_void;
use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use rustix::fs::{FallocateFlags, MemfdFlags, ftruncate, memfd_create};
use rustix::io::{Errno, retry_on_intr};
use rustix::mm::ProtFlags;
use rustix::process::{Resource, getrlimit};

use super::aligned::HUGE_PAGE;
use super::mapping::Mapping;
use super::private::Dumps;
use super::stream;
use super::syscalls::{collapse, fallocate, map_again};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::mm::{FrameMemory, PAGE_SIZE, Pfn, Protection, REGION_PAGES};

/// Frames that are worth a thread of their own: it takes some 50 us to start one, and 0.6 us to copy a frame.
const COPIES_OF_A_THREAD: usize = 256;

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
    dumps: Dumps,
    backed: Backed,
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
            dumps,
            backed: Backed::none(frames),
        }))
    }

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

    /// Whether core dumps have it.
    pub(super) fn dumps(&self) -> Dumps {
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
    pub(super) unsafe fn show(
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
        let end = first.offset().checked_add(len as u64);
        assert!(
            end.is_some_and(|end| end <= self.backed.frames * PAGE_SIZE),
            "{len} bytes from {first:?} on are not all frames"
        );
        // SAFETY: just checked: the file is mapped as a whole.
        let from = unsafe { all.base().add(first.offset() as usize) };
        // SAFETY: the caller's.
        unsafe { map_again(from.cast(), at, len) }?;
        Ok(())
    }

    /// `len` bytes of frame `pfn`, from byte `offset` on.
    ///
    /// # Panics
    /// If they are not all in the frame, or the frame has no memory or is beyond the end.
    pub fn slice(&self, pfn: Pfn, offset: u64, len: u64) -> VolatileSlice<'_> {
        self.slice_held(pfn, offset, len, ())
    }

    /// As [`PhysMap::slice`], with `held` kept for as long as the slice and its parts are.
    pub(super) fn slice_held<B: BitmapSlice>(
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

    /// Gives the file memory for `len` bytes from `offset` on.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let allocate = |offset, len| fallocate(self.file(), FallocateFlags::empty(), offset, len);
        Ok(in_spite_of_signals(offset, len, allocate)?)
    }

    /// Gives memory to whole huge pages from `offset` on, as such.
    fn allocate_huge(&self, offset: u64, len: u64) -> io::Result<()> {
        // A huge page is made of what is there: of nothing, none.
        for offset in (offset..offset + len).step_by(HUGE_PAGE as usize) {
            self.allocate(offset, PAGE_SIZE)?;
        }
        // SAFETY: a range of our own mapping.
        unsafe { collapse(self.writable.base().add(offset as usize), len as usize) }
    }

    fn frame(&self, pfn: Pfn) -> *mut u8 {
        self.run(pfn, 1)
    }

    /// The bytes of `count` frames from `first` on, all of which have memory.
    fn run(&self, first: Pfn, count: u64) -> *mut u8 {
        let is_backed = self.backed.are_all(first, count);
        assert!(
            is_backed,
            "{count} frames from {first:?} on have not all got memory"
        );
        // SAFETY: what has memory is inside the mapping.
        unsafe { self.writable.base().add(first.offset() as usize) }
    }

    /// Gives memory to `len` bytes from `start` on, in huge pages where that can be and is wanted.
    fn give(&self, start: u64, len: u64) -> io::Result<()> {
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

/// Does `call` for the `len` bytes from `offset` on, in parts if it is interrupted.
///
/// Kicks of the vCPU whose fault this is interrupt `fallocate`, which then undoes what it has done
/// (`shmem_fallocate` in `mm/shmem.c`; seen on Linux 6.1, no more on 6.18). On a host that is slower than the
/// kicks come it would never get there, so it is asked for less each time.
fn in_spite_of_signals(
    mut offset: u64,
    len: u64,
    mut call: impl FnMut(u64, u64) -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    let end = offset + len;
    let mut most = len;
    while offset < end {
        let part = most.min(end - offset);
        match call(offset, part) {
            Ok(()) => offset += part,
            Err(Errno::INTR) => most = (part / 2).next_multiple_of(PAGE_SIZE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Which frames have memory, a bit each.
///
/// Nothing is ordered by them: whoever has a frame has it from who gave it memory, by the pool's lock.
#[derive(Debug)]
struct Backed {
    words: Box<[AtomicU64]>,
    frames: u64,
}

impl Backed {
    fn none(frames: u64) -> Self {
        Self {
            words: (0..frames.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            frames,
        }
    }

    /// The words that the bits of a run lie in, and a mask of these bits in each. Frames beyond the end are
    /// left out.
    fn words(&self, first: Pfn, count: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let end = first.0.saturating_add(count).min(self.frames);
        let mut at = first.0;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let (word, bit) = (at / 64, at % 64);
                let bits = (64 - bit).min(end - at);
                at += bits;
                (&self.words[word as usize], u64::MAX >> (64 - bits) << bit)
            })
        })
    }

    fn set(&self, first: Pfn, count: u64) {
        for (word, mask) in self.words(first, count) {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    fn clear(&self, first: Pfn, count: u64) {
        for (word, mask) in self.words(first, count) {
            word.fetch_and(!mask, Ordering::Relaxed);
        }
    }

    fn are_all(&self, first: Pfn, count: u64) -> bool {
        let is_inside = first
            .0
            .checked_add(count)
            .is_some_and(|end| end <= self.frames);
        let mut words = self.words(first, count);
        is_inside && words.all(|(word, mask)| word.load(Ordering::Relaxed) & mask == mask)
    }
}

impl FrameMemory for PhysMap {
    fn commit(&self, first: Pfn, count: u64) -> io::Result<()> {
        self.give(first.offset(), count * PAGE_SIZE)?;
        self.backed.set(first, count);
        Ok(())
    }

    fn commit_base_pages(&self, first: Pfn, count: u64) -> io::Result<()> {
        self.allocate(first.offset(), count * PAGE_SIZE)?;
        self.backed.set(first, count);
        Ok(())
    }

    fn copy(&self, from: Pfn, to: Pfn) {
        assert_ne!(from, to, "a frame is not copied to itself");
        // SAFETY: both are whole frames inside the mapping, with memory, and differ, so they do not overlap.
        // A device that writes to `from` meanwhile (it was not stopped) makes the copy a mixture, as the
        // trait says; no reference to either exists.
        unsafe { ptr::copy_nonoverlapping(self.frame(from), self.frame(to), PAGE_SIZE as usize) }
    }

    fn copy_run(&self, from: Pfn, to: Pfn, count: u64) {
        // A page is read soon, perhaps, by whoever faulted on it.
        if count == 1 {
            return self.copy(from, to);
        }
        assert!(
            from.0.abs_diff(to.0) >= count,
            "{count} frames from {from:?} to {to:?}"
        );
        let (from, to) = (self.run(from, count), self.run(to, count));
        // SAFETY: both runs lie inside the mapping and have memory, and they do not overlap: just checked.
        // Otherwise as `copy`.
        unsafe { stream::copy(from, to, (count * PAGE_SIZE) as usize) }
    }

    fn copy_all(&self, pairs: &[(Pfn, Pfn)]) {
        let cpus = thread::available_parallelism().map_or(1, NonZero::get);
        let share = pairs.len().div_ceil(cpus).max(COPIES_OF_A_THREAD);
        let copy = |pairs: &[(Pfn, Pfn)]| pairs.iter().for_each(|&(from, to)| self.copy(from, to));
        thread::scope(|scope| {
            let mut shares = pairs.chunks(share);
            let ours = shares.next().unwrap_or_default();
            for theirs in shares {
                let other = thread::Builder::new().spawn_scoped(scope, move || copy(theirs));
                if other.is_err() {
                    // There are no more threads to be had.
                    copy(theirs);
                }
            }
            copy(ours);
        });
    }

    fn equal(&self, one: Pfn, other: Pfn) -> bool {
        let (one, other) = (self.frame(one), self.frame(other));
        // SAFETY: whole frames inside the mapping, which are aligned. Volatile: somebody may write to them,
        // in which case the answer means nothing, as the trait says. No reference to either exists.
        (0..PAGE_SIZE as usize / 8).all(|word| unsafe {
            one.cast::<u64>().add(word).read_volatile()
                == other.cast::<u64>().add(word).read_volatile()
        })
    }

    fn write(&self, frame: Pfn, offset: u64, bytes: &[u8]) {
        self.slice(frame, offset, bytes.len() as u64)
            .copy_from(bytes);
    }

    fn uncommit(&self, first: Pfn, count: u64) -> io::Result<()> {
        // Before it goes, so that nobody comes to it while it does.
        self.backed.clear(first, count);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (start, len) = (first.offset(), count * PAGE_SIZE);
        retry_on_intr(|| fallocate(self.file(), punch, start, len))
            .inspect_err(|_| self.backed.set(first, count))?;
        Ok(())
    }

    fn zero(&self, frame: Pfn) {
        // SAFETY: a whole frame inside the mapping; no reference to it exists.
        unsafe { ptr::write_bytes(self.frame(frame), 0, PAGE_SIZE as usize) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that gives six pages at a time, and never more before the next signal.
    #[test]
    fn a_slow_host_gets_there_between_signals() {
        let (mut given, mut calls) = (Vec::new(), 0);
        let slow = |offset: u64, len: u64| {
            calls += 1;
            assert!(calls < 20 && len > 0, "it does not get there: {given:?}");
            if len > 6 * PAGE_SIZE {
                return Err(Errno::INTR);
            }
            given.push(offset / PAGE_SIZE..(offset + len) / PAGE_SIZE);
            Ok(())
        };
        in_spite_of_signals(PAGE_SIZE, 21 * PAGE_SIZE, slow).unwrap();
        assert_eq!(given, [1..7, 7..13, 13..19, 19..22]);
    }

    #[test]
    fn what_a_host_refuses_is_refused() {
        let refused = in_spite_of_signals(0, 2 * PAGE_SIZE, |_, _| Err(Errno::NOSPC));
        assert_eq!(refused, Err(Errno::NOSPC));
        let mut signals = 3;
        let one_page = in_spite_of_signals(0, PAGE_SIZE, |_, len| {
            assert_eq!(len, PAGE_SIZE);
            signals -= 1;
            if signals > 0 {
                Err(Errno::INTR)
            } else {
                Ok(())
            }
        });
        assert_eq!(one_page, Ok(()));
    }
}
