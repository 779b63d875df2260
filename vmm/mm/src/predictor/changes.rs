//! Before which forks a region changes, and whether it pays to fork it before the pause: it does if nothing
//! of it changes between that and the fork.

/// Times in a row that it was in vain to fork a region early that is mapped page by page, from which on that
/// is tried less and less often.
const IN_VAIN_SMALL: u8 = 2;

/// The same for a region that a huge entry maps. To fork it costs the pause little, and a fault more costs
/// the guest as much for either.
const IN_VAIN_HUGE: u8 = 1;

/// At the least once in two to the power of so many forks.
const SELDOM: u8 = 6;

/// Forks in a row before which a region changed, from which on it is taken to change before the next one as
/// well.
const FREQUENT: u8 = 2;

/// Before which forks one region changed, and whether it has paid to fork it early.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Changes {
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

impl Changes {
    /// Whether region number `index` should be forked before fork number `fork`.
    pub(super) fn may_prepare(&self, index: usize, is_huge: bool, fork: u64) -> bool {
        let limit = if is_huge { IN_VAIN_HUGE } else { IN_VAIN_SMALL };
        // Not all regions at once.
        self.in_vain < limit || (fork + index as u64).is_multiple_of(1 << self.in_vain)
    }

    /// Whether the region does not change before every fork. Fork number `fork` is the next.
    pub(super) fn is_rare(&self, fork: u64) -> bool {
        self.row < FREQUENT || self.last + 1 < fork
    }

    /// It has changed before fork number `fork`, which shares it, or for which that is done early. Said once
    /// or more.
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

    /// The region changes, for the first time since it was forked early or by fork number `forks`, the last
    /// there was.
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_vain_is_tried_less_and_less() {
        let mut changes = Changes::default();
        let mut tried = vec![];
        for fork in 1..=256 {
            if changes.may_prepare(3, false, fork) {
                // Again, and again in vain: that counts once.
                for _ in 0..3 {
                    changes.prepared(fork);
                    changes.changed(fork - 1);
                }
                tried.push(fork + 3);
            }
            changes.changed(fork);
        }
        assert_eq!(tried, [4, 5, 8, 16, 32, 64, 128, 192, 256]);
        // Once that it paid is enough.
        changes.prepared(261);
        changes.changed(261);
        assert!((262..270).all(|fork| changes.may_prepare(3, false, fork)));
    }

    #[test]
    fn what_changed_before_two_forks_in_a_row_is_not_rare() {
        let mut changes = Changes::default();
        assert!(changes.is_rare(2));
        changes.forked(2);
        assert!(changes.is_rare(3), "one is not a row");
        changes.prepared(3);
        changes.forked(3);
        assert!(!changes.is_rare(4));
        assert!(changes.is_rare(5), "it paused");
        changes.forked(5);
        assert!(changes.is_rare(6));
    }

    #[test]
    fn one_failure_is_enough_where_there_is_little_to_gain() {
        let mut changes = Changes::default();
        changes.prepared(1);
        changes.changed(0);
        let tried = |is_huge| (2..9).filter(move |&fork| changes.may_prepare(1, is_huge, fork));
        assert!(tried(true).eq([3, 5, 7]));
        assert!(tried(false).eq(2..9));
    }

    #[test]
    fn now_and_then_in_vain_is_no_reason() {
        let mut changes = Changes::default();
        for fork in 1..50 {
            assert!(changes.may_prepare(0, false, fork));
            changes.prepared(fork);
            if fork % 2 == 0 {
                changes.changed(fork - 1);
                // What was done once more is in vain all the same, but if it has not changed again.
                changes.prepared(fork);
            }
            changes.changed(fork);
        }
    }
}
