//! What write faults cost on this machine, learnt while it runs.
//!
//! `mm` breaks a region page by page until that has cost as much as all of it at once. What the two cost
//! differs by an order of magnitude between machines (an exit is 1 us on bare metal and 28 us on PVM), so it
//! is not a constant.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::mm::{FaultOutcome, Resolution};

/// An observation below the average moves it by one part in this many; one above it by one part in
/// [`RELUCTANCE`], and counts as twice the average at most. What is wanted is the cost of a break by itself,
/// and what makes one dearer is rarely its own: the scheduler ran another thread, another vCPU had the lock,
/// or memory was new, which is paid for once.
const READINESS: u64 = 4;
const RELUCTANCE: u64 = 64;

/// The first break of a region counts as this many breaks of a page at most. It is likely to be the dearest,
/// and if it counted in full the price might be so high that there is no second one to learn from.
const FIRST_WHOLE: u64 = 16;

/// What things cost when nothing is in their way, in nanoseconds; 0 is not known yet. Statistics: nothing is
/// ordered by them, and an observation may be lost to another.
#[derive(Debug, Default)]
pub struct Prices {
    /// What every break changes lies apart from what every entry looks at.
    small: CachePadded<AtomicU64>,
    whole: AtomicU64,
    /// The shortest time a vCPU was in the guest: that of going there and back.
    entry: CachePadded<AtomicU64>,
    /// The shortest time a fault took from exit to entry: decoding and registers, and what little it
    /// resolved.
    handling: AtomicU64,
    /// Not learnt, but given.
    fixed: Option<u32>,
}

impl Prices {
    /// Those of somebody who knows, or wants something measured: a region is worth so many pages, whatever is
    /// seen.
    pub fn fixed(whole_price: u32) -> Self {
        Self {
            fixed: Some(whole_price),
            ..Self::default()
        }
    }

    /// What was learnt so far, to begin with for somebody else: a clone's faults cost what its parent's do.
    #[must_use]
    pub fn as_learnt(&self) -> Self {
        let copy = |price: &AtomicU64| AtomicU64::new(price.load(Ordering::Relaxed));
        let apart = |price| CachePadded::new(copy(price));
        Self {
            small: apart(&self.small),
            whole: copy(&self.whole),
            entry: apart(&self.entry),
            handling: copy(&self.handling),
            fixed: self.fixed,
        }
    }

    /// A vCPU was in the guest for so long.
    pub fn entered(&self, time: Duration) {
        shortest(&self.entry, time);
    }

    /// A fault took so long from exit to entry.
    pub fn handled(&self, time: Duration) {
        shortest(&self.handling, time);
    }

    /// A fault was resolved in so long. Says how many breaks of a page the break of a region is worth, if
    /// that is known.
    pub fn paid(&self, fault: FaultOutcome, time: Duration) -> Option<u32> {
        if !matches!(
            fault.resolution,
            Resolution::SharersMoved | Resolution::WriterMoved
        ) {
            return None;
        }
        let average: &AtomicU64 = if fault.is_whole {
            &self.whole
        } else {
            &self.small
        };
        let before = average.load(Ordering::Relaxed);
        let time = nanoseconds(time);
        let after = match before {
            0 if fault.is_whole => {
                let (small, around) = self.small_and_around();
                if small == 0 {
                    return None;
                }
                time.min(FIRST_WHOLE * (small + around))
            }
            0 => time,
            _ if time < before => before - (before - time) / READINESS,
            _ => before + (time - before).min(before) / RELUCTANCE,
        };
        average.store(after.max(1), Ordering::Relaxed);
        self.whole_price()
    }

    /// How many breaks of a page the break of a region is worth, each with the exit it takes. `None` until
    /// there was one of both.
    pub fn whole_price(&self) -> Option<u32> {
        if self.fixed.is_some() {
            return self.fixed;
        }
        let whole = self.whole.load(Ordering::Relaxed);
        let (small, around) = self.small_and_around();
        (small > 0 && whole > 0).then(|| ((whole + around) / (small + around)).clamp(1, 512) as u32)
    }

    /// What the break of a page costs, 0 if that is not known, and what the exit costs that either kind
    /// takes.
    fn small_and_around(&self) -> (u64, u64) {
        let get = |price: &AtomicU64| price.load(Ordering::Relaxed);
        let small = get(&self.small);
        let around = get(&self.entry) + get(&self.handling).saturating_sub(small);
        (small, around)
    }
}

fn shortest(of: &AtomicU64, time: Duration) {
    let time = nanoseconds(time);
    let shortest = of.load(Ordering::Relaxed);
    if time < shortest || shortest == 0 {
        of.store(time, Ordering::Relaxed);
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    fn fault(is_whole: bool) -> FaultOutcome {
        FaultOutcome {
            resolution: Resolution::SharersMoved,
            is_whole,
        }
    }

    #[test]
    fn a_region_is_worth_as_many_pages_as_it_costs() {
        let prices = Prices::default();
        prices.entered(50 * US);
        prices.entered(30 * US);
        prices.entered(90 * US);
        assert_eq!(prices.paid(fault(false), 10 * US), None, "of one kind only");
        assert_eq!(prices.paid(fault(true), 370 * US), Some(10));
    }

    #[test]
    fn a_first_region_that_took_for_ever_is_not_the_last() {
        let prices = Prices::default();
        prices.entered(30 * US);
        assert_eq!(prices.paid(fault(true), US), None, "compared with nothing");
        prices.paid(fault(false), 10 * US);
        assert_eq!(prices.paid(fault(true), 20_000 * US), Some(16));
        // It rises, if that is what they cost.
        for _ in 0..64 {
            prices.paid(fault(true), 20_000 * US);
        }
        assert!(prices.whole_price().unwrap() > 32);
    }

    #[test]
    fn what_is_around_a_fault_belongs_to_its_price() {
        let prices = Prices::default();
        prices.entered(20 * US);
        prices.handled(50 * US);
        prices.handled(40 * US);
        prices.paid(fault(false), 10 * US);
        assert_eq!(prices.paid(fault(true), 370 * US), Some(7));
    }

    #[test]
    fn what_copies_nothing_has_no_price() {
        let prices = Prices::default();
        let reused = FaultOutcome {
            resolution: Resolution::Reused,
            is_whole: true,
        };
        assert_eq!(prices.paid(reused, US), None);
        assert_eq!(prices.paid(fault(true), US), None);
    }

    #[test]
    fn prices_fall_readily_and_rise_reluctantly() {
        let prices = Prices::default();
        prices.paid(fault(false), 10 * US);
        // The first of all was out of line.
        prices.paid(fault(true), Duration::from_secs(1));
        for _ in 0..60 {
            prices.paid(fault(true), 100 * US);
        }
        assert_eq!(prices.whole_price(), Some(10));
        // One in eight pays for memory.
        for n in 0..400 {
            let time = if n % 8 == 0 { 5_000 } else { 100 };
            prices.paid(fault(true), time * US);
        }
        assert_eq!(prices.whole_price(), Some(10));
        // It has become dearer.
        for _ in 0..400 {
            prices.paid(fault(true), 200 * US);
        }
        assert_eq!(prices.whole_price(), Some(19));
    }

    #[test]
    fn prices_stay_in_bounds() {
        let prices = Prices::default();
        prices.paid(fault(false), US);
        for _ in 0..1000 {
            prices.paid(fault(true), Duration::MAX);
        }
        assert_eq!(prices.whole_price(), Some(512));
        let prices = Prices::default();
        prices.paid(fault(false), Duration::ZERO);
        assert_eq!(prices.paid(fault(true), Duration::ZERO), Some(1));
        let prices = Prices::default();
        prices.paid(fault(false), 5 * US);
        assert_eq!(prices.paid(fault(true), US), Some(1));
    }
}
