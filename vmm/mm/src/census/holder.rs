//! Walks through the tables of address spaces and of snapshots, alike.

use super::super::addr::Gfn;
use super::super::entry::Entry;
use super::super::frozen::Frozen;
use super::super::policy::CowPolicy;
use super::super::space::AddressSpace;
use super::super::sync::lock;
use super::why::How;

/// An entry that is present.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    /// The page; of a huge entry the first.
    pub(super) first: Gfn,
    pub(super) entry: Entry,
    pub(super) how: How,
    /// What has the mapping, as a number: snapshots, what is kept, and what is borrowed, may have it in common.
    /// None of a space's own entry.
    pub(super) mapping: Option<usize>,
}

/// Whoever may have frames.
pub(super) trait Holder {
    /// Calls `look` with each entry that is present: of a region that a huge entry maps with that one. Locks
    /// are held meanwhile.
    fn entries(&self, look: &mut dyn FnMut(Leaf));

    /// The same of mappings that are kept besides, of frames that the entries show.
    fn kept(&self, look: &mut dyn FnMut(Leaf));
}

impl<P: CowPolicy> Holder for AddressSpace<P> {
    fn entries(&self, look: &mut dyn FnMut(Leaf)) {
        let leaf = |first, entry| Leaf {
            first,
            entry,
            how: How::Entry,
            mapping: None,
        };
        for index in 0..self.mapped.table.regions() {
            if self.mapped.table.is_vacant(index) {
                continue;
            }
            let region = self.mapped.table.lock(index);
            if self.has_borrowed(&region) {
                // The snapshot's mapping stands for the space's: it is shown, and not counted again.
                let mut borrowed = |mapping, first, entry| {
                    look(Leaf {
                        first,
                        entry,
                        how: How::Entry,
                        mapping: Some(mapping),
                    });
                };
                self.with_lender(index, |lender| lender.lock().each(&mut borrowed));
                continue;
            }
            if region.is_untouched() {
                continue;
            }
            if let Some(huge) = region.huge() {
                look(leaf(region.first(), huge));
                continue;
            }
            for gfn in region.pages() {
                let entry = region.get(gfn);
                if entry.is_present() {
                    look(leaf(gfn, entry));
                }
            }
        }
    }

    fn kept(&self, look: &mut dyn FnMut(Leaf)) {
        let mut kept = |mapping, first, entry| {
            look(Leaf {
                first,
                entry,
                how: How::Kept,
                mapping: Some(mapping),
            });
        };
        for index in 0..self.mapped.table.regions() {
            // One at a time: what is held here is not given back by who opens the region meanwhile.
            let whole = lock(&self.lineage).unchanged.get(index).cloned();
            if let Some(whole) = whole {
                whole.lock().each(&mut kept);
            }
            if self.mapped.table.is_vacant(index) {
                continue;
            }
            let region = self.mapped.table.lock(index);
            for (n, chunk) in region.state.kept.iter().enumerate() {
                if let (Some(chunk), Some(first)) = (chunk, region.pages_of(n).next()) {
                    chunk.each(first, &mut kept);
                }
            }
        }
    }
}

impl Holder for Frozen {
    fn entries(&self, look: &mut dyn FnMut(Leaf)) {
        for (_, region) in self.table.iter() {
            region.lock().each(&mut |mapping, first, entry| {
                look(Leaf {
                    first,
                    entry,
                    how: How::Snapshot,
                    mapping: Some(mapping),
                });
            });
        }
    }

    fn kept(&self, _: &mut dyn FnMut(Leaf)) {}
}
