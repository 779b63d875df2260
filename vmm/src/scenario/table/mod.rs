//! The scenarios: PROTOCOL.md section 8, groups A to F and H, and a few of our own.
//!
//! | file | group |
//! |---|---|
//! | `plain` | A: plain copy-on-write |
//! | `missed` | B: missed COW |
//! | `wrong` | C: wrong COW inside one process |
//! | `fork` | D: forks with pins |
//! | `read_pins` | E: pins for reading |
//! | `huge` | F: huge pages |
//! | `other` | H: debuggers, moved pages, dirty tracking |
//! | `merged` | K: merged pages (ours) |
//! | `lineage` | L: siblings, and children of children (ours) |
//! | `clones` | L: clones of a snapshot, and snapshots of clones (ours) |
//! | `snapshots` | S: snapshots (ours) |
//! | `template` | what they have in common |
//!
//! Group G is races, which `tests/loom` has.

mod clones;
mod fork;
mod huge;
mod lineage;
mod merged;
mod missed;
mod other;
mod plain;
mod read_pins;
mod snapshots;
mod template;
mod wrong;

use super::script::Scenario;

const GROUPS: [&[Scenario]; 11] = [
    plain::SCENARIOS,
    missed::SCENARIOS,
    wrong::SCENARIOS,
    fork::SCENARIOS,
    read_pins::SCENARIOS,
    huge::SCENARIOS,
    other::SCENARIOS,
    merged::SCENARIOS,
    lineage::SCENARIOS,
    clones::SCENARIOS,
    snapshots::SCENARIOS,
];

/// All of them, group by group.
pub const SCENARIOS: &[Scenario] = &joined::<{ count() }>();

const fn count() -> usize {
    let (mut count, mut group) = (0, 0);
    while group < GROUPS.len() {
        count += GROUPS[group].len();
        group += 1;
    }
    count
}

const fn joined<const N: usize>() -> [Scenario; N] {
    let mut all = [template::PLAIN; N];
    let (mut at, mut group) = (0, 0);
    while group < GROUPS.len() {
        let mut member = 0;
        while member < GROUPS[group].len() {
            all[at] = GROUPS[group][member];
            at += 1;
            member += 1;
        }
        group += 1;
    }
    all
}

/// Scenarios of PROTOCOL.md section 8 that are not here, and why.
pub const NOT_HERE: &[(&str, &str)] = &[
    (
        "A9, E6",
        "need file-backed private memory: guest memory here is anonymous",
    ),
    (
        "B7",
        "needs hugetlb, whose pages are reused by mapping count to this day",
    ),
    (
        "B6, C3, C3b, C4, D11",
        "need swap: guest memory here is never swapped by the VMM",
    ),
    ("C6", "needs NUMA hinting"),
    ("D5, E2, F7", "are races: model-checked in tests/loom"),
    (
        "D9",
        "needs an event at fork; here a child's pages are always read-only at first",
    ),
    (
        "D10",
        "needs entries that say a migration is going on; here it holds the region's lock",
    ),
    ("D14", "needs memory that forks leave out"),
    (
        "F6, F16",
        "need entries that say a migration is going on, or swap: here a split wants neither",
    ),
    (
        "F11",
        "needs userfaultfd; what is nearest, dirty tracking, leaves regions in small entries",
    ),
    (
        "F15",
        "needs a huge zero page: here untouched memory is in the one zero frame (E5, E5h)",
    ),
    ("E7", "needs short-term pins: ours are all long-term"),
    (
        "E11",
        "needs read-only memory: that unshare makes nothing writable is in E1 and E10",
    ),
    ("H-d", "is checked whenever a pin is given back"),
];

/// The scenario called `id`, whatever the case of its letters.
pub fn find(id: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|s| s.id.eq_ignore_ascii_case(id))
}
