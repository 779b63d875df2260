//! What the measuring guest does: which page it writes next, and what it keeps of its own times.
//!
//! Each vCPU has a share of the memory and writes one word a page in it, along a [`Route`], for ever. It
//! reads the time-stamp counter after every write, so that whatever stops it, for however short, is seen
//! as a gap between two writes. Writes are counted in *laps* of a fixed number: a lap is what the guest's
//! lost time is measured in.
//!
//! Not covered: this guest checks nothing. What its memory holds follows no formula; the payload is for that.

use crate::abi::{PAGE_SIZE, Pattern, REGION_SIZE, VCPU_STRIDE};

/// Pages in a region.
const REGION_PAGES: u64 = REGION_SIZE / PAGE_SIZE;

/// What a vCPU is to do. The VMM writes it before the first instruction, and nobody after.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepOrders {
    /// Gpa of the first page of this vCPU's share.
    pub first: u64,
    /// Pages of its share. All are written once before anything is measured.
    pub resident: u64,
    /// How the pages to write are chosen among them.
    pub choice: Choice,
    /// Writes of a lap.
    pub lap: u64,
}

/// The numbers of a [`Route`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// A [`Pattern`] as a number.
    pub pattern: u64,
    /// Pages that are written, from the first of the share on.
    pub pages: u64,
    /// [`Pattern::Hot`]: how many of them, from the first on, are hot. There are others too.
    pub hot: u64,
    /// [`Pattern::Hot`]: one write of this many goes to the others.
    pub cold_every: u64,
}

/// What a vCPU says of itself, and its orders. Lies where other guests have their `VcpuPage`, and spans
/// several pages as that does.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SweepPage {
    /// What it is to do.
    pub orders: SweepOrders,
    /// 1 once all of its share was written.
    pub resident: u64,
    /// Writes done, without those that made its share resident.
    pub ops: u64,
    /// Laps done.
    pub laps: u64,
    /// The last laps: lap `n` is at `n % LAPS`, from when [`SweepPage::laps`] is beyond `n` to when it
    /// is beyond `n + LAPS - 1`.
    pub ring: [Lap; LAPS as usize],
}

/// Laps that a vCPU keeps.
pub const LAPS: u64 = 896;

/// A lap.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lap {
    /// TSC when the lap before was done.
    pub start: u64,
    /// TSC when this one was.
    pub end: u64,
    /// The longest time between two writes in it, in TSC ticks.
    pub longest_gap: u64,
    /// Writes done at its end.
    pub ops: u64,
}

const _: () = assert!(size_of::<SweepPage>() as u64 <= VCPU_STRIDE);

/// The pages a vCPU writes, one after the other.
#[derive(Clone, Debug)]
pub struct Route {
    pattern: Pattern,
    choice: Choice,
    at: u64,
    hot: Shuffle,
    others: Shuffle,
}

impl Route {
    /// The route that `choice` asks for, from its beginning. `None` if there is none such: no such pattern,
    /// or nothing to choose from.
    pub const fn new(choice: Choice) -> Option<Self> {
        let Some(pattern) = Pattern::from_raw(choice.pattern) else {
            return None;
        };
        let others = match pattern {
            Pattern::Hot if choice.hot == 0 || choice.cold_every < 2 => return None,
            Pattern::Hot if choice.hot >= choice.pages => return None,
            Pattern::Hot => choice.pages - choice.hot,
            Pattern::Sparse if choice.pages < REGION_PAGES => return None,
            _ if choice.pages == 0 => return None,
            _ => choice.pages,
        };
        Some(Self {
            pattern,
            choice,
            at: 0,
            hot: Shuffle::new(choice.hot),
            others: Shuffle::new(others),
        })
    }

    /// The page of the next write, counted from the first of the share.
    #[inline]
    pub fn next_page(&mut self) -> u64 {
        match self.pattern {
            Pattern::Dense => self.turn(self.choice.pages),
            Pattern::Uniform => self.others.next(),
            Pattern::Hot => {
                if self.turn(self.choice.cold_every) == 0 {
                    self.choice.hot + self.others.next()
                } else {
                    self.hot.next()
                }
            }
            Pattern::Sparse => {
                let region = self.turn(self.choice.pages / REGION_PAGES);
                // A page that differs from region to region, so that not all of them share cache sets.
                region * REGION_PAGES + region * 37 % REGION_PAGES
            }
        }
    }

    /// Counts from 0 to below `end`, over and over.
    #[inline]
    fn turn(&mut self, end: u64) -> u64 {
        let at = self.at;
        self.at = if at + 1 == end { 0 } else { at + 1 };
        at
    }
}

impl Choice {
    /// How many different pages the writes from number `from` up to `to` go to, if this is a [`Route`].
    pub const fn distinct(&self, from: u64, to: u64) -> u64 {
        let writes = to.saturating_sub(from);
        match Pattern::from_raw(self.pattern) {
            Some(Pattern::Hot) if self.cold_every > 0 => {
                let cold = to.div_ceil(self.cold_every) - from.div_ceil(self.cold_every);
                min(writes - cold, self.hot) + min(cold, self.pages - self.hot)
            }
            Some(Pattern::Sparse) => min(writes, self.pages / REGION_PAGES),
            _ => min(writes, self.pages),
        }
    }
}

const fn min(a: u64, b: u64) -> u64 {
    if a < b { a } else { b }
}

/// The numbers below `len` in an order without a pattern that caches or prefetchers know, each once
/// before any is there again.
#[derive(Clone, Copy, Debug)]
struct Shuffle {
    len: u64,
    /// One less than a power of two: the state goes through all numbers up to it.
    mask: u64,
    /// How far down the high bits are mixed into the low ones, which alone would alternate.
    shift: u32,
    state: u64,
}

impl Shuffle {
    const fn new(len: u64) -> Self {
        let mask = if len == 0 {
            0
        } else {
            len.next_power_of_two() - 1
        };
        let shift = mask.count_ones().div_ceil(2);
        Self {
            len,
            mask,
            shift: if shift == 0 { 1 } else { shift },
            state: 0,
        }
    }

    #[inline]
    fn next(&mut self) -> u64 {
        loop {
            // A linear congruence has the full period: multiplier 1 mod 4, odd increment.
            self.state = self
                .state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f)
                & self.mask;
            // One to one: the high bits stay as they are, and say what was added to the low ones.
            let number = self.state ^ (self.state >> self.shift);
            if number < self.len {
                return number;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn choice(pattern: Pattern, pages: u64) -> Choice {
        Choice {
            pattern: pattern as u64,
            pages,
            hot: pages / 8,
            cold_every: 10,
        }
    }

    #[test]
    fn a_shuffle_has_every_number_once() {
        for len in [1, 2, 3, 7, 8, 9, 1000, 1024, 1025, 16_384] {
            let mut shuffle = Shuffle::new(len);
            for _ in 0..2 {
                let mut seen: Vec<u64> = (0..len).map(|_| shuffle.next()).collect();
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..len), "{len}");
            }
        }
    }

    #[test]
    fn a_shuffle_is_not_in_order() {
        let mut shuffle = Shuffle::new(4096);
        let order: Vec<u64> = (0..4096).map(|_| shuffle.next()).collect();
        let near = order
            .windows(2)
            .filter(|pair| pair[0].abs_diff(pair[1]) <= 2);
        assert!(near.count() < 40);
        let steps = order.windows(2).map(|pair| pair[1].wrapping_sub(pair[0]));
        assert!(steps.collect::<HashSet<_>>().len() > 2000, "no stride");
    }

    #[test]
    fn orders_stay_in_their_share_and_write_as_many_pages_as_they_say() {
        for pattern in [
            Pattern::Dense,
            Pattern::Uniform,
            Pattern::Hot,
            Pattern::Sparse,
        ] {
            for pages in [512, 1000, 4096] {
                let choice = choice(pattern, pages);
                for (from, to) in [(0, 100), (9, 651), (777, 3000), (5, 20_000)] {
                    let mut route = Route::new(choice).unwrap();
                    let mut seen = HashSet::new();
                    for op in 0..to {
                        let page = route.next_page();
                        assert!(page < pages);
                        if op >= from {
                            seen.insert(page);
                        }
                    }
                    assert_eq!(
                        seen.len() as u64,
                        choice.distinct(from, to),
                        "{choice:?} {from} {to}"
                    );
                }
            }
        }
    }

    #[test]
    fn nine_writes_of_ten_are_hot() {
        let choice = choice(Pattern::Hot, 4096);
        let mut route = Route::new(choice).unwrap();
        let hot = (0..10_000).filter(|_| route.next_page() < choice.hot);
        assert_eq!(hot.count(), 9_000);
    }

    #[test]
    fn sparse_writes_one_page_of_every_region() {
        let mut route = Route::new(choice(Pattern::Sparse, 8 * 512)).unwrap();
        let regions = (0..16).map(|_| route.next_page() / 512);
        assert!(regions.eq((0..8).chain(0..8)));
    }

    #[test]
    fn impossible_choices_are_refused() {
        let refused = |change: fn(&mut Choice)| {
            let mut choice = choice(Pattern::Hot, 4096);
            change(&mut choice);
            Route::new(choice).is_none()
        };
        assert!(!refused(|_| ()));
        assert!(refused(|choice| choice.pattern = 4));
        assert!(refused(|choice| choice.hot = 0));
        assert!(refused(|choice| choice.hot = 4096));
        assert!(refused(|choice| choice.cold_every = 1));
        assert!(Route::new(choice(Pattern::Sparse, 511)).is_none());
        assert!(Route::new(choice(Pattern::Dense, 0)).is_none());
    }
}
