//! The stock: free runs outside homes that have memory already, and how many there should be.
//!
//! To get memory for a copy from the host costs many times what the copying does, so memory for copies should be
//! there before the guest asks. How much of it is learnt from one snapshot to the next: as much as was taken
//! between the last two. Before anything is known it is a part of what is in use, up to a bound, since the
//! first snapshot is the one that most guests see; a guest that is never forked pays with that.
//!
//! Who fills the stock has time: it is asked for by [`Stock::wanted`], by a thread that works when nobody
//! else does. What was free over many snapshots, and is more than any of them took, goes back to the host a little
//! at a time ([`Idle`]): memory that goes is missed by a guest that is rewound, or whose snapshots are dropped, only
//! now and then.

use super::mmu::MOST_FOLIOS_AT_ONCE;

/// Huge folios' worth of memory that is kept in stock though nobody takes it: what is asked for at a time.
pub(super) const COMMIT_FOLIOS: u64 = MOST_FOLIOS_AT_ONCE;

/// What of the stock is filled at a time: who does it may be in the way of others for as long as that takes, and the
/// host may need 4 ms for each.
pub(super) const FILL_FOLIOS: u64 = 2;

/// Of what is in use, the part that a first snapshot is expected to copy soon: one of so many runs.
const PART: u64 = 4;
/// The most that is kept in stock, in runs: 256 MiB.
const MOST: u64 = 128;

/// Looks in an epoch of [`Idle`]: memory goes back to the host if nobody needed it for one to two of them.
pub(super) const EPOCH: u32 = 16;

/// What nobody has needed for a while: over the epoch of looks that is, and the one before it.
#[derive(Clone, Copy, Debug, Default)]
struct Idle {
    looks: u32,
    /// The least that there was in stock in each, the older first.
    least: [u64; 2],
    /// The most that was taken between two looks of each.
    taken: [u64; 2],
}

impl Idle {
    /// Between the last look and this there were at least `least` runs in stock, and `taken` were taken.
    fn look(&mut self, least: u64, taken: u64) {
        self.looks += 1;
        if self.looks == EPOCH {
            self.looks = 0;
            self.least = [self.least[1], least];
            self.taken = [self.taken[1], taken];
        } else {
            self.least[1] = self.least[1].min(least);
            self.taken[1] = self.taken[1].max(taken);
        }
    }

    /// Runs that were in stock all the time.
    fn least(&self) -> u64 {
        self.least[0].min(self.least[1])
    }

    /// Runs that were taken at once.
    fn taken(&self) -> u64 {
        self.taken[0].max(self.taken[1])
    }

    /// So many of the runs that were in stock no longer are, by our own doing.
    fn has_gone(&mut self, runs: u64) {
        self.least
            .iter_mut()
            .for_each(|least| *least = least.saturating_sub(runs));
    }
}

/// What is known of how many runs are needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Learnt {
    /// Nothing: there was no look yet.
    #[default]
    Nothing,
    /// Nothing: there was one, so the copies for the first snapshot are being made.
    FirstSnapshot,
    /// What was between the last two.
    Interval {
        /// Runs that were wanted at once.
        taken: u64,
        /// How many of them had not come back by its end.
        kept: u64,
    },
}

/// How many runs are in stock, and were.
#[derive(Debug, Default)]
pub(super) struct Stock {
    /// Runs that are whole, and of which some frame at least has memory.
    runs: u64,
    /// The least that there were since the last look.
    least: u64,
    idle: Idle,
    /// How many more were taken than came back since the last look, from here or past it.
    out: i64,
    /// The most that was.
    most_out: i64,
    learnt: Learnt,
    /// It cannot be filled: the host has refused, or there is no run for it. Not tried again before the next
    /// look.
    is_refused: bool,
    /// Somebody waits until more is wanted.
    pub(super) is_awaited: bool,
    /// Nobody fills it any more.
    pub(super) is_closed: bool,
}

impl Stock {
    pub(super) fn runs(&self) -> u64 {
        self.runs
    }

    /// A run that was in stock no longer is, since somebody has taken it; or the other way round.
    #[inline]
    pub(super) fn changed(&mut self, was_in: bool, is_in: bool) {
        match (was_in, is_in) {
            (true, false) => {
                self.runs -= 1;
                self.least = self.least.min(self.runs);
                self.note_out(1);
            }
            (false, true) => {
                self.runs += 1;
                self.out -= 1;
            }
            _ => {}
        }
    }

    /// Of what came last, so many runs are new: nobody had taken them.
    pub(super) fn was_filled(&mut self, runs: u64) {
        self.out += runs as i64;
    }

    /// Somebody has to wait for the memory of so many runs.
    pub(super) fn note_late(&mut self, runs: u64) {
        self.note_out(runs as i64);
    }

    fn note_out(&mut self, runs: i64) {
        self.out += runs;
        self.most_out = self.most_out.max(self.out);
    }

    /// There is no memory for more, or no run.
    pub(super) fn note_refused(&mut self) {
        self.is_refused = true;
    }

    /// How many runs should be asked for now, where `in_use` are in use.
    pub(super) fn wanted(&self, in_use: u64) -> u64 {
        if self.is_refused {
            return 0;
        }
        self.aim(in_use).saturating_sub(self.expected())
    }

    /// How many there will be at the next look, if as many come back as did before the last.
    fn expected(&self) -> u64 {
        let kept = match self.learnt {
            // What is out before the first snapshot is whose it is.
            Learnt::Nothing => return self.runs,
            Learnt::FirstSnapshot => 0,
            Learnt::Interval { kept, .. } => kept,
        };
        self.runs + self.still_out().saturating_sub(kept)
    }

    fn aim(&self, in_use: u64) -> u64 {
        let aim = match self.learnt {
            Learnt::Nothing => in_use / PART,
            // They should not have to share memory's bandwidth with more for others.
            Learnt::FirstSnapshot => COMMIT_FOLIOS,
            Learnt::Interval { taken, .. } => taken,
        };
        aim.min(MOST)
    }

    /// How many were taken since the last look and have not come back.
    fn still_out(&self) -> u64 {
        u64::try_from(self.out).unwrap_or(0)
    }

    /// A snapshot is about to be taken: how many runs go to the host next, a few at a time. They were in stock for
    /// at least an epoch, and are more than what was taken between any two looks of that.
    pub(super) fn look(&mut self) -> u64 {
        let taken = self.most_out as u64;
        self.learnt = match self.learnt {
            // There was no snapshot that would have needed copies.
            Learnt::Nothing => Learnt::FirstSnapshot,
            Learnt::FirstSnapshot | Learnt::Interval { .. } => Learnt::Interval {
                taken,
                kept: self.still_out(),
            },
        };
        self.idle.look(self.least, taken);
        let beyond = self
            .runs
            .saturating_sub(self.idle.taken().max(COMMIT_FOLIOS));
        let idle = self.idle.least().saturating_sub(COMMIT_FOLIOS);
        let surplus = idle.min(beyond).min(COMMIT_FOLIOS);
        self.idle.has_gone(surplus);
        self.least = self.runs - surplus;
        // Nobody takes those that go.
        (self.out, self.most_out) = (-(surplus as i64), 0);
        self.is_refused = false;
        surplus
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stock of `runs` runs.
    fn stock(runs: u64) -> Stock {
        let mut stock = Stock::default();
        fill(&mut stock, runs);
        stock
    }

    fn fill(stock: &mut Stock, runs: u64) {
        come_back(stock, runs);
        stock.was_filled(runs);
    }

    fn come_back(stock: &mut Stock, runs: u64) {
        (0..runs).for_each(|_| stock.changed(false, true));
    }

    fn take(stock: &mut Stock, runs: u64) {
        (0..runs).for_each(|_| stock.changed(true, false));
    }

    /// A look, and what goes back to the host then.
    fn look(stock: &mut Stock) -> u64 {
        let surplus = stock.look();
        take(stock, surplus);
        surplus
    }

    #[test]
    fn before_the_first_snapshot_it_is_a_part_of_what_is_in_use() {
        let mut stock = stock(0);
        assert_eq!((stock.wanted(3), stock.wanted(100)), (0, 25));
        assert_eq!(stock.wanted(1 << 40), MOST, "up to a bound");
        fill(&mut stock, 1);
        assert_eq!(stock.wanted(100), 24);
        fill(&mut stock, 19);
        assert_eq!(look(&mut stock), 0);
        // The first snapshot's copies come now: they are what it was for.
        assert_eq!(stock.wanted(100), 0);
        take(&mut stock, 20);
        assert_eq!(stock.wanted(100), 0, "they may come back");
    }

    #[test]
    fn what_was_taken_is_wanted_again() {
        let mut stock = stock(30);
        look(&mut stock);
        take(&mut stock, 20);
        stock.note_late(3);
        assert_eq!(look(&mut stock), 0);
        assert_eq!(stock.wanted(1000), 23 - 10);
        // What is put there meanwhile does not count, nor what was taken after as much had come back.
        take(&mut stock, 10);
        fill(&mut stock, 4);
        stock.note_late(15);
        come_back(&mut stock, 9);
        take(&mut stock, 9);
        look(&mut stock);
        assert_eq!(stock.wanted(0), 25 - 4);
    }

    /// The snapshots before it are dropped each time, or none is.
    #[test]
    fn what_will_come_back_is_not_replaced() {
        let mut dropped = stock(30);
        look(&mut dropped);
        for _ in 0..3 {
            take(&mut dropped, 30);
            assert_eq!(dropped.wanted(1000), 0);
            come_back(&mut dropped, 30);
            assert_eq!(look(&mut dropped), 0);
        }
        let mut kept = stock(60);
        look(&mut kept);
        take(&mut kept, 30);
        for _ in 0..3 {
            assert_eq!(look(&mut kept), 0);
            assert_eq!(kept.wanted(1000), 0);
            take(&mut kept, 20);
            assert_eq!(kept.wanted(1000), 20, "it will be missing at the next look");
            take(&mut kept, 10);
            fill(&mut kept, 30);
            assert_eq!(kept.wanted(1000), 0);
        }
    }

    #[test]
    fn what_nobody_took_goes_a_few_at_a_time() {
        let mut stock = stock(50);
        // The first look ends a time in which there was less.
        for n in 1..2 * EPOCH {
            assert_eq!(look(&mut stock), 0, "look {n}");
        }
        let went = [(); 7].map(|()| look(&mut stock));
        assert_eq!(went, [8, 8, 8, 8, 8, 2, 0], "all but COMMIT_FOLIOS");
        assert_eq!((stock.runs(), stock.wanted(100)), (COMMIT_FOLIOS, 0));
    }

    #[test]
    fn what_is_taken_now_and_then_stays() {
        let mut stock = stock(30 + COMMIT_FOLIOS);
        let went = |stock: &mut Stock| -> u64 {
            let looks = (0..4 * EPOCH).map(|n| {
                if n % EPOCH == 0 {
                    take(stock, 30);
                    come_back(stock, 30);
                }
                look(stock)
            });
            looks.sum()
        };
        assert_eq!(went(&mut stock), 0);
        fill(&mut stock, 20);
        assert_eq!(went(&mut stock), 20, "what is beyond that");
    }

    #[test]
    fn a_host_that_refuses_is_asked_again_after_the_next_look() {
        let mut stock = stock(0);
        stock.note_refused();
        assert_eq!(stock.wanted(100), 0);
        look(&mut stock);
        assert_eq!(stock.wanted(100), COMMIT_FOLIOS);
    }
}
