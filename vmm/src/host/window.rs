//! The window: the host addresses behind a KVM memslot.
//!
//! Page `gfn` of the window shows the frame that the shadow page table says, with the protection it says. It is
//! changed by `mmap(MAP_FIXED)` and `mprotect`: KVM's MMU notifier makes every vCPU see the change before
//! the call returns. Memory nobody ever wrote is a private anonymous mapping without write permission: the
//! host's own zero page, which costs one mapping for any number of pages.
#![expect(unsafe_code, reason = "maps frames over a range of addresses it owns")]

use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

use super::budget::MappingBudget;
use super::physmap::PhysMap;
use crate::mm::{Gfn, Mmu, MmuError, PAGE_SIZE, Pfn, Protection, REGION_PAGES};

/// A window of guest memory.
#[derive(Debug)]
pub struct Window {
    /// First host address, aligned to 2 MiB.
    base: usize,
    pages: u64,
    physmap: Arc<PhysMap>,
    budget: Arc<MappingBudget>,
    /// What each page shows, so that mappings can be counted before they are made.
    shown: Mutex<Vec<Shown>>,
}

/// What a page shows. Neighbours share a mapping if they show the same thing: frames that follow each other, or zeros.
///
/// Packed, since a fork looks at that of every page: bit 0 says that there is a frame, bit 1 that it is writable, the bits from 2 on are
/// `pfn - gfn`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Shown(i64);

impl Shown {
    const ZEROS: Self = Self(0);
    const FRAME: i64 = 1;
    const WRITABLE: i64 = 2;

    fn frames(distance: i64, protection: Protection) -> Self {
        Self(distance << 2 | Self::FRAME).protected(protection)
    }

    fn protected(self, protection: Protection) -> Self {
        match protection {
            _ if self == Self::ZEROS => self,
            Protection::ReadOnly => Self(self.0 & !Self::WRITABLE),
            Protection::ReadWrite => Self(self.0 | Self::WRITABLE),
        }
    }
}

impl Window {
    /// A window of `pages` pages on to `physmap`, all of which show zeros.
    ///
    /// # Errors
    /// The host's, if it has no address space; or the mapping budget's.
    pub fn new(physmap: Arc<PhysMap>, budget: Arc<MappingBudget>, pages: u64) -> io::Result<Self> {
        budget
            .change(0, 1)
            .map_err(|limit| io::Error::other(MmuError::MappingLimit { limit }))?;
        let base = reserve(pages * PAGE_SIZE).inspect_err(|_| {
            let _ = budget.change(1, 0);
        })?;
        Ok(Self {
            base,
            pages,
            physmap,
            budget,
            shown: Mutex::new(vec![Shown::ZEROS; pages as usize]),
        })
    }

    /// First host address: what a memslot for gpa 0 points at.
    pub fn host_address(&self) -> u64 {
        self.base as u64
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Whether it has no pages. It has.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    fn address(&self, gfn: Gfn) -> *mut c_void {
        ptr::with_exposed_provenance_mut(self.base + gfn.gpa() as usize)
    }

    /// Changes what pages `first..first + count` show: books the mappings, lets `apply` do it, and notes it, or
    /// takes the booking back if that fails.
    fn change(
        &self,
        first: Gfn,
        count: u64,
        what: &'static str,
        shows: impl Fn(Shown) -> Shown,
        apply: impl FnOnce() -> rustix::io::Result<()>,
    ) -> Result<(), MmuError> {
        assert!(
            count > 0
                && first
                    .0
                    .checked_add(count)
                    .is_some_and(|end| end <= self.pages),
            "{count} pages from {first:?} on are not in the window"
        );
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let range = first.0 as usize..(first.0 + count) as usize;
        // The page before and the page after: a mapping may end or begin at either end.
        let edges = range.start.saturating_sub(1)..(range.end + 1).min(shown.len());
        let before = mappings(shown[edges.clone()].iter().copied());
        let after = mappings(edges.clone().map(|page| match shown[page] {
            old if range.contains(&page) => shows(old),
            neighbour => neighbour,
        }));
        self.budget
            .change(before, after)
            .map_err(|limit| MmuError::MappingLimit { limit })?;
        if let Err(error) = apply() {
            let _ = self.budget.change(after, before);
            return Err(match error {
                // Ours is not the only use of mappings: the host may be at its limit before we are.
                Errno::NOMEM => MmuError::MappingLimit {
                    limit: self.budget.limit(),
                },
                error => MmuError::Host {
                    what,
                    first,
                    count,
                    source: error.into(),
                },
            });
        }
        for page in &mut shown[range] {
            *page = shows(*page);
        }
        Ok(())
    }
}

impl Mmu for Window {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        let len = (count * PAGE_SIZE) as usize;
        let fixed = MapFlags::FIXED | MapFlags::NORESERVE;
        if frame == Pfn::ZERO {
            return self.change(
                first,
                count,
                "clear",
                |_| Shown::ZEROS,
                || {
                    // SAFETY: `change` has checked that the range is the window's own. Only vCPUs look through it.
                    unsafe {
                        mmap_anonymous(
                            self.address(first),
                            len,
                            ProtFlags::READ,
                            MapFlags::PRIVATE | fixed,
                        )
                    }
                    .map(drop)
                },
            );
        }
        let distance = frame.0 as i64 - first.0 as i64;
        let prot = match protection {
            Protection::ReadOnly => ProtFlags::READ,
            Protection::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let shows = |_| Shown::frames(distance, protection);
        self.change(first, count, "map", shows, || {
            // SAFETY: as above.
            unsafe {
                mmap(
                    self.address(first),
                    len,
                    prot,
                    MapFlags::SHARED | fixed,
                    self.physmap.file(),
                    frame.offset(),
                )
            }
            .map(drop)
        })
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        let flags = match protection {
            Protection::ReadOnly => MprotectFlags::READ,
            Protection::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        let shows = |page: Shown| page.protected(protection);
        self.change(first, count, "protect", shows, || {
            // SAFETY: as above.
            unsafe { mprotect(self.address(first), (count * PAGE_SIZE) as usize, flags) }
        })
    }

    fn is_crowded(&self) -> bool {
        self.budget.is_crowded()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let shown = self.shown.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = self.budget.change(mappings(shown.iter().copied()), 0);
        // SAFETY: the range is the window's own; the VM whose memslot pointed here is gone, or sees nothing from now on.
        let unmapped = unsafe { munmap(self.address(Gfn(0)), self.len() as usize) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "cannot unmap a window");
        }
    }
}

/// Mappings that a run of pages takes.
fn mappings(pages: impl Iterator<Item = Shown>) -> u64 {
    let mut last = None;
    pages.fold(0, |count, page| {
        let begins = last.replace(page) != Some(page);
        count + u64::from(begins)
    })
}

/// Reserves addresses that show zeros, aligned to 2 MiB.
fn reserve(len: u64) -> io::Result<usize> {
    let align = (REGION_PAGES * PAGE_SIZE) as usize;
    let len = len as usize;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            len + align,
            ProtFlags::READ,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?
    .expose_provenance();
    let base = start.next_multiple_of(align);
    let trim = |from: usize, len: usize| {
        if len == 0 {
            return Ok(());
        }
        // SAFETY: a part of the mapping just made, which nobody else knows of.
        unsafe { munmap(ptr::with_exposed_provenance_mut(from), len) }
    };
    trim(start, base - start)?;
    trim(base + len, start + align - base)?;
    Ok(base)
}
