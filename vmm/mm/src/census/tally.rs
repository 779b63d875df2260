//! How many holders each frame has.
//!
//! Holders come one after the other, each with a number of its own, and each counts once for a frame however
//! many of its pages show it. Huge entries are counted once for their folio. A frame's holders are those of
//! its folio and its own: who has the folio is taken out of the counts of its pages.

use super::super::addr::{Order, Pfn};
use super::super::entry::Entry;

/// Of one frame, or of one folio.
#[derive(Clone, Copy, Default)]
struct Met {
    holders: u32,
    /// The number of the last that came.
    last: u32,
}

pub(super) struct Tally {
    /// What is never met costs no memory.
    frames: Vec<[u32; 2]>,
    folios: Vec<Met>,
    /// Of which folios pages are mapped one by one.
    is_by_page: Vec<bool>,
    huge: Order,
}

impl Met {
    /// Says whether `who` is new here.
    fn meet(&mut self, who: u32) -> bool {
        let is_new = self.last != who;
        self.last = who;
        is_new
    }
}

impl Tally {
    /// Of `frames` frames that nobody has.
    pub(super) fn new(frames: u64, huge: Order) -> Self {
        let folios = frames.div_ceil(huge.pages()) as usize;
        Self {
            frames: vec![[0; 2]; frames as usize],
            folios: vec![Met::default(); folios],
            is_by_page: vec![false; folios],
            huge,
        }
    }

    /// The first walk: `who` has what `entry` maps. Nobody comes again who was followed by another.
    pub(super) fn meet(&mut self, who: u32, entry: Entry) {
        let (pfn, folio) = self.place(entry);
        if entry.is_huge() {
            if !self.folios[folio].meet(who) {
                return;
            }
            self.folios[folio].holders += 1;
            if self.is_by_page[folio] {
                for n in pfn.run(self.huge.pages()) {
                    let mut met = self.met(n);
                    if met.last == who {
                        // It has come by a page before, and has the folio now.
                        met.holders -= 1;
                        self.set(n, met);
                    }
                }
            }
        } else if self.folios[folio].last != who {
            let mut met = self.met(pfn);
            if met.meet(who) {
                met.holders += 1;
                self.set(pfn, met);
                self.is_by_page[folio] = true;
            }
        }
    }

    /// The second walk, with other numbers: has `count` called with how many holders there are of what
    /// `entry` maps, and how many frames have as many. Each frame once.
    pub(super) fn share(&mut self, who: u32, entry: Entry, mut count: impl FnMut(u32, u64)) {
        let (pfn, folio) = self.place(entry);
        if entry.is_huge() {
            if !self.folios[folio].meet(who) {
                return;
            }
            if !self.is_by_page[folio] {
                return count(self.folios[folio].holders.max(1), self.huge.pages());
            }
            for n in pfn.run(self.huge.pages()) {
                if self.met(n).last != who {
                    count(self.holders(n).max(1), 1);
                }
            }
        } else if self.folios[folio].last != who {
            let mut met = self.met(pfn);
            if met.meet(who) {
                self.set(pfn, met);
                // Somebody is there, though the first walk may have come too early.
                count(self.holders(pfn).max(1), 1);
            }
        }
    }

    /// How many holders the first walk has found of a frame.
    pub(super) fn holders(&self, pfn: Pfn) -> u32 {
        self.met(pfn).holders + self.folios[self.huge.index(pfn.0)].holders
    }

    fn place(&self, entry: Entry) -> (Pfn, usize) {
        (entry.pfn(), self.huge.index(entry.pfn().0))
    }

    fn met(&self, pfn: Pfn) -> Met {
        let [holders, last] = self.frames[pfn.0 as usize];
        Met { holders, last }
    }

    fn set(&mut self, pfn: Pfn, Met { holders, last }: Met) {
        self.frames[pfn.0 as usize] = [holders, last];
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const FOLIO: Order = Order::new(2);

    fn shares(tally: &mut Tally, who: u32, entries: &[Entry]) -> Vec<(u32, u64)> {
        let mut all = vec![];
        for &entry in entries {
            tally.share(who, entry, |holders, frames| all.push((holders, frames)));
        }
        all
    }

    #[test]
    fn a_holder_counts_once_by_whatever_entries() {
        let (huge, page) = (Entry::huge_read_only(Pfn(4)), Entry::read_only(Pfn(5)));
        for both in [[huge, page], [page, huge]] {
            let mut tally = Tally::new(8, FOLIO);
            for entry in both.into_iter().chain(both) {
                tally.meet(1, entry);
            }
            tally.meet(2, page);
            assert_eq!(
                [4, 5, 6].map(|n| tally.holders(Pfn(n))),
                [1, 2, 1],
                "{both:?}"
            );
            let mut of_first = shares(&mut tally, 3, &both);
            of_first.sort_unstable();
            assert_eq!(of_first, [(1, 1), (1, 1), (1, 1), (2, 1)], "{both:?}");
            assert_eq!(shares(&mut tally, 4, &[page, page]), [(2, 1)]);
        }
    }

    #[test]
    fn a_folio_that_is_mapped_huge_only_is_one_step() {
        let mut tally = Tally::new(8, FOLIO);
        let huge = Entry::huge_read_only(Pfn(4));
        (1..4).for_each(|who| tally.meet(who, huge));
        assert_eq!(shares(&mut tally, 4, &[huge, huge]), [(3, 4)]);
    }

    /// The tables have changed between the walks.
    #[test]
    fn who_was_not_met_has_it_alone() {
        let mut tally = Tally::new(8, FOLIO);
        let entries = [Entry::huge_read_only(Pfn(4)), Entry::read_only(Pfn(1))];
        assert_eq!(shares(&mut tally, 1, &entries), [(1, 4), (1, 1)]);
    }
}
