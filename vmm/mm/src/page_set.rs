//! Sets of guest pages.

use super::addr::Gfn;

/// A set of pages: one bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    len: u64,
}

impl PageSet {
    /// None of the first `pages` pages.
    pub(super) fn new(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            len: 0,
        }
    }

    pub(super) fn insert(&mut self, gfn: Gfn) {
        self.len += u64::from(!self.contains(gfn));
        self.words[(gfn.0 / 64) as usize] |= 1 << (gfn.0 % 64);
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
        self.words
            .get((gfn.0 / 64) as usize)
            .is_some_and(|word| word >> (gfn.0 % 64) & 1 != 0)
    }

    /// Its pages, in order.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            (0..64)
                .filter(move |bit| word >> bit & 1 != 0)
                .map(move |bit| Gfn(index as u64 * 64 + bit))
        })
    }
}
