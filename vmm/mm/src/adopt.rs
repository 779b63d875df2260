//! Adoption: a region that a clone has only borrowed so far becomes its own (`lent.rs`).
//!
//! ```text
//!   the region is     its entries    who counts a mapping of each frame     who keeps it where it is
//!   --------------    ------------   -----------------------------------    ------------------------
//!   borrowed          none           the snapshot's region                  the loan
//!   adopted           read-only      both                                   its own mapping
//!   opened (`open`)   read-only      the space; who else has the snapshot   its own mapping
//! ```
//! It is done under the region's lock, by whoever is first to do anything with it: nobody looks at the
//! entries of a region before. The order is what makes it safe: mappings are counted while the snapshot is
//! lent still, so that it cannot move away from frames that the window shows, and entries are published
//! before the region is said to be adopted, so that nobody who reads them without a lock takes it for
//! untouched.
//!
//! The snapshot's region stays in the clone's lineage until the region changes. Whoever is the last to have
//! it takes it from there, and finds himself the frames' last holder.
//!
//! A region that was backed when it was borrowed (`backed.rs`) is *hidden*: the window shows nothing of it. To adopt
//! it is to bring it, too, and to show it: between counting its mappings and publishing its entries.
//!
//! What only looks does without: [`AddressSpace::entry`] and a reader's hold ask the snapshot's region.

use std::mem;
use std::sync::Arc;

use super::addr::{Gfn, OutOfRange, Pfn};
use super::backed::{BringError, Toucher};
use super::entry::Entry;
use super::fault::FaultError;
use super::frame_state::FrameState;
use super::frozen::{FrozenGuard, FrozenRegion};
use super::lent::{Loan, Slots};
use super::mapped::table::RegionGuard;
use super::mmu::MmuError;
use super::pool::FramePool;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;
use super::sync::lock;

/// A frame has as many mappings as can be counted, so that a clone's page in it cannot become its own.
/// Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[error("{gfn:?} cannot be told from its snapshot: its frame has too many mappings ({state:?})")]
pub struct TooManyMappings {
    /// The page.
    pub gfn: Gfn,
    /// What is known of its frame.
    pub state: FrameState,
}

/// Why a region that is borrowed could not be made the space's own. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// A frame of it has as many mappings as can be counted.
    #[error(transparent)]
    TooManyMappings(#[from] TooManyMappings),
    /// Its bytes were somewhere else still, and cannot be had.
    #[error(transparent)]
    Bring(#[from] BringError),
    /// It was hidden, and the MMU cannot show it.
    #[error(transparent)]
    Mmu(#[from] MmuError),
}

/// What a space has borrowed, by the node of its snapshot. What of it is borrowed still the table knows.
#[derive(Default)]
pub(super) struct Borrowed(pub(super) Box<[Option<Arc<Loan>>]>);

impl Borrowed {
    /// Whether there is nothing, and never was: so it is with every space that is no clone.
    #[inline]
    pub(super) fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn give_back(&self, node: usize, slots: Slots) {
        if let Some(Some(loan)) = self.0.get(node)
            && slots != 0
        {
            loan.give_back(slots);
        }
    }
}

impl<P> AddressSpace<P> {
    /// Locks a region to do something with it: it is this space's own then. (A lock that is handed on in a
    /// `Result` is copied, which costs a fault more than all the rest of its way to the entry: there it is
    /// taken by itself, and the region adopted.)
    ///
    /// # Errors
    /// If it is borrowed, and cannot be adopted.
    #[inline]
    pub(super) fn lock(&self, index: usize) -> Result<RegionGuard<'_>, AdoptError> {
        let mut region = self.mapped.table.lock(index);
        self.adopt(&mut region)?;
        Ok(region)
    }

    /// Locks the region that `gfn` lies in: [`AddressSpace::lock`].
    #[inline]
    pub(super) fn lock_of(&self, gfn: Gfn) -> Result<RegionGuard<'_>, AdoptError> {
        self.lock(self.mapped.table.region_of(gfn))
    }

    /// Has the region of `gfn` be this space's own, and does nothing else to it: for races that begin there.
    #[cfg(loom)]
    pub fn adopt_region_of(&self, gfn: Gfn) {
        self.lock_of(gfn)
            .expect("a frame has few mappings in a race");
    }

    /// Makes a region the space's own, if it is borrowed.
    #[inline]
    pub(super) fn adopt(&self, region: &mut RegionGuard<'_>) -> Result<(), AdoptError> {
        self.adopt_for(region, Toucher::Host)
    }

    /// The same for somebody else than host code.
    #[inline]
    pub(super) fn adopt_for(
        &self,
        region: &mut RegionGuard<'_>,
        toucher: Toucher,
    ) -> Result<(), AdoptError> {
        if self.has_borrowed(region) {
            self.adopt_borrowed(region, toucher)?;
        }
        Ok(())
    }

    /// Shows page `gfn` to vCPUs, if it is hidden from them: it was backed when the space was made, and is brought.
    /// For a vCPU that has touched it, whatever it has done there; a write of what is shown takes a
    /// [write fault](AddressSpace::write_fault).
    ///
    /// # Errors
    /// If there is no such page, or it cannot be brought or shown. Nothing has changed.
    pub fn touch(&self, gfn: Gfn) -> Result<Touch, FaultError> {
        let table = &self.mapped.table;
        table.in_range(gfn)?;
        // What is shown is never hidden again.
        if !table.is_hidden(table.region_of(gfn)) {
            return self
                .mapped
                .check()
                .map(|()| Touch::WasShown)
                .map_err(Into::into);
        }
        let _no_fork = self.mapped.enter()?;
        let mut region = table.lock_of(gfn);
        if !self.has_borrowed(&region) || !region.is_hidden() {
            return Ok(Touch::WasShown);
        }
        self.adopt_for(&mut region, Toucher::Vcpu)?;
        Ok(Touch::Shown)
    }

    /// Whether page `gfn` is hidden from vCPUs: it was backed when the space was made. A hint: somebody may have
    /// it shown at any time.
    ///
    /// # Errors
    /// If there is no such page.
    pub fn is_hidden(&self, gfn: Gfn) -> Result<bool, OutOfRange> {
        let table = &self.mapped.table;
        table.in_range(gfn)?;
        Ok(table.is_hidden(table.region_of(gfn)))
    }

    /// Whether a region is borrowed.
    #[inline]
    pub(super) fn has_borrowed(&self, region: &RegionGuard<'_>) -> bool {
        !self.borrowed.is_nothing() && region.is_borrowed()
    }

    /// How many regions are hidden from vCPUs. It only ever becomes less.
    pub fn hidden(&self) -> u64 {
        if self.borrowed.is_nothing() {
            return 0;
        }
        self.mapped.table.hidden()
    }

    /// The first page of the first region that is hidden from vCPUs, from that of `from` on. A hint, as
    /// [`AddressSpace::is_hidden`].
    pub fn first_hidden(&self, from: Gfn) -> Option<Gfn> {
        let table = &self.mapped.table;
        if self.borrowed.is_nothing() || table.in_range(from).is_err() {
            return None;
        }
        let mut regions = table.region_of(from)..table.regions();
        let first = regions.find(|&index| table.is_hidden(index))?;
        Some(table.pages_of_region(first).0)
    }

    #[cold]
    fn adopt_borrowed(
        &self,
        region: &mut RegionGuard<'_>,
        toucher: Toucher,
    ) -> Result<(), AdoptError> {
        let lender = lock(&self.lineage).unchanged.get(region.index()).cloned();
        if is_left_out(Safeguard::AdoptedBeforeGivenBack) {
            self.give_back(region);
        }
        if let Some(lender) = &lender {
            let theirs = lender.lock_brought(toucher)?;
            if region.is_hidden() {
                self.count_and_show(region, &theirs)?;
            } else {
                self.count_and_publish(region, &theirs)?;
            }
        }
        if !is_left_out(Safeguard::AdoptedBeforeGivenBack) {
            self.give_back(region);
        }
        Ok(())
    }

    fn count_and_publish(
        &self,
        region: &mut RegionGuard<'_>,
        theirs: &FrozenGuard<'_>,
    ) -> Result<(), TooManyMappings> {
        if let Some(head) = theirs.huge() {
            self.count_huge(region, head)?;
            region.adopt_huge(head);
            return Ok(());
        }
        for (gfn, pfn) in self.count_pages(region, theirs)?.keep() {
            region.adopt_page(gfn, pfn);
        }
        Ok(())
    }

    /// The same of a region that is hidden, which the MMU shows then.
    fn count_and_show(
        &self,
        region: &mut RegionGuard<'_>,
        theirs: &FrozenGuard<'_>,
    ) -> Result<(), AdoptError> {
        if let Some(head) = theirs.huge() {
            self.count_huge(region, head)?;
            let frames: Vec<Pfn> = head.run(region.len()).collect();
            let shown = self.mapped.show(region, &frames, true);
            if shown.is_err() && region.is_hidden() {
                self.pool.unmap_huge(head);
            }
            return Ok(shown?);
        }
        let counted = self.count_pages(region, theirs)?;
        let mut frames = vec![Pfn::ZERO; region.len() as usize];
        for &(gfn, pfn) in &counted.counted {
            frames[(gfn.0 - region.first().0) as usize] = pfn;
        }
        let shown = self.mapped.show(region, &frames, false);
        if !region.is_hidden() {
            counted.keep();
        }
        Ok(shown?)
    }

    fn count_huge(&self, region: &RegionGuard<'_>, head: Pfn) -> Result<(), TooManyMappings> {
        let mapped = self.pool.frames().try_map_again_huge(head);
        mapped.map_err(|state| TooManyMappings {
            gfn: region.first(),
            state,
        })
    }

    fn count_pages(
        &self,
        region: &RegionGuard<'_>,
        theirs: &FrozenGuard<'_>,
    ) -> Result<MoreMappings<'_>, TooManyMappings> {
        let mut pages = MoreMappings::new(&self.pool);
        for (index, chunk) in theirs.chunks().into_iter().flatten().enumerate() {
            let Some(chunk) = chunk else { continue };
            chunk.with_frames(|frames| {
                let pages_of_chunk = region.pages_of(index).zip(frames);
                let mut present = pages_of_chunk.filter(|&(_, &pfn)| pfn != Pfn::ZERO);
                present.try_for_each(|(gfn, &pfn)| pages.count(gfn, pfn))
            })?;
        }
        Ok(pages)
    }

    /// Has a region not borrowed any more.
    pub(super) fn give_back(&self, region: &mut RegionGuard<'_>) {
        region.own();
        let (node, slot) = Loan::place(region.index());
        self.borrowed.give_back(node, slot);
    }

    /// Calls `look` with the entry of a page as the snapshot's region has it that it is borrowed of. None if
    /// it is not borrowed (any more), or hidden: what it is borrowed of may have no frames yet, and then only who
    /// adopts it finds some.
    ///
    /// It changes neither meanwhile: nobody takes the snapshot's region from the lineage, and till then the
    /// page is in that frame, by the loan or by a mapping of the space's own.
    #[inline]
    pub(super) fn with_borrowed<R>(&self, gfn: Gfn, look: impl FnOnce(Entry) -> R) -> Option<R> {
        let index = self.mapped.table.region_of(gfn);
        let table = &self.mapped.table;
        if self.borrowed.is_nothing() || !table.is_borrowed(index) || table.is_hidden(index) {
            return None;
        }
        self.with_lender(index, |lender| lender.lock().with(gfn, look))
    }

    /// Calls `look` with the snapshot's region that a region is borrowed of. None if it is not.
    pub(super) fn with_lender<R>(
        &self,
        index: usize,
        look: impl FnOnce(&FrozenRegion) -> R,
    ) -> Option<R> {
        let lineage = lock(&self.lineage);
        // Adopted is before opened: if it is borrowed now, what it is borrowed of is there.
        if !self.mapped.table.is_borrowed(index) {
            return None;
        }
        lineage.unchanged.get(index).map(|lender| look(lender))
    }

    /// Gives back all that is borrowed still, of a space that is going.
    pub(super) fn give_back_all(&mut self) {
        for node in 0..self.borrowed.0.len() {
            let slots = self.mapped.table.borrowed(node);
            self.mapped.table.borrow(node, 0);
            self.borrowed.give_back(node, slots);
        }
    }
}

/// What became of a vCPU's touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// The page was shown already: if it is a write, it takes a fault.
    WasShown,
    /// It is shown now.
    Shown,
}

/// Mappings that are counted, of pages without an entry yet: they are taken back if they get none.
struct MoreMappings<'a> {
    pool: &'a FramePool,
    counted: Vec<(Gfn, Pfn)>,
}

impl<'a> MoreMappings<'a> {
    fn new(pool: &'a FramePool) -> Self {
        Self {
            pool,
            counted: Vec::new(),
        }
    }

    fn count(&mut self, gfn: Gfn, pfn: Pfn) -> Result<(), TooManyMappings> {
        let mapped = self.pool.frames().try_map_again(pfn);
        mapped.map_err(|state| TooManyMappings { gfn, state })?;
        self.counted.push((gfn, pfn));
        Ok(())
    }

    fn keep(mut self) -> Vec<(Gfn, Pfn)> {
        mem::take(&mut self.counted)
    }
}

impl Drop for MoreMappings<'_> {
    fn drop(&mut self) {
        for &(_, pfn) in &self.counted {
            self.pool.unmap(pfn);
        }
    }
}
