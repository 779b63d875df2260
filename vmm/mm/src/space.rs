//! Address spaces: the live ones, which vCPUs run in. `frozen.rs` has the others.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::account::Account;
use super::addr::{Gfn, OutOfRange};
use super::adopt::Borrowed;
use super::commit::AllocError;
use super::entry::Entry;
use super::frozen::FrozenTable;
use super::home::Places;
use super::lineage::Lineage;
use super::mapped::Mapped;
use super::mapped::table::{RegionGuard, Table};
use super::mmu::{Mmu, MmuError};
use super::page_set::PageSet;
use super::policy::CowPolicy;
use super::pool::FramePool;
use super::predictor::Predictor;
use super::stats::{Counters, MmStats};
use super::sync::{Mutex, lock};

/// The memory of a running VM: a shadow page table and the [`Mmu`] that mirrors it.
///
/// # Locks
/// In this order, each optional (a clone that is being made is nobody else's yet: its locks come last):
/// 1. `Mapped::enter`: shared by faults and slow pins, alone by fork and restore (the
///    kernel's `mmap_lock`).
/// 2. the lock of one region of this space (the kernel's page-table lock).
/// 3. `lineage`, what the next fork takes over; and the predictor's own. Never both.
/// 4. the lock of the same region of one snapshot at a time, of one of its chunks, and of a loan they are
///    part of; before them, of a node of the snapshot that is being lent.
/// 5. the pool's allocator, which has the accounts; or its promises.
///
/// Entries change only under 2; frame states change by compare-and-swap, with or without locks.
pub struct AddressSpace<P> {
    pub(super) pool: Arc<FramePool>,
    pub(super) policy: P,
    pub(super) mapped: Mapped,
    /// Where homes of its regions are to be, if they get others than they began with.
    pub(super) places: Places,
    /// Who pays for the frames that it allocates.
    pub(super) account: Account,
    pub(super) lineage: Mutex<Lineage>,
    /// What a clone shows and has not adopted.
    pub(super) borrowed: Borrowed,
    pub(super) predictor: Predictor,
    pub(super) counters: Counters,
    /// Whether memory that is touched first gets a huge folio.
    pub(super) uses_huge: bool,
    /// Whether somebody has asked which pages were written: from then on that is told page by page.
    pub(super) tracks_dirty: AtomicBool,
}

impl<P: CowPolicy> AddressSpace<P> {
    /// An address space of `pages` pages, none of them touched. `mmu` shows zeros, read-only, everywhere. It
    /// has an account of its own, without a limit.
    ///
    /// # Errors
    /// If the pool has no room for a home of `pages` frames.
    pub fn new(
        pool: Arc<FramePool>,
        policy: P,
        mmu: Box<dyn Mmu>,
        pages: u64,
    ) -> Result<Self, AllocError> {
        let home = pool.reserve(pages)?;
        let account = pool.open_account(None);
        let space = Self::without_home(pool, policy, mmu, pages, account);
        space.mapped.table.settle(home);
        Ok(space)
    }

    /// The same without frames of its own: its regions get homes when they need them. With this account,
    /// which is one of the pool's.
    pub(super) fn without_home(
        pool: Arc<FramePool>,
        policy: P,
        mmu: Box<dyn Mmu>,
        pages: u64,
        account: Account,
    ) -> Self {
        Self::check_account(&pool, &account);
        let table = Table::new(pages, pool.huge());
        Self {
            places: Places::default(),
            account,
            lineage: Mutex::new(Lineage::new(table.regions())),
            borrowed: Borrowed::default(),
            predictor: Predictor::learning(),
            pool,
            policy,
            mapped: Mapped::new(table, mmu),
            counters: Counters::default(),
            uses_huge: true,
            tracks_dirty: AtomicBool::new(false),
        }
    }

    /// The same, without huge folios: every page has an entry of its own, and is broken by itself.
    #[must_use]
    pub fn with_base_pages(mut self) -> Self {
        self.uses_huge = false;
        self
    }

    /// The same, with this account: what it allocates from now on is charged to it. What it has allocated
    /// before stays with the account it had.
    ///
    /// # Panics
    /// If the account is of another pool.
    #[must_use]
    pub fn with_account(mut self, account: Account) -> Self {
        Self::check_account(&self.pool, &account);
        self.account = account;
        self
    }

    fn check_account(pool: &FramePool, account: &Account) {
        assert!(
            pool.has_account(account),
            "an address space pays its own pool"
        );
    }

    /// The account that it and its snapshots are charged to.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// The same, with a predictor that need not learn: for tests.
    #[cfg(test)]
    pub(super) fn with_predictor(mut self, predictor: Predictor) -> Self {
        self.predictor = predictor;
        self
    }

    /// Sets what the break of a whole region costs: as much as `small` breaks of a page. What it costs is
    /// measured by whoever handles the faults. At 0 every break is of a whole region.
    pub fn set_whole_price(&self, small: u32) {
        self.predictor.set_whole_price(small);
    }

    /// Has [`AddressSpace::take_protected`] know what becomes read-only from now on.
    pub fn note_protected(&self) {
        self.mapped.note_protected();
    }

    /// The pages that a fork, a restore or dirty tracking has made read-only since this was last called, and
    /// those that a restore has changed and that are read-only: what was writable or different, and may not
    /// be written now. Some may be writable again. None if nobody has asked for it to be noted.
    pub fn take_protected(&self) -> Option<PageSet> {
        self.mapped.take_protected()
    }

    /// Sets how many chunks (16 pages each, of regions that are mapped page by page and change before every
    /// fork) may have changed without [`AddressSpace::prepare_fork`] doing anything about them.
    pub fn leave_to_fork(&self, chunks: u32) {
        self.predictor.leave_to_fork(chunks);
    }

    /// Its copy-on-write policy.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.mapped.table.pages()
    }

    /// The pool its frames are from.
    pub fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    /// The entry of a page just now. Of a page that a clone has borrowed, that of its snapshot; one that is hidden
    /// has none yet.
    pub fn entry(&self, gfn: Gfn) -> Result<Entry, OutOfRange> {
        self.mapped.table.in_range(gfn)?;
        let borrowed = self.with_borrowed(gfn, |entry| entry);
        Ok(borrowed.unwrap_or_else(|| self.mapped.table.peek(gfn)))
    }

    /// Whether a page is borrowed still.
    #[cfg(all(test, not(loom)))]
    pub(super) fn is_borrowed(&self, gfn: Gfn) -> bool {
        let table = &self.mapped.table;
        table.is_borrowed(table.region_of(gfn))
    }

    /// What the next fork would take over from the last of a page (the holder of its mapping), and the frame
    /// it has for it.
    #[cfg(all(test, not(loom)))]
    pub(super) fn kept(&self, gfn: Gfn) -> Option<(usize, super::addr::Pfn)> {
        let region = self.mapped.table.lock_of(gfn);
        if let Some(chunk) = region.state.kept.get(region.chunk_of(gfn)) {
            let chunk = chunk.as_ref()?;
            return Some((Arc::as_ptr(chunk).addr(), chunk.frame(gfn)));
        }
        let lineage = lock(&self.lineage);
        let frozen = lineage.unchanged.get(region.index())?.lock();
        Some((frozen.holder(gfn), frozen.get(gfn).pfn()))
    }

    /// Whether the MMU shows what it should. If it does not, nothing can be done with the space any more, and
    /// the guest must not run on.
    ///
    /// # Errors
    /// [`MmuError::Broken`], with the change that was the last.
    pub fn check(&self) -> Result<(), MmuError> {
        self.mapped.check()
    }

    /// What was done so far.
    pub fn stats(&self) -> MmStats {
        self.counters.read()
    }
}

impl<P: CowPolicy> AddressSpace<P> {
    /// Maps a region that has a huge entry by small ones instead: what they say is the same, and nothing is
    /// copied (PROTOCOL.md 4.10). The MMU need not know.
    pub(super) fn split(&self, region: &mut RegionGuard<'_>) {
        if let Some(huge) = region.huge() {
            self.pool.frames().split_mapping(huge.pfn(), |page| {
                self.policy.is_exclusive_after_split(page)
            });
            region.set_small();
            Counters::add(&self.counters.mine().split);
        }
    }
}

impl<P> Drop for AddressSpace<P> {
    /// Frames that are still pinned live on as orphans until their pins are dropped. The caller has stopped
    /// the vCPUs: the MMU is not changed.
    fn drop(&mut self) {
        self.give_back_all();
        let pool = &self.pool;
        self.mapped.dismantle(|entry| match entry.is_huge() {
            true => pool.unmap_huge(entry.pfn()),
            false => pool.unmap(entry.pfn()),
        });
        lock(&self.lineage).unchanged = FrozenTable::default();
    }
}

impl<P> fmt::Debug for AddressSpace<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("pages", &self.mapped.table.pages())
            .field("stats", &self.counters.read())
            .finish()
    }
}
