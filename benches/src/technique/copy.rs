//! Stop and copy: Firecracker's full snapshot, into memory instead of a file.
//!
//! Better than theirs: the destination has its memory already, so that nothing is allocated or zeroed in the
//! pause, both sides are in huge pages, and all cores copy.
#![expect(unsafe_code, reason = "copies guest memory")]

use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use guest::abi::REGION_SIZE;
use palimpsest::kvm::{GuestRam, Memslot};

use super::anonymous::{Anonymous, PageSize, PlainDevice};
use super::{BenchDevice, SnapshotMemory, Technique, TechniqueError};

pub(super) struct StopAndCopy {
    memory: Arc<Anonymous>,
    destination: Arc<Anonymous>,
    threads: u64,
    taken: AtomicBool,
    copied: AtomicU64,
}

impl StopAndCopy {
    pub(super) fn new(memory: u64) -> Result<Self, TechniqueError> {
        let destination = Anonymous::new(memory, PageSize::Huge)?;
        destination.populate(0..memory)?;
        Ok(Self {
            memory: Anonymous::new(memory, PageSize::Huge)?,
            destination,
            threads: thread::available_parallelism().map_or(1, |n| n.get() as u64),
            taken: AtomicBool::new(false),
            copied: AtomicU64::new(0),
        })
    }
}

/// Copies all of `from`, with as many `threads`. Nobody may write to it meanwhile, nor use `to`, which is as
/// large.
pub(crate) fn copy_all(from: &Anonymous, to: &Anonymous, threads: u64) {
    assert_eq!(from.bytes(), to.bytes());
    thread::scope(|scope| {
        for index in 1..threads {
            scope.spawn(move || copy_part(from, to, index, threads));
        }
        copy_part(from, to, 0, threads);
    });
}

/// Copies part `index` of as many as there are threads.
fn copy_part(from: &Anonymous, to: &Anonymous, index: u64, threads: u64) {
    let regions = from.bytes().div_ceil(REGION_SIZE);
    let border = |n: u64| (regions * n / threads * REGION_SIZE).min(from.bytes());
    let (start, end) = (border(index) as usize, border(index + 1) as usize);
    // SAFETY: the range is in both mappings, which do not overlap. vCPUs and devices are stopped, so nobody
    // writes to the source, and of the destination this thread has this part alone: there is one copy at a
    // time.
    unsafe {
        ptr::copy_nonoverlapping(
            from.base().as_ptr().add(start),
            to.base().as_ptr().add(start),
            end - start,
        );
    }
}

impl Technique for StopAndCopy {
    fn slot(&self) -> Arc<dyn Memslot> {
        Arc::clone(&self.memory) as _
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        Arc::clone(&self.memory) as _
    }

    fn populate(&self, gpas: Range<u64>) -> Result<(), TechniqueError> {
        self.memory.populate(gpas)
    }

    fn snapshot(&self) -> Result<Box<dyn SnapshotMemory + '_>, TechniqueError> {
        if self.taken.swap(true, Ordering::Acquire) {
            return Err(TechniqueError::Busy);
        }
        copy_all(&self.memory, &self.destination, self.threads);
        self.copied
            .fetch_add(self.memory.bytes(), Ordering::Relaxed);
        Ok(Box::new(Copied(self)))
    }

    fn copied(&self) -> Option<u64> {
        Some(self.copied.load(Ordering::Relaxed))
    }

    fn device(&self, _gpas: Range<u64>) -> Result<Box<dyn BenchDevice>, TechniqueError> {
        Ok(Box::new(PlainDevice(Arc::clone(&self.memory))))
    }
}

/// The copy. Its memory is kept for the next one.
struct Copied<'a>(&'a StopAndCopy);

impl SnapshotMemory for Copied<'_> {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), TechniqueError> {
        self.0
            .destination
            .read(gpa, buf)
            .map_err(TechniqueError::Memory)
    }
}

impl Drop for Copied<'_> {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
    }
}
