//! How the mix is run, and that it can fail.

use std::env;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, Runner};

use crate::child;
use crate::mix::{mix, mix_of_folios};
use crate::mm::{CowPolicy, Exclusive, Safeguard};

const SEED: u64 = 20_220_509;
/// Schedules of each kind, unless `SHUTTLE_ITERATIONS` says otherwise.
const ITERATIONS: usize = 5_000;
/// PCT finds what needs an order of so many steps with a probability that is known.
const DEPTH: usize = 4;

fn iterations() -> usize {
    env::var("SHUTTLE_ITERATIONS").map_or(ITERATIONS, |n| {
        n.parse().expect("SHUTTLE_ITERATIONS is a number")
    })
}

fn config() -> Config {
    let mut config = Config::new();
    // That orderings are not modelled is known: they are loom's part.
    config.silence_warnings = true;
    config.failure_persistence = FailurePersistence::Print;
    config
}

fn random<C: CowPolicy + Default>() {
    let scheduler = RandomScheduler::new_from_seed(SEED, iterations());
    Runner::new(scheduler, config()).run(mix::<C>);
}

fn pct<C: CowPolicy + Default>() {
    let scheduler = PctScheduler::new_from_seed(SEED, DEPTH, iterations());
    Runner::new(scheduler, config()).run(mix::<C>);
}

#[test]
fn all_is_well_in_random_schedules() {
    random::<Exclusive>();
}

#[test]
fn all_is_well_in_schedules_of_few_switches() {
    pct::<Exclusive>();
}

#[test]
fn all_is_well_with_folios() {
    let random = RandomScheduler::new_from_seed(SEED, iterations());
    Runner::new(random, config()).run(mix_of_folios::<Exclusive>);
    let pct = PctScheduler::new_from_seed(SEED, DEPTH, iterations());
    Runner::new(pct, config()).run(mix_of_folios::<Exclusive>);
}

/// Asserts that the mix finds the protocol without `safeguard` wrong, by an oracle that says one of `how`: which
/// of them is the first to see it is a matter of the schedule.
fn fails(test: &str, safeguard: Safeguard, how: &[&str]) {
    child::fails(test, how, || {
        safeguard.leave_out();
        random::<Exclusive>();
        pct::<Exclusive>();
    });
}

macro_rules! safeguards {
    ($($test:ident: $safeguard:ident, $($how:literal)|+;)*) => {$(
        #[test]
        fn $test() {
            fails(
                concat!(module_path!(), "::", stringify!($test)),
                Safeguard::$safeguard,
                &[$($how),+],
            );
        }
    )*};
}

// The mix is no proof, and need not find every safeguard's absence: those that are not here need weak memory,
// or a window that is hit too seldom. `tests/loom` has them all.
safeguards! {
    pin_tests_in_the_word: PinTestsInTheWord, "coherence";
    share_tests_in_the_word: ShareTestsInTheWord, "coherence";
    get_only_of_mapped: GetOnlyOfMapped, "freed twice" | "was not fresh";
    fault_looks_under_lock: FaultLooksUnderLock, "coherence" | "count";
    mmu_before_unmap: MmuBeforeUnmap, "coherence";
    copy_is_held: CopyIsHeld, "is not held";
    reuse_proved_again: ReuseProvedAgain, "isolation";
    clone_under_lock: CloneUnderLock, "isolation" | "count";
    isolated_before_copy: IsolatedBeforeCopy, "coherence";
    writers_stopped_before_copy: WritersStoppedBeforeCopy, "lost";
    compared_when_still: ComparedWhenStill, "tracking";
}
