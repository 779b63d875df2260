//! What must be done before a page changes that the next fork would have taken over from the last one.

use std::sync::Weak;

use super::addr::Gfn;
use super::frozen::FrozenChunks;
use super::mapped::table::RegionGuard;
use super::policy::CowPolicy;
use super::space::AddressSpace;
use super::sync::lock;

impl<P: CowPolicy> AddressSpace<P> {
    /// To be called before a page changes: its frame, what is in it, or who may write it.
    ///
    /// If no snapshot has use for what the last one had here, that one's mappings go, so that the space finds
    /// itself alone.
    pub(super) fn open(&self, region: &mut RegionGuard<'_>, gfn: Gfn) {
        self.open_region(region);
        let chunk = region.chunk_of(gfn);
        if let Some(kept) = region.state.kept.get_mut(chunk) {
            *kept = None;
        }
    }

    /// As [`AddressSpace::open`], for all pages of the region.
    pub(super) fn open_all(&self, region: &mut RegionGuard<'_>) {
        self.open_region(region);
        region.state.kept = FrozenChunks::default();
    }

    fn open_region(&self, region: &mut RegionGuard<'_>) {
        if region.state.is_changed {
            return;
        }
        region.state.is_changed = true;
        let index = region.index();
        let (frozen, forks) = {
            let mut lineage = lock(&self.lineage);
            lineage.changed.push(index);
            (lineage.unchanged.replace(index, None), lineage.forks)
        };
        region.state.history.changed(index, forks);
        if let Some(frozen) = frozen {
            region.state.kept = frozen.lock().chunks().cloned().unwrap_or_default();
            region.remember(&frozen);
            // Nobody else's: it goes here and now.
            drop(frozen);
        }
    }

    /// Keeps what the last snapshot has of a region and shows just as the region does, which was in small
    /// entries only since it changed: all but the chunk of page `gfn`, which is about to change or just has.
    pub(super) fn keep_chunks(&self, region: &mut RegionGuard<'_>, gfn: Gfn) {
        let Some(frozen) = region.state.sharers.last().and_then(Weak::upgrade) else {
            return;
        };
        let Some(mut chunks) = frozen.lock().chunks().cloned() else {
            return;
        };
        for (index, chunk) in chunks.iter_mut().enumerate() {
            let ours = region.pages_of(index).map(|gfn| region.get(gfn).pfn());
            if index == region.chunk_of(gfn) || chunk.as_ref().is_some_and(|c| !c.is_in(ours)) {
                *chunk = None;
            }
        }
        region.state.kept = chunks;
    }
}
