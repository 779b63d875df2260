//! Sets of guest pages.

use super::addr::Gfn;
use super::bits::BitSet;

/// A set of pages: one bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    set: BitSet,
    /// The pages from here on are never in it.
    end: Gfn,
    len: u64,
}

impl PageSet {
    /// None of the first `pages` pages.
    pub(super) fn new(pages: u64) -> Self {
        Self {
            set: BitSet::new(pages),
            end: Gfn(pages),
            len: 0,
        }
    }

    pub(super) fn insert(&mut self, gfn: Gfn) {
        self.len += u64::from(!self.contains(gfn));
        self.set.set(gfn.0, true);
    }

    /// How many pages are in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether a page is in it. Pages beyond the end of the address space are not.
    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn < self.end && self.set.get(gfn.0)
    }

    /// Its pages, in order.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.set.iter().map(Gfn)
    }
}
