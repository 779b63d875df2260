//! What the next fork takes over from the last one.
//!
//! A region that nobody has changed since a fork is possibly shared, all of it, and some snapshot's region
//! shows just what it shows: the next snapshot gets the same one. So an address space keeps the table of its
//! last snapshot, without the regions that have changed since, and the list of those. Of a region that is
//! mapped page by page and has changed in some places it keeps the chunks that have not: the next snapshot's
//! region is made of these and of new ones.
//!
//! What is kept is *closed*: read-only, not exclusive, and counted once more than anybody needs, so that it
//! must be *opened* (`open.rs`) before anything else is done to it.

use std::sync::Arc;

use super::frozen::{FrozenChunks, FrozenRegion, FrozenTable};
use super::mapped::table::RegionGuard;

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

impl RegionGuard<'_> {
    /// Notes that a snapshot's region, which is kept for the next fork, shows all that it shows.
    pub(super) fn close(&mut self) {
        self.state.is_changed = false;
        self.state.kept = FrozenChunks::default();
    }

    /// Notes that a snapshot's region may share frames with this one.
    pub(super) fn remember(&mut self, frozen: &Arc<FrozenRegion>) {
        let sharers = &mut self.state.sharers;
        sharers.retain(|s| s.strong_count() > 0);
        sharers.push(Arc::downgrade(frozen));
    }
}
