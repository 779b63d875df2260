//! What an address space predicts of its guest's writes: how much a break copies, what is forked before the
//! pause, and what is broken before the guest asks for it.
//!
//! **Guarantee.** Nothing rests on a prediction. One that is wrong costs a copy or a fault, and never a page.
//!
//! An address space has one [`Predictor`], and for each region a [`History`], which is the predictor's record
//! of it. An operation says what it has done, and asks what to do:
//!
//! | question | asked by | answered by |
//! |---|---|---|
//! | [`Predictor::breaks_whole`] | a fault | `breaks`: the small breaks of the region, by ski rental; `sweeps`: the regions beside it |
//! | [`Predictor::prepares`] | `prepare_fork` | `changes`: before which forks the region changed |
//! | [`Predictor::next_ahead`] | `break_ahead` | `working_set`: what was written before the last two forks |
//!
//! What is taken for granted is looked at again every few forks (`probe`). Tests can have a predictor that
//! learns nothing and always answers the same (`Predictor::fixed`).

mod breaks;
mod changes;
mod probe;
mod sweeps;
mod working_set;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::sync::{Mutex, lock};
use breaks::Breaks;
use changes::Changes;
use sweeps::Sweeps;
pub(super) use working_set::Leaf;
use working_set::WorkingSet;

/// Small breaks that cost as much as that of a whole region, until somebody has measured it.
const WHOLE_PRICE: u32 = 8;
/// Chunks that a fork may have to do: some 4 us each on PVM, a fifth of a millisecond together.
const LEFT_TO_FORK: u32 = 40;

/// What one address space has learnt of its guest's writes, and what it makes of that.
pub(super) struct Predictor {
    /// What the break of a whole region costs, in small ones.
    whole_price: AtomicU32,
    /// How many chunks that change before every fork are left to it, though it is prepared.
    left_to_fork: AtomicU32,
    /// Whether somebody breaks ahead of the writes.
    notes_writes: AtomicBool,
    working_set: Mutex<WorkingSet>,
    sweeps: Mutex<Sweeps>,
    #[cfg(test)]
    fixed: Option<Fixed>,
}

/// What one region has done until now: the predictor's record, kept with the region under its lock.
#[derive(Debug, Default)]
pub(super) struct History {
    breaks: Breaks,
    changes: Changes,
}

/// A region that may be forked before the pause.
pub(super) struct Candidate<'a> {
    pub(super) history: &'a History,
    pub(super) index: usize,
    /// Whether a huge entry maps it.
    pub(super) is_huge: bool,
}

/// Answers that do not depend on what has happened.
#[cfg(test)]
#[derive(Clone, Debug, Default)]
pub(super) struct Fixed {
    /// Whether every break is of a whole region, or none is.
    pub(super) breaks_whole: bool,
    /// Whether every region that may be forked early is, or none is.
    pub(super) prepares: bool,
    /// What is broken ahead after every fork.
    pub(super) ahead: Vec<Leaf>,
}

impl Predictor {
    /// One that has learnt nothing yet.
    pub(super) fn learning() -> Self {
        Self {
            whole_price: AtomicU32::new(WHOLE_PRICE),
            left_to_fork: AtomicU32::new(LEFT_TO_FORK),
            notes_writes: AtomicBool::new(false),
            working_set: Mutex::default(),
            sweeps: Mutex::default(),
            #[cfg(test)]
            fixed: None,
        }
    }

    /// One that always answers the same.
    #[cfg(test)]
    pub(super) fn fixed(answers: Fixed) -> Self {
        Self {
            fixed: Some(answers),
            ..Self::learning()
        }
    }

    pub(super) fn set_whole_price(&self, small: u32) {
        // All faults look at it, and few change it.
        if self.whole_price() != small {
            self.whole_price.store(small, Ordering::Relaxed);
        }
    }

    pub(super) fn leave_to_fork(&self, chunks: u32) {
        self.left_to_fork.store(chunks, Ordering::Relaxed);
    }

    pub(super) fn note_writes(&self) {
        self.notes_writes.store(true, Ordering::Relaxed);
    }

    /// Whether forks are to say what was writable.
    pub(super) fn notes_writes(&self) -> bool {
        self.notes_writes.load(Ordering::Relaxed)
    }

    /// Whether the next break of region number `index` should take all of it.
    pub(super) fn breaks_whole(&self, index: usize, region: &History) -> bool {
        #[cfg(test)]
        if let Some(fixed) = &self.fixed {
            return fixed.breaks_whole;
        }
        let breaks = &region.breaks;
        breaks.wants_whole(self.whole_price())
            || !breaks.is_put_to_the_proof() && lock(&self.sweeps).trust(index)
    }

    fn whole_price(&self) -> u32 {
        self.whole_price.load(Ordering::Relaxed)
    }

    /// Region number `index` was broken whole, or all that was to be.
    pub(super) fn broke_whole(&self, index: usize, region: &mut History) {
        let price = self.whole_price();
        if region.breaks.has_paid(price) {
            lock(&self.sweeps).note_proof(index);
        } else if !region.breaks.wants_whole(price) && lock(&self.sweeps).note_trust(index) {
            // Nothing was learnt of it: the next time it is trusted again, or proves itself.
            return;
        }
        region.breaks.count_whole();
    }

    /// Whether a region changes before every fork, page by page, and so is not worth forking early. It is
    /// left to fork number `fork`, as long as not too much is.
    pub(super) fn is_left_to_fork(&self, region: &Candidate<'_>, fork: u64) -> bool {
        !region.is_huge && !region.history.changes.is_rare(fork)
    }

    /// Whether it pays to fork a region early, for fork number `fork`, to which `left` chunks would be left
    /// now.
    pub(super) fn prepares(&self, region: &Candidate<'_>, fork: u64, left: usize) -> bool {
        #[cfg(test)]
        if let Some(fixed) = &self.fixed {
            return fixed.prepares;
        }
        let is_too_much = left > self.left_to_fork.load(Ordering::Relaxed) as usize;
        let changes = &region.history.changes;
        (is_too_much || !self.is_left_to_fork(region, fork))
            && changes.may_prepare(region.index, region.is_huge, fork)
    }

    /// Fork number `fork` found `written` writable, in order.
    pub(super) fn forked(&self, fork: u64, written: Vec<Leaf>) {
        #[cfg(test)]
        if let Some(fixed) = &self.fixed {
            return lock(&self.working_set).set_next(&fixed.ahead);
        }
        if self.notes_writes() {
            lock(&self.working_set).note(fork, written);
        }
    }

    /// What was forked early found `written` writable: the next fork will not.
    pub(super) fn prepared(&self, written: &[Leaf]) {
        if !written.is_empty() {
            lock(&self.working_set).note_prepared(written);
        }
    }

    /// What should be broken next before the guest asks for it. Each is said once.
    pub(super) fn next_ahead(&self) -> Option<Leaf> {
        lock(&self.working_set).pop_next()
    }
}

impl History {
    /// Region number `index` changes, for the first time since it was forked early or by fork number `forks`,
    /// the last there was.
    pub(super) fn changed(&mut self, index: usize, forks: u64) {
        self.changes.changed(forks);
        self.breaks.begin(index, forks);
    }

    /// The region has changed before fork number `fork`, which shares it.
    pub(super) fn forked(&mut self, fork: u64) {
        self.changes.forked(fork);
    }

    /// The next fork cannot take over region number `index` from fork number `fork`: it counts as changed at
    /// once, and [`History::changed`] will not be called.
    pub(super) fn remains_changed(&mut self, index: usize, fork: u64) {
        self.breaks.begin(index, fork);
    }

    /// The region was forked early, for fork number `fork`.
    pub(super) fn prepared(&mut self, fork: u64) {
        self.changes.prepared(fork);
    }

    /// One page was copied.
    pub(super) fn broke_page(&mut self) {
        self.breaks.count_small();
    }

    /// The page was copied for the writer, which moved.
    pub(super) fn moved_writer(&mut self) {
        self.breaks.count_move();
    }
}
