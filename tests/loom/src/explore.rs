//! Running a race under loom, and catching how it fails.

use loom::model::Builder;

use crate::child;
use crate::mm::Safeguard;

/// How often a model takes a thread off that could run on, in one interleaving, where it is bounded. A switch
/// to another thread because this one waits or ends does not count, nor does which store a load sees. What
/// the safeguards are there for is found with two.
const PREEMPTIONS: usize = 4;

/// Asserts that `race` ends well in every interleaving.
pub(crate) fn holds(race: impl Fn() + Send + Sync + 'static) {
    let mut model = model();
    // Not for `LOOM_MAX_PREEMPTIONS` to lower.
    model.preemption_bound = None;
    model.check(race);
}

/// Asserts that `race` ends well in every interleaving of at most four preemptions, or
/// `LOOM_MAX_PREEMPTIONS`.
pub(crate) fn holds_bounded(race: impl Fn() + Send + Sync + 'static) {
    let mut model = model();
    model.preemption_bound = model.preemption_bound.or(Some(PREEMPTIONS));
    model.check(race);
}

/// The same of at most three: for races of so many steps that four take minutes.
pub(crate) fn holds_within_three(race: impl Fn() + Send + Sync + 'static) {
    holds_within(3, race);
}

/// The same of at most two: for two machines that both break a folio, with all that takes.
pub(crate) fn holds_within_two(race: impl Fn() + Send + Sync + 'static) {
    holds_within(2, race);
}

fn holds_within(preemptions: usize, race: impl Fn() + Send + Sync + 'static) {
    let mut model = model();
    model.preemption_bound = model.preemption_bound.or(Some(preemptions));
    model.check(race);
}

fn model() -> Builder {
    let mut model = Builder::new();
    // The default is for models a tenth as long.
    model.max_branches = 10_000;
    model
}

/// Asserts that `race`, without `safeguard` if there is one, ends badly in some interleaving, with an
/// assertion that says `how`. `test` is the caller's name.
#[track_caller]
pub(crate) fn fails(
    test: &str,
    safeguard: Option<Safeguard>,
    race: impl Fn() + Send + Sync + 'static,
    how: &str,
) {
    child::fails(test, &[how], || {
        if let Some(safeguard) = safeguard {
            safeguard.leave_out();
        }
        holds_bounded(race);
    });
}
