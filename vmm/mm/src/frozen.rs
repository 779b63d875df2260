//! Snapshots: frozen address spaces, which share what did not change between them.
//!
//! ```text
//!   Frozen 1 ──> root ──> node 0 ──> region 0    region 1   ...
//!                     └─> node 1 ───────┐
//!   Frozen 2 ──> root ──> node 0' ──> region 0'  region 1   ...      region 0 changed between the two
//!                     └─> node 1 (the same)
//! ```
//! A region is mapped by one huge entry, or in *chunks* of some pages each, and different regions may have
//! chunks in common:
//!
//! ```text
//!   region 0  ──> chunk 0   chunk 1   ...
//!   region 0' ──> chunk 0'  chunk 1   ...      a page of chunk 0 changed between the two
//! ```
//! A chunk, or the huge entry of a region, holds one mapping of each of its frames, however many snapshots it
//! belongs to. So a fork pays for the chunks that changed since the last and for little else, and a COW break
//! that moves the sharers moves a page once for all of them.
//!
//! A snapshot is never written, but not bound to frames either: when a running space writes to a page that
//! only snapshots share with it, *they* are given the copy (`fault.rs`). Unless it is lent to clones, whose
//! windows show its frames (`lent.rs`): then it stays where it is.
//!
//! A region of a snapshot that comes from outside may be *backed* (`backed.rs`): it has no frames before somebody
//! wants its bytes, and the mappings it has then are as those of any other.

use std::fmt;
use std::mem;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Weak};

use super::account::Account;
use super::addr::{Gfn, Order, OutOfRange, Pfn};
use super::backed::{Backed, Backing, BringError, Brought, Source, Toucher};
use super::entry::Entry;
use super::frame_state::FrameState;
use super::lent::{FAN_OUT, Leases, Lending, Lent, Slots, each};
use super::pool::FramePool;
use super::safeguard::{Safeguard, is_left_out};
use super::sync::{Mutex, MutexGuard, lock};

/// Why what is in a snapshot could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum FrozenError {
    /// No such page.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// It is backed, and could not be brought.
    #[error(transparent)]
    Bring(#[from] BringError),
}

/// A snapshot of an address space: its pages as they were at one instant. It has no vCPUs and is never
/// written.
pub struct Frozen {
    pub(super) pool: Arc<FramePool>,
    pub(super) table: FrozenTable,
    pub(super) pages: u64,
    /// That of the space it was taken of: open for as long as the snapshot is there.
    pub(super) account: Account,
}

impl Frozen {
    /// A snapshot of `pages` pages that comes from outside: `regions` of it, in order, are backed by `backing`, and
    /// the others are zeros. What is brought is in frames of `pool`, in huge folios if it `uses_huge` ones, and
    /// `account` pays for it.
    ///
    /// # Panics
    /// If the account is of another pool, or there is no such region.
    pub fn backed(
        pool: &Arc<FramePool>,
        account: Account,
        pages: u64,
        uses_huge: bool,
        regions: impl IntoIterator<Item = usize>,
        backing: Arc<dyn Backing>,
    ) -> Arc<Self> {
        assert!(pool.has_account(&account), "a snapshot pays its own pool");
        let order = pool.huge();
        let source = Arc::new(Source {
            backing,
            account: account.clone(),
            uses_huge,
        });
        // Without it regions are where there is room.
        let mut home = pool.reserve(pages).ok();
        let mut table = FrozenTable::new(pages.div_ceil(order.pages()) as usize);
        let mut regions = regions.into_iter().peekable();
        for (index, first) in (0..).zip((0..pages).step_by(order.pages() as usize)) {
            let pages = order.pages().min(pages - first);
            let home = home.as_mut().map(|home| home.split_front(pages));
            if regions.next_if_eq(&index).is_some() {
                let backed = Backed {
                    source: Arc::clone(&source),
                    home,
                    index,
                    first: Gfn(first),
                    pages,
                    turn: Mutex::new(()),
                };
                let frames = FrozenFrames::Backed(Arc::new(backed));
                let region = FrozenRegion::new(pool, Gfn(first), frames);
                table.replace(index, Some(Arc::new(region)));
            }
        }
        assert!(
            regions.next().is_none(),
            "there is no such region, or it is out of order"
        );
        Arc::new(Self {
            pool: Arc::clone(pool),
            table,
            pages,
            account,
        })
    }

    /// The regions that are backed still.
    pub fn backed_regions(&self) -> BackedRegions {
        let regions = self.table.iter();
        let backed = regions.filter(|(_, region)| region.lock().backed().is_some());
        BackedRegions(
            backed
                .map(|(index, region)| (index, Arc::downgrade(region)))
                .collect(),
        )
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The account of the space it was taken of, which its copies are charged to.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// The pool its frames are from.
    pub fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    /// The entry of a page just now: a hint, since a break may move it to another frame. A page that was not
    /// brought yet has none.
    ///
    /// # Errors
    /// If there is no such page.
    pub fn entry(&self, gfn: Gfn) -> Result<Entry, OutOfRange> {
        self.check(gfn)?;
        let region = self.region_of(gfn);
        Ok(region.map_or(Entry::UNTOUCHED, |region| region.lock().get(gfn)))
    }

    /// The frame a page is in just now: a hint as well.
    pub fn frame(&self, gfn: Gfn) -> Result<Pfn, OutOfRange> {
        self.entry(gfn).map(Entry::pfn)
    }

    /// Calls `look` with the frame a page is in, which stays there and as it is for the length of the call. A
    /// break of the page waits meanwhile: be short. What is backed is brought first.
    ///
    /// # Errors
    /// If there is no such page, or it cannot be brought.
    pub fn with_frame<R>(&self, gfn: Gfn, look: impl FnOnce(Pfn) -> R) -> Result<R, FrozenError> {
        self.with_entry(gfn, |entry| look(entry.pfn()))
    }

    /// Whether nobody had touched the region that page `gfn` is in: all of it is zeros, and takes nothing.
    ///
    /// # Errors
    /// If there is no such page.
    pub fn is_untouched(&self, gfn: Gfn) -> Result<bool, OutOfRange> {
        self.check(gfn)?;
        Ok(self.region_of(gfn).is_none())
    }

    /// Whether two snapshots have all of the region that page `gfn` is in in common, so that it is the same in
    /// both. If not, it may still be the same by chance: nothing is compared.
    ///
    /// # Errors
    /// If one of them has no such page.
    pub fn has_in_common(&self, other: &Self, gfn: Gfn) -> Result<bool, OutOfRange> {
        self.check(gfn)?;
        other.check(gfn)?;
        // Never both locks at once: who breaks pages takes them in another order.
        let holders = |region: &Arc<FrozenRegion>| region.lock().chunk_holders();
        Ok(match (self.region_of(gfn), other.region_of(gfn)) {
            (None, None) => true,
            (Some(ours), Some(theirs)) if Arc::ptr_eq(ours, theirs) => true,
            // Both hold their chunks, so that an address is that of one chunk.
            (Some(ours), Some(theirs)) => {
                let ours = holders(ours);
                ours.is_some() && ours == holders(theirs)
            }
            _ => false,
        })
    }

    fn check(&self, gfn: Gfn) -> Result<(), OutOfRange> {
        let pages = self.pages;
        match gfn.0 < pages {
            true => Ok(()),
            false => Err(OutOfRange { gfn, pages }),
        }
    }

    fn region_of(&self, gfn: Gfn) -> Option<&Arc<FrozenRegion>> {
        self.table.get(self.pool.huge().index(gfn.0))
    }

    /// Which region of a snapshot a page is in: the same number for snapshots that have it in common.
    #[cfg(test)]
    pub(super) fn region_address(&self, gfn: Gfn) -> usize {
        self.region_of(gfn)
            .map_or(0, |region| Arc::as_ptr(region).addr())
    }

    /// What holds the mapping of a page: the same number for snapshots that have it in common.
    #[cfg(test)]
    pub(super) fn holder(&self, gfn: Gfn) -> usize {
        self.region_of(gfn)
            .map_or(0, |region| region.lock().holder(gfn))
    }

    /// As [`Frozen::with_frame`], with the entry.
    pub(super) fn with_entry<R>(
        &self,
        gfn: Gfn,
        look: impl FnOnce(Entry) -> R,
    ) -> Result<R, FrozenError> {
        self.check(gfn)?;
        Ok(match self.region_of(gfn) {
            Some(region) => {
                let entries = region.lock_brought(Toucher::Reader)?;
                entries.with(gfn, look)
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

/// Regions of a snapshot that were backed when somebody asked. It keeps none of them: a region that nobody has any
/// more is gone.
#[derive(Clone)]
pub struct BackedRegions(Vec<(usize, Weak<FrozenRegion>)>);

impl BackedRegions {
    /// Their numbers, in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|(index, _)| *index)
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Brings region number `index`, if it is one of them, is there still, and was not brought.
    ///
    /// # Errors
    /// If it cannot be brought. Nothing has changed.
    pub fn bring(&self, index: usize, toucher: Toucher) -> Result<(), BringError> {
        let at = self.0.binary_search_by_key(&index, |(index, _)| *index);
        let region = at.ok().and_then(|at| self.0[at].1.upgrade());
        region.map_or(Ok(()), |region| region.bring(toucher))
    }
}

impl fmt::Debug for BackedRegions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// The regions of a snapshot: a tree whose parts are shared, so that it is copied by copying its root and
/// changed by copying the way to the change. A region that was never touched is not there.
#[derive(Clone, Default)]
pub(super) struct FrozenTable {
    root: Arc<Vec<Option<Arc<Node>>>>,
}

/// Some regions that follow each other.
struct Node {
    regions: [Option<Arc<FrozenRegion>>; FAN_OUT],
    /// The last loan of them, if there was one, so that what was worked out for it need not be again.
    lent: Mutex<Option<Arc<Lent>>>,
}

impl Node {
    fn empty() -> Self {
        Self {
            regions: [const { None }; FAN_OUT],
            lent: Mutex::new(None),
        }
    }

    /// Lends `slots`, which are regions that are there, to one more.
    fn lend(&self, slots: Slots) -> Arc<Lent> {
        let mut last = lock(&self.lent);
        if let Some(lent) = &*last
            && lent.try_borrow(slots)
        {
            return Arc::clone(lent);
        }
        let mut lending = Lending::new(slots);
        for slot in each(slots) {
            if let Some(region) = &self.regions[slot] {
                lending.begin(slot);
                region.lock().lend(&mut lending);
            }
        }
        let lent = lending.finish();
        *last = Some(Arc::clone(&lent));
        lent
    }
}

/// A node that is about to become another: what was lent of this one is not what is lent of that.
impl Clone for Node {
    fn clone(&self) -> Self {
        Self {
            regions: self.regions.clone(),
            lent: Mutex::new(None),
        }
    }
}

impl FrozenTable {
    pub(super) fn new(regions: usize) -> Self {
        Self {
            root: Arc::new(vec![None; regions.div_ceil(FAN_OUT)]),
        }
    }

    pub(super) fn get(&self, index: usize) -> Option<&Arc<FrozenRegion>> {
        self.root.get(index / FAN_OUT)?.as_ref()?.regions[index % FAN_OUT].as_ref()
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
            .get_or_insert_with(|| Arc::new(Node::empty()));
        let node = Arc::make_mut(node);
        node.lent = Mutex::new(None);
        mem::replace(&mut node.regions[index % FAN_OUT], region)
    }

    /// The regions that are there, with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Arc<FrozenRegion>)> {
        self.root
            .iter()
            .zip((0..).step_by(FAN_OUT))
            .filter_map(|(node, first)| Some((node.as_ref()?, first)))
            .flat_map(|(node, first)| (first..).zip(&node.regions))
            .filter_map(|(index, region)| Some((index, region.as_ref()?)))
    }

    /// The regions with these numbers that the two do not have in common: what each has there.
    pub(super) fn apart<'a>(
        &'a self,
        other: &'a Self,
        indices: Range<usize>,
    ) -> impl Iterator<
        Item = (
            usize,
            Option<&'a Arc<FrozenRegion>>,
            Option<&'a Arc<FrozenRegion>>,
        ),
    > {
        fn address<T>(of: Option<&Arc<T>>) -> usize {
            of.map_or(0, |of| Arc::as_ptr(of).addr())
        }
        fn node(table: &FrozenTable, node: usize) -> Option<&Arc<Node>> {
            table.root.get(node)?.as_ref()
        }
        let nodes = indices.start / FAN_OUT..indices.end.div_ceil(FAN_OUT);
        nodes
            .filter(|&n| address(node(self, n)) != address(node(other, n)))
            .flat_map(|n| n * FAN_OUT..(n + 1) * FAN_OUT)
            .filter(move |index| indices.contains(index))
            .map(|index| (index, self.get(index), other.get(index)))
            .filter(|(_, own, other)| address(*own) != address(*other))
    }

    /// How many nodes it has: node `n` has the regions from `n * FAN_OUT` on.
    pub(super) fn nodes(&self) -> usize {
        self.root.len()
    }

    /// The regions of a node that are there.
    pub(super) fn slots(&self, node: usize) -> Slots {
        let regions = self.root[node].iter().flat_map(|node| &node.regions);
        (0..)
            .zip(regions)
            .filter(|(_, region)| region.is_some())
            .fold(0, |slots, (slot, _)| slots | 1 << slot)
    }

    /// Lends `slots` of a node, which are regions that are there, to one more: they do not move until they
    /// are given back. None if there are none.
    pub(super) fn lend(&self, node: usize, slots: Slots) -> Option<Arc<Lent>> {
        let node = self.root[node].as_ref()?;
        (slots != 0).then(|| node.lend(slots))
    }
}

/// A region of one or more snapshots.
pub(super) struct FrozenRegion {
    pool: Arc<FramePool>,
    first: Gfn,
    entries: Mutex<Entries>,
}

/// What a frozen region holds.
struct Entries {
    frames: FrozenFrames,
    /// Of its huge entry. Each chunk has its own.
    leases: Leases,
}

/// Where the pages of a frozen region are.
pub(super) enum FrozenFrames {
    /// Somewhere else still: in no frame.
    Backed(Arc<Backed>),
    /// In the folio at this frame, by one huge entry, whose mapping this is.
    Huge(Pfn),
    /// Each in a frame of its own.
    Small(FrozenChunks),
}

/// The chunks of a region, in order. One in which nothing was ever touched is not there.
pub(super) type FrozenChunks = Box<[Option<Arc<FrozenChunk>>]>;

impl FrozenRegion {
    /// The region that begins at page `first`. Its mappings are counted already.
    pub(super) fn new(pool: &Arc<FramePool>, first: Gfn, frames: FrozenFrames) -> Self {
        Self {
            pool: Arc::clone(pool),
            first,
            entries: Mutex::new(Entries {
                frames,
                leases: Leases::default(),
            }),
        }
    }

    /// Its entries. It stays huge, or in chunks, or backed, while this is held.
    pub(super) fn lock(&self) -> FrozenGuard<'_> {
        FrozenGuard {
            region: self,
            entries: lock(&self.entries),
        }
    }

    /// Its entries, for who wants what is in it: it is not backed.
    ///
    /// # Errors
    /// If it was, and cannot be brought.
    pub(super) fn lock_brought(&self, toucher: Toucher) -> Result<FrozenGuard<'_>, BringError> {
        let entries = self.lock();
        if entries.backed().is_none() {
            return Ok(entries);
        }
        drop(entries);
        self.bring(toucher)?;
        // Once it has frames it has them for good.
        Ok(self.lock())
    }

    /// Brings it, if it is backed still.
    ///
    /// # Errors
    /// If it cannot be brought. It is backed then as it was.
    pub(super) fn bring(&self, toucher: Toucher) -> Result<(), BringError> {
        let Some(backed) = self.lock().backed().cloned() else {
            return Ok(());
        };
        let _turn = (!is_left_out(Safeguard::BroughtInTurn)).then(|| lock(&backed.turn));
        if self.lock().backed().is_none() && !is_left_out(Safeguard::BroughtInTurn) {
            return Ok(());
        }
        let frames = match backed.bring(&self.pool, toucher)? {
            Brought::Huge(head) => FrozenFrames::Huge(head),
            Brought::Small(frames) => {
                let each = self.chunk_order().pages() as usize;
                let chunks = frames.chunks(each);
                let chunk = |frames: &[Pfn]| FrozenChunk::new(&self.pool, frames.iter().copied());
                FrozenFrames::Small(chunks.map(chunk).collect())
            }
        };
        self.lock().come(frames);
        Ok(())
    }

    fn chunk_order(&self) -> Order {
        self.pool.huge().chunk()
    }

    fn chunk_of(&self, gfn: Gfn) -> usize {
        self.chunk_order().index(gfn.0 - self.first.0)
    }

    /// The pages of the folio at `head`, in chunks. Their mappings are counted already.
    fn chunks_of(&self, head: Pfn) -> FrozenChunks {
        let (all, each) = (self.pool.huge().pages(), self.chunk_order().pages());
        (0..all)
            .step_by(each as usize)
            .map(|n| FrozenChunk::new(&self.pool, Pfn(head.0 + n).run(each)))
            .collect()
    }
}

impl Drop for FrozenRegion {
    fn drop(&mut self) {
        if let Some(head) = self.lock().huge() {
            self.pool.unmap_huge(head);
        }
    }
}

/// The right to look at a frozen region, and to move its pages.
pub(super) struct FrozenGuard<'a> {
    region: &'a FrozenRegion,
    entries: MutexGuard<'a, Entries>,
}

impl FrozenGuard<'_> {
    pub(super) fn huge(&self) -> Option<Pfn> {
        match self.entries.frames {
            FrozenFrames::Huge(head) => Some(head),
            FrozenFrames::Small(_) | FrozenFrames::Backed(_) => None,
        }
    }

    /// What backs it, if it was not brought yet.
    pub(super) fn backed(&self) -> Option<&Arc<Backed>> {
        match &self.entries.frames {
            FrozenFrames::Backed(backed) => Some(backed),
            _ => None,
        }
    }

    /// It was brought, to these frames, each of which has a mapping counted for it.
    fn come(&mut self, frames: FrozenFrames) {
        let Entries {
            frames: place,
            leases,
        } = &mut *self.entries;
        *place = frames;
        // Who has borrowed it so far sees nothing of it, and counts what is here when he comes for it. Who
        // borrows it from now on is to see it.
        leases.make_over();
    }

    /// Its chunks, if it is in chunks.
    pub(super) fn chunks(&self) -> Option<&FrozenChunks> {
        match &self.entries.frames {
            FrozenFrames::Huge(_) | FrozenFrames::Backed(_) => None,
            FrozenFrames::Small(chunks) => Some(chunks),
        }
    }

    /// Calls `look` with the entry of a page, which does not change meanwhile. A backed region has none: who wants
    /// what is in it has it brought first ([`FrozenRegion::lock_brought`]).
    pub(super) fn with<R>(&self, gfn: Gfn, look: impl FnOnce(Entry) -> R) -> R {
        let chunk = match &self.entries.frames {
            FrozenFrames::Backed(_) => return look(Entry::UNTOUCHED),
            FrozenFrames::Huge(head) => {
                let index = gfn.0 - self.region.first.0;
                return look(Entry::huge_read_only(Pfn(head.0 + index)));
            }
            FrozenFrames::Small(chunks) => &chunks[self.region.chunk_of(gfn)],
        };
        match chunk {
            Some(chunk) => {
                let pages = lock(&chunk.pages);
                look(match pages.frames[chunk.index(gfn)] {
                    Pfn::ZERO => Entry::UNTOUCHED,
                    pfn => Entry::read_only(pfn),
                })
            }
            None => look(Entry::UNTOUCHED),
        }
    }

    /// The frames of all its pages just now, [`Pfn::ZERO`] for those that were never touched, to as many
    /// places: numbers that are no frame's, if it is backed.
    pub(super) fn frames(&self, into: &mut [Pfn]) {
        match &self.entries.frames {
            // No frame of anybody's, nor the same for two of them.
            FrozenFrames::Backed(backed) => {
                let nowhere = u64::MAX - Arc::as_ptr(backed).addr() as u64;
                into.fill(Pfn(nowhere));
            }
            FrozenFrames::Huge(head) => {
                for (place, pfn) in into.iter_mut().zip(head.0..) {
                    *place = Pfn(pfn);
                }
            }
            FrozenFrames::Small(chunks) => {
                let each = self.region.chunk_order().pages() as usize;
                into.fill(Pfn::ZERO);
                for (places, chunk) in into.chunks_mut(each).zip(chunks) {
                    if let Some(chunk) = chunk {
                        places.copy_from_slice(&lock(&chunk.pages).frames[..places.len()]);
                    }
                }
            }
        }
    }

    /// The entry of a page just now. Another region's guard may change it, if the two have the chunk in
    /// common.
    pub(super) fn get(&self, gfn: Gfn) -> Entry {
        self.with(gfn, |entry| entry)
    }

    /// Calls `look` with each entry that is present, its page, and what holds the mapping
    /// ([`FrozenGuard::holder`]): of a huge entry once, with the first page.
    pub(super) fn each(&self, look: &mut impl FnMut(usize, Gfn, Entry)) {
        let region = self.region;
        match &self.entries.frames {
            FrozenFrames::Backed(_) => {}
            FrozenFrames::Huge(head) => {
                let holder = ptr::from_ref(region).addr();
                look(holder, region.first, Entry::huge_read_only(*head));
            }
            FrozenFrames::Small(chunks) => {
                let firsts = (region.first.0..).step_by(region.chunk_order().pages() as usize);
                for (first, chunk) in firsts.zip(chunks) {
                    if let Some(chunk) = chunk {
                        chunk.each(Gfn(first), look);
                    }
                }
            }
        }
    }

    /// What holds the mapping of a page: the same number for regions that have it in common.
    pub(super) fn holder(&self, gfn: Gfn) -> usize {
        match &self.entries.frames {
            FrozenFrames::Huge(_) | FrozenFrames::Backed(_) => ptr::from_ref(self.region).addr(),
            FrozenFrames::Small(chunks) => chunks[self.region.chunk_of(gfn)]
                .as_ref()
                .map_or(0, |chunk| Arc::as_ptr(chunk).addr()),
        }
    }

    /// What holds the mappings of its chunks, in order, if it is in chunks. Chunks stay where they are from then
    /// on.
    fn chunk_holders(&self) -> Option<Vec<Option<*const FrozenChunk>>> {
        let chunks = self.chunks()?.iter();
        Some(
            chunks
                .map(|chunk| chunk.as_ref().map(Arc::as_ptr))
                .collect(),
        )
    }

    /// Whether the page is lent to clones, whose windows show its frame.
    pub(super) fn is_lent(&self, gfn: Gfn) -> bool {
        match &self.entries.frames {
            FrozenFrames::Huge(_) => self.entries.leases.is_lent(),
            FrozenFrames::Backed(_) => false,
            FrozenFrames::Small(chunks) => chunks[self.region.chunk_of(gfn)]
                .as_ref()
                .is_some_and(|chunk| lock(&chunk.pages).leases.is_lent()),
        }
    }

    /// Makes all of it part of a loan.
    fn lend(&mut self, lending: &mut Lending) {
        let region = self.region;
        let Entries { frames, leases } = &mut *self.entries;
        match frames {
            FrozenFrames::Backed(_) => lending.lend(leases, Lending::hide),
            FrozenFrames::Huge(head) => {
                let count = region.pool.huge().pages();
                lending.lend(leases, |lending| lending.push(region.first, *head, count));
            }
            FrozenFrames::Small(chunks) => {
                let pages = (region.first.0..).step_by(region.chunk_order().pages() as usize);
                for (first, chunk) in pages.zip(&*chunks) {
                    let Some(chunk) = chunk else { continue };
                    let ChunkPages { frames, leases } = &mut *lock(&chunk.pages);
                    lending.lend(leases, |lending| {
                        let present = (first..)
                            .zip(&*frames)
                            .filter(|&(_, &pfn)| pfn != Pfn::ZERO);
                        present.for_each(|(gfn, &pfn)| lending.push(Gfn(gfn), pfn, 1));
                    });
                }
            }
        }
    }

    /// Shows page `gfn` in another frame, whose mapping is counted, and gives the mapping of the old one
    /// back. `false`, and nothing has changed, if the page is lent.
    pub(super) fn try_move_page(&mut self, gfn: Gfn, to: Pfn) -> bool {
        let region = self.region;
        let Entries { frames, leases } = &mut *self.entries;
        if let FrozenFrames::Huge(head) = *frames {
            if !leases.try_end() {
                return false;
            }
            // Shared with whoever breaks it: there is no bit to spread.
            region
                .pool
                .frames()
                .split_mapping(head, FrameState::is_exclusive);
            *frames = FrozenFrames::Small(region.chunks_of(head));
        }
        if let FrozenFrames::Small(chunks) = &*frames
            && let Some(chunk) = &chunks[region.chunk_of(gfn)]
        {
            let mut pages = lock(&chunk.pages);
            // Another region that has it in common may be lent.
            if !pages.leases.try_end() {
                return false;
            }
            let from = mem::replace(&mut pages.frames[chunk.index(gfn)], to);
            drop(pages);
            region.pool.unmap(from);
        }
        true
    }

    /// Shows the whole region, which a huge entry maps, in another folio, whose mapping is counted, and gives
    /// the mapping of the old one back. `false`, and nothing has changed, if it is lent.
    pub(super) fn try_move_folio(&mut self, to: Pfn) -> bool {
        let Entries { frames, leases } = &mut *self.entries;
        let FrozenFrames::Huge(head) = frames else {
            return false;
        };
        if !leases.try_end() {
            return false;
        }
        let from = mem::replace(head, to);
        self.region.pool.unmap_huge(from);
        true
    }
}

/// The most pages of a chunk.
const CHUNK_PAGES: usize = Order::HUGE.chunk().pages() as usize;

/// Some pages of one or more regions. It holds a mapping of every frame it shows, and gives them back when it
/// goes.
pub(super) struct FrozenChunk {
    pool: Arc<FramePool>,
    pages: Mutex<ChunkPages>,
}

struct ChunkPages {
    /// [`Pfn::ZERO`] for a page that was never touched, and beyond the end.
    frames: [Pfn; CHUNK_PAGES],
    leases: Leases,
}

impl FrozenChunk {
    /// A chunk whose pages are in `frames`, [`Pfn::ZERO`] for those that were never touched. Their mappings
    /// are counted already. None if there is nothing in it.
    pub(super) fn new(
        pool: &Arc<FramePool>,
        frames: impl IntoIterator<Item = Pfn>,
    ) -> Option<Arc<Self>> {
        let mut all = [Pfn::ZERO; CHUNK_PAGES];
        for (to, pfn) in all.iter_mut().zip(frames) {
            *to = pfn;
        }
        all.iter().any(|&pfn| pfn != Pfn::ZERO).then(|| {
            Arc::new(Self {
                pool: Arc::clone(pool),
                pages: Mutex::new(ChunkPages {
                    frames: all,
                    leases: Leases::default(),
                }),
            })
        })
    }

    /// Whether its pages are in `frames`, just now.
    pub(super) fn is_in(&self, frames: impl Iterator<Item = Pfn>) -> bool {
        frames.zip(lock(&self.pages).frames).all(|(a, b)| a == b)
    }

    /// Calls `look` with the frames of its pages, which stay there and as they are for the length of the
    /// call.
    pub(super) fn with_frames<R>(&self, look: impl FnOnce(&[Pfn]) -> R) -> R {
        look(&lock(&self.pages).frames)
    }

    /// As [`FrozenGuard::each`], of a chunk that begins at page `first`.
    pub(super) fn each(self: &Arc<Self>, first: Gfn, look: &mut impl FnMut(usize, Gfn, Entry)) {
        let holder = Arc::as_ptr(self).addr();
        let frames = lock(&self.pages).frames;
        for (gfn, pfn) in (first.0..).map(Gfn).zip(frames) {
            if pfn != Pfn::ZERO {
                look(holder, gfn, Entry::read_only(pfn));
            }
        }
    }

    #[cfg(all(test, not(loom)))]
    pub(super) fn frame(&self, gfn: Gfn) -> Pfn {
        lock(&self.pages).frames[self.index(gfn)]
    }

    fn index(&self, gfn: Gfn) -> usize {
        let order = self.pool.huge().chunk();
        (gfn.0 - order.floor(gfn.0)) as usize
    }
}

impl Drop for FrozenChunk {
    fn drop(&mut self) {
        let frames = lock(&self.pages).frames;
        frames
            .into_iter()
            .filter(|&pfn| pfn != Pfn::ZERO)
            .for_each(|pfn| self.pool.unmap(pfn));
    }
}
