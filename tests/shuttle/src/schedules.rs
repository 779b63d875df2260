//! How the mix is run, and that it can fail.

use std::env;
use std::panic;
use std::process::{self, Command};

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, Runner};

use crate::mix::{mix, mix_of_folios};
use crate::mm::{CowPolicy, Exclusive, Safeguard};
use crate::without::Without;

const SEED: u64 = 20_220_509;
/// Schedules of each kind, unless `SHUTTLE_ITERATIONS` says otherwise.
const ITERATIONS: usize = 5_000;
/// PCT finds what needs an order of so many steps with a probability that is known.
const DEPTH: usize = 4;

/// Set for the process that is to find a failure.
const TO_FAIL: &str = "SHUTTLE_TESTS_TO_FAIL";
/// Its exit code if it did.
const FAILED: i32 = 3;

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

/// Asserts that the mix finds `C` wrong, by an oracle that says `how`. In a process of its own, as in `tests/loom`: it ends
/// where it fails.
fn fails<C: CowPolicy + Default>(test: &str, how: &str) {
    if env::var_os(TO_FAIL).is_some() {
        panic::set_hook(Box::new(|info| {
            eprintln!("{info}");
            process::exit(FAILED);
        }));
        random::<C>();
        return pct::<C>();
    }
    // A test is known without the name of its crate.
    let test = test.split_once("::").map_or(test, |(_, rest)| rest);
    let output = Command::new(env::current_exe().expect("a test has a binary"))
        .args(["--exact", test, "--nocapture"])
        .env(TO_FAIL, "1")
        .output()
        .expect("it can be run again");
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => panic!("the mix finds nothing wrong"),
        Some(FAILED) if said.contains(how) => {}
        _ => panic!("not for the reason meant: {} {said}", output.status),
    }
}

macro_rules! safeguards {
    ($($test:ident: $safeguard:ident, $how:literal;)*) => {$(
        #[test]
        fn $test() {
            fails::<Without<{ Safeguard::$safeguard as u8 }>>(
                concat!(module_path!(), "::", stringify!($test)),
                $how,
            );
        }
    )*};
}

// The mix is no proof, and need not find every safeguard's absence: those that are not here need weak memory, or a window
// that is hit too seldom. `tests/loom` has them all.
safeguards! {
    pin_rereads_entry: PinRereadsEntry, "tracking";
    pin_tests_in_the_word: PinTestsInTheWord, "coherence";
    share_tests_in_the_word: ShareTestsInTheWord, "coherence";
    get_only_of_mapped: GetOnlyOfMapped, "freed twice";
    fault_looks_under_lock: FaultLooksUnderLock, "freed twice";
    mmu_before_unmap: MmuBeforeUnmap, "coherence";
    copy_is_held: CopyIsHeld, "is not held";
    reuse_proved_again: ReuseProvedAgain, "TooMany";
    clone_under_lock: CloneUnderLock, "isolation";
    isolated_before_copy: IsolatedBeforeCopy, "coherence";
    writers_stopped_before_copy: WritersStoppedBeforeCopy, "lost";
    compared_when_still: ComparedWhenStill, "tracking";
}
