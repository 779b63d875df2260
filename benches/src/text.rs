//! A report for people.

use std::fmt::Write;

use vmm::cli::units::{bytes, count, micros};

use crate::report::{Cell, First, Platform, Rate, Report, Setting, Skipped};
use crate::technique::Kind;
use crate::verdict::{Bound, Verdict};

/// From this load on other programs take CPU time that is then missing in the measurements.
const BUSY: f64 = 0.5;

/// All of `report`.
pub fn report(report: &Report) -> String {
    let mut text = head(report);
    for setting in report.settings() {
        text.push('\n');
        text.push_str(&table(report, setting));
    }
    text.push('\n');
    text.push_str(&targets(&report.targets));
    text
}

fn head(report: &Report) -> String {
    let Report {
        platform,
        machine,
        rounds,
        skipped,
        ..
    } = report;
    let mut text = format!(
        "snapshots of the same guest: {} KVM, Linux {}, {} CPUs; {rounds} snapshots each\n\
         a plain copy takes {} a page; pin and unpin {:.1} ns, two threads {:.2} times one\n",
        platform.kvm,
        platform.kernel,
        platform.cpus,
        micros(machine.copy_us_per_page),
        machine.pin_ns,
        machine.pin_two_threads,
    );
    text.push_str(&caveats(platform, skipped));
    text
}

/// What is to be known of the numbers.
pub(crate) fn caveats(platform: &Platform, skipped: &[Skipped]) -> String {
    let mut text = String::new();
    if platform.load > BUSY {
        let _ = writeln!(
            text,
            "the machine was busy before (load {:.2}): the numbers are of whatever ran beside, too",
            platform.load
        );
    }
    for skipped in skipped {
        let _ = writeln!(text, "left out: {}: {}", skipped.what, skipped.why);
    }
    text
}

/// A setting: one line a technique, each number with its ratio to ours.
fn table(report: &Report, setting: Setting<'_>) -> String {
    let Setting {
        memory,
        pattern,
        vcpus,
        dma,
    } = setting;
    let cells: Vec<&Cell> = report
        .cells
        .iter()
        .filter(|cell| cell.setting() == setting)
        .collect();
    let ours = cells
        .iter()
        .find(|cell| cell.technique == Kind::Ours.name());
    let mut text = format!(
        "{}, {pattern}, {vcpus} vcpu{}{}",
        bytes(memory),
        if vcpus == 1 { "" } else { "s" },
        if dma { ", DMA" } else { "" },
    );
    if let Some(cell) = cells.first() {
        let _ = write!(
            text,
            ": {} pages written, usual lap {}; without a snapshot: pause {}, longest gap {}",
            count(cell.pages),
            micros(cell.usual_lap_us),
            micros(cell.empty_pause_us),
            micros(cell.quiet_gap_us)
        );
    }
    text.push('\n');
    let rates: Vec<f64> = cells
        .first()
        .map(|cell| cell.rates.iter().map(|rate| rate.asked).collect())
        .unwrap_or_default();
    let mut lines = vec![header(&rates)];
    for cell in &cells {
        lines.push(line(cell, ours.copied(), &rates));
    }
    text.push_str(&align(&lines));
    text.push_str(&firsts(&cells, ours.copied()));
    text
}

/// The first snapshots of fresh guests beside the later ones of one, if any were measured.
fn firsts(cells: &[&Cell], ours: Option<&Cell>) -> String {
    let measured = || cells.iter().filter_map(|cell| Some((*cell, cell.first?)));
    let Some((_, first)) = measured().next() else {
        return String::new();
    };
    let ours = ours.and_then(|ours| Some((&ours.technique, ours.first?)));
    let header = [
        "",
        "pause p50",
        "",
        "max",
        "later",
        "stall p50",
        "",
        "max",
        "later",
    ];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    for (cell, first) in measured() {
        let to_ours = |number: fn(&First) -> f64| match &ours {
            Some((name, ours)) if **name != cell.technique => ratio(number(&first), number(ours)),
            _ => String::new(),
        };
        lines.push(vec![
            cell.technique.clone(),
            micros(first.pause_us.p50),
            to_ours(|first| first.pause_us.p50),
            micros(first.pause_us.max),
            ratio(first.pause_us.p50, cell.pause_us.p50),
            micros(first.stall_us.p50),
            to_ours(|first| first.stall_us.p50),
            micros(first.stall_us.max),
            ratio(first.stall_us.p50, cell.stall_us.p50),
        ]);
    }
    format!(
        "the first snapshot there is, of {} guests each; *later* is its ratio to those above\n{}",
        first.guests,
        align(&lines)
    )
}

fn header(rates: &[f64]) -> Vec<String> {
    let mut line: Vec<String> = [
        "",
        "pause p50",
        "",
        "p99",
        "max",
        "stall p50",
        "",
        "max",
        "gap p50",
        "",
        "max",
        "a page",
        "",
        "copied",
        "peak mem",
    ]
    .map(str::to_owned)
    .into();
    line.extend(rates.iter().map(|rate| format!("at {rate}/s")));
    line
}

fn line(cell: &Cell, ours: Option<&Cell>, rates: &[f64]) -> Vec<String> {
    let ratio = |number: fn(&Cell) -> f64| match ours {
        Some(ours) if ours.technique != cell.technique => ratio(number(cell), number(ours)),
        _ => String::new(),
    };
    let mut line = vec![
        cell.technique.clone(),
        micros(cell.pause_us.p50),
        ratio(|cell| cell.pause_us.p50),
        micros(cell.pause_us.p99),
        micros(cell.pause_us.max),
        micros(cell.stall_us.p50),
        ratio(|cell| cell.stall_us.p50),
        micros(cell.stall_us.max),
        micros(cell.gap_us.p50),
        ratio(|cell| cell.gap_us.p50),
        micros(cell.gap_us.max),
        micros(cell.per_page_us),
        ratio(|cell| cell.per_page_us),
        bytes(cell.copied),
        bytes(cell.peak_memory),
    ];
    line.extend(
        rates
            .iter()
            .map(|rate| cell.rate(*rate).map_or("-".to_owned(), share)),
    );
    line
}

/// How much of its speed the guest has, and how many snapshots there really were if fewer than asked for.
fn share(rate: &Rate) -> String {
    let percent = rate.share * 100.0;
    let share = match percent {
        p if p < 0.995 => format!("{p:.2}%"),
        p if p < 9.95 => format!("{p:.1}%"),
        p => format!("{p:.0}%"),
    };
    if rate.taken < rate.asked * 0.9 {
        format!("{share} ({:.1}/s)", rate.taken)
    } else {
        share
    }
}

/// `number` as a multiple of `ours`, three digits of it. Empty if there is none.
pub fn ratio(number: f64, ours: f64) -> String {
    let ratio = number / ours;
    match ratio {
        r if !r.is_finite() || r <= 0.0 => String::new(),
        r if r < 0.1 => format!("x{r:.3}"),
        r if r < 9.995 => format!("x{r:.2}"),
        r if r < 99.95 => format!("x{r:.1}"),
        r => format!("x{r:.0}"),
    }
}

/// The targets, one a line.
pub(crate) fn targets(verdicts: &[Verdict]) -> String {
    let mut lines: Vec<Vec<String>> = Vec::new();
    for verdict in verdicts {
        let limit = match verdict.bound {
            Bound::AtMost => format!("<= {}", number(verdict.limit)),
            Bound::AtLeast => format!(">= {}", number(verdict.limit)),
        };
        let outcome = match (verdict.met(), verdict.missed_by()) {
            (Some(true), _) => "met".to_owned(),
            (Some(false), Some(by)) if by.is_finite() => format!("missed, by a factor of {by:.2}"),
            (Some(false), _) => "missed".to_owned(),
            (None, _) => "not measured".to_owned(),
        };
        lines.push(vec![
            verdict.what.clone(),
            limit,
            verdict.found.map_or("-".to_owned(), number),
            outcome,
            format!("({})", verdict.where_),
        ]);
    }
    let mut text = "targets\n".to_owned();
    for line in align_by(&lines, |column| matches!(column, 1 | 2)).lines() {
        let _ = writeln!(text, "  {line}");
    }
    text
}

/// Four decimals at most, and three digits.
fn number(value: f64) -> String {
    match value {
        v if v < 0.1 => format!("{v:.4}"),
        v if v < 9.995 => format!("{v:.2}"),
        v => format!("{v:.1}"),
    }
}

/// A table below its title, or nothing if there is no line but the first, which is the header.
pub(crate) fn titled(title: &str, lines: &[Vec<String>]) -> String {
    match lines.len() {
        0 | 1 => String::new(),
        _ => format!("\n{title}\n{}", align(lines)),
    }
}

/// A line of a table.
pub(crate) fn fields<const N: usize>(fields: [&str; N]) -> Vec<String> {
    fields.map(str::to_owned).into()
}

/// `lines` with their fields in columns: the first to the left, the others to the right.
pub(crate) fn align(lines: &[Vec<String>]) -> String {
    align_by(lines, |column| column > 0)
}

/// `lines` with their fields in columns, to the right where `right` says so.
fn align_by(lines: &[Vec<String>], right: impl Fn(usize) -> bool) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        lines
            .iter()
            .filter_map(|line| line.get(column))
            .map(|field| field.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (column, (field, width)) in line.iter().zip(&widths).enumerate() {
            // A ratio stands close to its number.
            let gap = match column {
                0 => "",
                _ if field.starts_with('x') || (field.is_empty() && *width > 0) => " ",
                _ => "  ",
            };
            row.push_str(gap);
            if right(column) {
                let _ = write!(row, "{field:>width$}");
            } else {
                let _ = write!(row, "{field:<width$}");
            }
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{cell, report as example};

    #[test]
    fn ratios_have_three_digits() {
        for (number, ours, text) in [
            (1.0, 1.0, "x1.00"),
            (1.0, 30.0, "x0.033"),
            (300.0, 1.0, "x300"),
            (25.5, 2.0, "x12.8"),
            (9.996, 1.0, "x10.0"),
            (1.0, 0.0, ""),
            (0.0, 1.0, ""),
        ] {
            assert_eq!(ratio(number, ours), text);
        }
    }

    #[test]
    fn a_setting_is_a_table_with_ratios_to_ours() {
        let report = example(vec![
            cell("ours", 1 << 30, "hot", 1.0),
            cell("fork", 1 << 30, "hot", 40.0),
        ]);
        let table = table(&report, report.settings()[0]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[0],
            "1.00 GiB, hot, 1 vcpu: 32,768 pages written, usual lap 650 µs; \
             without a snapshot: pause 150 µs, longest gap 40.2 µs"
        );
        assert!(lines[1].contains("pause p50") && lines[1].contains("at 10/s"));
        assert!(lines[2].starts_with("ours") && !lines[2].contains(" x"));
        let fields: Vec<&str> = lines[3].split_whitespace().collect();
        assert_eq!(fields[..4], ["fork", "10.0", "ms", "x40.0"]);
        let end = |line: &str| line.chars().count();
        assert_eq!(end(lines[2]), end(lines[3]), "columns end alike:\n{table}");
    }

    #[test]
    fn first_snapshots_are_beside_ours_and_the_later_ones() {
        let mut cells = vec![
            cell("ours", 1 << 30, "dense", 1.0),
            cell("fork", 1 << 30, "dense", 40.0),
        ];
        let report = example(cells.clone());
        let without = table(&report, report.settings()[0]);
        for cell in &mut cells {
            let mut twice = cell.pause_us;
            twice.p50 *= 2.0;
            cell.first = Some(First {
                guests: 3,
                pause_us: twice,
                stall_us: cell.stall_us,
            });
        }
        let report = example(cells);
        let table = table(&report, report.settings()[0]);
        let first = table
            .strip_prefix(&without)
            .expect("it comes behind the others");
        let lines: Vec<&str> = first.lines().collect();
        assert!(lines[0].contains("of 3 guests each"), "{first}");
        let fields = |line: &str| {
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let (ours, fork) = (fields(lines[2]), fields(lines[3]));
        assert_eq!((&*ours[0], &*fork[0], &*fork[3]), ("ours", "fork", "x40.0"));
        assert_eq!(fork.iter().filter(|field| *field == "x2.00").count(), 1);
        assert_eq!(ours.iter().filter(|field| *field == "x2.00").count(), 1);
    }

    #[test]
    fn fewer_snapshots_than_asked_for_are_told() {
        let mut rate = cell("copy", 1 << 30, "hot", 1.0).rates[1];
        assert_eq!(share(&rate), "70%");
        rate.taken = 2.25;
        assert_eq!(share(&rate), "70% (2.2/s)");
        rate.share = 0.000_31;
        rate.taken = 10.0;
        assert_eq!(share(&rate), "0.03%");
    }

    #[test]
    fn targets_are_met_missed_or_not_measured() {
        let mut report = example(vec![
            cell("ours", 1 << 30, "dense", 1.0),
            cell("fork", 1 << 30, "dense", 10.0),
        ]);
        report.targets = crate::targets::judge(&report);
        let text = super::report(&report);
        let line = |what: &str| {
            text.lines()
                .find(|line| line.trim_start().starts_with(what))
                .unwrap()
        };
        assert!(
            line("dense rewrite, per page: ours / fork").contains("missed, by a factor of 2.00")
        );
        assert!(line("pin and unpin").contains("met"));
        assert!(line("any mix").contains("not measured"));
        assert!(text.contains("the machine was busy before (load 1.25)"));
        assert!(text.contains("left out: ours-2m: this build has no 2 MiB frames"));
    }
}
