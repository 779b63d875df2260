//! The frame pool: all frames of a process, and the memory they may have.
//!
//! A region of an address space has a *home* (`home.rs`): a frame for each of its pages, where the page is
//! for as long as nothing forces it elsewhere. All other frames (copies for snapshots, mostly) come from the
//! rest of the pool. Which frame is whose is `allocator.rs`; how frames come to have memory is `commit.rs`;
//! the handles by which they are held are `fresh.rs` and `hold.rs`.
//!
//! Memory is asked for in whole runs as long as a huge folio, and more of them at a time in a home, so that
//! the host can give it in huge pages (PLATFORM.md, "Huge frames without privilege").

use std::fmt;
use std::hint;
use std::io;
use std::sync::Arc;

use super::account::Account;
use super::addr::{Access, Order, Pfn};
use super::allocator::{Allocator, PoolUsage, Unavailable};
use super::bits::BitSet;
use super::commit::{AllocError, Supply};
use super::entry::Entry;
use super::folio::Dissolved;
use super::frame::{FrameTable, Released};
use super::frame_state::FrameState;
use super::fresh::{Fresh, FreshFolio, Isolated};
use super::hold::{Get, PinnedRun};
use super::home::{Home, Place};
use super::ledger::Charges;
use super::mmu::FrameMemory;
use super::policy::CowPolicy;
use super::pool_ref::PoolRef;
use super::promise::{Promise, PromiseError, Promises};
use super::safeguard::{Safeguard, is_left_out};
use super::stripe::Striped;

/// All frames of a process.
pub struct FramePool {
    frames: Arc<FrameTable>,
    supply: Arc<Supply>,
    references: Striped<PoolRef>,
    promises: Arc<Promises>,
}

impl FramePool {
    /// A pool of `frames` frame numbers, of which at most `limit` have memory behind them at a time. Frame 0
    /// is the zero frame.
    ///
    /// # Panics
    /// If `frames` is 0.
    pub fn new(
        memory: Arc<dyn FrameMemory>,
        frames: u64,
        limit: u64,
    ) -> Result<Arc<Self>, AllocError> {
        Self::with_folios_of(Order::HUGE, memory, frames, limit)
    }

    /// As [`FramePool::new`], with huge folios of another size: for models, in which 512 pages are too many.
    ///
    /// # Errors
    /// As [`FramePool::new`].
    ///
    /// # Panics
    /// As [`FramePool::new`].
    pub fn with_folios_of(
        huge: Order,
        memory: Arc<dyn FrameMemory>,
        frames: u64,
        limit: u64,
    ) -> Result<Arc<Self>, AllocError> {
        assert!(frames > 0, "a pool has at least the zero frame");
        if !has_room_for_records(frames) {
            let what = format!("no addresses for the records of {frames} frames");
            let source = io::Error::new(io::ErrorKind::OutOfMemory, what);
            return Err(AllocError::Host {
                count: frames,
                source,
            });
        }
        memory
            .commit(Pfn::ZERO, 1)
            .map_err(|source| AllocError::Host { count: 1, source })?;
        let supply = Arc::new(Supply::new(Allocator::new(frames, huge, limit), memory));
        let frames = Arc::new(FrameTable::new(frames, huge));
        Ok(Arc::new(Self {
            references: PoolRef::striped(&frames, &supply),
            promises: Promises::new(limit),
            frames,
            supply,
        }))
    }

    /// What is known of a frame just now.
    pub fn state(&self, pfn: Pfn) -> FrameState {
        self.frames.state(pfn)
    }

    /// Waits until there should be more memory in stock: committed, and ready for copies that nobody has to
    /// make yet. `false` once it is nobody's duty any more ([`FramePool::close_stock`]). How much is a matter
    /// of what is in use, before the first fork, and of what was copied between the last two; a pool that has
    /// committed three quarters of its limit has none.
    pub fn wait_for_want(&self) -> bool {
        self.supply.wait_for_want()
    }

    /// Commits some of what should be in stock, if the host has it: for a thread that has the time. Says
    /// whether there should be more.
    pub fn stock_up(&self) -> bool {
        self.supply.stock_up()
    }

    /// Ends the wait for more to do: for good.
    pub fn close_stock(&self) {
        self.supply.close_stock();
    }

    /// How full the pool is.
    pub fn usage(&self) -> PoolUsage {
        self.supply.lock().usage()
    }

    /// Opens an account, for as many spaces as are to share it, with the most frames that it may be charged
    /// with, if there is a limit.
    pub fn open_account(&self, limit: Option<u64>) -> Account {
        Account::open(&self.supply, limit)
    }

    /// What all accounts together are charged with: just the frames that are in use.
    pub fn charges(&self) -> Charges {
        self.supply.lock().ledger().charges()
    }

    /// Promises `frames` frames of what may be committed, if as many are not promised yet.
    ///
    /// # Errors
    /// If that would be more than the limit.
    pub fn try_promise(&self, frames: u64) -> Result<Promise, PromiseError> {
        self.promises.try_promise(frames)
    }

    /// Frames that are promised.
    pub fn promised(&self) -> u64 {
        self.promises.promised()
    }

    /// Whether it is one of this pool's accounts.
    pub(super) fn has_account(&self, account: &Account) -> bool {
        account.is_of(&self.supply)
    }

    /// Frames that are allocated or held though everybody is gone: what is left when no address space,
    /// snapshot or pin should be. Empty when the accounts are right. At most `most` of them; those about which
    /// the host is being asked are nobody's yet, or somebody's who is not gone.
    pub fn leftovers(&self, most: usize) -> Vec<(Pfn, FrameState)> {
        let allocator = self.supply.lock();
        (1..self.frames.len())
            .map(|n| (Pfn(n), self.frames.state(Pfn(n))))
            .filter(|&(pfn, state)| allocator.is_in_use(pfn) || state.refs() > 0)
            .take(most)
            .collect()
    }

    /// The frames that are in use, and how many the accounts say there are: as many, unless somebody waits
    /// for the host.
    pub(super) fn frames_in_use(&self) -> (BitSet, u64) {
        let allocator = self.supply.lock();
        (allocator.in_use(), allocator.usage().in_use)
    }

    /// Whether a frame is in use.
    pub(super) fn is_in_use(&self, pfn: Pfn) -> bool {
        self.supply.lock().is_in_use(pfn)
    }

    pub(super) fn frames(&self) -> &FrameTable {
        &self.frames
    }

    pub(super) fn memory(&self) -> &dyn FrameMemory {
        self.supply.memory()
    }

    #[cfg(test)]
    pub(super) fn supply(&self) -> &Supply {
        &self.supply
    }

    /// For a handle that the calling thread makes.
    #[inline]
    fn reference(&self) -> PoolRef {
        self.references.mine().clone()
    }

    /// How large a huge folio is.
    pub(super) fn huge(&self) -> Order {
        self.frames.huge
    }

    /// Reserves a home of `pages` frames.
    pub(super) fn reserve(&self, pages: u64) -> Result<Home, AllocError> {
        Home::reserve(&self.supply, pages)
    }

    /// Reserves a home for a region: [`Home::reserve_folio`].
    pub(super) fn reserve_folio(
        &self,
        place: &Place,
        index: usize,
        regions: usize,
    ) -> Option<Home> {
        // No folio has the zero frame.
        if self.frames.len() < 2 * self.huge().pages() {
            return None;
        }
        Home::reserve_folio(&self.supply, self.huge(), place, index, regions)
    }

    /// Makes a home of a folio that the caller has alone: [`Home::of_folio`].
    pub(super) fn home_of_folio(&self, head: Pfn) -> Option<Home> {
        Home::of_folio(&self.supply, self.huge(), head)
    }

    /// Whether somebody has a frame.
    pub(super) fn is_allocated(&self, pfn: Pfn) -> bool {
        self.supply.lock().is_allocated(pfn)
    }

    /// A frame for anything, with whatever is in it.
    pub(super) fn allocate(&self, payer: &Account) -> Result<Fresh, AllocError> {
        let payer = payer.number();
        let taken = self.supply.take(|a| a.claim_single(payer))?;
        Ok(Fresh::of_allocated(self.reference(), &taken))
    }

    /// The frame for page `index` of a home, with whatever is in it. If it has no memory, that is asked for
    /// up to the `most`th page from there on. `None` if somebody has the frame, or there is no memory for it.
    pub(super) fn allocate_at(
        &self,
        payer: &Account,
        home: &Home,
        index: u64,
        most: u64,
    ) -> Result<Option<Fresh>, AllocError> {
        let (payer, pfn) = (payer.number(), home.frame(index));
        let taken = self
            .supply
            .try_take(|a| a.claim_home(payer, pfn, 1, most))?;
        Ok(taken.map(|taken| Fresh::of_allocated(self.reference(), &taken)))
    }

    /// The frames of a huge folio for the pages from `index` on: their homes. `None` if one of them is in
    /// use, or there is not memory for all of them, or room for them in the account. With
    /// whatever is in them.
    pub(super) fn allocate_huge(
        &self,
        payer: &Account,
        home: &Home,
        index: u64,
    ) -> Result<Option<FreshFolio>, AllocError> {
        let (head, pages) = (home.frame(index), self.huge().pages());
        let most = home.rest(index).min(self.supply.folios_at_once() * pages);
        let payer = payer.number();
        let taken = self
            .supply
            .try_take(|a| a.claim_home(payer, head, pages, most))?;
        Ok(taken.map(|taken| FreshFolio::of_allocated(self.reference(), &taken)))
    }

    /// The frames of a huge folio for anything. `None` if there is no such run, or not memory for all of it.
    /// With whatever is in them.
    pub(super) fn allocate_folio(&self, payer: &Account) -> Result<Option<FreshFolio>, AllocError> {
        let payer = payer.number();
        let taken = self.supply.try_take(|a| a.claim_folio(payer))?;
        Ok(taken.map(|taken| FreshFolio::of_allocated(self.reference(), &taken)))
    }

    /// Has memory ready for whoever needs a frame or a folio next, which may be in a hurry, and gives back to
    /// the host what nobody has used for a while. What there is no memory for is left to them.
    pub(super) fn provide(&self) {
        self.supply.provide();
        self.supply.give_back_surplus();
    }

    /// A frame for page `index`, with whatever is in it: its home if that is free, so that neighbours stay
    /// neighbours, else any. Room is made for it if there is none.
    pub(super) fn allocate_near(
        &self,
        payer: &Account,
        home: &Home,
        index: u64,
    ) -> Result<Fresh, AllocError> {
        let (payer, pfn) = (payer.number(), home.frame(index));
        let taken = self.supply.take(|a| match a.claim_home(payer, pfn, 1, 1) {
            Err(Unavailable::Taken | Unavailable::Limit) => a.claim_single(payer),
            home => home,
        })?;
        Ok(Fresh::of_allocated(self.reference(), &taken))
    }

    /// Gives a fresh frame its first mapping, which the caller must put into an entry: possibly shared, as what a
    /// snapshot has.
    pub(super) fn share_fresh(&self, fresh: Fresh) -> Pfn {
        let held = fresh.into_held();
        let mapped = self.frames.try_map_held(held.pfn());
        debug_assert!(mapped.is_ok(), "a fresh frame has no mappings");
        held.pfn()
    }

    /// The same of a folio, which a huge entry maps.
    pub(super) fn share_fresh_folio(&self, fresh: FreshFolio) -> Pfn {
        let head = fresh.into_mapped();
        let mapped = self.frames.try_map_again_huge(head);
        debug_assert!(mapped.is_ok(), "a fresh folio has one mapping");
        self.unmap_huge(head);
        head
    }

    pub(super) fn free(&self, pfn: Pfn) {
        self.supply.free(pfn, 1);
    }

    pub(super) fn free_folio(&self, head: Pfn) {
        self.supply.free(head, self.huge().pages());
    }

    /// Gives back a mapping of `pfn` by a small entry.
    pub(super) fn unmap(&self, pfn: Pfn) {
        if self.frames.unmap(pfn) == Released::Last {
            self.free(pfn);
        }
    }

    /// Gives back a mapping of the folio at `head` by a huge entry.
    pub(super) fn unmap_huge(&self, head: Pfn) {
        match self.frames.unmap_huge(head) {
            Dissolved::No => {}
            Dissolved::Free => self.free_folio(head),
            Dissolved::InPart(free) => {
                let mut allocator = self.supply.lock();
                free.into_iter().for_each(|pfn| allocator.release(pfn, 1));
            }
        }
    }

    /// For model checkers: as [`FramePool::unmap`], without an order.
    pub(super) fn unmap_unordered(&self, pfn: Pfn) {
        if self.frames.unmap_unordered(pfn) == Released::Last {
            self.free(pfn);
        }
    }

    /// Takes pins on pages that `entry` maps: [`PinnedRun::try_take`].
    #[inline]
    pub(super) fn try_pin<P: CowPolicy>(
        &self,
        entry: Entry,
        count: u64,
        access: Access,
        policy: &P,
    ) -> Result<PinnedRun, FrameState> {
        PinnedRun::try_take(self.reference(), entry, count, access, policy)
    }

    /// Takes a transient hold on the page that `entry` maps: [`Get::try_take`].
    #[inline]
    pub(super) fn try_get(&self, entry: Entry) -> Result<Get, FrameState> {
        Get::try_take(self.reference(), entry)
    }

    /// Takes the caller's mapping of a frame away: [`Isolated::try_take`].
    pub(super) fn isolate(
        &self,
        pfn: Pfn,
        may: impl Fn(FrameState) -> bool,
    ) -> Result<Isolated, FrameState> {
        Isolated::try_take(self.reference(), pfn, may)
    }

    /// Lets go of isolated frames. The memory of those that nobody else has goes back to the host.
    pub(super) fn give_to_host(&self, isolated: Vec<Isolated>) {
        let mut free: Vec<Pfn> = isolated
            .into_iter()
            .filter_map(Isolated::into_last)
            .collect();
        free.sort_unstable();
        for run in free.chunk_by(|a, b| a.0 + 1 == b.0) {
            let (first, count) = (run[0], run.len() as u64);
            if is_left_out(Safeguard::UncommittedBeforeFree) {
                self.supply.lock().release(first, count);
                self.supply.uncommit(first, count);
            } else {
                // Still allocated, so that nobody takes them while their memory goes.
                self.supply.uncommit(first, count);
                self.supply.lock().release(first, count);
            }
        }
    }
}

/// Whether the tables of so many frames can be allocated. They cost no memory before they are used, and still
/// a host refuses one that it could never fill: to find out is better than to be ended by it.
fn has_room_for_records(frames: u64) -> bool {
    // Words, payers, and some sets of bits: all of them at a time.
    let tables = [
        frames.checked_mul(8),
        frames.checked_mul(4),
        Some(frames / 8 * 5),
    ];
    let mut reserved = Vec::new();
    tables.into_iter().all(|bytes| {
        let mut table = Vec::<u8>::new();
        let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
        let is_there = bytes.is_some_and(|bytes| table.try_reserve_exact(bytes).is_ok());
        reserved.push(table);
        // Or the compiler may leave out what nobody uses.
        hint::black_box(&mut reserved);
        is_there
    })
}

impl fmt::Debug for FramePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FramePool")
            .field("usage", &self.usage())
            .finish()
    }
}
