//! Running a race under loom, and catching how it fails.

use std::env;
use std::panic;
use std::process::{self, Command};

use loom::model::Builder;

/// Set for the process that is to find a failure.
const TO_FAIL: &str = "LOOM_TESTS_TO_FAIL";
/// Its exit code if it did.
const FAILED: i32 = 3;

/// How often a model takes a thread off that could run on, in one interleaving, where it is bounded. A switch
/// to another thread because this one waits or ends does not count, nor does which store a load sees. What the safeguards are
/// there for is found with two.
const PREEMPTIONS: usize = 4;

/// Asserts that `race` ends well in every interleaving.
pub(crate) fn holds(race: impl Fn() + Send + Sync + 'static) {
    let mut model = model();
    // Not for `LOOM_MAX_PREEMPTIONS` to lower.
    model.preemption_bound = None;
    model.check(race);
}

/// Asserts that `race` ends well in every interleaving of at most four preemptions, or `LOOM_MAX_PREEMPTIONS`.
pub(crate) fn holds_bounded(race: impl Fn() + Send + Sync + 'static) {
    let mut model = model();
    model.preemption_bound = model.preemption_bound.or(Some(PREEMPTIONS));
    model.check(race);
}

/// The same of at most three: for races of so many steps that four take minutes.
pub(crate) fn holds_within_three(race: impl Fn() + Send + Sync + 'static) {
    let mut model = model();
    model.preemption_bound = model.preemption_bound.or(Some(3));
    model.check(race);
}

fn model() -> Builder {
    let mut model = Builder::new();
    // The default is for models a tenth as long.
    model.max_branches = 10_000;
    model
}

/// Asserts that `race` ends badly in some interleaving, with an assertion that says `how`. Any other failure, such as
/// a limit of loom's, proves nothing. `test` is the caller's name.
///
/// The race runs in a process of its own, which ends where it fails. Unwinding would run destructors: here they take
/// locks and change counts, so that they would be part of a model that has failed, and a second panic would abort.
#[track_caller]
pub(crate) fn fails(test: &str, race: impl Fn() + Send + Sync + 'static, how: &str) {
    if env::var_os(TO_FAIL).is_some() {
        panic::set_hook(Box::new(|info| {
            eprintln!("{info}");
            process::exit(FAILED);
        }));
        return holds_bounded(race);
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
        Some(0) => panic!("loom finds nothing wrong"),
        Some(FAILED) if said.contains(how) => {}
        _ => panic!("not for the reason meant: {} {said}", output.status),
    }
}
