//! How much of a region a COW break copies: a page, or all of it.
//!
//! A small break costs a fault; a whole region costs the copy of 512 pages, which is a few faults' worth.
//! Which is better is known only afterwards, so this is the ski rental problem: small breaks first, and when
//! they have cost as much as the region would have, the rest of it at once. That is never worse than twice
//! the better of the two.
//!
//! A guest that waits for its faults writes less before the next fork than it would: what a region has cost
//! before the forks so far is therefore held against it, the less the longer ago. So few breaks before each
//! fork add up to as many as many before one.
//!
//! A break that moves the writer costs more than one that moves the sharers, and counts for more.
//!
//! A region that was broken whole the last times is broken whole at its first fault, and put to the proof
//! every few forks.

use super::probe::is_probe;

/// Small breaks that one counts as that moves the writer, and not the sharers. It is a `mmap` where that is
/// an `mprotect`, half as dear again with its fault; and leaves up to two mappings more, which stay, where
/// that leaves them till the next fork.
const MOVE: u32 = 2;

/// The breaks of one region since the last fork, and what was learnt from those before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Breaks {
    /// Small breaks since the last fork.
    small: u32,
    /// Of those before, half of the last, a quarter of the ones before them, and so on.
    carried: u32,
    /// Whether the region was broken whole, or all that was to be.
    is_whole: bool,
    /// Whether it was the last time, too.
    was_whole: bool,
    /// Whether it is put to the proof this time.
    is_probe: bool,
    /// The number of the fork it began after, and one more: 0 before it ever began.
    since: u64,
}

impl Breaks {
    /// A change of region number `index` after fork number `fork`: the first since then, or since it was
    /// forked early. What was written while nobody shared it says nothing of how it is written.
    pub(super) fn begin(&mut self, index: usize, fork: u64) {
        if self.since == fork + 1 {
            return;
        }
        *self = Self {
            small: 0,
            carried: if self.is_whole {
                0
            } else {
                (self.carried + self.small) / 2
            },
            is_whole: false,
            was_whole: self.is_whole || self.was_whole && self.small == 0,
            // Not all regions at once.
            is_probe: is_probe(fork + index as u64),
            since: fork + 1,
        };
    }

    /// Whether the next break should take the whole region, when one of all costs as much as `price` small
    /// ones.
    pub(super) fn wants_whole(&self, price: u32) -> bool {
        self.was_whole && !self.is_probe || self.has_paid(price)
    }

    /// Whether the small breaks have cost as much as the whole region would.
    pub(super) fn has_paid(&self, price: u32) -> bool {
        self.carried + self.small >= price
    }

    /// Whether it was broken whole the last times, and is to show whether it still should be.
    pub(super) fn is_put_to_the_proof(&self) -> bool {
        self.was_whole && self.is_probe
    }

    pub(super) fn count_small(&mut self) {
        self.small += 1;
    }

    /// The last small break moved the writer: it counts as [`MOVE`].
    pub(super) fn count_move(&mut self) {
        self.small += MOVE - 1;
    }

    pub(super) fn count_whole(&mut self) {
        self.is_whole = true;
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn regions_are_put_to_the_proof_in_turn() {
        for index in [0, 3] {
            let mut breaks = Breaks::default();
            let mut proofs = vec![];
            for fork in 1..=24 {
                breaks.begin(index, fork);
                if !breaks.wants_whole(1) {
                    proofs.push(fork + index as u64);
                }
                breaks.count_whole();
            }
            let first = 1 + index as u64;
            assert_eq!(proofs, [first, 8, 16, 24]);
        }
    }

    #[test]
    fn what_was_forked_early_goes_on_where_it_was() {
        let mut breaks = Breaks::default();
        for fork in 1..4 {
            for _ in 0..3 {
                breaks.begin(1, fork);
                breaks.count_small();
            }
        }
        // 3, and half of 3 and half of that.
        assert!(breaks.wants_whole(5) && !breaks.wants_whole(6));
    }

    #[test]
    fn few_breaks_before_each_fork_add_up() {
        let mut breaks = Breaks::default();
        let mut asked = vec![];
        for fork in 1..7 {
            breaks.begin(1, fork);
            (0..6).for_each(|_| breaks.count_small());
            asked.push(breaks.wants_whole(10));
        }
        assert_eq!(asked, [false, false, true, true, true, true]);
        // Fewer than half the price are never too many.
        let mut breaks = Breaks::default();
        for fork in 1..50 {
            breaks.begin(1, fork);
            (0..4).for_each(|_| breaks.count_small());
            assert!(!breaks.wants_whole(10));
        }
    }

    #[test]
    fn breaks_that_move_the_writer_count_for_more() {
        let mut breaks = Breaks::default();
        breaks.begin(0, 1);
        for n in 1..=3 {
            breaks.count_small();
            breaks.count_move();
            assert_eq!(breaks.wants_whole(5), n == 3, "{n}");
        }
    }

    #[test]
    fn one_interval_with_few_breaks_ends_a_row_of_whole_ones() {
        let mut breaks = Breaks::default();
        breaks.begin(0, 1);
        breaks.count_whole();
        breaks.begin(0, 2);
        assert!(breaks.wants_whole(9));
        breaks.begin(0, 3);
        assert!(
            breaks.wants_whole(9),
            "nobody shared it: nothing was learnt"
        );
        breaks.begin(0, 8);
        assert!(!breaks.wants_whole(9), "the proof");
        breaks.count_small();
        breaks.begin(0, 9);
        assert!(!breaks.wants_whole(9));
    }
}
