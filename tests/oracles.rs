//! The oracles on real KVM: silent on a run that is right, and each of them loud about its fault.

mod support;

use std::ops::RangeInclusive;
use std::time::Duration;

use support::{Run, config, no_kvm, run, times};
use vmm::check::{Oracle, Violation};
use vmm::session::config::{Config, Injection, RunLength};
use vmm::session::report::Verdict;

/// Seeds that every fault is tried with.
fn seeds() -> RangeInclusive<u64> {
    1..=times(20)
}

/// Runs with `fault` in them, as short as can be: they go on until the fault has had its occasion, however
/// fast the guest is, and not longer. Its oracle must see it in every one.
fn caught(fault: Injection) -> Vec<Run> {
    let oracle = fault.caught_by();
    seeds()
        .map(|seed| {
            let run = run(Config {
                seed,
                length: RunLength::Snapshots(1),
                restore_every: 1,
                dma_devices: 4,
                track_dirty: (fault == Injection::ForgetDirty).then_some(Duration::from_millis(2)),
                inject: Some(fault),
                ..config()
            });
            let seen = &run.report.violations;
            assert!(
                seen.of(oracle) > 0,
                "{fault}, seed {seed}: {seen:?}, {:?}",
                run.report.error
            );
            run
        })
        .collect()
}

/// Checks the verdicts on `fault`, and returns what its oracle has said.
fn violations(fault: Injection) -> Vec<Violation> {
    let oracle = fault.caught_by();
    let heading = format!("violation of {oracle}: ");
    let mut violations = Vec::new();
    for run in caught(fault) {
        assert_eq!(run.report.verdict, Verdict::Violated);
        run.assert_all_told();
        violations.extend(
            run.seen
                .violations
                .into_iter()
                .filter(|v| v.oracle == oracle),
        );
    }
    for violation in &violations {
        assert!(violation.to_string().starts_with(&heading), "{violation}");
    }
    violations
}

/// What a violation at a page must say for somebody to look into it.
fn assert_tells_where(violation: &Violation, memory: u64) {
    assert!(violation.gpa.is_some_and(|gpa| gpa < memory), "{violation}");
    assert!(!violation.expected.is_empty(), "{violation}");
    assert!(!violation.found.is_empty(), "{violation}");
    assert_ne!(violation.expected, violation.found, "{violation}");
}

#[test]
fn a_clean_run_has_no_violation() {
    if no_kvm() {
        return;
    }
    for seed in [1, 2, 3] {
        let run = run(Config {
            seed,
            dma_devices: 4,
            length: RunLength::Snapshots(times(100)),
            ..config()
        });
        run.assert_clean();
        assert!(run.report.checked_pages > 0);
    }
}

#[test]
fn every_oracle_has_a_fault() {
    for oracle in Oracle::ALL {
        assert!(
            Injection::ALL
                .iter()
                .any(|fault| fault.caught_by() == oracle),
            "{oracle}"
        );
    }
}

#[test]
fn sharing_a_pinned_page_breaks_coherence() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::SharePinned) {
        assert_tells_where(&violation, config().memory);
        assert!(violation.last_writer.contains("device"), "{violation}");
        assert!(!violation.frame.is_empty(), "{violation}");
    }
}

#[test]
fn a_page_left_writable_breaks_isolation() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::SkipWriteProtect) {
        assert_tells_where(&violation, config().memory);
        assert!(violation.snapshot.is_some(), "{violation}");
    }
}

#[test]
fn writing_a_shared_frame_in_place_breaks_isolation() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::ReuseShared) {
        assert_tells_where(&violation, config().memory);
        assert!(violation.snapshot.is_some(), "{violation}");
    }
}

#[test]
fn devices_that_run_on_break_the_cut() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::RunDevices) {
        assert!(violation.snapshot.is_some(), "{violation}");
    }
}

#[test]
fn registers_captured_late_break_the_cut() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::LateRegisters) {
        assert!(violation.snapshot.is_some(), "{violation}");
    }
}

#[test]
fn registers_of_an_earlier_instant_break_the_cut() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::StaleRegisters) {
        assert!(violation.detail.starts_with("vcpu 0: "), "{violation}");
        assert!(violation.snapshot.is_some(), "{violation}");
    }
}

/// All pages that are compared with that vCPU's registers alone agree with them. Only its marks in the pages
/// of other vCPUs show that it is of another instant, and, to another oracle, the random numbers it has
/// drawn.
#[test]
fn a_vcpu_of_an_earlier_instant_breaks_the_cut() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::SkewVcpus) {
        assert!(violation.detail.contains("mark"), "{violation}");
        assert_tells_where(&violation, config().memory);
    }
}

#[test]
fn a_page_that_a_restore_forgets_breaks_life() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::StalePage) {
        assert_tells_where(&violation, config().memory);
    }
}

/// What a fault needs does not come by itself where it was not asked for.
#[test]
fn a_run_that_would_not_restore_does_so_for_a_fault_that_needs_it() {
    if no_kvm() {
        return;
    }
    let run = run(Config {
        length: RunLength::Snapshots(3),
        restore_every: u64::MAX,
        inject: Some(Injection::StalePage),
        ..config()
    });
    assert_eq!(run.report.snapshots.restored, 1);
    assert!(run.report.violations.life > 0, "{:?}", run.report);
}

#[test]
fn a_dirty_page_that_is_kept_back_breaks_tracking() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::ForgetDirty) {
        assert_tells_where(&violation, config().memory);
        assert!(violation.snapshot.is_some(), "{violation}");
    }
}

#[test]
fn a_rewound_guest_that_keeps_its_generation_breaks_identity() {
    if no_kvm() {
        return;
    }
    let mut drawn_again = 0;
    for violation in violations(Injection::SameGeneration) {
        assert!(!violation.expected.is_empty(), "{violation}");
        assert_ne!(violation.expected, violation.found, "{violation}");
        drawn_again += u64::from(violation.detail.ends_with("which were drawn before"));
    }
    // By each vCPU in each run: it has its occasion.
    assert!(drawn_again >= config().vcpus * seeds().count() as u64);
}

#[test]
fn a_leaked_pin_breaks_accounting() {
    if no_kvm() {
        return;
    }
    let violations = violations(Injection::LeakPin);
    // One a run.
    assert_eq!(violations.len(), seeds().count(), "{violations:?}");
    for violation in violations {
        assert!(violation.found.contains("1 pins"), "{violation}");
    }
}
