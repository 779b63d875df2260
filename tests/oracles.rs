//! The oracles on real KVM: silent on a run that is right, and each of them loud about the fault that is made for it.

mod support;

use std::time::{Duration, Instant};

use palimpsest::check::{Oracle, Violation};
use palimpsest::session::config::{Config, Injection, RunLength};
use palimpsest::session::report::Verdict;
use support::{PATIENCE, Run, config, no_kvm, run, run_until};

/// A fault shows only if the guest or a device does the wrong thing at the wrong moment. Most show in the first few
/// snapshots; `run-devices` needs a device to be between its data and its completion just when memory is forked, which
/// takes some hundred of them on a machine that does nothing else. So runs are long, and repeated with other seeds for as
/// long as patience lasts before the oracle is blamed.
fn caught(fault: Injection) -> Run {
    let oracle = fault.caught_by();
    let mut missed = String::new();
    let deadline = Instant::now() + PATIENCE;
    for seed in 1.. {
        let asked = Config {
            seed,
            dma_devices: 4,
            track_dirty: (fault == Injection::ForgetDirty).then_some(Duration::from_millis(2)),
            inject: Some(fault),
            ..config()
        };
        let run = run_until(asked, move |seen| {
            let now = seen.now();
            now.snapshots >= 250 || now.violations.of(oracle) > 0
        });
        if run.report.violations.of(oracle) > 0 {
            return run;
        }
        missed.push_str(&format!("\nseed {seed}: {:?}", run.report.violations));
        if Instant::now() > deadline {
            break;
        }
    }
    panic!("{fault} was not caught by {oracle}:{missed}");
}

/// Checks the verdict on `fault`, and returns what its oracle has said.
fn violations(fault: Injection) -> Vec<Violation> {
    let run = caught(fault);
    assert_eq!(run.report.verdict, Verdict::Violated);
    run.assert_all_told();
    let mut violations = run.seen.violations;
    violations.retain(|v| v.oracle == fault.caught_by());
    let heading = format!("violation of {}: ", fault.caught_by());
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
            length: RunLength::Snapshots(100),
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
fn a_page_that_a_restore_forgets_breaks_life() {
    if no_kvm() {
        return;
    }
    for violation in violations(Injection::StalePage) {
        assert_tells_where(&violation, config().memory);
    }
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
fn a_leaked_pin_breaks_accounting() {
    if no_kvm() {
        return;
    }
    let violations = violations(Injection::LeakPin);
    assert_eq!(violations.len(), 1, "{violations:?}");
    assert!(violations[0].found.contains("1 pins"), "{}", violations[0]);
}
