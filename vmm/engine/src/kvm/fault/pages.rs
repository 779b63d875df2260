//! Collects the pages that accesses are about.

use std::ops::Range;

use kvm_bindings::kvm_sregs;

use super::cause::frames;
use super::decode::GuestAccess;
use crate::causes::Cause;
use crate::kvm::memory::GuestRam;
use crate::kvm::paging::{Touch, Walker};
use crate::mm::{PAGE_SIZE, REGION_PAGES};

/// Guest frames, each once, in the order found. What lies outside of memory is passed over: it cannot be what
/// faulted.
pub(super) struct Pages<'a> {
    walker: Walker<'a>,
    frames: u64,
    gfns: Vec<u64>,
}

impl<'a> Pages<'a> {
    pub(super) fn new(ram: &'a dyn GuestRam, sregs: &kvm_sregs) -> Self {
        Self {
            walker: Walker::new(ram, sregs),
            frames: frames(ram),
            gfns: Vec::new(),
        }
    }

    pub(super) fn into_gfns(self) -> Vec<u64> {
        self.gfns
    }

    fn add(&mut self, gfn: u64) {
        if gfn < self.frames && !self.gfns.contains(&gfn) {
            self.gfns.push(gfn);
        }
    }

    /// Adds a run of frames.
    pub(super) fn add_all(&mut self, gfns: Range<u64>) {
        let end = gfns.end.min(self.frames);
        if self.gfns.is_empty() {
            self.gfns = (gfns.start..end).collect();
        } else {
            (gfns.start..end).for_each(|gfn| self.add(gfn));
        }
    }

    /// Adds what `access` writes: its pages if it is a write, and page tables that must be told of it.
    pub(super) fn written(&mut self, access: &GuestAccess) -> Result<(), Cause> {
        self.told(access)?;
        if access.touch == Touch::Write {
            for gva in pages_of(access) {
                if let Some(gpa) = self.walker.translate(gva, access.touch, |_| {})? {
                    self.add(gpa / PAGE_SIZE);
                }
            }
        }
        Ok(())
    }

    /// Adds page tables in which `access` sets accessed or dirty bits.
    pub(super) fn told(&mut self, access: &GuestAccess) -> Result<(), Cause> {
        for gva in pages_of(access) {
            let mut tables = Vec::new();
            self.walker.translate(gva, access.touch, |step| {
                if step.sets_bit {
                    tables.push(step.slot);
                }
            })?;
            tables.into_iter().for_each(|gpa| self.add(gpa / PAGE_SIZE));
        }
        Ok(())
    }

    /// Adds every page-table page that is walked for `access`, as far as the walk goes.
    pub(super) fn walked(&mut self, access: &GuestAccess) -> Result<(), Cause> {
        for gva in pages_of(access) {
            let mut tables = Vec::new();
            self.walker
                .translate(gva, access.touch, |step| tables.push(step.slot))?;
            tables.into_iter().for_each(|gpa| self.add(gpa / PAGE_SIZE));
        }
        Ok(())
    }

    /// Adds the regions that `access` lies in.
    pub(super) fn around(&mut self, access: &GuestAccess) -> Result<(), Cause> {
        for gva in pages_of(access) {
            if let Some(gpa) = self.walker.translate(gva, access.touch, |_| {})? {
                let gfn = gpa / PAGE_SIZE;
                let first = gfn - gfn % REGION_PAGES;
                if !self.gfns.contains(&gfn) {
                    self.add_all(first..first + REGION_PAGES);
                }
            }
        }
        Ok(())
    }
}

/// The addresses of the pages that an access touches: where it begins, then each page's first byte.
fn pages_of(access: &GuestAccess) -> impl Iterator<Item = u64> + use<> {
    let gva = access.gva;
    let first = gva - gva % PAGE_SIZE;
    let pages = (gva % PAGE_SIZE + access.len.max(1)).div_ceil(PAGE_SIZE);
    (0..pages).map(move |page| first.wrapping_add(page * PAGE_SIZE))
}
