//! Clones: live address spaces made of a snapshot, whose frames they share (PROTOCOL.md T10).
//!
//! A clone is made while its siblings, and the space that was forked, write. It **borrows** the snapshot, 64
//! regions at a time: what is lent stays in its frames (`lent.rs`). All that is left to do is to map them, in
//! *runs*: pages that follow each other, in frames that do, with one call of the MMU, be they of one region
//! or of all of them. How long it takes depends on how many runs there are, and hardly on how much memory: no
//! region is looked at, until the clone does something with it, and *adopts* it (`adopt.rs`).
//!
//! A region whose pages are scattered over many runs, or over more than one where mappings are short, is
//! copied whole into a folio of the clone's own, which takes one mapping.
//!
//! What cannot be borrowed is adopted at once: under the lock of the snapshot's region each page's frame is
//! given one mapping more, so that from then on whoever writes it breaks; and what cannot be shared is
//! copied. That is the region at the end, if it is shorter than a folio, since what has been shared of that
//! is counted in entries; and all of it under a policy that would not share everything that is shared
//! already, as it would have to be asked about each page.
//!
//! What of the snapshot is backed (`backed.rs`) is hidden from the clone's vCPUs, and brought when they touch it; or at
//! once, if it cannot be borrowed.
//!
//! A clone that cannot be made leaves nothing behind.

use std::mem;
use std::sync::Arc;

use super::account::Account;
use super::addr::{Gfn, Pfn};
use super::adopt::Borrowed;
use super::backed::Toucher;
use super::entry::Entry;
use super::fork::{Copies, ForkError};
use super::frame_state::{FrameState, GETS, MAPS, PINS};
use super::frozen::{Frozen, FrozenChunks, FrozenRegion, FrozenTable};
use super::lent::{FAN_OUT, Lent, Loan, Run, each};
use super::mapped::table::{Stretch, StretchKind};
use super::mmu::Mmu;
use super::policy::CowPolicy;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;
use super::sync::lock;

/// A region in more runs of frames than this is copied. To map a run costs the host some 20 us where KVM is a
/// shadow MMU; to give a folio memory and copy 2 MiB to it about what 64 of them cost. And a process has
/// 65,530 mappings: a thousand regions with more of them than this would be all.
const SCATTERED: usize = 64;

impl<P: CowPolicy> AddressSpace<P> {
    /// A running clone of a snapshot: a live address space that shares the snapshot's frames. `mmu` shows
    /// zeros, read-only, everywhere; or nothing, if whoever made it has the rest show zeros afterwards: each
    /// page is mapped once at most. It has an account of its own, without a limit.
    ///
    /// # Errors
    /// If `mmu` refuses, or there is no memory for a page that cannot be shared. Nothing is left of the
    /// clone, nor of `mmu`.
    pub fn from_frozen(frozen: &Frozen, policy: P, mmu: Box<dyn Mmu>) -> Result<Self, ForkError> {
        let account = frozen.pool.open_account(None);
        Self::from_frozen_with_account(frozen, policy, mmu, account)
    }

    /// As [`AddressSpace::from_frozen`], with this account: pages that must be copied at once are charged to
    /// it already.
    ///
    /// # Errors
    /// As [`AddressSpace::from_frozen`].
    ///
    /// # Panics
    /// If the account is of another pool.
    pub fn from_frozen_with_account(
        frozen: &Frozen,
        policy: P,
        mmu: Box<dyn Mmu>,
        account: Account,
    ) -> Result<Self, ForkError> {
        let pool = Arc::clone(&frozen.pool);
        let mut clone = Self::without_home(pool, policy, mmu, frozen.pages(), account);
        // Until it changes something, its own forks are what the snapshot is: where all of it is shared.
        lock(&clone.lineage).unchanged = frozen.table.clone();
        let lent = clone.borrow(&frozen.table);
        let mut adoption = Adoption {
            clone: &clone,
            counted: Vec::new(),
            different: Vec::new(),
        };
        for (node, lent) in lent.iter().enumerate() {
            adoption.adopt_node(&frozen.table, node, lent.as_deref())?;
        }
        adoption.map_counted(Rest::Mapped)?;
        adoption.hide(&lent)?;
        let different = mem::take(&mut adoption.different);
        drop(adoption);
        for index in different {
            clone.open_all(&mut clone.mapped.table.lock(index));
        }
        Ok(clone)
    }

    /// Borrows what can be borrowed of a snapshot, by node.
    fn borrow(&mut self, snapshot: &FrozenTable) -> Vec<Option<Arc<Lent>>> {
        if !shares_what_is_shared(&self.policy) {
            return vec![None; snapshot.nodes()];
        }
        let table = &self.mapped.table;
        // A region that is too short is the last.
        let last = table.regions().saturating_sub(1);
        let (end, slot) = Loan::place(last);
        let is_short = table.pages_of_region(last).1 < self.pool.huge().pages();
        let lend = |node| {
            let mut slots = snapshot.slots(node);
            if node == end && is_short {
                slots &= !slot;
            }
            let lent = snapshot.lend(node, slots)?;
            table.borrow(node, slots);
            table.hide(node, lent.hidden & slots);
            Some(lent)
        };
        let lent: Vec<_> = (0..snapshot.nodes()).map(lend).collect();
        let loan = |lent: &Option<Arc<Lent>>| lent.as_ref().map(|lent| Arc::clone(&lent.loan));
        if lent.iter().any(Option::is_some) {
            self.borrowed = Borrowed(lent.iter().map(loan).collect());
        }
        lent
    }
}

/// Whether a policy has everything shared that is shared already, whoever holds it.
fn shares_what_is_shared(policy: &impl CowPolicy) -> bool {
    let shared = FrameState::FREE.plus(&MAPS);
    let held = shared.and_then(|s| s.plus(&GETS)?.plus(&PINS));
    held.is_some_and(|held| policy.may_share(held))
}

/// A clone that is being made.
struct Adoption<'a, P: CowPolicy> {
    clone: &'a AddressSpace<P>,
    /// What has a mapping more on the clone's behalf, or is borrowed, and is not mapped yet: in order.
    counted: Vec<Stretch>,
    /// The regions that the snapshot does not have in common with the clone.
    different: Vec<usize>,
}

/// What becomes of the last run, which may go on in the next region.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rest {
    Waits,
    Mapped,
}

impl<P: CowPolicy> Adoption<'_, P> {
    /// Takes what a node of the snapshot has: as it is `lent`, or region by region.
    fn adopt_node(
        &mut self,
        snapshot: &FrozenTable,
        node: usize,
        lent: Option<&Lent>,
    ) -> Result<(), ForkError> {
        if let Some(lent) = lent {
            for &(slot, pieces) in &lent.uneven {
                if self.is_scattered(pieces) {
                    let index = node * FAN_OUT + slot;
                    let mut region = self.clone.mapped.table.lock(index);
                    self.clone.give_back(&mut region);
                }
            }
            self.count_runs(node, lent);
            self.map_counted(Rest::Waits)?;
        }
        let borrowed = self.clone.mapped.table.borrowed(node);
        for slot in each(snapshot.slots(node) & !borrowed) {
            let index = node * FAN_OUT + slot;
            if let Some(from) = snapshot.get(index) {
                self.adopt(index, from)?;
            }
        }
        Ok(())
    }

    /// Notes the runs that are lent of a node, where it is borrowed.
    fn count_runs(&mut self, node: usize, lent: &Lent) {
        let table = &self.clone.mapped.table;
        let is_all = lent
            .uneven
            .iter()
            .all(|&(slot, _)| table.is_borrowed(node * FAN_OUT + slot));
        for &Run {
            first,
            frame,
            count,
        } in &lent.runs
        {
            if is_all {
                self.count(first, frame, count, StretchKind::Borrowed);
                continue;
            }
            let mut done = 0;
            while done < count {
                let at = Gfn(first.0 + done);
                let part = table.rest_of_region(at).min(count - done);
                if table.is_borrowed(table.region_of(at)) {
                    self.count(at, Pfn(frame.0 + done), part, StretchKind::Borrowed);
                }
                done += part;
            }
        }
    }

    /// Hides what is backed of what is `lent`, by node: neighbours with one call.
    fn hide(&self, lent: &[Option<Arc<Lent>>]) -> Result<(), ForkError> {
        let table = &self.clone.mapped.table;
        let nodes = lent.iter().enumerate();
        let hidden = nodes.flat_map(|(node, lent)| {
            let slots = lent.as_ref().map_or(0, |lent| lent.hidden);
            each(slots & table.borrowed(node)).map(move |slot| node * FAN_OUT + slot)
        });
        let hidden: Vec<usize> = hidden.collect();
        for run in hidden.chunk_by(|a, b| a + 1 == *b) {
            let (first, _) = table.pages_of_region(run[0]);
            let (last, count) = table.pages_of_region(run[run.len() - 1]);
            let hidden = self
                .clone
                .mapped
                .hide_first(first, last.0 + count - first.0);
            hidden.map_err(ForkError::Map)?;
        }
        Ok(())
    }

    /// Whether a region in so many runs of frames is to be copied.
    fn is_scattered(&self, runs: usize) -> bool {
        let most = if self.clone.mapped.is_crowded() {
            1
        } else {
            SCATTERED
        };
        runs > most
    }

    /// Adopts a region of the snapshot.
    fn adopt(&mut self, index: usize, from: &FrozenRegion) -> Result<(), ForkError> {
        let clone = self.clone;
        let (first, count) = clone.mapped.table.pages_of_region(index);
        // A break must not move the snapshot between the look and the share: the frame would be the writer's.
        let theirs = from.lock_brought(Toucher::Reader)?;
        let is_shared = if let Some(head) = theirs.huge() {
            let _locked = (!is_left_out(Safeguard::CloneUnderLock)).then_some(theirs);
            let frames = clone.pool.frames();
            if frames.try_share_huge(head, &clone.policy).is_ok() {
                self.count(first, head, count, StretchKind::Huge);
                true
            } else {
                frames.mark_by_page(head);
                let frames: Vec<Pfn> = head.run(count).collect();
                self.adopt_pages(first, &frames)?
            }
        } else {
            let chunks = theirs.chunks().cloned().unwrap_or_default();
            drop(theirs);
            !self.copy_scattered(index, &chunks)? && self.adopt_chunks(first, &chunks)?
        };
        if !is_shared || count < clone.pool.huge().pages() {
            self.different.push(index);
        }
        self.map_counted(Rest::Waits)
    }

    /// Adopts what is in the chunks of the region that begins at page `first`. Says whether all could be
    /// shared.
    fn adopt_chunks(&mut self, first: Gfn, chunks: &FrozenChunks) -> Result<bool, ForkError> {
        let each = self.clone.pool.huge().chunk().pages();
        let mut is_shared = true;
        for (chunk, first) in chunks.iter().zip((first.0..).step_by(each as usize)) {
            let Some(chunk) = chunk else { continue };
            let mut adopt = |frames: &[Pfn]| self.adopt_pages(Gfn(first), frames);
            is_shared &= if is_left_out(Safeguard::CloneUnderLock) {
                let frames = chunk.with_frames(<[Pfn]>::to_vec);
                adopt(&frames)
            } else {
                chunk.with_frames(adopt)
            }?;
        }
        Ok(is_shared)
    }

    /// Copies a region into a folio of the clone's own, if its pages are scattered and there is a folio. Says
    /// whether it has.
    fn copy_scattered(&self, index: usize, chunks: &FrozenChunks) -> Result<bool, ForkError> {
        let clone = self.clone;
        if !self.is_scattered(self.runs_of(chunks)) {
            return Ok(false);
        }
        let mut region = clone.mapped.table.lock(index);
        let folio = if region.is_full() {
            // Without memory the pages are shared after all.
            clone.allocate_region(&mut region).ok().flatten()
        } else {
            None
        };
        let Some(folio) = folio else {
            return Ok(false);
        };
        let each = clone.pool.huge().chunk().pages();
        for (chunk, head) in chunks.iter().zip((folio.head().0..).step_by(each as usize)) {
            match chunk {
                Some(chunk) => chunk.with_frames(|frames| self.copy_pages(frames, Pfn(head))),
                None => self.copy_pages(&vec![Pfn::ZERO; each as usize], Pfn(head)),
            }
        }
        let to = Entry::huge_read_only(folio.head());
        let (first, count) = (region.first(), region.len());
        let mapped = clone.mapped.map(&mut region, first, count, to, folio);
        mapped.map(|()| true).map_err(ForkError::Map)
    }

    /// In how many runs of frames the pages are that chunks have, just now.
    fn runs_of(&self, chunks: &FrozenChunks) -> usize {
        let each = self.clone.pool.huge().chunk().pages() as usize;
        let (mut runs, mut next) = (0, Pfn::ZERO);
        let mut look = |frames: &[Pfn]| {
            for &pfn in &frames[..each] {
                runs += usize::from(pfn != Pfn::ZERO && pfn != next);
                next = match pfn {
                    Pfn::ZERO => Pfn::ZERO,
                    Pfn(n) => Pfn(n + 1),
                };
            }
        };
        for chunk in chunks {
            match chunk {
                Some(chunk) => chunk.with_frames(&mut look),
                None => look(&vec![Pfn::ZERO; each]),
            }
        }
        runs
    }

    /// Copies pages to the frames from `to` on.
    fn copy_pages(&self, frames: &[Pfn], to: Pfn) {
        let each = self.clone.pool.huge().chunk().pages();
        for (from, to) in frames.iter().zip(to.run(each)) {
            match *from {
                Pfn::ZERO => self.clone.pool.memory().zero(to),
                from => self.clone.copy(from, to),
            }
        }
    }

    /// Adopts pages of one region, whose frames are these, [`Pfn::ZERO`] where nothing was ever touched. Says
    /// whether all could be shared.
    fn adopt_pages(&mut self, first: Gfn, frames: &[Pfn]) -> Result<bool, ForkError> {
        let mut copies = Copies::new();
        for (gfn, &pfn) in (first.0..).map(Gfn).zip(frames) {
            if pfn != Pfn::ZERO {
                let ours = self.clone.share_or_copy(gfn, pfn, &mut copies)?;
                self.count(gfn, ours, 1, StretchKind::Small);
            }
        }
        self.clone.pool.memory().copy_all(&copies);
        Ok(copies.is_empty())
    }

    /// Notes that `count` pages from `first` on, in the frames from `frame` on, have a mapping more, or are
    /// borrowed.
    fn count(&mut self, first: Gfn, frame: Pfn, count: u64, kind: StretchKind) {
        let next = Stretch {
            first,
            frame,
            count,
            kind,
        };
        let table = &self.clone.mapped.table;
        match self.counted.last_mut() {
            Some(last)
                if last.is_followed_by(&next)
                    && last.kind == kind
                    && (kind != StretchKind::Small
                        || table.region_of(last.first) == table.region_of(first)) =>
            {
                last.count += count;
            }
            _ => self.counted.push(next),
        }
    }

    /// Maps what is counted, run by run.
    fn map_counted(&mut self, rest: Rest) -> Result<(), ForkError> {
        if rest == Rest::Waits && self.counted.len() <= 1 {
            return Ok(());
        }
        let runs = self.counted.chunk_by(Stretch::is_followed_by);
        let mut ends: Vec<usize> = runs.map(<[Stretch]>::len).collect();
        if rest == Rest::Waits {
            ends.pop();
        }
        let mut mapped = 0;
        let mut result = Ok(());
        for len in ends {
            let run = &self.counted[mapped..mapped + len];
            result = self.clone.mapped.map_first(run).map_err(ForkError::Map);
            if result.is_err() {
                break;
            }
            mapped += len;
        }
        self.counted.drain(..mapped);
        result
    }
}

impl<P: CowPolicy> Drop for Adoption<'_, P> {
    /// Gives back what was counted for nothing. What is mapped or borrowed goes with the clone.
    fn drop(&mut self) {
        let pool = &self.clone.pool;
        for stretch in &self.counted {
            let frames = stretch.frame.run(stretch.count);
            match stretch.kind {
                StretchKind::Borrowed => {}
                StretchKind::Small => frames.for_each(|pfn| pool.unmap(pfn)),
                StretchKind::Huge => {
                    let pages = pool.huge().pages();
                    let heads = frames.step_by(pages as usize);
                    heads.for_each(|head| pool.unmap_huge(head));
                }
            }
        }
    }
}
