//! Catching how a search for a failure ends. `tests/shuttle` uses this as well.

use std::env;
use std::panic;
use std::process::{self, Command};

/// Set for the process that is to find a failure.
const TO_FAIL: &str = "MODEL_TESTS_TO_FAIL";
/// Its exit code if it did.
const FAILED: i32 = 3;

/// Asserts that `search` fails, with an assertion that says one of `how`. Any other failure, such as a model
/// checker's limit, proves nothing. `test` is the name of the test that calls this, which is run again.
///
/// The search is made in a process of its own, which ends where it fails. Unwinding would run destructors:
/// here they take locks and change counts, so that they would be part of a model that has failed, and a
/// second panic would abort.
#[track_caller]
pub(crate) fn fails(test: &str, how: &[&str], search: impl FnOnce()) {
    if env::var_os(TO_FAIL).is_some() {
        panic::set_hook(Box::new(|info| {
            eprintln!("{info}");
            process::exit(FAILED);
        }));
        return search();
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
        Some(0) => panic!("the search finds nothing wrong"),
        Some(FAILED) if how.iter().any(|how| said.contains(how)) => {}
        _ => panic!("not for the reason meant: {} {said}", output.status),
    }
}
