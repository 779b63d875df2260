//! Ours: a shadow page table and a window, copy-on-write resolved on the faulting vCPU's own thread, all through the library's public parts.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use guest::abi::PAGE_SIZE;
use palimpsest::host::{Ahead, MappingBudget, PhysMap, PinnedBuffer, Prices, Ram, Window};
use palimpsest::kvm::{GuestRam, Memslot};
use palimpsest::mm::{Access, AddressSpace, Exclusive, FramePool, Frozen, Gfn};

use super::{Device, Taken, Technique, TechniqueError, host};
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
    ram: Ram<Exclusive>,
    ahead: Option<Ahead>,
    window: Arc<Window>,
    /// What was allocated for the frame table, the shadow page table and the window's notes.
    tables: Option<Mutex<Made>>,
}

impl Ours {
    pub(super) fn new(
        memory: u64,
        granularity: Granularity,
        copies_ahead: bool,
    ) -> Result<Self, TechniqueError> {
        let before = heap::mark();
        let pages = memory / PAGE_SIZE;
        // The guest, one snapshot, what the guest writes while that one is dropped, and what is allocated in batches.
        let frames = 3 * pages + 1024;
        let physmap = PhysMap::new(frames).map_err(host("reserve frames"))?;
        let alloc = |error| host("make a frame pool")(std::io::Error::other(error));
        let pool = FramePool::new(Arc::clone(&physmap) as _, frames, frames).map_err(alloc)?;
        let budget = Arc::new(MappingBudget::of_this_process());
        let window =
            Window::new(Arc::clone(&physmap), budget, pages).map_err(host("map the window"))?;
        let window = Arc::new(window);
        let shown = Box::new(Arc::clone(&window));
        let mut space = AddressSpace::new(pool, Exclusive, shown, pages).map_err(alloc)?;
        if granularity == Granularity::Small {
            physmap.use_base_pages();
            space = space.with_base_pages();
        }
        let mut ram = Ram::new(Arc::new(space), physmap);
        if granularity == Granularity::Huge {
            // Whatever a page costs, a region is broken whole.
            ram = ram.with_prices(Prices::fixed(0));
        }
        let ahead = copies_ahead
            .then(|| Ahead::start(Arc::clone(ram.space())))
            .transpose()
            .map_err(host("start a thread"))?;
        Ok(Self {
            ram,
            ahead,
            window,
            tables: before.map(|before| Mutex::new(before.made())),
        })
    }
}

impl Technique for Ours {
    fn slot(&self) -> Arc<dyn Memslot> {
        Arc::clone(&self.window) as _
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        Arc::new(self.ram.clone())
    }

    /// What the guest's write faults would do, without the guest.
    fn populate(&self, gpas: Range<u64>) -> Result<(), TechniqueError> {
        let before = heap::mark();
        (gpas.start / PAGE_SIZE..gpas.end / PAGE_SIZE).try_for_each(|gfn| {
            self.ram
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
        self.ram.space().prepare_fork();
        Ok(())
    }

    fn snapshot(&self) -> Result<Box<dyn Taken + '_>, TechniqueError> {
        let frozen = self.ram.space().fork()?;
        Ok(Box::new(Shared { ours: self, frozen }))
    }

    fn resumed(&self) {
        self.ahead.iter().for_each(Ahead::work);
    }

    fn copied(&self) -> Option<u64> {
        let stats = self.ram.space().stats();
        Some((stats.copied + stats.eager_copied) * PAGE_SIZE)
    }

    fn tables(&self) -> Option<u64> {
        let tables = self.tables.as_ref()?;
        let tables = tables.lock().unwrap_or_else(PoisonError::into_inner);
        // What the window noted since it was made comes on top: that much of it is counted twice, for it is little.
        Some(tables.resident().ok()? + self.window.notes())
    }

    fn device(&self, gpas: Range<u64>) -> Result<Box<dyn Device>, TechniqueError> {
        let registered = gpas.start..gpas.end.min(gpas.start + REGISTERED * PAGE_SIZE);
        let buffer = self
            .ram
            .pin(
                registered.start,
                registered.end - registered.start,
                Access::Write,
            )
            .map_err(|error| TechniqueError::Memory(error.into()))?;
        Ok(Box::new(PinningDevice {
            ram: self.ram.clone(),
            registered,
            buffer,
        }))
    }
}

/// A device that pins what it writes: some of it for good, the rest for each write.
struct PinningDevice {
    ram: Ram<Exclusive>,
    registered: Range<u64>,
    buffer: PinnedBuffer,
}

impl Device for PinningDevice {
    fn write_page(&mut self, gpa: u64, word: u64) -> Result<(), TechniqueError> {
        let page = [word.to_le_bytes(); PAGE_SIZE as usize / 8];
        let bytes = page.as_flattened();
        if self.registered.contains(&gpa) {
            let index = (gpa - self.registered.start) / PAGE_SIZE;
            for slice in self.buffer.slices().skip(index as usize).take(1) {
                slice.copy_from(bytes);
            }
            return Ok(());
        }
        self.ram
            .write(gpa, bytes)
            .map_err(|error| TechniqueError::Memory(error.into()))
    }
}

struct Shared<'a> {
    ours: &'a Ours,
    frozen: Arc<Frozen>,
}

impl Taken for Shared<'_> {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), TechniqueError> {
        let mut done = 0;
        while done < buf.len() {
            let at = gpa + done as u64;
            let offset = at % PAGE_SIZE;
            let end = buf.len().min(done + (PAGE_SIZE - offset) as usize);
            let part = &mut buf[done..end];
            self.frozen
                .with_frame(Gfn::of_gpa(at), |pfn| {
                    let len = part.len() as u64;
                    self.ours
                        .ram
                        .physmap()
                        .slice(pfn, offset, len)
                        .copy_to(part)
                })
                .map_err(|error| TechniqueError::Memory(error.into()))?;
            done = end;
        }
        Ok(())
    }
}
