//! Guest memory by guest-physical address, for host code.
//!
//! | file | concept |
//! |---|---|
//! | `pages` | a range of bytes, page by page |
//! | `pinned` | a range that stays pinned until it is dropped |
//! | `slices` | the traits of `vm-memory`, whose slices are pinned |

mod pages;
mod pinned;
mod slices;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use self::pages::pages;
pub use self::pinned::PinnedBuffer;
pub use self::slices::SlicePin;
use super::physmap::PhysMap;
use super::precedence::Precedence;
use super::prices::Prices;
use super::space::Space;
use crate::mm::{Access, FaultError, Gfn, PAGE_SIZE, PinError, Resolution, Touch};

/// Guest memory of a running VM, whatever its copy-on-write policy.
#[derive(Clone)]
pub struct Ram {
    space: Arc<dyn Space>,
    physmap: Arc<PhysMap>,
    prices: Arc<Prices>,
    precedence: Arc<Precedence>,
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
            precedence: Arc::default(),
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

    #[cfg(test)]
    pub(in crate::host) fn with_precedence(mut self, precedence: Precedence) -> Self {
        self.precedence = Arc::new(precedence);
        self
    }

    /// Whether changes of its mappings come before those of other machines.
    pub fn precedence(&self) -> &Precedence {
        &self.precedence
    }

    /// What faults have cost.
    pub fn prices(&self) -> &Prices {
        &self.prices
    }

    /// Resolves a write of a vCPU to page `gfn`, as
    /// [`AddressSpace::write_fault`](crate::mm::AddressSpace::write_fault), and learns what that costs: how
    /// much of a region a break copies goes by it.
    ///
    /// # Errors
    /// As [`AddressSpace::write_fault`](crate::mm::AddressSpace::write_fault).
    pub fn write_fault(&self, gfn: Gfn) -> Result<Resolution, FaultError> {
        self.precedence.give_way();
        let start = Instant::now();
        let fault = self.space.resolve_write(gfn)?;
        if let Some(price) = self.prices.paid(fault, start.elapsed()) {
            self.space.set_whole_price(price);
        }
        Ok(fault.resolution)
    }

    /// Shows page `gfn` to a vCPU that has touched it, if it was hidden: as
    /// [`AddressSpace::touch`](crate::mm::AddressSpace::touch).
    ///
    /// # Errors
    /// As there.
    pub fn touch(&self, gfn: Gfn) -> Result<Touch, FaultError> {
        self.precedence.give_way();
        self.space.touch(gfn)
    }

    /// How many regions of 2 MiB are hidden from vCPUs: [`AddressSpace::hidden`](crate::mm::AddressSpace::hidden).
    pub fn hidden(&self) -> u64 {
        self.space.hidden()
    }

    /// The first page that is hidden from vCPUs, from the region of `from` on:
    /// [`AddressSpace::first_hidden`](crate::mm::AddressSpace::first_hidden).
    pub fn first_hidden(&self, from: Gfn) -> Option<Gfn> {
        self.space.first_hidden(from)
    }

    /// Bytes of guest memory, from gpa 0.
    pub fn size(&self) -> u64 {
        self.space.pages() * PAGE_SIZE
    }

    /// Pins the `len` bytes at `gpa`, and holds them until the buffer is dropped.
    ///
    /// # Errors
    /// If they are not all guest memory, or a page can't be pinned; nothing is held then.
    pub fn pin(&self, gpa: u64, len: u64, access: Access) -> Result<PinnedBuffer, RamError> {
        self.check(gpa, len)?;
        let count = pages(gpa, len).count() as u64;
        self.precedence.give_way();
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
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), RamError> {
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
    pub fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), RamError> {
        let pinned = self.pin(gpa, buf.len() as u64, Access::Write)?;
        let mut done = 0;
        for slice in pinned.slices() {
            let next = done + slice.len();
            slice.copy_from(&buf[done..next]);
            done = next;
        }
        Ok(())
    }

    fn check(&self, gpa: u64, len: u64) -> Result<(), RamError> {
        match gpa.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(RamError::OutOfRange { gpa, len }),
        }
    }
}
