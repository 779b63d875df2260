//! The report of `vmm fork`, for people.

use std::fmt::Write;

use crate::cli::printable::printable;
use crate::cli::report_text::{kvm_in_words, loaded_rows, plural, quantiles, violations};
use crate::cli::units::{bytes, count, exact_time, micros};
use crate::session::config::{Size, pattern_name};
use crate::session::family::config::Shape;
use crate::session::family::report::{FamilyReport, SharesReport};
use crate::session::report::{EndedBy, Verdict};

/// `report` on one screen. The first line is the verdict.
pub(super) fn render(report: &FamilyReport) -> String {
    let mut text = verdict(report);
    text.push('\n');
    let error = report.error.as_deref().unwrap_or_default();
    let told = usize::from(report.verdict == Verdict::Error);
    for line in error.lines().skip(told) {
        let _ = writeln!(text, "  {}", printable(line));
    }
    text.push('\n');
    for (name, value) in rows(report) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<11} {value}");
    }
    text
}

fn verdict(report: &FamilyReport) -> String {
    let machines = report.machines.len() as u64;
    match report.verdict {
        Verdict::Ok => format!(
            "ok: {}, {} of them, every one checked bit for bit, no violation",
            plural(machines, "machine"),
            plural(report.snapshots, "snapshot")
        ),
        Verdict::NothingChecked => format!("nothing checked: {}", report.unchecked.join("; ")),
        Verdict::Violated => format!(
            "VIOLATED: {} in {} of {}",
            plural(report.violations.total(), "violation"),
            plural(report.snapshots, "snapshot"),
            plural(machines, "machine")
        ),
        Verdict::Error => {
            let error = report.error.as_deref().unwrap_or_default();
            let first = error.lines().next().unwrap_or("no reason given");
            format!("could not finish: {}", printable(first))
        }
    }
}

fn rows(report: &FamilyReport) -> Vec<(&'static str, String)> {
    let FamilyReport { config, .. } = report;
    let guest = &config.guest;
    let shape = match config.shape {
        Shape::Clones(clones) => plural(clones, "clone"),
        Shape::Tree { depth, width } => format!(
            "{} below the root, {} of each machine",
            plural(depth, "generation"),
            plural(width, "clone")
        ),
    };
    let ended = match report.ended_by {
        EndedBy::CtrlC => ", ended early by Ctrl-C or a signal",
        EndedBy::Error => ", until an error",
        _ => ", as asked",
    };
    let mut rows = vec![
        ("run", format!("{}{ended}", micros(report.duration_s * 1e6))),
        (
            "asked for",
            format!(
                "{shape}; {}{}, {}, {}, {}, {} before the first",
                Size(guest.memory),
                config
                    .quota
                    .map_or(String::new(), |quota| format!(" ({} each)", Size(quota))),
                plural(guest.vcpus, "vCPU"),
                plural(guest.dma_devices, "device"),
                pattern_name(guest.pattern),
                exact_time(config.warm_up)
            ),
        ),
    ];
    if let Some(loaded) = &report.loaded {
        let store = printable(&loaded.store);
        let from = format!("the root, from {} in {store}", loaded.name);
        rows.extend(loaded_rows(&from, loaded));
    }
    rows.extend([
        ("", format!("{:>10} {:>10} {:>10}", "p50", "p99", "max")),
        (
            "clone",
            quantiles(
                &report.first_instruction_us,
                "from the wish to its first instruction",
            ),
        ),
        (
            "fork pause",
            quantiles(
                &report.fork_pause_us,
                "its parent stands still, once for all its clones",
            ),
        ),
        (
            "pause",
            quantiles(&report.pause_us, "for the other snapshots"),
        ),
    ]);
    if let Some(forking) = report.forking {
        rows.push((
            "forking",
            format!(
                "{} in {}; the root {} operations/s before, {} meanwhile",
                plural(forking.clones, "clone"),
                micros(forking.time_s * 1e6),
                count(forking.root_ops_per_s_before as u64),
                count(forking.root_ops_per_s_meanwhile as u64)
            ),
        ));
    }
    let ops: u64 = report.machines.iter().map(|m| m.ops).sum();
    let least = report.machines.iter().map(|m| m.ops).min().unwrap_or(0);
    let copied: u64 = report.machines.iter().map(|m| m.pages_copied).sum();
    rows.extend([
        (
            "guests",
            format!(
                "{} operations, {} at least by each; {} copied",
                count(ops),
                count(least),
                plural(copied, "page")
            ),
        ),
        (
            "snapshots",
            format!(
                "{} taken, {} checked ({})",
                count(report.snapshots),
                count(report.checked),
                plural(report.checked_pages, "page")
            ),
        ),
        (
            "identity",
            format!("{} compared", plural(report.checked_draws, "random number")),
        ),
    ]);
    if let Some(shares) = &report.shares {
        rows.push(("memory", of_each(shares)));
    }
    rows.extend([(
        "in use",
        format!(
            "{} of {} at most, {} of {} mappings",
            bytes(report.bytes_peak),
            bytes(report.bytes_limit),
            count(report.mappings_peak),
            count(report.mappings_limit)
        ),
    )]);
    rows.extend(violations(&report.violations));
    if let Some(fault) = guest.inject {
        let outcome = match report.violations.total() {
            0 => "NOT caught",
            _ => "caught",
        };
        rows.push(("injected", format!("{fault}: {outcome}")));
    }
    rows.extend([
        ("policy", guest.policy.to_string()),
        (
            "platform",
            format!(
                "{}, Linux {}, {}",
                kvm_in_words(&report.platform.kvm, &report.platform.paging),
                report.platform.kernel,
                plural(report.platform.cpus, "CPU")
            ),
        ),
        ("seed", format!("{} (repeat with --seed {0})", guest.seed)),
    ]);
    rows
}

/// What clones have of memory, alone and with others.
fn of_each(shares: &SharesReport) -> String {
    let machines = shares.holders.iter().filter(|h| !h.is_snapshot);
    let mut alone: Vec<u64> = machines.map(|m| m.alone_bytes).collect();
    alone.sort_unstable();
    let middle = alone.get(alone.len() / 2).copied().unwrap_or(0);
    let most = alone.last().copied().unwrap_or(0);
    format!(
        "each machine {} by itself ({} at most), {} shared by several",
        bytes(middle),
        bytes(most),
        bytes(shares.shared_bytes)
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::check::ViolationCounts;
    use crate::session::config::Injection;
    use crate::session::config::tests::example as guest;
    use crate::session::family::config::FamilyConfig;
    use crate::session::family::report::{Forking, MemberReport, Shares};
    use crate::session::report::{Platform, Quantiles};

    fn example() -> FamilyReport {
        let member = |id: usize| MemberReport {
            id,
            parent: (id > 0).then_some(0),
            depth: u64::from(id > 0),
            first_instruction_us: (id > 0).then_some(412.5),
            ops: 1_000 * (id as u64 + 1),
            pages_copied: 7,
        };
        let times = |micros| Quantiles {
            p50: Some(micros),
            p99: Some(2.0 * micros),
            max: Some(3.0 * micros),
        };
        let holder = |machine, is_snapshot, mib: u64| Shares {
            machine,
            is_snapshot,
            alone_bytes: mib << 20,
            shared_bytes: 40 << 20,
        };
        FamilyReport {
            version: "0.1.0".to_owned(),
            platform: Platform {
                accel: "kvm".to_owned(),
                kvm: "pvm".to_owned(),
                paging: "shadow".to_owned(),
                kernel: "6.18.0".to_owned(),
                cpus: 2,
            },
            config: FamilyConfig {
                quota: None,
                guest: guest(),
                shape: Shape::Clones(2),
                warm_up: Duration::from_secs(1),
                duration: Duration::from_secs(5),
            },
            verdict: Verdict::Ok,
            error: None,
            unchecked: Vec::new(),
            ended_by: EndedBy::Duration,
            duration_s: 6.25,
            loaded: None,
            refused: None,
            forking: Some(Forking {
                clones: 2,
                time_s: 0.001,
                root_ops_per_s_before: 200_000.0,
                root_ops_per_s_meanwhile: 150_000.0,
            }),
            first_instruction_us: times(412.5),
            fork_pause_us: times(120.0),
            pause_us: times(130.0),
            snapshots: 55,
            checked: 55,
            checked_pages: 123_456,
            checked_draws: 7_654,
            shares: Some(SharesReport {
                holders: vec![
                    holder(0, false, 3),
                    holder(1, false, 2),
                    holder(2, false, 9),
                    holder(0, true, 100),
                ],
                shared_bytes: 40 << 20,
                held_bytes: 0,
                unexplained_bytes: 0,
            }),
            machines: (0..3).map(member).collect(),
            violations: ViolationCounts::default(),
            bytes_peak: 300 << 20,
            bytes_limit: 900 << 20,
            mappings_peak: 77,
            mappings_limit: 63_530,
        }
    }

    #[test]
    fn a_good_family_reads_like_this() {
        assert_eq!(
            render(&example()),
            "\
ok: 3 machines, 55 snapshots of them, every one checked bit for bit, no violation

run         6.25 s, as asked
asked for   2 clones; 256 MiB, 2 vCPUs, 2 devices, uniform, 1 s before the first
                   p50        p99        max
clone           412 µs     825 µs    1.24 ms   from the wish to its first instruction
fork pause      120 µs     240 µs     360 µs   its parent stands still, once for all its clones
pause           130 µs     260 µs     390 µs   for the other snapshots
forking     2 clones in 1.00 ms; the root 200,000 operations/s before, 150,000 meanwhile
guests      6,000 operations, 1,000 at least by each; 21 pages copied
snapshots   55 taken, 55 checked (123,456 pages)
identity    7,654 random numbers compared
memory      each machine 3.00 MiB by itself (9.00 MiB at most), 40.0 MiB shared by several
in use      300 MiB of 900 MiB at most, 77 of 63,530 mappings
violations  cut 0, isolation 0, coherence 0, life 0, tracking 0,
            identity 0, accounting 0
policy      exclusive
platform    PVM (KVM without VMX or SVM), Linux 6.18.0, 2 CPUs
seed        7 (repeat with --seed 7)
"
        );
    }

    #[test]
    fn what_went_wrong_comes_first() {
        let mut report = example();
        report.verdict = Verdict::Error;
        report.error = Some("clone 2 was refused: no memory\nmachine 1: a\x1bcrash".to_owned());
        let text = render(&report);
        let expected =
            "could not finish: clone 2 was refused: no memory\n  machine 1: a\\u{1b}crash\n\n";
        assert!(text.starts_with(expected), "{text}");
        report.verdict = Verdict::Violated;
        report.violations.isolation = 2;
        report.config.guest.inject = Some(Injection::ReuseShared);
        let text = render(&report);
        assert!(text.starts_with("VIOLATED: 2 violations in 55 snapshots of 3 machines\n"));
        assert!(text.contains("\n  clone 2 was refused"), "{text}");
        assert!(text.contains("injected    reuse-shared: caught"), "{text}");
    }
}
