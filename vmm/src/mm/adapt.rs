//! How much of a region a COW break copies: a page, or all of it.
//!
//! A small break costs a fault; a whole region costs the copy of 512 pages, which is a few faults' worth. Which is better is known only
//! afterwards, so this is the ski rental problem: small breaks first, and when they have cost as much as the region would have, the
//! rest of it at once. That is never worse than twice the better of the two.
//!
//! A region that was broken whole the last times is broken whole at its first fault, and put to the proof every few forks.

/// Regions are put to the proof, with small breaks, once in so many forks.
const PROBE: u8 = 8;

/// The breaks of one region since the last fork, and what was learnt from those before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Breaks {
    /// Small breaks since the last fork.
    small: u32,
    /// Whether the region was broken whole, or all that was to be.
    is_whole: bool,
    /// Forks in a row after which it was broken whole.
    streak: u8,
}

impl Breaks {
    /// The first change after a fork. What was written while nobody shared it says nothing of how it is written.
    pub(super) fn begin(&mut self) {
        self.streak = match (self.is_whole, self.small) {
            (true, _) => (self.streak + 1) % PROBE,
            (false, 0) => self.streak,
            (false, _) => 0,
        };
        self.small = 0;
        self.is_whole = false;
    }

    /// Whether the next break should take the whole region, when one of all costs as much as `price` small ones.
    pub(super) fn wants_whole(&self, price: u32) -> bool {
        self.streak > 0 || self.small >= price
    }

    pub(super) fn count_small(&mut self) {
        self.small += 1;
    }

    pub(super) fn count_whole(&mut self) {
        self.is_whole = true;
    }
}
