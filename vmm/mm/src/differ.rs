//! Where two snapshots differ.
//!
//! What they have in common of their trees they have in the same frames, so the looks are at what changed
//! between the two, and not at all of memory.

use std::ops::Range;
use std::sync::Arc;

use super::addr::{Gfn, Pfn};
use super::frozen::{Frozen, FrozenRegion};

impl Frozen {
    /// The pages in `pages` that this and `other`, a snapshot of as many pages in the same pool, do not show in
    /// the same frame just now: region by region, in order. None of a region where there are none.
    ///
    /// A hint, as [`Frozen::frame`] is: a break may move a page at any time. But a page that is in none of the
    /// answers was in one frame in both, and if nobody has broken it since, it is still.
    pub fn differing<'a>(
        &'a self,
        other: &'a Self,
        pages: Range<Gfn>,
    ) -> impl Iterator<Item = Vec<Gfn>> + 'a {
        debug_assert!(Arc::ptr_eq(&self.pool, &other.pool) && self.pages == other.pages);
        let order = self.pool.huge();
        let end = pages.end.0.min(self.pages);
        let regions = order.index(pages.start.0)..order.index(end.max(1) - 1) + 1;
        let each = order.pages() as usize;
        let (mut ours, mut theirs) = (vec![Pfn::ZERO; each], vec![Pfn::ZERO; each]);
        let apart = self.table.apart(&other.table, regions);
        apart.filter_map(move |(index, own, other)| {
            frames(own, &mut ours);
            frames(other, &mut theirs);
            let first = (index * each) as u64;
            let differing: Vec<_> = (first..)
                .zip(ours.iter().zip(&theirs))
                .filter(|(gfn, (a, b))| a != b && (pages.start.0..end).contains(gfn))
                .map(|(gfn, _)| Gfn(gfn))
                .collect();
            (!differing.is_empty()).then_some(differing)
        })
    }
}

/// The frames of all pages of a region just now; zeros where nothing was touched.
fn frames(region: Option<&Arc<FrozenRegion>>, into: &mut [Pfn]) {
    match region {
        Some(region) => region.lock().frames(into),
        None => into.fill(Pfn::ZERO),
    }
}
