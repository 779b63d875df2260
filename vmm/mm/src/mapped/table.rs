//! The shadow page table: for each guest page the frame it is in and whether vCPUs may write it.
//!
//! It has two levels. A **region** is as many pages as a huge folio has (2 MiB), and is mapped by one *huge*
//! entry or by a small entry for each of its pages. An entry is one atomic word. It is **changed only under
//! the lock of its region** and may be read without one (the fast path of a pin does).
//!
//! A region of a clone may be **borrowed** (`lent.rs`): it has no entries yet, and shows what the snapshot's
//! region says. To who reads without a lock it looks untouched, so who believes that asks first whether it is
//! borrowed ([`Table::is_borrowed`]). What it is borrowed of may be *backed* (`backed.rs`); then it is **hidden**, and
//! vCPUs see nothing of it until it is adopted.

use std::ops::{Range, RangeInclusive};
use std::sync::{Mutex as StdMutex, MutexGuard as StdMutexGuard, OnceLock, PoisonError, Weak};

use crossbeam_utils::CachePadded;

use super::super::addr::{Gfn, Order, OutOfRange, Pfn};
use super::super::entry::Entry;
use super::super::frozen::{FrozenChunks, FrozenRegion};
use super::super::home::Home;
use super::super::lent::{FAN_OUT, Slots};
use super::super::predictor::History;
use super::super::sync::{AtomicU64, Mutex, MutexGuard, Ordering, lock, zeroed};

/// Regions of a group: those that a node of a snapshot has.
const GROUP: usize = FAN_OUT;

/// The entries of one address space.
pub(in super::super) struct Table {
    /// The huge entry of each region, if it is present.
    huge: Box<[AtomicU64]>,
    /// Of each group, which of its regions are borrowed ([`Slots`]).
    borrowed: Box<[AtomicU64]>,
    /// Of each group, which of those are hidden: they were backed when they were borrowed.
    hidden: Box<[AtomicU64]>,
    /// The rest, made when somebody first looks at a region of the group: a clone has huge entries long before
    /// it has need of more, and most of a very large guest is never touched.
    groups: Box<[OnceLock<Group>]>,
    /// By group, the frames that its regions are given for their own when it is made, if any were reserved. Of
    /// `std`, as what makes a group: nobody waits for it.
    homes: Box<[StdMutex<Option<Home>>]>,
    pages: u64,
    /// How large a region is.
    order: Order,
}

/// What there is of some regions beside huge entries.
struct Group {
    /// Small entries. Those of a region with a huge entry mean nothing, and those of a region that always had
    /// one were never touched: they are as long as a page of the host, and cost no memory (`sync::zeroed`).
    entries: Box<[AtomicU64]>,
    /// A lock a region: who is in one region waits for nobody who is in another.
    states: Box<[CachePadded<Mutex<RegionState>>]>,
}

/// What is kept of a region under its lock, beside its entries.
#[derive(Default)]
pub(in super::super) struct RegionState {
    /// Small entries that are not [`Entry::UNTOUCHED`]. Of a region that a huge entry maps it means nothing.
    touched: usize,
    /// Whether anything has changed since the last fork (`lineage.rs`).
    pub(in super::super) is_changed: bool,
    /// Of a region that has changed: the chunks of the last snapshot that show what it still shows. Empty if
    /// there are none.
    pub(in super::super) kept: FrozenChunks,
    /// The snapshots' regions that may share frames with this one.
    pub(in super::super) sharers: Vec<Weak<FrozenRegion>>,
    /// The predictor's record of it.
    pub(in super::super) history: History,
    /// The frames it has for its own: none until it needs one (`house.rs`).
    pub(in super::super) home: Option<Home>,
}

impl Table {
    pub(in super::super) fn new(pages: u64, order: Order) -> Self {
        let regions = pages.div_ceil(order.pages()) as usize;
        Self {
            huge: zeroed(regions),
            borrowed: zeroed(regions.div_ceil(GROUP)),
            hidden: zeroed(regions.div_ceil(GROUP)),
            groups: (0..regions.div_ceil(GROUP))
                .map(|_| OnceLock::new())
                .collect(),
            homes: (0..regions.div_ceil(GROUP))
                .map(|_| StdMutex::default())
                .collect(),
            pages,
            order,
        }
    }

    /// Gives each region its part of `home`, which has a frame for each page: when it is first looked at, and
    /// none was before.
    pub(in super::super) fn settle(&self, mut home: Home) {
        for (group, slot) in self.homes.iter().enumerate() {
            debug_assert!(!self.is_made(group * GROUP));
            *lock_home(slot) = Some(home.split_front(self.pages_of_group(group)));
        }
    }

    /// How many pages the regions of a group have.
    fn pages_of_group(&self, group: usize) -> u64 {
        let each = GROUP as u64 * self.order.pages();
        each.min(self.pages - group as u64 * each)
    }

    /// The group of a region, and which of it that is.
    fn group_of(&self, index: usize) -> (&OnceLock<Group>, usize) {
        (&self.groups[index / GROUP], index % GROUP)
    }

    /// Whether a region has no entries because it is borrowed.
    ///
    /// Acquire pairs with the release in [`RegionGuard::own`]: who sees that it is not borrowed any more sees
    /// the entries it was given.
    #[inline]
    pub(in super::super) fn is_borrowed(&self, index: usize) -> bool {
        self.borrowed(index / GROUP) >> (index % GROUP) & 1 != 0
    }

    /// Which regions of a group are borrowed.
    #[inline]
    pub(in super::super) fn borrowed(&self, group: usize) -> Slots {
        self.borrowed[group].load(Ordering::Acquire)
    }

    /// Notes that regions of a group of a space that nobody else has yet are borrowed.
    pub(in super::super) fn borrow(&self, group: usize, slots: Slots) {
        self.borrowed[group].store(slots, Ordering::Release);
    }

    /// Notes that regions of a group that are borrowed are hidden, as [`Table::borrow`].
    pub(in super::super) fn hide(&self, group: usize, slots: Slots) {
        self.hidden[group].store(slots, Ordering::Release);
    }

    /// How many regions are hidden.
    pub(in super::super) fn hidden(&self) -> u64 {
        let hidden = self.hidden.iter();
        hidden
            .map(|slots| u64::from(slots.load(Ordering::Acquire).count_ones()))
            .sum()
    }

    /// Whether vCPUs see nothing of a region: it was backed when it was borrowed.
    #[inline]
    pub(in super::super) fn is_hidden(&self, index: usize) -> bool {
        self.hidden[index / GROUP].load(Ordering::Acquire) >> (index % GROUP) & 1 != 0
    }

    fn is_made(&self, index: usize) -> bool {
        self.group_of(index).0.get().is_some()
    }

    /// Whether nobody has ever touched or locked anything of the region's group, and it is not borrowed: a look
    /// at it would only put memory behind it. Of a very large guest most regions are so.
    pub(in super::super) fn is_vacant(&self, index: usize) -> bool {
        let is_present = || {
            let huge = Entry::of_word(self.huge[index].load(Ordering::Acquire));
            huge.is_present()
        };
        !self.is_made(index) && !self.is_borrowed(index) && !is_present()
    }

    fn make_group(&self, index: usize) -> Group {
        let group = index / GROUP;
        let first = group * GROUP;
        let regions = first..self.regions().min(first + GROUP);
        let mut home = lock_home(&self.homes[group]).take();
        let state = |index| {
            let (_, pages) = self.pages_of_region(index);
            CachePadded::new(Mutex::new(RegionState {
                home: home.as_mut().map(|home| home.split_front(pages)),
                ..RegionState::default()
            }))
        };
        Group {
            entries: zeroed(self.pages_of_group(group) as usize),
            states: regions.map(state).collect(),
        }
    }

    pub(in super::super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(in super::super) fn regions(&self) -> usize {
        self.huge.len()
    }

    /// Whether there is such a page.
    pub(in super::super) fn in_range(&self, gfn: Gfn) -> Result<(), OutOfRange> {
        let pages = self.pages();
        if gfn.0 < pages {
            Ok(())
        } else {
            Err(OutOfRange { gfn, pages })
        }
    }

    /// Which region a page lies in.
    pub(in super::super) fn region_of(&self, gfn: Gfn) -> usize {
        self.order.index(gfn.0)
    }

    /// Reads an entry without a lock: a hint, until something pins it down.
    ///
    /// Acquire pairs with the release in [`RegionGuard::set`]: who sees an entry sees its frame initialised
    /// and mapped. While a region changes from huge to small entries or back, an old small entry may be read:
    /// its frame's word says that it means nothing.
    pub(in super::super) fn peek(&self, gfn: Gfn) -> Entry {
        match self.peek_huge(gfn) {
            Some(entry) => entry,
            None => self.peek_small(gfn),
        }
    }

    /// What [`Table::peek`] looks at first: the huge entry, if there is one, and what it says of the page.
    #[inline]
    pub(in super::super) fn peek_huge(&self, gfn: Gfn) -> Option<Entry> {
        // The last region may be too short for a huge entry.
        if gfn.0 >= self.order.floor(self.pages()) {
            return None;
        }
        let huge = &self.huge[self.region_of(gfn)];
        let huge = Entry::of_word(huge.load(Ordering::Acquire));
        huge.is_present()
            .then(|| huge.page(gfn.0 - self.order.floor(gfn.0)))
    }

    /// What [`Table::peek`] looks at then. Time may pass between the two, so one look at the huge entry does
    /// for many pages.
    #[inline]
    pub(in super::super) fn peek_small(&self, gfn: Gfn) -> Entry {
        let (group, _) = self.group_of(self.region_of(gfn));
        let Some(group) = group.get() else {
            return Entry::UNTOUCHED;
        };
        let pages = GROUP as u64 * self.order.pages();
        Entry::of_word(group.entries[(gfn.0 & (pages - 1)) as usize].load(Ordering::Acquire))
    }

    /// How many pages there are from `gfn` on to the end of its region.
    pub(in super::super) fn rest_of_region(&self, gfn: Gfn) -> u64 {
        let end = self.order.floor(gfn.0) + self.order.pages();
        end.min(self.pages()) - gfn.0
    }

    pub(in super::super) fn lock(&self, index: usize) -> RegionGuard<'_> {
        let (group, at) = self.group_of(index);
        let group = group.get_or_init(|| self.make_group(index));
        let (first, count) = self.pages_of_region(index);
        let first_entry = at * self.order.pages() as usize;
        RegionGuard {
            state: lock(&group.states[at]),
            borrowed: &self.borrowed[index / GROUP],
            hidden: &self.hidden[index / GROUP],
            huge: &self.huge[index],
            entries: &group.entries[first_entry..first_entry + count as usize],
            first,
            index,
            order: self.order,
        }
    }

    /// Publishes entries, read-only, for pages that were never touched, of a space that nobody else has yet.
    pub(super) fn publish(&self, stretch: &Stretch) {
        let Stretch { first, frame, .. } = *stretch;
        match stretch.kind {
            StretchKind::Borrowed => {}
            StretchKind::Huge => {
                let pages = self.order.pages();
                let huge = &self.huge[self.region_of(first)..];
                let heads = (frame.0..frame.0 + stretch.count).step_by(pages as usize);
                for (slot, head) in huge.iter().zip(heads) {
                    let entry = Entry::huge_read_only(Pfn(head));
                    slot.store(entry.word(), Ordering::Release);
                }
            }
            StretchKind::Small => {
                let mut region = self.lock_of(first);
                (0..stretch.count).for_each(|n| {
                    region.set(Gfn(first.0 + n), Entry::read_only(Pfn(frame.0 + n)));
                });
            }
        }
    }

    /// The pages of a region: the first, and how many.
    pub(in super::super) fn pages_of_region(&self, index: usize) -> (Gfn, u64) {
        let first = index as u64 * self.order.pages();
        (Gfn(first), self.order.pages().min(self.pages() - first))
    }

    /// Takes all entries away, and hands over those that are present.
    pub(super) fn clear(&mut self, mut give_back: impl FnMut(Entry)) {
        for index in 0..self.regions() {
            let huge = Entry::of_word(self.huge[index].load(Ordering::Relaxed));
            if huge.is_present() {
                // What it has left in the small ones is not looked at.
                give_back(huge);
                self.huge[index].store(Entry::UNTOUCHED.word(), Ordering::Release);
                if self.is_made(index) {
                    self.lock(index).state.touched = 0;
                }
            } else if self.is_made(index) {
                self.lock(index).clear_small(&mut give_back);
            }
        }
    }

    /// Locks the region that `gfn` lies in.
    pub(in super::super) fn lock_of(&self, gfn: Gfn) -> RegionGuard<'_> {
        self.lock(self.region_of(gfn))
    }
}

fn lock_home(home: &StdMutex<Option<Home>>) -> StdMutexGuard<'_, Option<Home>> {
    home.lock().unwrap_or_else(PoisonError::into_inner)
}

/// By what pages are mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) enum StretchKind {
    /// Small entries of one region.
    Small,
    /// Huge entries of whole regions.
    Huge,
    /// None yet: their regions are borrowed.
    Borrowed,
}

/// Pages that follow each other, in frames that do.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Stretch {
    pub(in super::super) first: Gfn,
    /// That of the first page.
    pub(in super::super) frame: Pfn,
    pub(in super::super) count: u64,
    pub(in super::super) kind: StretchKind,
}

impl Stretch {
    /// Whether `next` goes on where this ends.
    pub(in super::super) fn is_followed_by(&self, next: &Self) -> bool {
        let end = (self.first.0 + self.count, self.frame.0 + self.count);
        end == (next.first.0, next.frame.0)
    }
}

/// The right to change the entries of one region.
pub(in super::super) struct RegionGuard<'a> {
    pub(in super::super) state: MutexGuard<'a, RegionState>,
    borrowed: &'a AtomicU64,
    hidden: &'a AtomicU64,
    huge: &'a AtomicU64,
    entries: &'a [AtomicU64],
    first: Gfn,
    index: usize,
    order: Order,
}

impl RegionGuard<'_> {
    pub(in super::super) fn index(&self) -> usize {
        self.index
    }

    /// Whether no page of the region was ever touched. It is not borrowed.
    pub(in super::super) fn is_untouched(&self) -> bool {
        self.state.touched == 0 && self.huge().is_none()
    }

    /// Whether it has no entries because it is borrowed: then it must be adopted before anything else is done
    /// to it.
    #[inline]
    pub(in super::super) fn is_borrowed(&self) -> bool {
        self.borrowed.load(Ordering::Acquire) & self.slot_of_group() != 0
    }

    /// Whether vCPUs see nothing of it: it is borrowed, and was backed when it was.
    pub(in super::super) fn is_hidden(&self) -> bool {
        self.hidden.load(Ordering::Acquire) & self.slot_of_group() != 0
    }

    #[inline]
    fn slot_of_group(&self) -> Slots {
        1 << (self.index % GROUP)
    }

    /// Notes that it is not borrowed, after its entries were published.
    ///
    /// Release pairs with the acquire in [`Table::is_borrowed`].
    pub(in super::super) fn own(&mut self) {
        take_out(self.borrowed, self.slot_of_group());
    }

    /// Notes that it is not hidden any more: vCPUs see what its entries say.
    pub(super) fn show(&mut self) {
        take_out(self.hidden, self.slot_of_group());
    }

    /// Publishes what a snapshot's region says, whose frames were counted once more for this: a huge entry,
    /// or a small one for each page that has a frame.
    pub(in super::super) fn adopt_huge(&mut self, head: Pfn) {
        self.set_huge(Entry::huge_read_only(head));
    }

    /// As [`RegionGuard::adopt_huge`], of one page.
    pub(in super::super) fn adopt_page(&mut self, gfn: Gfn, pfn: Pfn) {
        self.set(gfn, Entry::read_only(pfn));
    }

    pub(in super::super) fn first(&self) -> Gfn {
        self.first
    }

    /// How many pages it has.
    pub(in super::super) fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Whether a huge entry could map it: the last one may be too short.
    pub(in super::super) fn is_full(&self) -> bool {
        self.len() == self.order.pages()
    }

    /// The pages of the region, in order.
    pub(in super::super) fn pages(&self) -> impl Iterator<Item = Gfn> + use<> {
        let first = self.first.0;
        (first..first + self.entries.len() as u64).map(Gfn)
    }

    /// How many chunks it has.
    pub(in super::super) fn chunks(&self) -> usize {
        self.len().div_ceil(self.order.chunk().pages()) as usize
    }

    /// Which of them a page is in.
    pub(in super::super) fn chunk_of(&self, gfn: Gfn) -> usize {
        self.order.chunk().index(gfn.0 - self.first.0)
    }

    /// The pages of a chunk, in order.
    pub(in super::super) fn pages_of(&self, chunk: usize) -> impl Iterator<Item = Gfn> + use<> {
        let each = self.order.chunk().pages();
        let first = self.first.0 + chunk as u64 * each;
        let end = self.first.0 + self.len();
        (first..end.min(first + each)).map(Gfn)
    }

    /// The chunks that have pages of a range which is not empty. None if the region has no page of it.
    pub(super) fn chunks_within(&self, pages: &RangeInclusive<Gfn>) -> Range<usize> {
        let first = self.first.max(*pages.start());
        let last = Gfn(self.first.0 + self.len() - 1).min(*pages.end());
        if first > last {
            return 0..0;
        }
        self.chunk_of(first)..self.chunk_of(last) + 1
    }

    /// The pages of a chunk that are in a range, in order.
    pub(super) fn pages_of_within(
        &self,
        chunk: usize,
        pages: &RangeInclusive<Gfn>,
    ) -> impl Iterator<Item = Gfn> + use<> {
        let each = self.order.chunk().pages();
        let first = self.first.0 + chunk as u64 * each;
        let end = (self.first.0 + self.len()).min(first + each);
        (first.max(pages.start().0)..end.min(pages.end().0 + 1)).map(Gfn)
    }

    /// Whether a chunk may have changed since the last fork.
    pub(super) fn is_open(&self, chunk: usize) -> bool {
        !matches!(self.state.kept.get(chunk), Some(Some(_)))
    }

    /// The chunks of a region that has changed, but for those that have not. None of a region that a huge
    /// entry maps.
    pub(in super::super) fn open_chunks(&self) -> impl Iterator<Item = usize> + use<'_> {
        let is_open = |&chunk: &usize| self.is_open(chunk);
        let chunks = if self.huge().is_some() {
            0
        } else {
            self.chunks()
        };
        (0..chunks).filter(is_open)
    }

    /// Their pages, in order.
    pub(in super::super) fn open_pages(&self) -> impl Iterator<Item = Gfn> + use<'_> {
        self.open_chunks().flat_map(|chunk| self.pages_of(chunk))
    }

    /// The entry of a page; of a huge entry, what it says of the page. The region is not borrowed.
    pub(in super::super) fn get(&self, gfn: Gfn) -> Entry {
        // Not where it would be a step more of each race.
        #[cfg(not(any(loom, shuttle)))]
        debug_assert!(!self.is_borrowed(), "{gfn:?} has no entry yet");
        self.entry(gfn)
    }

    fn entry(&self, gfn: Gfn) -> Entry {
        match self.huge() {
            Some(huge) => huge.page(gfn.0 - self.first.0),
            // Not read: that would put memory behind it, which most regions never need.
            None if self.state.touched == 0 => Entry::UNTOUCHED,
            // The lock orders this against every store.
            None => Entry::of_word(self.slot(gfn).load(Ordering::Relaxed)),
        }
    }

    /// The huge entry, if there is one: its frame is the first of the folio.
    pub(in super::super) fn huge(&self) -> Option<Entry> {
        if !self.is_full() {
            return None;
        }
        let huge = Entry::of_word(self.huge.load(Ordering::Relaxed));
        huge.is_present().then_some(huge)
    }

    /// Publishes a small entry. Only [`Mapped`](super::Mapped) may: it has the MMU show the same.
    ///
    /// Release pairs with the acquire in [`Table::peek`]. It is also the store that a pin's re-read looks
    /// for: it comes before the old frame's mapping is given back (`FrameTable::update`, second partner).
    pub(super) fn set(&mut self, gfn: Gfn, entry: Entry) {
        debug_assert!(self.huge().is_none() && !entry.is_huge());
        let before = self.entry(gfn);
        self.slot(gfn).store(entry.word(), Ordering::Release);
        self.state.touched = self.state.touched + usize::from(entry != Entry::UNTOUCHED)
            - usize::from(before != Entry::UNTOUCHED);
    }

    /// Publishes a huge entry, in place of another or of the small ones.
    pub(super) fn set_huge(&mut self, entry: Entry) {
        debug_assert!(entry.is_huge() && self.is_full());
        self.huge.store(entry.word(), Ordering::Release);
    }

    /// Publishes small entries that say what the huge entry says, in its place.
    pub(in super::super) fn set_small(&mut self) {
        let Some(huge) = self.huge() else { return };
        for (index, slot) in (0..).zip(self.entries) {
            slot.store(huge.page(index).small().word(), Ordering::Release);
        }
        self.state.touched = self.entries.len();
        // After them: who finds no huge entry finds these.
        self.huge.store(Entry::UNTOUCHED.word(), Ordering::Release);
    }

    /// Publishes the huge entry that says what the small ones say, in their place: all are writable, and in
    /// the folio at `head`.
    pub(in super::super) fn set_joined(&mut self, head: Pfn) {
        debug_assert!(
            self.pages()
                .zip(head.0..)
                .all(|(gfn, pfn)| self.get(gfn) == Entry::writable(Pfn(pfn)))
        );
        self.set_huge(Entry::huge_writable(head));
    }

    /// Notes that a page has changed.
    pub(in super::super) fn mark(&mut self, gfn: Gfn) {
        self.set(gfn, self.get(gfn).dirtied());
    }

    /// Forgets that a page has changed, which vCPUs may not write.
    pub(in super::super) fn unmark(&mut self, gfn: Gfn) {
        debug_assert!(!self.get(gfn).is_writable());
        self.set(gfn, self.get(gfn).cleaned());
    }

    /// Takes the small entries away, and hands over those that are present.
    fn clear_small(&mut self, mut give_back: impl FnMut(Entry)) {
        if self.is_untouched() {
            return;
        }
        for slot in self.entries {
            let entry = Entry::of_word(slot.load(Ordering::Relaxed));
            slot.store(Entry::UNTOUCHED.word(), Ordering::Release);
            if entry.is_present() {
                give_back(entry);
            }
        }
        self.state.touched = 0;
    }

    fn slot(&self, gfn: Gfn) -> &AtomicU64 {
        &self.entries[(gfn.0 - self.first.0) as usize]
    }
}

/// Takes a region out of those that `slots` says of its group.
fn take_out(slots: &AtomicU64, slot: Slots) {
    let mut seen = slots.load(Ordering::Relaxed);
    // Its neighbours may be taken out, too.
    while let Err(now) =
        slots.compare_exchange_weak(seen, seen & !slot, Ordering::AcqRel, Ordering::Relaxed)
    {
        seen = now;
    }
}
