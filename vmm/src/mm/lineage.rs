//! What the next fork takes over from the last one.
//!
//! A region that nobody has changed since a fork is possibly shared, all of it, and some snapshot's region shows just what
//! it shows: the next snapshot gets the same one. So an address space keeps the table of its last snapshot, without the
//! regions that have changed since, and the list of those.

use std::sync::Arc;

use super::frozen::FrozenTable;
use super::policy::CowPolicy;
use super::space::AddressSpace;
use super::sync::lock;
use super::table::RegionGuard;

pub(super) struct Lineage {
    /// The regions of the last snapshot that show what the space still shows.
    pub(super) unchanged: FrozenTable,
    /// The others that were touched since.
    pub(super) changed: Vec<usize>,
    /// How many forks there were.
    pub(super) forks: u64,
}

impl Lineage {
    /// Of a space of so many regions that was never forked.
    pub(super) fn new(regions: usize) -> Self {
        Self {
            unchanged: FrozenTable::new(regions),
            changed: Vec::new(),
            forks: 0,
        }
    }
}

impl<P: CowPolicy> AddressSpace<P> {
    /// To be called before anything in a region changes: its frames, what is in them, or who may write them.
    ///
    /// If no snapshot has use for what the last one had here, that one's mappings go, so that the space finds itself alone.
    pub(super) fn open(&self, region: &mut RegionGuard<'_>) {
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
        region.state.breaks.begin(index, forks);
        region.state.sharers.retain(|s| s.strong_count() > 0);
        if let Some(frozen) = frozen {
            region.state.sharers.push(Arc::downgrade(&frozen));
            // Nobody else's: it goes here and now.
            drop(frozen);
        }
    }
}
