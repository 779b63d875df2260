//! Accounting: when VM, devices and snapshots are gone, everything must have been given back.

use super::violation::{Oracle, Violation};
use palimpsest::host::MappingBudget;
use palimpsest::mm::FramePool;

/// The most frames that are reported one by one.
const MOST: usize = 16;

/// Reports what is still held after the VM, its devices and all snapshots were dropped.
pub fn account(pool: &FramePool, budget: &MappingBudget) -> Vec<Violation> {
    let mut violations: Vec<_> = pool
        .leftovers(MOST)
        .into_iter()
        .map(|(pfn, state)| {
            let mut v = Violation::new(
                Oracle::Accounting,
                "a frame is still held though everybody is gone",
            );
            v.expected = "free".to_owned();
            v.found = format!(
                "{} mappings, {} readers, {} pins",
                state.maps(),
                state.gets(),
                state.pins()
            );
            v.frame = format!("{pfn:?} {state:?}");
            v
        })
        .collect();
    let in_use = pool.usage().in_use;
    if violations.is_empty() && in_use > 0 {
        violations.push(Violation::new(
            Oracle::Accounting,
            format!("{in_use} frames are booked as used and none of them is"),
        ));
    }
    if budget.used() > 0 {
        violations.push(Violation::new(
            Oracle::Accounting,
            format!(
                "{} window mappings are booked though no window is left",
                budget.used()
            ),
        ));
    }
    violations
}
