//! What scenarios have in common.
//!
//! Expected verdicts are in the order mapcount, mapcount-forced-break, refcount, seed (and its recomputing
//! variant, if no other is said), exclusive.

use super::super::performer::Memory;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{self, Copied, Ok};

/// What most scenarios have in common.
pub(super) const PLAIN: Scenario = Scenario {
    id: "",
    title: "",
    about: "",
    memory: Memory::Base,
    steps: &[],
    copies: None,
    gets_must_follow: false,
    kernels_pin_count: false,
    expected: Expected::all(Ok),
    kernel_races: None,
    kernel_may: None,
};

/// What scenarios on a huge folio have in common.
pub(super) const HUGE: Scenario = Scenario {
    memory: Memory::Huge,
    ..PLAIN
};

/// The kernel's reuse of a page that was touched a moment ago.
pub(super) const LRU_BATCH: Option<(Verdict, &str)> = Some((
    Copied,
    "a page that is still in another CPU's LRU batch has a reference more (H11)",
));

/// The kernel's fork of a folio with a pin.
pub(super) const COPIES_ALL: Option<(Verdict, &str)> = Some((
    Copied,
    "pins are counted by folio, so all of its pages are copied for the child",
));
