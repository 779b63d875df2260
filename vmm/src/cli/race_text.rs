//! The live race under each policy, as a table.

use std::fmt::Write;

use super::printable::printable;
use super::units::{bytes, count, exact_time, micros};
use crate::policy::Policy;
use crate::session::compare::{Race, Raced};
use crate::session::report::{Oracle, Verdict};

/// A row a policy.
pub(super) fn render(race: &Race, races: &[Raced]) -> String {
    let config = race.config(Policy::Exclusive);
    let tracking = config.track_dirty.map_or_else(String::new, |every| {
        format!(", dirty tracking every {}", exact_time(every))
    });
    let mut text = format!(
        "the race: {} under each policy; {}, {} vcpus, {} devices,\n  \
         a snapshot every {}{tracking}; seed {}\n",
        exact_time(race.duration),
        bytes(race.memory),
        race.vcpus,
        config.dma_devices,
        exact_time(config.snapshot_every),
        race.seed
    );
    if let Some(raced) = races.first() {
        let platform = &raced.report.platform;
        let by = match &*platform.kvm {
            "none" => "threads of this process".to_owned(),
            kvm => format!("{kvm} KVM"),
        };
        let _ = writeln!(
            text,
            "  on {}, Linux {}, {} CPUs",
            by, platform.kernel, platform.cpus
        );
    }
    let _ = write!(text, "\n  {:<21}", "violations of");
    for oracle in Oracle::ALL {
        let _ = write!(text, " {:>5.5}", oracle.name());
    }
    let _ = writeln!(text);
    for raced in races {
        let _ = write!(text, "  {:<21}", raced.policy.name());
        for oracle in Oracle::ALL {
            let _ = write!(text, " {:>5}", raced.report.violations.of(oracle));
        }
        let _ = writeln!(text, "  {}", verdict(raced));
    }
    let _ = writeln!(
        text,
        "\n  {:<21} {:>6} {:>9} {:>9} {:>7} {:>9} {:>11}",
        "", "snaps", "pause p50", "copies", "eager", "unshared", "ops/s"
    );
    let base = races
        .iter()
        .find(|r| r.policy == Policy::Exclusive)
        .map(|r| r.report.guest.ops_per_s)
        .filter(|&ops| ops > 0.0);
    for raced in races {
        let report = &raced.report;
        let pause = report.pause_us.p50.map_or_else(|| "-".to_owned(), micros);
        let ratio = base.map_or_else(String::new, |base| {
            format!(" {:>7}", format!("{:.2} x", report.guest.ops_per_s / base))
        });
        let _ = writeln!(
            text,
            "  {:<21} {:>6} {pause:>9} {:>9} {:>7} {:>9} {:>11}{ratio}",
            raced.policy.name(),
            report.snapshots.taken,
            count(report.faults.copied),
            count(report.faults.eager_copied),
            count(report.faults.unshared),
            count(report.guest.ops_per_s as u64),
        );
    }
    for raced in races {
        if let Some(error) = &raced.report.error {
            let first = error.lines().next().unwrap_or_default();
            let _ = writeln!(
                text,
                "\n  under {} the run ended early: {}",
                raced.policy,
                printable(first)
            );
        }
    }
    text
}

fn verdict(raced: &Raced) -> String {
    let expected: Vec<_> = raced.must_show.iter().map(|o| o.name()).collect();
    match (raced.is_as_expected(), expected.is_empty()) {
        (true, true) => "right, as it must be".to_owned(),
        (true, false) => format!("wrong, as expected ({})", expected.join(", ")),
        (false, _)
            if matches!(
                raced.report.verdict,
                Verdict::Error | Verdict::NothingChecked
            ) =>
        {
            "! did not finish".to_owned()
        }
        (false, true) => "! VIOLATED".to_owned(),
        (false, false) if raced.was_too_short() => "! too short to tell".to_owned(),
        (false, false) => format!("! not caught ({})", expected.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::session::compare::must_show;
    use crate::session::report::ViolationCounts;
    use crate::session::report::tests::example;

    fn raced(policy: Policy, seen: Option<Oracle>) -> Raced {
        let mut report = example();
        report.violations = ViolationCounts::default();
        report.error = None;
        report.verdict = Verdict::Ok;
        if let Some(oracle) = seen {
            report.violations.add(oracle);
            report.verdict = Verdict::Violated;
        }
        Raced {
            policy,
            must_show: must_show(policy),
            report,
        }
    }

    #[test]
    fn every_policy_has_a_row_and_what_is_not_expected_is_marked() {
        let race = Race {
            duration: Duration::from_secs(3),
            seed: 5,
            memory: 64 << 20,
            vcpus: 2,
            accel: crate::accel::Accel::Kvm,
        };
        let text = render(
            &race,
            &[
                raced(Policy::Mapcount, Some(Oracle::Isolation)),
                raced(Policy::Refcount, None),
                raced(Policy::Seed, Some(Oracle::Cut)),
                raced(Policy::Exclusive, Some(Oracle::Life)),
            ],
        );
        let has = |policy: &str, end: &str| {
            let is_it = |l: &&str| l.trim_start().starts_with(policy) && l.ends_with(end);
            assert!(text.lines().any(|l| is_it(&l)), "{policy}: {end}\n{text}");
        };
        has("mapcount", "wrong, as expected (isolation)");
        has("refcount", "! not caught (coherence)");
        has("seed", "! not caught (coherence)");
        has("exclusive", "! VIOLATED");
        has("exclusive", "1.00 x");
        assert!(text.contains("seed 5"), "{text}");
        let right = render(&race, &[raced(Policy::Exclusive, None)]);
        assert!(right.contains("right, as it must be"), "{right}");
        assert!(text.lines().all(|l| l.chars().count() <= 100), "{text}");
        for text in [&text, &render(&race, &[raced(Policy::Seed, None)])] {
            assert!(text.lines().all(|l| l == l.trim_end()), "{text}");
        }
    }
}
