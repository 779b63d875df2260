//! The report of `vmm fork`, for people.

use std::fmt::Write;

use crate::cli::printable::printable;
use crate::cli::report_text::{kvm_in_words, plural, quantiles};
use crate::cli::units::{bytes, count, exact_time, micros};
use crate::session::config::{Size, pattern_name};
use crate::session::family::config::Shape;
use crate::session::family::report::{FamilyReport, SharesReport};
use crate::session::report::{EndedBy, Oracle, Verdict};

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
                "{shape}; {}, {}, {}, {}, {} before the first",
                Size(guest.memory),
                plural(guest.vcpus, "vCPU"),
                plural(guest.dma_devices, "device"),
                pattern_name(guest.pattern),
                exact_time(config.warm_up)
            ),
        ),
    ];
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
    ]);
    if let Some(shares) = &report.shares {
        rows.push(("memory", of_each(shares)));
    }
    rows.extend([
        (
            "in use",
            format!(
                "{} of {} at most, {} of {} mappings",
                bytes(report.bytes_peak),
                bytes(report.bytes_limit),
                count(report.mappings_peak),
                count(report.mappings_limit)
            ),
        ),
        (
            "violations",
            Oracle::ALL
                .map(|oracle| format!("{oracle} {}", count(report.violations.of(oracle))))
                .join(", "),
        ),
    ]);
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
