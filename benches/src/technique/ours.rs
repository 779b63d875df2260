//! Ours: a shadow page table and a window, copy-on-write resolved on the faulting vCPU's own thread, all
//! through the library's public parts.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use guest::abi::PAGE_SIZE;
use palimpsest::host::{Ahead, PinnedBuffer, Placement, Prices, Ram, Window};
use palimpsest::kvm::{GuestRam, Memslot};
use palimpsest::memory::{Frames, Memory, MemoryError, MemoryOptions};
use palimpsest::mm::{Access, Exclusive, Frozen, Gfn};

use super::{BenchDevice, SnapshotMemory, Technique, TechniqueError, host};
use crate::heap::{self, Made};

/// Pages of a device's memory that it holds for good, as RDMA, io_uring and VFIO hold theirs.
const REGISTERED: u64 = 16;

/// In which pieces memory is shared and copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// As the library decides by itself.
    Adaptive,
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Huge,
}

pub(super) struct Ours {
    memory: Memory,
    ahead: Option<Ahead>,
    /// What was allocated for the frame table, the shadow page table and the window's notes.
    tables: Option<Mutex<Made>>,
}

impl Ours {
    pub(super) fn new(
        memory: u64,
        placement: Placement,
        granularity: Granularity,
        copies_ahead: bool,
    ) -> Result<Self, TechniqueError> {
        let before = heap::mark();
        // The guest, one snapshot, what the guest writes while that one is dropped, and batches.
        let frames = Frames::new(3 * memory + 1024 * PAGE_SIZE).map_err(no_memory)?;
        let options = MemoryOptions {
            base_pages: granularity == Granularity::Small,
            // Whatever a page costs, a region is broken whole.
            prices: (granularity == Granularity::Huge).then(|| Prices::fixed(0)),
            placement,
            account: None,
        };
        let plain = |window| Box::new(window) as _;
        let memory = Memory::with(&frames, memory, Exclusive, options, plain).map_err(no_memory)?;
        if copies_ahead {
            frames.keep_stock().map_err(host("start a thread"))?;
        }
        let ahead = copies_ahead
            .then(|| Ahead::start(Arc::clone(memory.space())))
            .transpose()
            .map_err(host("start a thread"))?;
        Ok(Self {
            memory,
            ahead,
            tables: before.map(|before| Mutex::new(before.made())),
        })
    }
}

fn no_memory(error: MemoryError) -> TechniqueError {
    host("have memory for a guest")(std::io::Error::other(error))
}

impl Technique for Ours {
    fn slot(&self) -> Arc<dyn Memslot> {
        Arc::clone(self.memory.window()) as _
    }

    fn window(&self) -> Option<Arc<Window>> {
        Some(Arc::clone(self.memory.window()))
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        Arc::new(self.memory.ram().clone())
    }

    fn frames(&self) -> Option<&Frames> {
        Some(self.memory.frames())
    }

    /// What the guest's write faults would do, without the guest.
    fn populate(&self, gpas: Range<u64>) -> Result<(), TechniqueError> {
        let before = heap::mark();
        (gpas.start / PAGE_SIZE..gpas.end / PAGE_SIZE).try_for_each(|gfn| {
            self.memory
                .space()
                .write_fault(Gfn(gfn))
                .map(drop)
                .map_err(|error| TechniqueError::Memory(error.into()))
        })?;
        if let (Some(tables), Some(before)) = (&self.tables, before) {
            let mut tables = tables.lock().unwrap_or_else(PoisonError::into_inner);
            tables.append(before.made());
        }
        Ok(())
    }

    fn prepare(&self) -> Result<(), TechniqueError> {
        self.ahead.iter().for_each(Ahead::rest);
        self.memory.space().prepare_fork();
        Ok(())
    }

    fn snapshot(&self) -> Result<Box<dyn SnapshotMemory + '_>, TechniqueError> {
        let frozen = self.memory.space().fork()?;
        Ok(Box::new(CowSnapshot { ours: self, frozen }))
    }

    fn resumed(&self) {
        self.ahead.iter().for_each(Ahead::work);
    }

    fn copied(&self) -> Option<u64> {
        let stats = self.memory.space().stats();
        Some((stats.copied + stats.eager_copied) * PAGE_SIZE)
    }

    fn tables(&self) -> Option<u64> {
        let tables = self.tables.as_ref()?;
        let tables = tables.lock().unwrap_or_else(PoisonError::into_inner);
        // Notes of the window since it was made come on top. They are few, and may be counted twice.
        Some(tables.resident().ok()? + self.memory.window().notes())
    }

    fn device(&self, gpas: Range<u64>) -> Result<Box<dyn BenchDevice>, TechniqueError> {
        let registered = gpas.start..gpas.end.min(gpas.start + REGISTERED * PAGE_SIZE);
        let ram = self.memory.ram();
        let buffer = ram
            .pin(
                registered.start,
                registered.end - registered.start,
                Access::Write,
            )
            .map_err(|error| TechniqueError::Memory(error.into()))?;
        Ok(Box::new(PinningDevice {
            ram: ram.clone(),
            registered,
            buffer,
        }))
    }
}

/// A device that pins what it writes: some of it for good, the rest for each write.
struct PinningDevice {
    ram: Ram,
    registered: Range<u64>,
    buffer: PinnedBuffer,
}

impl BenchDevice for PinningDevice {
    fn write_page(&mut self, gpa: u64, word: u64) -> Result<(), TechniqueError> {
        let page = [word.to_le_bytes(); PAGE_SIZE as usize / 8];
        let bytes = page.as_flattened();
        if self.registered.contains(&gpa) {
            let at = gpa - self.registered.start;
            let mut done = 0;
            for slice in self.buffer.part(at..at + PAGE_SIZE) {
                slice.copy_from(&bytes[done..done + slice.len()]);
                done += slice.len();
            }
            return Ok(());
        }
        self.ram
            .write(gpa, bytes)
            .map_err(|error| TechniqueError::Memory(error.into()))
    }
}

struct CowSnapshot<'a> {
    ours: &'a Ours,
    frozen: Arc<Frozen>,
}

impl SnapshotMemory for CowSnapshot<'_> {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), TechniqueError> {
        let frames = self.ours.memory.frames();
        let read = frames.read(&self.frozen, gpa, buf);
        read.map_err(|error| TechniqueError::Memory(error.into()))
    }

    fn frozen(&self) -> Option<&Arc<Frozen>> {
        Some(&self.frozen)
    }
}
