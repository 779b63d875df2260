//! The working set: what the guest writes before every fork, as far as forks know.
//!
//! That is what was writable at the last fork and at the one before. What was broken ahead is writable at the
//! next fork whether the guest wrote it or not, so every few forks nothing is broken ahead, and what is not
//! written any more is found out: what the guest does not write is copied so many times at most.

use std::collections::VecDeque;
use std::mem;

use super::super::addr::Gfn;
use super::probe::is_probe;

/// What one entry maps: a page, or a region that a huge entry maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) struct Leaf {
    /// The page, or the first one.
    pub(in super::super) first: Gfn,
    pub(in super::super) is_huge: bool,
}

/// What was written lately, as far as forks know.
#[derive(Default)]
pub(super) struct WorkingSet {
    /// Before the last fork, in order.
    last: Vec<Leaf>,
    /// Before the next one, as far as it was prepared.
    prepared: Vec<Leaf>,
    /// To be broken ahead.
    next: VecDeque<Leaf>,
}

impl WorkingSet {
    /// Takes what is to be broken ahead next.
    pub(super) fn pop_next(&mut self) -> Option<Leaf> {
        self.next.pop_front()
    }

    #[cfg(test)]
    pub(super) fn set_next(&mut self, next: &[Leaf]) {
        self.next = next.iter().copied().collect();
    }

    /// The next fork will not find `leaves` writable, because somebody prepared it.
    pub(super) fn note_prepared(&mut self, leaves: &[Leaf]) {
        self.prepared.extend_from_slice(leaves);
    }

    /// Fork number `fork` found `leaves` writable, in order.
    pub(super) fn note(&mut self, fork: u64, mut leaves: Vec<Leaf>) {
        leaves.append(&mut self.prepared);
        leaves.sort_unstable();
        leaves.dedup();
        let before = mem::replace(&mut self.last, leaves);
        self.next.clear();
        if !is_probe(fork) {
            let mut before = before.into_iter().peekable();
            let again = self.last.iter().copied().filter(|leaf| {
                while before.next_if(|old| old < leaf).is_some() {}
                before.peek() == Some(leaf)
            });
            self.next.extend(again);
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn leaves_that_were_written_twice_are_found_in_order() {
        let leaves = |numbers: &[u64]| -> Vec<Leaf> {
            let leaf = |&n: &u64| Leaf {
                first: Gfn(n / 2),
                is_huge: n % 2 == 1,
            };
            numbers.iter().map(leaf).collect()
        };
        let mut set = WorkingSet::default();
        set.note(1, leaves(&[0, 3, 4, 9]));
        assert_eq!(set.next, []);
        set.note(2, leaves(&[1, 3, 9, 12]));
        assert_eq!(set.next, leaves(&[3, 9]));
        set.note(3, leaves(&[]));
        assert_eq!(set.next, []);
    }
}
