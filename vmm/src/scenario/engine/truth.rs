//! What each page of each address space should hold.
//!
//! A page has a history: all values it had. A child's pages have their parent's from before the fork, so what
//! parents, children and children of children have in common is a value of their own to each, and what any of
//! them was given after they parted is not.

use std::collections::BTreeMap;

use super::super::performer::{PAGES, Page, Who};

/// The values a page had, the present one last.
pub(super) type History = Vec<u64>;

pub(super) struct Truth {
    histories: BTreeMap<(Who, Page), History>,
    /// The page each value was written to first, also of address spaces that have ended.
    origins: BTreeMap<u64, (Who, Page)>,
}

impl Truth {
    /// P alone, with zeros.
    pub(super) fn new() -> Self {
        Self {
            histories: (0..PAGES).map(|page| ((Who::P, page), vec![0])).collect(),
            origins: BTreeMap::new(),
        }
    }

    /// Empty if there is no such address space.
    pub(super) fn history(&self, who: Who, page: Page) -> &[u64] {
        self.histories.get(&(who, page)).map_or(&[], |v| v)
    }

    pub(super) fn now(&self, who: Who, page: Page) -> u64 {
        self.history(who, page).last().copied().unwrap_or_default()
    }

    /// A page was given `value`.
    pub(super) fn set(&mut self, who: Who, page: Page, value: u64) {
        self.note_origin(who, page, value);
        self.histories.entry((who, page)).or_default().push(value);
    }

    /// `value` was written to what was once a page of `who`.
    pub(super) fn note_origin(&mut self, who: Who, page: Page, value: u64) {
        if value != 0 {
            self.origins.entry(value).or_insert((who, page));
        }
    }

    /// Whose page was given `value` first.
    pub(super) fn origin(&self, value: u64) -> Option<(Who, Page)> {
        self.origins.get(&value).copied()
    }

    /// `child` is there, and has what `parent` has.
    pub(super) fn part(&mut self, parent: Who, child: Who) {
        for page in 0..PAGES {
            let history = self.history(parent, page).to_vec();
            self.histories.insert((child, page), history);
        }
    }
}
