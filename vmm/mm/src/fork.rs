//! Fork: a frozen copy of an address space that shares its frames (PROTOCOL.md T10 to T12, 4.1, 4.2, 4.5).
//!
//! Two passes, each of which leaves a legal state wherever it stops:
//! 1. **Write-protect.** Every writable page that may be shared becomes read-only in the MMU, then in its
//!    entry. The bit stays: read-only and exclusive is a normal state, and a fork that fails here costs
//!    the guest a few faults that copy nothing.
//! 2. **Share.** For every page that is read-only now: clear the bit and add the child's mapping, in one
//!    step. A page that is writable still (a device holds it), or whose frame refuses (it was pinned since),
//!    is copied for the child at once, and the parent's entry is not touched.
//!
//! Only what has changed since the last fork is looked at (`lineage.rs`): the rest is possibly shared
//! already, and the child has it in common with the last one. A region that a huge entry maps is shared as
//! one; if a device holds pages of it, the entry is split first, and just those pages are copied. (The kernel
//! copies all 512: it counts pins by folio.)
//!
//! Protecting before sharing is what J. Horn proposed for Linux in June 2025: a writer that was not
//! stopped cannot tear the child's pages, since no frame is shared while anybody may write it.

use std::sync::Arc;

use super::addr::{Gfn, Pfn};
use super::backed::BringError;
use super::commit::AllocError;
use super::frozen::{Frozen, FrozenChunk, FrozenChunks, FrozenFrames, FrozenRegion};
use super::mapped::table::RegionGuard;
use super::mmu::MmuError;
use super::policy::CowPolicy;
use super::predictor::{Candidate, Leaf};
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;
use super::stats::Counters;
use super::sync::lock;

/// Huge entries and chunks that [`AddressSpace::prepare_fork`] forks at once, or a few more, while faults in
/// their regions wait.
const PREPARE_AT_ONCE: usize = 16;

/// Frames, and those they are to be copied to.
pub(super) type Copies = Vec<(Pfn, Pfn)>;

/// What a snapshot has of a region: shared, or copied where a device holds it.
struct ForkedRegion {
    /// Nothing of a region in which there is nothing.
    frozen: Option<Arc<FrozenRegion>>,
    /// If the next snapshot cannot have the same: those of its chunks that it can have.
    kept: Option<FrozenChunks>,
}

/// Why a fork failed. The parent is whole and runs on; nothing was leaked.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// No frame for the copy of a pinned page.
    #[error("cannot copy {gfn:?}, which a device holds")]
    EagerCopy {
        /// The pinned page.
        gfn: Gfn,
        /// Why.
        source: AllocError,
    },
    /// The window could not be write-protected.
    #[error("cannot write-protect guest memory")]
    WriteProtect(#[source] MmuError),
    /// The child's own MMU could not be set up.
    #[error("cannot map the clone's memory")]
    Map(#[source] MmuError),
    /// Of a clone: memory that cannot be shared cannot be had either.
    #[error(transparent)]
    Bring(#[from] BringError),
}

impl<P: CowPolicy> AddressSpace<P> {
    /// Forks the address space into a snapshot.
    ///
    /// Pins may be taken meanwhile: each page is either shared and not pinned, or pinned and copied. For
    /// the result to be the state at *one* instant the caller has parked the vCPUs and stopped the devices.
    ///
    /// # Errors
    /// If there is no memory for the copy of a pinned page, or the MMU refuses.
    pub fn fork(&self) -> Result<Arc<Frozen>, ForkError> {
        let _alone = self.mapped.enter_alone().map_err(ForkError::WriteProtect)?;
        let mut changed = lock(&self.lineage).changed.clone();
        // So that neighbours are protected with one call.
        changed.sort_unstable();
        let mut regions: Vec<_> = changed.iter().map(|&i| self.mapped.table.lock(i)).collect();
        let mut written = Vec::new();
        // If it fails, they are changed still, and what was shared so far goes back.
        let shared = self.share_regions(&mut regions, &mut written)?;
        let mut lineage = lock(&self.lineage);
        lineage.forks += 1;
        let fork = lineage.forks;
        let mut table = lineage.unchanged.clone();
        for (region, shared) in regions.iter().zip(&shared) {
            table.replace(region.index(), shared.frozen.clone());
        }
        lineage.unchanged = table.clone();
        lineage.changed.clear();
        for (region, shared) in regions.iter_mut().zip(shared) {
            region.state.history.forked(fork);
            if let Some(kept) = shared.kept {
                let index = region.index();
                lineage.unchanged.replace(index, None);
                lineage.changed.push(index);
                region.state.history.remains_changed(index, fork);
                region.state.kept = kept;
                shared.frozen.iter().for_each(|f| region.remember(f));
            } else {
                region.close();
            }
        }
        drop(lineage);
        self.predictor.forked(fork, written);
        Ok(Arc::new(Frozen {
            pool: Arc::clone(&self.pool),
            table,
            pages: self.mapped.table.pages(),
            account: self.account.clone(),
        }))
    }

    /// Does what the next [`AddressSpace::fork`] would have to do, while the guest runs: forks what has
    /// changed, for nobody. What was shared so is what that fork takes over if it does not change again; and
    /// if it does, the guest finds itself alone and copies nothing (PROTOCOL.md T4), but has had a fault
    /// more. So it is done where it pays (`predictor/`), and again, for what the guest has written meanwhile,
    /// as long as that becomes less. Of what changes before every fork, page by page, so much is left to it
    /// as does not make it long ([`AddressSpace::leave_to_fork`]): write-protecting a page costs a guest that
    /// runs several times what it costs one that stands still.
    ///
    /// Has memory ready for the copies of pinned pages, too.
    ///
    /// It is never needed: what it cannot do is left to the fork.
    pub fn prepare_fork(&self) {
        self.pool.provide();
        let mut before = usize::MAX;
        loop {
            let (mut changed, fork) = {
                let lineage = lock(&self.lineage);
                (lineage.changed.clone(), lineage.forks + 1)
            };
            changed.sort_unstable();
            let regions = changed.iter().map(|&index| self.mapped.table.lock(index));
            let mut left = regions
                .filter(|region| self.predictor.is_left_to_fork(&candidate(region), fork))
                .map(|region| region.open_chunks().count())
                .sum();
            let (mut rest, mut prepared) = (changed.as_slice(), 0);
            while !rest.is_empty() {
                let (looked_at, done) = self.prepare_some(rest, &mut left);
                rest = &rest[looked_at..];
                prepared += done;
            }
            if prepared < PREPARE_AT_ONCE || prepared > before / 2 {
                break;
            }
            before = prepared;
        }
    }

    /// Looks at the first of `regions`, in order, and forks those for which it pays, for nobody. Says how
    /// many it has looked at and how many it has forked. Faults in them wait meanwhile. `left` are the chunks
    /// of regions that change before every fork and are left to it.
    fn prepare_some(&self, regions: &[usize], left: &mut usize) -> (usize, usize) {
        let Ok(_no_fork) = self.mapped.enter() else {
            return (regions.len(), 0);
        };
        let fork = lock(&self.lineage).forks + 1;
        let (mut looked_at, mut pieces) = (0, 0);
        let mut chosen = Vec::new();
        for &index in regions {
            let region = self.mapped.table.lock(index);
            looked_at += 1;
            let chunks = region.open_chunks().count();
            if region.state.is_changed
                && region.is_full()
                && self.predictor.prepares(&candidate(&region), fork, *left)
                && self.is_unheld(&region)
            {
                if self.predictor.is_left_to_fork(&candidate(&region), fork) {
                    *left = left.saturating_sub(chunks);
                }
                pieces += chunks.max(1);
                chosen.push(region);
            }
            if pieces >= PREPARE_AT_ONCE {
                break;
            }
        }
        let (mut done, mut written) = (Vec::new(), Vec::new());
        // What lies between two of them is writable, and is to stay so.
        for run in chosen.chunk_by_mut(|a, b| a.index() + 1 == b.index()) {
            // What fails here is left to the fork.
            let Ok(shared) = self.share_regions(run, &mut written) else {
                continue;
            };
            for (region, shared) in run.iter_mut().zip(shared) {
                // Held since, if it was kept.
                if shared.kept.is_none() {
                    region.close();
                    region.state.history.prepared(fork);
                    done.push((region.index(), shared.frozen));
                }
            }
        }
        let mut lineage = lock(&self.lineage);
        let is_done = |index: &usize| done.binary_search_by_key(index, |&(done, _)| done).is_ok();
        lineage.changed.retain(|index| !is_done(index));
        let prepared = done.len();
        for (index, frozen) in done {
            lineage.unchanged.replace(index, frozen);
        }
        drop(lineage);
        self.predictor.prepared(&written);
        (looked_at, prepared)
    }

    /// Whether nobody holds what has changed in a region. What is pinned would be copied, for nobody; and
    /// what is written through a hold would be lost before the fork.
    fn is_unheld(&self, region: &RegionGuard<'_>) -> bool {
        let is_idle = |gfn| self.pool.state(region.get(gfn).pfn()).is_idle();
        match region.huge() {
            Some(huge) => self.pool.frames().is_mapped_huge_only(huge.pfn(), 1),
            None => region.open_pages().all(is_idle),
        }
    }

    /// Both passes, for regions that have changed, in order: all that are writable, or neighbours. What was
    /// writable is added to `written`, in order, if anybody wants to know.
    fn share_regions(
        &self,
        regions: &mut [RegionGuard<'_>],
        written: &mut Vec<Leaf>,
    ) -> Result<Vec<ForkedRegion>, ForkError> {
        if is_left_out(Safeguard::ProtectedBeforeShared) {
            let shared = self.share_all(regions)?;
            self.write_protect(regions, written)?;
            return Ok(shared);
        }
        self.write_protect(regions, written)?;
        self.share_all(regions)
    }

    /// Pass 2.
    fn share_all(&self, regions: &mut [RegionGuard<'_>]) -> Result<Vec<ForkedRegion>, ForkError> {
        let mut copies = Copies::new();
        let shared: Result<_, _> = regions
            .iter_mut()
            .map(|region| self.share_region(region, &mut copies))
            .collect();
        // All at once: it may take more than one CPU.
        shared.inspect(|_| self.pool.memory().copy_all(&copies))
    }

    /// Shares a region, or copies what of it a device holds. What is to be copied is added to `copies`.
    fn share_region(
        &self,
        region: &mut RegionGuard<'_>,
        copies: &mut Copies,
    ) -> Result<ForkedRegion, ForkError> {
        let first = region.first();
        // Sharing what is writable still.
        let too_early = is_left_out(Safeguard::ProtectedBeforeShared);
        let frozen = |frames| Some(Arc::new(FrozenRegion::new(&self.pool, first, frames)));
        if let Some(huge) = region.huge() {
            let head = huge.pfn();
            if (!huge.is_writable() || too_early)
                && self
                    .pool
                    .frames()
                    .try_share_huge(head, &self.policy)
                    .is_ok()
            {
                return Ok(ForkedRegion {
                    frozen: frozen(FrozenFrames::Huge(head)),
                    kept: None,
                });
            }
            self.split(region);
        }
        let mut chunks: FrozenChunks = vec![None; region.chunks()].into();
        let mut copied = Vec::new();
        for (index, to) in chunks.iter_mut().enumerate() {
            *to = match region.state.kept.get(index) {
                Some(Some(kept)) => Some(Arc::clone(kept)),
                _ => {
                    let before = copies.len();
                    let chunk = self.share_chunk(region, index, copies)?;
                    if copies.len() > before {
                        copied.push(index);
                    }
                    chunk
                }
            };
        }
        let is_empty = chunks.iter().all(Option::is_none);
        // A region shorter than a folio is forked anew each time: the counts of a small space are then what
        // its entries say.
        let kept = if !region.is_full() {
            Some(FrozenChunks::default())
        } else if copied.is_empty() {
            None
        } else {
            let mut kept = chunks.clone();
            copied.into_iter().for_each(|index| kept[index] = None);
            Some(kept)
        };
        Ok(ForkedRegion {
            frozen: frozen(FrozenFrames::Small(chunks)).filter(|_| !is_empty),
            kept,
        })
    }

    /// A new chunk of a region for a child, shared or copied page by page.
    fn share_chunk(
        &self,
        region: &RegionGuard<'_>,
        index: usize,
        copies: &mut Copies,
    ) -> Result<Option<Arc<FrozenChunk>>, ForkError> {
        let too_early = is_left_out(Safeguard::ProtectedBeforeShared);
        let mut failed = None;
        let frames = region.pages_of(index).map_while(|gfn| {
            let entry = region.get(gfn);
            let theirs = if !entry.is_present() {
                Ok(Pfn::ZERO)
            } else if entry.is_writable() && !too_early {
                self.copy_for_child(gfn, entry.pfn(), copies)
            } else {
                self.share_or_copy(gfn, entry.pfn(), copies)
            };
            theirs.map_err(|error| failed = Some(error)).ok()
        });
        // If it failed, this gives back what was shared.
        let chunk = FrozenChunk::new(&self.pool, frames);
        failed.map_or(Ok(chunk), Err)
    }

    /// One more mapping of `pfn` for another address space, or of a copy of it if it can't be shared.
    pub(super) fn share_or_copy(
        &self,
        gfn: Gfn,
        pfn: Pfn,
        copies: &mut Copies,
    ) -> Result<Pfn, ForkError> {
        match self.pool.frames().try_share(pfn, &self.policy) {
            Ok(()) => Ok(pfn),
            Err(_) => self.copy_for_child(gfn, pfn, copies),
        }
    }

    /// T11: a mapped frame for the child, to which `pfn` is to be copied.
    fn copy_for_child(&self, gfn: Gfn, pfn: Pfn, copies: &mut Copies) -> Result<Pfn, ForkError> {
        let fresh = self
            .pool
            .allocate(&self.account)
            .map_err(|source| ForkError::EagerCopy { gfn, source })?;
        copies.push((pfn, fresh.pfn()));
        Counters::add(&self.counters.mine().eager_copied);
        Ok(fresh.into_mapped())
    }

    /// Pass 1: protects runs of pages with one call each. A run ends where a page must stay writable, so
    /// pages that are read-only already, or untouched, do not break it.
    ///
    /// Adds to `written` what was writable, in order.
    fn write_protect(
        &self,
        regions: &mut [RegionGuard<'_>],
        written: &mut Vec<Leaf>,
    ) -> Result<(), ForkError> {
        // The first page of a run and the last, and which region the first is in.
        let mut run: Option<(usize, Gfn, Gfn)> = None;
        for index in 0..regions.len() {
            let region = &mut regions[index];
            if let Some(huge) = region.huge() {
                let (first, last) = (region.first(), Gfn(region.first().0 + region.len() - 1));
                if !huge.is_writable() {
                    continue;
                }
                if self.pool.frames().may_share_huge(huge.pfn(), &self.policy) {
                    run = Some(run.map_or((index, first, last), |(i, f, _)| (i, f, last)));
                    continue;
                }
                self.split(region);
            }
            let writable = |&gfn: &Gfn| region.get(gfn).is_writable();
            let writable: Vec<Gfn> = region.open_pages().filter(writable).collect();
            for gfn in writable {
                let pfn = regions[index].get(gfn).pfn();
                if self.policy.may_share(self.pool.state(pfn)) {
                    run = Some(run.map_or((index, gfn, gfn), |(i, f, _)| (i, f, gfn)));
                } else if let Some((from, first, last)) = run.take() {
                    self.protect_run(&mut regions[from..=index], first, last, written)?;
                }
            }
        }
        run.map_or(Ok(()), |(from, first, last)| {
            self.protect_run(&mut regions[from..], first, last, written)
        })
    }

    /// Protects what `regions` have of a run of pages.
    fn protect_run(
        &self,
        regions: &mut [RegionGuard<'_>],
        first: Gfn,
        last: Gfn,
        written: &mut Vec<Leaf>,
    ) -> Result<(), ForkError> {
        let notes_writes = self.predictor.notes_writes();
        let mut note = |first, is_huge| {
            if notes_writes {
                written.push(Leaf { first, is_huge });
            }
        };
        self.mapped
            .write_protect(regions, first..=last, |gfn, entry| {
                note(gfn, entry.is_huge());
            })
            .map_err(ForkError::WriteProtect)
    }
}

/// What the predictor is asked about a region that has changed.
fn candidate<'a>(region: &'a RegionGuard<'_>) -> Candidate<'a> {
    Candidate {
        history: &region.state.history,
        index: region.index(),
        is_huge: region.huge().is_some(),
    }
}
