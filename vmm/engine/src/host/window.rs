//! The window: the host addresses behind a KVM memslot.
//!
//! Page `gfn` of the window shows the frame that the shadow page table says, with the protection it says. It
//! is changed by `mremap` of what the physmap has mapped, and by `mprotect`: KVM's MMU notifier makes every
//! vCPU see the change before the call returns. Memory nobody ever wrote is a private anonymous mapping
//! without write permission: the host's own zero page, which costs one mapping for any number of pages.
//!
//! Where guest code runs as code of this process, guest addresses are host addresses: such a window is at the
//! guest's own addresses ([`Placement::AtGuestAddresses`]), and what it shows can be executed. It begins at
//! [`LOWEST`]: a host maps nothing below, so pages there are noted and never shown. There is one such place
//! in a process; windows of code that may be anywhere can be anywhere ([`Placement::Executable`]).
//!
//! A window may have nothing to show at first ([`Window::vacant`]): nothing is mapped there, and what is mapped
//! first replaces nothing.
//!
//! What the host refuses it may have done in part: `mprotect` changes one mapping after the other, and says
//! that there is no room for more when it comes to the one that must be split (seen on Linux 6.18 with
//! `vm.max_map_count` reached). So after a refusal the window asks the kernel what is there: it has changed
//! nothing, or says [`MmuError::Torn`].
#![expect(unsafe_code, reason = "maps frames over a range of addresses it owns")]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, munmap};

use super::aligned::{reserve, reserve_at};
use super::budget::MappingBudget;
use super::maps;
use super::physmap::PhysMap;
use super::precedence::Precedence;
use super::private::keep_private;
use super::shown::{Shown, ShownPages, mappings};
use super::syscalls::{mmap_anonymous, mprotect};
use super::vacant::Vacant;
use crate::mm::{Gfn, Mmu, MmuError, PAGE_SIZE, Pfn, Protection};

/// The lowest address of a window at guest addresses: the least that Linux lets a process map, as it is
/// configured everywhere (`vm.mmap_min_addr`).
pub const LOWEST: u64 = 0x1_0000;

/// Where a window is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// Where the host has addresses, aligned to 2 MiB.
    #[default]
    Anywhere,
    /// At the guest's own addresses, from [`LOWEST`] on, for who runs guest code as code of this process.
    /// There is one such place in it.
    AtGuestAddresses,
    /// Where the host has addresses, as [`Placement::Anywhere`], for who runs guest code as code of this
    /// process that does not care where it is. There is room for many.
    Executable,
}

/// A window of guest memory.
#[derive(Debug)]
pub struct Window {
    /// Host address of gpa 0, aligned to 2 MiB.
    base: usize,
    /// The first page that is mapped.
    lowest: u64,
    pages: u64,
    placement: Placement,
    physmap: Arc<PhysMap>,
    budget: Arc<MappingBudget>,
    /// What each page shows, so that mappings can be counted before they are made.
    shown: Mutex<ShownPages>,
    /// The addresses, if they were free at first.
    kept: Option<Vacant>,
}

impl Window {
    /// A window of `pages` pages on to `physmap`, all of which show zeros.
    ///
    /// # Errors
    /// The host's, if it has no address space; or the mapping budget's.
    pub fn new(physmap: Arc<PhysMap>, budget: Arc<MappingBudget>, pages: u64) -> io::Result<Self> {
        Self::placed(physmap, budget, pages, Placement::Anywhere)
    }

    /// The same, at `placement`.
    ///
    /// # Errors
    /// As [`Window::new`]; or if something is mapped there already, which is named, or the host does not let
    /// memory be executed.
    pub fn placed(
        physmap: Arc<PhysMap>,
        budget: Arc<MappingBudget>,
        pages: u64,
        placement: Placement,
    ) -> io::Result<Self> {
        budget
            .change(0, 1)
            .map_err(|limit| io::Error::other(MmuError::MappingLimit { limit }))?;
        let len = pages.saturating_mul(PAGE_SIZE);
        let (base, lowest) = match placement {
            Placement::Anywhere => (reserve(len), 0),
            Placement::Executable => (physmap.allow_execution().and_then(|()| reserve(len)), 0),
            Placement::AtGuestAddresses => {
                let made = physmap.allow_execution();
                let made = made.and_then(|()| reserve_at(LOWEST..len.max(LOWEST)));
                (made.map(|()| 0), LOWEST / PAGE_SIZE)
            }
        };
        let base = base.inspect_err(|_| {
            let _ = budget.change(1, 0);
        })?;
        let window = Self {
            base,
            lowest,
            pages,
            placement,
            physmap,
            budget,
            shown: Mutex::new(ShownPages::all(pages, Shown::ZEROS)),
            kept: None,
        };
        window.keep_private(Gfn(0), pages);
        Ok(window)
    }

    /// A window of `pages` pages on to `physmap` at which nothing is mapped. Each page is mapped once, and then
    /// [`Window::settle`] is called, before anything else is done with it: until then it must not be looked at.
    ///
    /// # Errors
    /// The host's, if it has no address space.
    pub(crate) fn vacant(
        physmap: Arc<PhysMap>,
        budget: Arc<MappingBudget>,
        pages: u64,
    ) -> io::Result<Self> {
        let kept = Vacant::find(pages.saturating_mul(PAGE_SIZE))?;
        Ok(Self {
            base: kept.start(),
            lowest: 0,
            pages,
            placement: Placement::Anywhere,
            physmap,
            budget,
            shown: Mutex::new(ShownPages::all(pages, Shown::NOTHING)),
            kept: Some(kept),
        })
    }

    /// Has every page show zeros that shows nothing. A window that has none is as it was.
    ///
    /// # Errors
    /// As [`Mmu::map`].
    pub(crate) fn settle(&self) -> Result<(), MmuError> {
        let vacant: Vec<Range<u64>> = {
            let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            let runs = shown.runs_within(0..self.pages);
            runs.filter(|&(_, shown)| shown == Shown::NOTHING)
                .map(|(pages, _)| pages)
                .collect()
        };
        let of_one = |a: &Range<u64>, b: &Range<u64>| a.end == b.start;
        for run in vacant.chunk_by(of_one) {
            let (first, end) = (run[0].start, run[run.len() - 1].end);
            self.map(Gfn(first), Pfn::ZERO, end - first, Protection::ReadOnly)?;
        }
        if self.kept.is_some() {
            self.keep_private(Gfn(0), self.pages);
        }
        Ok(())
    }

    /// Whether it shows frames of `physmap`.
    pub(crate) fn shows(&self, physmap: &Arc<PhysMap>) -> bool {
        Arc::ptr_eq(&self.physmap, physmap)
    }

    /// Host address of gpa 0: what a memslot for it points at.
    pub fn host_address(&self) -> u64 {
        self.base as u64
    }

    /// Where it is.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// The part of `count` pages from `first` on that is mapped.
    fn mapped(&self, first: Gfn, count: u64) -> Range<u64> {
        let end = first.0 + count;
        first.0.max(self.lowest).min(end)..end
    }

    /// What everything here may be, beside written.
    fn readable(&self) -> ProtFlags {
        match self.placement {
            Placement::Anywhere => ProtFlags::READ,
            Placement::AtGuestAddresses | Placement::Executable => {
                ProtFlags::READ | ProtFlags::EXEC
            }
        }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Whether it has no pages. It has.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Bytes of memory that it takes to know what each page shows.
    pub fn notes(&self) -> u64 {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.size() as u64
    }

    fn address(&self, gfn: Gfn) -> *mut c_void {
        ptr::with_exposed_provenance_mut(self.base + gfn.gpa() as usize)
    }

    /// Keeps mappings that were just made for `count` pages from `first` on to this process. Until then they
    /// are not, so that a child that is made meanwhile has them; it is not worth a lock.
    fn keep_private(&self, first: Gfn, count: u64) {
        let pages = self.mapped(first, count);
        let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
        // SAFETY: the callers have mapped them, in the window's own range.
        let kept =
            unsafe { keep_private(self.address(Gfn(pages.start)), len, self.physmap.dumps()) };
        if let Err(error) = kept {
            // What the guest sees is right all the same.
            tracing::debug!(%error, "a mapping is not kept from child processes");
        }
    }

    /// Changes what pages `first..first + count` show: books the mappings, lets `apply` do it to those of
    /// them that are mapped, and notes it, or takes the booking back if that fails.
    fn change(
        &self,
        first: Gfn,
        count: u64,
        what: &'static str,
        shows: impl Fn(Shown) -> Shown,
        apply: impl FnOnce(Range<u64>, Replaces, &ShownPages) -> rustix::io::Result<()>,
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
        let range = first.0..first.0 + count;
        // The page before and the page after: a mapping may end or begin at either end.
        let at = |page: u64| shown.get(page);
        let before_it = range.start.checked_sub(1).map(at);
        let after_it = (range.end < self.pages).then(|| at(range.end));
        let inside = || shown.runs_within(range.clone()).map(|(_, shown)| shown);
        let edged = |inside: &mut dyn Iterator<Item = Shown>| {
            mappings(before_it.into_iter().chain(inside).chain(after_it))
        };
        // Of pages some of which are mapped the host will refuse it.
        let is_vacant = self.kept.is_some() && inside().any(|shown| shown == Shown::NOTHING);
        let replaces = match is_vacant {
            true => Replaces::Nothing,
            false => Replaces::Mappings,
        };
        let before = edged(&mut inside());
        let after = edged(&mut inside().map(&shows));
        self.budget
            .change(before, after)
            .map_err(|limit| MmuError::MappingLimit { limit })?;
        let mapped = self.mapped(first, count);
        if !mapped.is_empty()
            && let Err(error) = apply(mapped.clone(), replaces, &shown)
        {
            let _ = self.budget.change(after, before);
            let noted = shown.runs_within(mapped.clone());
            let noted = noted.filter(|&(_, shown)| shown != Shown::NOTHING);
            let is_torn = !self.is_mapped_as(mapped, noted);
            // The host may refuse before the budget does: the process has mappings that are no windows', and
            // the host has other reasons to say that there is no memory.
            let no_room = MmuError::MappingLimit {
                limit: self.budget.limit().min(self.budget.used_by_all()),
            };
            return Err(match error {
                Errno::NOMEM if is_torn => MmuError::Torn {
                    what,
                    first,
                    count,
                    source: io::Error::other(no_room),
                },
                Errno::NOMEM => no_room,
                error if is_torn => MmuError::Torn {
                    what,
                    first,
                    count,
                    source: error.into(),
                },
                error => MmuError::Host {
                    what,
                    first,
                    count,
                    source: error.into(),
                },
            });
        }
        shown.change(range, shows);
        Ok(())
    }
}

impl Window {
    /// Maps no frames at `pages`: zeros, if they may be read.
    fn map_nothing(
        &self,
        pages: Range<u64>,
        rights: ProtFlags,
        replaces: Replaces,
    ) -> rustix::io::Result<()> {
        let count = pages.end - pages.start;
        // SAFETY: `change` has checked that the range is the window's own. Only vCPUs look through it.
        unsafe {
            mmap_anonymous(
                self.address(Gfn(pages.start)),
                (count * PAGE_SIZE) as usize,
                rights,
                MapFlags::PRIVATE | MapFlags::NORESERVE | replaces.flags(),
            )
        }?;
        // Of a window that is not settled that is done when it is.
        if replaces == Replaces::Mappings {
            self.keep_private(Gfn(pages.start), count);
        }
        Ok(())
    }

    /// Whether pages `range` show what is `noted` of them, by the kernel's word. If it does not say, they may
    /// not.
    fn is_mapped_as(
        &self,
        range: Range<u64>,
        noted: impl Iterator<Item = (Range<u64>, Shown)>,
    ) -> bool {
        let Ok(shown) = self.shown_by_kernel(range) else {
            return false;
        };
        // Neighbours that are alike may be one run for one of the two and several for the other.
        let pages = |runs: Vec<(Range<u64>, Shown)>| {
            let mut whole: Vec<(Range<u64>, Shown)> = Vec::new();
            for (run, shown) in runs {
                match whole.last_mut() {
                    Some((last, same)) if last.end == run.start && *same == shown => {
                        last.end = run.end;
                    }
                    _ => whole.push((run, shown)),
                }
            }
            whole
        };
        pages(shown) == pages(noted.collect())
    }

    /// What pages `range` show, run by run. What nothing is mapped at is in no run.
    fn shown_by_kernel(&self, range: Range<u64>) -> io::Result<Vec<(Range<u64>, Shown)>> {
        let address = |page: u64| self.base as u64 + page * PAGE_SIZE;
        let page = |address: u64| (address - self.base as u64) / PAGE_SIZE;
        let parts = maps::within(address(range.start)..address(range.end))?;
        let run = |part: maps::MappedPart| {
            let pages = page(part.addresses.start)..page(part.addresses.end);
            let shown = if part.is_shared {
                let distance = (part.offset / PAGE_SIZE) as i64 - pages.start as i64;
                let protection = if part.is_writable {
                    Protection::ReadWrite
                } else {
                    Protection::ReadOnly
                };
                Shown::frames(distance, protection)
            } else if part.is_readable {
                Shown::ZEROS
            } else {
                Shown::HIDDEN
            };
            (pages, shown)
        };
        Ok(parts.into_iter().map(run).collect())
    }

    /// What each page shows by the kernel's word: its frame, with the protection it has. Nothing where
    /// nothing is mapped, or hidden.
    #[cfg(test)]
    pub(super) fn pages_by_kernel(&self) -> Vec<Option<(Pfn, Protection)>> {
        let mut pages = vec![None; self.pages as usize];
        for (run, shown) in self.shown_by_kernel(0..self.pages).unwrap() {
            for page in run {
                pages[page as usize] = Some(match shown {
                    Shown::HIDDEN => continue,
                    Shown::ZEROS => (Pfn::ZERO, Protection::ReadOnly),
                    Shown(bits) => (
                        Pfn((page as i64 + (bits >> 2)) as u64),
                        if bits & Shown::WRITABLE != 0 {
                            Protection::ReadWrite
                        } else {
                            Protection::ReadOnly
                        },
                    ),
                });
            }
        }
        pages
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
        if frame == Pfn::ZERO {
            let shows = |_| Shown::ZEROS;
            return self.change(first, count, "clear", shows, |pages, replaces, _| {
                self.map_nothing(pages, self.readable(), replaces)
            });
        }
        let distance = frame.0 as i64 - first.0 as i64;
        let shows = |_| Shown::frames(distance, protection);
        self.change(first, count, "map", shows, |pages, replaces, _| {
            let frame = Pfn(frame.0 + (pages.start - first.0));
            let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
            let at = self.address(Gfn(pages.start));
            match replaces {
                // SAFETY: as above.
                Replaces::Mappings => unsafe { self.physmap.show(frame, protection, at, len) },
                // SAFETY: it replaces nothing.
                Replaces::Nothing => unsafe { self.physmap.show_first(frame, protection, at, len) },
            }
        })
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        let flags = match protection {
            Protection::ReadOnly => self.readable(),
            Protection::ReadWrite => self.readable() | ProtFlags::WRITE,
        };
        let flags = MprotectFlags::from_bits_retain(flags.bits());
        let shows = |page: Shown| page.protected(protection);
        self.change(first, count, "protect", shows, |pages, _, shown| {
            // What is hidden is a mapping like others, and would be seen.
            let mut seen: Vec<Range<u64>> = Vec::new();
            for (run, shown) in shown.runs_within(pages) {
                match seen.last_mut() {
                    _ if shown == Shown::HIDDEN => {}
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => seen.push(run),
                }
            }
            seen.into_iter().try_for_each(|pages| {
                let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
                // SAFETY: as above.
                unsafe { mprotect(self.address(Gfn(pages.start)), len, flags) }
            })
        })
    }

    fn hide(&self, first: Gfn, count: u64) -> Result<(), MmuError> {
        let shows = |_| Shown::HIDDEN;
        self.change(first, count, "hide", shows, |pages, replaces, _| {
            self.map_nothing(pages, ProtFlags::empty(), replaces)
        })
    }

    fn is_crowded(&self) -> bool {
        self.budget.is_crowded()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let precedence = Precedence::default();
        let _first = precedence.take();
        let all = self.mapped(Gfn(0), self.pages);
        let shown = self.shown.get_mut().unwrap_or_else(PoisonError::into_inner);
        let pages = shown.runs_within(0..self.pages).map(|(_, shown)| shown);
        let _ = self.budget.change(mappings(pages), 0);
        // Where nothing of ours is, somebody else may be.
        let shown = shown.runs_within(all);
        let ours = shown.filter(|&(_, shown)| shown != Shown::NOTHING);
        let mut whole: Vec<Range<u64>> = Vec::new();
        for (pages, _) in ours {
            match whole.last_mut() {
                Some(last) if last.end == pages.start => last.end = pages.end,
                _ => whole.push(pages),
            }
        }
        for pages in whole {
            let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
            // SAFETY: the range is the window's own; the VM whose memslot pointed here is gone, or sees nothing
            // from now on.
            let unmapped = unsafe { munmap(self.address(Gfn(pages.start)), len) };
            if let Err(error) = unmapped {
                tracing::warn!(%error, "cannot unmap a window");
            }
        }
    }
}

/// What a new mapping is made in place of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Replaces {
    /// Mappings of the window's own.
    Mappings,
    /// Nothing is there; or somebody else, who stays.
    Nothing,
}

impl Replaces {
    fn flags(self) -> MapFlags {
        match self {
            Self::Mappings => MapFlags::FIXED,
            Self::Nothing => MapFlags::FIXED_NOREPLACE,
        }
    }
}
