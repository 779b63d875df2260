//! How much of a region a COW break copies: a page, or all of it.
//!
//! A small break costs a fault; a whole region costs the copy of 512 pages, which is a few faults' worth. Which is better is known only
//! afterwards, so this is the ski rental problem: small breaks first, and when they have cost as much as the region would have, the
//! rest of it at once. That is never worse than twice the better of the two.
//!
//! A guest that waits for its faults writes less before the next fork than it would: what a region has cost before the forks so far
//! is therefore held against it, the less the longer ago. So few breaks before each fork are as many as many before one.
//!
//! A region that was broken whole the last times is broken whole at its first fault, and put to the proof every few forks.

/// Regions are put to the proof, with small breaks, once in so many forks.
const PROBE: u64 = 8;

/// Whether it is time to look again at what is taken for granted.
pub(super) const fn is_proof(turn: u64) -> bool {
    turn.is_multiple_of(PROBE)
}

/// Times in a row that it was in vain to fork a region early, from which on that is tried less and less often: one that is mapped page by
/// page, and one that a huge entry maps. To fork the latter costs the pause little, and a fault more costs the guest as much for either.
const IN_VAIN: (u8, u8) = (2, 1);

/// At the least once in two to the power of so many forks.
const SELDOM: u8 = 6;

/// Forks in a row before which a region changed, from which on it is taken to change before the next one as well.
const HABIT: u8 = 2;

/// Before which forks a region changed, and whether it has paid to fork it before the pause: it has if nothing changed until the fork.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Habit {
    /// The fork it was last done for, until it is known whether it paid; the first fork is number 1.
    prepared: u64,
    /// It did not.
    is_in_vain: bool,
    /// For how many forks it did not, since it last did.
    in_vain: u8,
    /// The last fork before which it changed.
    last: u64,
    /// How many there were in a row.
    row: u8,
}

impl Habit {
    /// Whether region number `index` should be forked before fork number `fork`.
    pub(super) fn may_prepare(&self, index: usize, is_huge: bool, fork: u64) -> bool {
        let limit = if is_huge { IN_VAIN.1 } else { IN_VAIN.0 };
        // Not all regions at once.
        self.in_vain < limit || (fork + index as u64).is_multiple_of(1 << self.in_vain)
    }

    /// Whether the region does not change before every fork. Fork number `fork` is the next.
    pub(super) fn is_rare(&self, fork: u64) -> bool {
        self.row < HABIT || self.last + 1 < fork
    }

    /// It has changed before fork number `fork`, which shares it, or for which that is done early. Said once or more.
    pub(super) fn forked(&mut self, fork: u64) {
        if self.last != fork {
            let follows = self.last + 1 == fork;
            self.row = if follows {
                self.row.saturating_add(1)
            } else {
                1
            };
            self.last = fork;
        }
    }

    /// It was forked early: once or more.
    pub(super) fn prepared(&mut self, fork: u64) {
        self.forked(fork);
        if self.prepared != fork {
            self.prepared = fork;
            self.is_in_vain = false;
        }
    }

    /// The region changes, for the first time since it was forked early or by fork number `forks`, the last there was.
    pub(super) fn changed(&mut self, forks: u64) {
        if self.prepared > forks {
            if !self.is_in_vain {
                self.is_in_vain = true;
                self.in_vain = SELDOM.min(self.in_vain + 1);
            }
        } else if self.prepared != 0 {
            if !self.is_in_vain {
                self.in_vain = 0;
            }
            self.prepared = 0;
        }
    }
}

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
    is_proof: bool,
    /// The number of the fork it began after, and one more: 0 before it ever began.
    since: u64,
}

impl Breaks {
    /// A change of region number `index` after fork number `fork`: the first since then, or since it was forked early. What was written
    /// while nobody shared it says nothing of how it is written.
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
            is_proof: is_proof(fork + index as u64),
            since: fork + 1,
        };
    }

    /// Whether the next break should take the whole region, when one of all costs as much as `price` small ones.
    pub(super) fn wants_whole(&self, price: u32) -> bool {
        self.was_whole && !self.is_proof || self.carried + self.small >= price
    }

    pub(super) fn count_small(&mut self) {
        self.small += 1;
    }

    pub(super) fn count_whole(&mut self) {
        self.is_whole = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_vain_is_tried_less_and_less() {
        let mut habit = Habit::default();
        let mut tried = vec![];
        for fork in 1..=256 {
            if habit.may_prepare(3, false, fork) {
                // Again, and again in vain: that counts once.
                for _ in 0..3 {
                    habit.prepared(fork);
                    habit.changed(fork - 1);
                }
                tried.push(fork + 3);
            }
            habit.changed(fork);
        }
        assert_eq!(tried, [4, 5, 8, 16, 32, 64, 128, 192, 256]);
        // Once that it paid is enough.
        habit.prepared(261);
        habit.changed(261);
        assert!((262..270).all(|fork| habit.may_prepare(3, false, fork)));
    }

    #[test]
    fn what_changed_before_two_forks_in_a_row_is_not_rare() {
        let mut habit = Habit::default();
        assert!(habit.is_rare(2));
        habit.forked(2);
        assert!(habit.is_rare(3), "one is not a habit");
        habit.prepared(3);
        habit.forked(3);
        assert!(!habit.is_rare(4));
        assert!(habit.is_rare(5), "it paused");
        habit.forked(5);
        assert!(habit.is_rare(6));
    }

    #[test]
    fn one_failure_is_enough_where_there_is_little_to_gain() {
        let mut habit = Habit::default();
        habit.prepared(1);
        habit.changed(0);
        let tried = |is_huge| (2..9).filter(move |&fork| habit.may_prepare(1, is_huge, fork));
        assert!(tried(true).eq([3, 5, 7]));
        assert!(tried(false).eq(2..9));
    }

    #[test]
    fn now_and_then_in_vain_is_no_reason() {
        let mut habit = Habit::default();
        for fork in 1..50 {
            assert!(habit.may_prepare(0, false, fork));
            habit.prepared(fork);
            if fork % 2 == 0 {
                habit.changed(fork - 1);
                // What was done once more is in vain all the same, but if it has not changed again.
                habit.prepared(fork);
            }
            habit.changed(fork);
        }
    }

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
