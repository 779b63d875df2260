//! Guest memory by guest-physical address, for host code.
//!
//! [`Ram`] is what devices are given. It implements `vm-memory`'s `GuestMemory`, so that `virtio-queue`
//! drives a ring through it, and **every slice it hands out is pinned for as long as the slice lives**: the
//! pin travels in the place `vm-memory` has for a dirty bitmap, with the slice and all its parts. Code that
//! only knows `GuestMemory` so follows the protocol without knowing of it.

use std::fmt;
use std::iter::FusedIterator;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::physmap::PhysMap;
use super::prices::Prices;
use super::space::Space;
use crate::mm::{Access, FaultError, Gfn, PAGE_SIZE, Pin, PinError, PinnedRun, Resolution};

/// Guest memory of a running VM, whatever its copy-on-write policy.
#[derive(Clone)]
pub struct Ram {
    space: Arc<dyn Space>,
    physmap: Arc<PhysMap>,
    prices: Arc<Prices>,
}

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram")
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

/// Why guest memory could not be accessed.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Beyond the end.
    #[error("guest memory has no {len} bytes at {gpa:#x}")]
    OutOfRange {
        /// First byte.
        gpa: u64,
        /// How many.
        len: u64,
    },
    /// A page could not be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A page could not be held.
    #[error(transparent)]
    Hold(#[from] FaultError),
}

impl Ram {
    /// Guest memory of `space`, whose frames are in `physmap`.
    pub fn new(space: Arc<dyn Space>, physmap: Arc<PhysMap>) -> Self {
        Self {
            space,
            physmap,
            prices: Arc::default(),
        }
    }

    /// The physmap.
    pub fn physmap(&self) -> &Arc<PhysMap> {
        &self.physmap
    }

    /// The same, with prices that are not learnt.
    #[must_use]
    pub fn with_prices(mut self, prices: Prices) -> Self {
        if let Some(price) = prices.whole_price() {
            self.space.set_whole_price(price);
        }
        self.prices = Arc::new(prices);
        self
    }

    /// What faults have cost.
    pub fn prices(&self) -> &Prices {
        &self.prices
    }

    /// Resolves a write of a vCPU to page `gfn`, as [`AddressSpace::write_fault`], and learns what that
    /// costs: how much of a region a break copies goes by it.
    ///
    /// # Errors
    /// As [`AddressSpace::write_fault`].
    pub fn write_fault(&self, gfn: Gfn) -> std::result::Result<Resolution, FaultError> {
        let start = Instant::now();
        let fault = self.space.resolve_write(gfn)?;
        if let Some(price) = self.prices.paid(fault, start.elapsed()) {
            self.space.set_whole_price(price);
        }
        Ok(fault.resolution)
    }

    /// Bytes of guest memory, from gpa 0.
    pub fn size(&self) -> u64 {
        self.space.pages() * PAGE_SIZE
    }

    /// Pins the `len` bytes at `gpa`, and holds them until the buffer is dropped.
    ///
    /// # Errors
    /// If they are not all guest memory, or a page can't be pinned; nothing is held then.
    pub fn pin(
        &self,
        gpa: u64,
        len: u64,
        access: Access,
    ) -> std::result::Result<PinnedBuffer, RamError> {
        self.check(gpa, len)?;
        let count = pages(gpa, len).count() as u64;
        Ok(PinnedBuffer {
            physmap: Arc::clone(&self.physmap),
            runs: self.space.pin_range(Gfn::of_gpa(gpa), count, access)?,
            gpa,
            len,
        })
    }

    /// Copies guest memory at `gpa` out, as a transient reader: bytes the guest is writing meanwhile may be
    /// old, new or mixed.
    ///
    /// # Errors
    /// If the bytes are not all guest memory.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> std::result::Result<(), RamError> {
        self.check(gpa, buf.len() as u64)?;
        let mut done = 0;
        for part in pages(gpa, buf.len() as u64) {
            let hold = self.space.get(part.gfn, Access::Read)?;
            let slice = self.physmap.slice(hold.pfn(), part.offset, part.len);
            done += slice.copy_to(&mut buf[done..done + part.len as usize]);
        }
        Ok(())
    }

    /// Copies `buf` to guest memory at `gpa`, through a pin.
    ///
    /// # Errors
    /// As [`Ram::pin`].
    pub fn write(&self, gpa: u64, buf: &[u8]) -> std::result::Result<(), RamError> {
        let pinned = self.pin(gpa, buf.len() as u64, Access::Write)?;
        let mut done = 0;
        for slice in pinned.slices() {
            let next = done + slice.len();
            slice.copy_from(&buf[done..next]);
            done = next;
        }
        Ok(())
    }

    fn check(&self, gpa: u64, len: u64) -> std::result::Result<(), RamError> {
        match gpa.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(RamError::OutOfRange { gpa, len }),
        }
    }
}

/// The part of a byte range that lies in one page.
#[derive(Clone, Copy)]
struct PagePart {
    gfn: Gfn,
    offset: u64,
    len: u64,
}

/// Splits the `len` bytes at `gpa` at page borders. The range does not wrap.
fn pages(gpa: u64, len: u64) -> impl Iterator<Item = PagePart> {
    let end = gpa + len;
    let mut at = gpa;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let offset = at % PAGE_SIZE;
            let len = (PAGE_SIZE - offset).min(end - at);
            let part = PagePart {
                gfn: Gfn::of_gpa(at),
                offset,
                len,
            };
            at += len;
            part
        })
    })
}

/// Bytes of guest memory that are pinned: they stay where they are, and what the guest sees there, until this
/// is dropped.
pub struct PinnedBuffer {
    physmap: Arc<PhysMap>,
    runs: Vec<PinnedRun>,
    gpa: u64,
    len: u64,
}

impl PinnedBuffer {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, in order: one slice a page.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        pages(self.gpa, self.len)
            .zip(self.runs.iter().flat_map(PinnedRun::pfns))
            .map(|(part, pfn)| self.physmap.slice(pfn, part.offset, part.len))
    }

    /// The pins themselves.
    pub fn into_pins(self) -> impl Iterator<Item = PinnedRun> {
        self.runs.into_iter()
    }
}

impl fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedBuffer")
            .field("gpa", &self.gpa)
            .field("len", &self.len)
            .finish()
    }
}

/// Keeps a page pinned for as long as a slice of it, or any part of the slice, lives.
#[derive(Clone, Debug)]
pub struct SlicePin {
    _pin: Arc<Pin>,
}

impl WithBitmapSlice<'_> for SlicePin {
    type S = Self;
}

impl BitmapSlice for SlicePin {}

impl Bitmap for SlicePin {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
    fn slice_at(&self, _offset: usize) -> Self {
        self.clone()
    }
}

impl GuestMemory for Ram {
    // There is no memory below that could be reached without a pin: `physical_memory` says so.
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = SlicePin;

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.check(addr.0, count as u64).is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, SlicePin>> {
        self.check(addr.0, count as u64)
            .map_err(|_| Error::InvalidGuestAddress(addr))?;
        let access = if access.has_write() {
            Access::Write
        } else {
            Access::Read
        };
        Ok(Slices {
            ram: self,
            parts: pages(addr.0, count as u64).fuse(),
            access,
        })
    }
}

struct Slices<'a, I> {
    ram: &'a Ram,
    parts: std::iter::Fuse<I>,
    access: Access,
}

impl<'a, I: Iterator<Item = PagePart>> Iterator for Slices<'a, I> {
    type Item = Result<VolatileSlice<'a, SlicePin>>;

    fn next(&mut self) -> Option<Self::Item> {
        let part = self.parts.next()?;
        Some(match self.ram.space.pin(part.gfn, self.access) {
            Ok(pin) => {
                let pfn = pin.pfn();
                let held = SlicePin {
                    _pin: Arc::new(pin),
                };
                Ok(self
                    .ram
                    .physmap
                    .slice_held(pfn, part.offset, part.len, held))
            }
            Err(error) => {
                // What follows an error must not be handed out.
                self.parts.by_ref().for_each(drop);
                Err(Error::IOError(std::io::Error::other(error)))
            }
        })
    }
}

impl<I: Iterator<Item = PagePart>> FusedIterator for Slices<'_, I> {}

impl<'a, I: Iterator<Item = PagePart>> GuestMemorySliceIterator<'a, SlicePin> for Slices<'a, I> {}
