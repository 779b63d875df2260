//! What `mm` does with frames: gives them memory, copies, compares and zeroes them.

#![expect(unsafe_code, reason = "copies, compares and zeroes whole frames")]

use std::io;
use std::{ptr, thread};

use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;

use super::PhysMap;
use crate::host::stream;
use crate::host::syscalls::fallocate;
use crate::mm::{FrameMemory, PAGE_SIZE, Pfn};

/// Frames that are worth a thread of their own: it takes some 50 us to start one, and 0.6 us to copy a frame.
const COPIES_OF_A_THREAD: usize = 256;

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

    fn folios_at_once(&self) -> u64 {
        self.at_once.folios()
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
        let share = pairs.len().div_ceil(self.cpus).max(COPIES_OF_A_THREAD);
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

impl PhysMap {
    /// Has `fill` write what is in it to a run of frames that follow each other, which nobody else has: from
    /// `first` on, `count` of them. What it gets is all of their bytes, with anything in them.
    ///
    /// # Panics
    /// If a frame has no memory.
    ///
    /// # Safety
    /// The frames are nobody's but the caller's: nobody else reads or writes them before this returns, and nothing
    /// shows them.
    pub(crate) unsafe fn with_fresh<R>(
        &self,
        first: Pfn,
        count: u64,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let (at, len) = (self.run(first, count), (count * PAGE_SIZE) as usize);
        // SAFETY: the run lies in the mapping and has memory, just checked; it is all initialised, by the host; and
        // it is the caller's alone, by contract, so that this is the one reference to it.
        fill(unsafe { std::slice::from_raw_parts_mut(at, len) })
    }
}
