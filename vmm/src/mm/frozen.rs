//! Snapshots: frozen address spaces, which share what did not change between them.
//!
//! ```text
//!   Frozen 1 ──> root ──> node 0 ──> region 0    region 1   ...
//!                     └─> node 1 ───────┐
//!   Frozen 2 ──> root ──> node 0' ──> region 0'  region 1   ...      region 0 changed between the two
//!                     └─> node 1 (the same)
//! ```
//! A region of a snapshot holds one mapping of each of its frames, however many snapshots it belongs to. So a fork pays for the
//! regions that changed since the last and for nothing else, and a COW break that moves the sharers moves a region once for all of them.
//!
//! A snapshot is never written, but not bound to frames either: when a running space writes to a page that only snapshots
//! share with it, *they* are given the copy (`fault.rs`).

use std::fmt;
use std::sync::Arc;

use super::addr::{Gfn, Order, Pfn};
use super::frame::FrameState;
use super::pool::FramePool;
use super::space::OutOfRange;
use super::sync::{Mutex, MutexGuard, lock};
use super::table::Entry;

/// Regions that a node of the tree has.
const FAN_OUT: usize = 64;

/// A snapshot of an address space: its pages as they were at one instant. It has no vCPUs and is never written.
pub struct Frozen {
    pub(super) pool: Arc<FramePool>,
    pub(super) table: FrozenTable,
    pub(super) pages: u64,
}

impl Frozen {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The entry of a page just now: a hint, since a break may move it to another frame.
    pub fn entry(&self, gfn: Gfn) -> Result<Entry, OutOfRange> {
        self.with_entry(gfn, |entry| entry)
    }

    /// The frame a page is in just now: a hint as well.
    pub fn frame(&self, gfn: Gfn) -> Result<Pfn, OutOfRange> {
        self.entry(gfn).map(Entry::pfn)
    }

    /// Calls `look` with the frame a page is in, which stays there and as it is for the length of the call. A break of
    /// the page waits meanwhile: be short.
    pub fn with_frame<R>(&self, gfn: Gfn, look: impl FnOnce(Pfn) -> R) -> Result<R, OutOfRange> {
        self.with_entry(gfn, |entry| look(entry.pfn()))
    }

    /// Which region of a snapshot a page is in: the same number for snapshots that have it in common.
    #[cfg(test)]
    pub(super) fn region_address(&self, gfn: Gfn) -> usize {
        let region = self.table.get(self.pool.huge().index(gfn.0));
        region.map_or(0, |region| Arc::as_ptr(region).addr())
    }

    /// As [`Frozen::with_frame`], with the entry.
    pub(super) fn with_entry<R>(
        &self,
        gfn: Gfn,
        look: impl FnOnce(Entry) -> R,
    ) -> Result<R, OutOfRange> {
        let pages = self.pages;
        if gfn.0 >= pages {
            return Err(OutOfRange { gfn, pages });
        }
        Ok(match self.table.get(self.pool.huge().index(gfn.0)) {
            Some(region) => {
                let entries = region.lock();
                look(entries.get(gfn))
            }
            None => look(Entry::UNTOUCHED),
        })
    }
}

impl fmt::Debug for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frozen")
            .field("pages", &self.pages)
            .finish()
    }
}

/// The regions of a snapshot: a tree whose parts are shared, so that it is copied by copying its root and changed by copying the
/// way to the change. A region that was never touched is not there.
#[derive(Clone, Default)]
pub(super) struct FrozenTable {
    root: Arc<Vec<Option<Arc<Node>>>>,
}

#[derive(Clone)]
struct Node([Option<Arc<FrozenRegion>>; FAN_OUT]);

impl FrozenTable {
    pub(super) fn new(regions: usize) -> Self {
        Self {
            root: Arc::new(vec![None; regions.div_ceil(FAN_OUT)]),
        }
    }

    pub(super) fn get(&self, index: usize) -> Option<&Arc<FrozenRegion>> {
        self.root.get(index / FAN_OUT)?.as_ref()?.0[index % FAN_OUT].as_ref()
    }

    /// Puts `region` in the place of another, which is returned.
    pub(super) fn replace(
        &mut self,
        index: usize,
        region: Option<Arc<FrozenRegion>>,
    ) -> Option<Arc<FrozenRegion>> {
        if region.is_none() && self.get(index).is_none() {
            return None;
        }
        let node = Arc::make_mut(&mut self.root)
            .get_mut(index / FAN_OUT)?
            .get_or_insert_with(|| Arc::new(Node([const { None }; FAN_OUT])));
        std::mem::replace(&mut Arc::make_mut(node).0[index % FAN_OUT], region)
    }

    /// The regions that are there, with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Arc<FrozenRegion>)> {
        self.root
            .iter()
            .zip((0..).step_by(FAN_OUT))
            .filter_map(|(node, first)| Some((node.as_ref()?, first)))
            .flat_map(|(node, first)| (first..).zip(&node.0))
            .filter_map(|(index, region)| Some((index, region.as_ref()?)))
    }
}

/// A region of one or more snapshots. It holds a mapping of every frame it shows, and gives them back when it goes.
pub(super) struct FrozenRegion {
    pool: Arc<FramePool>,
    first: Gfn,
    frames: Mutex<FrozenFrames>,
}

/// Where the pages of a frozen region are.
pub(super) enum FrozenFrames {
    /// In the folio at this frame, by one huge entry.
    Huge(Pfn),
    /// Each in a frame of its own; [`Pfn::ZERO`] if it was never touched.
    Small(Box<[Pfn]>),
}

impl FrozenRegion {
    /// The region that begins at page `first`. Its mappings are counted already.
    pub(super) fn new(pool: &Arc<FramePool>, first: Gfn, frames: FrozenFrames) -> Self {
        Self {
            pool: Arc::clone(pool),
            first,
            frames: Mutex::new(frames),
        }
    }

    /// Its entries, which do not change while this is held.
    pub(super) fn lock(&self) -> FrozenGuard<'_> {
        FrozenGuard {
            first: self.first,
            pool: &self.pool,
            frames: lock(&self.frames),
        }
    }
}

impl Drop for FrozenRegion {
    fn drop(&mut self) {
        match &*self.lock().frames {
            FrozenFrames::Huge(head) => self.pool.unmap_huge(*head),
            FrozenFrames::Small(frames) => frames
                .iter()
                .filter(|&&pfn| pfn != Pfn::ZERO)
                .for_each(|&pfn| self.pool.unmap(pfn)),
        }
    }
}

/// The right to look at the entries of a frozen region, and to move its pages.
pub(super) struct FrozenGuard<'a> {
    first: Gfn,
    pool: &'a Arc<FramePool>,
    frames: MutexGuard<'a, FrozenFrames>,
}

impl FrozenGuard<'_> {
    pub(super) fn huge(&self) -> Option<Pfn> {
        match *self.frames {
            FrozenFrames::Huge(head) => Some(head),
            FrozenFrames::Small(_) => None,
        }
    }

    pub(super) fn get(&self, gfn: Gfn) -> Entry {
        let index = gfn.0 - self.first.0;
        match &*self.frames {
            FrozenFrames::Huge(head) => Entry::huge_read_only(Pfn(head.0 + index)),
            FrozenFrames::Small(frames) => match frames[index as usize] {
                Pfn::ZERO => Entry::UNTOUCHED,
                pfn => Entry::read_only(pfn),
            },
        }
    }

    /// Shows page `gfn` in another frame, whose mapping is counted, and gives the mapping of the old one back.
    pub(super) fn move_page(&mut self, gfn: Gfn, to: Pfn) {
        if let FrozenFrames::Huge(head) = *self.frames {
            // Shared with whoever breaks it: there is no bit to spread.
            self.pool
                .frames()
                .split_mapping(head, FrameState::is_exclusive);
            let pages = Order::pages(self.pool.huge());
            *self.frames = FrozenFrames::Small(head.run(pages).collect());
        }
        if let FrozenFrames::Small(frames) = &mut *self.frames {
            let slot = &mut frames[(gfn.0 - self.first.0) as usize];
            let from = std::mem::replace(slot, to);
            self.pool.unmap(from);
        }
    }

    /// Shows the whole region, which a huge entry maps, in another folio, whose mapping is counted, and gives the mapping of the old one back.
    pub(super) fn move_folio(&mut self, to: Pfn) {
        if let FrozenFrames::Huge(head) = &mut *self.frames {
            let from = std::mem::replace(head, to);
            self.pool.unmap_huge(from);
        }
    }
}
