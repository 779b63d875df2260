//! Guest memory by the traits of `vm-memory`.
//!
//! [`Ram`] is what devices are given. It implements `vm-memory`'s `GuestMemory`, so that `virtio-queue`
//! drives a ring through it, and **every slice it hands out is pinned for as long as the slice lives**: the
//! pin travels in the place `vm-memory` has for a dirty bitmap, with the slice and all its parts. Code that
//! only knows `GuestMemory` so follows the protocol without knowing of it.

use std::iter::{Fuse, FusedIterator};
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::Ram;
use super::pages::{PagePart, pages};
use crate::mm::{Access, Pin};

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
    parts: Fuse<I>,
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
