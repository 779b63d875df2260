//! The report at the end of a run, for people.

use std::fmt::Write;

use super::{
    printable::printable,
    units::{bytes, count, exact_time, micros},
};
use crate::session::{
    config::{Config, RunLength, Size, pattern_name},
    report::{
        CheckpointCounts, EndedBy, FaultCounts, LoadCounts, Oracle, Quantiles, Report, SaveCounts,
        StepQuantiles, Verdict, ViolationCounts,
    },
};

/// `report` on one screen. The first line is the verdict; what a crashed guest left comes right after it.
pub(crate) fn render(report: &Report) -> String {
    let mut text = verdict(report);
    text.push('\n');
    // The first line of the error is in the verdict, if that is an error.
    let error = report.error.as_deref().unwrap_or_default();
    let told = usize::from(report.verdict == Verdict::Error);
    for line in error.lines().skip(told) {
        text.push_str("  ");
        text.push_str(&printable(line));
        text.push('\n');
    }
    text.push('\n');
    for (name, value) in rows(report) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<11} {value}");
    }
    text
}

fn verdict(report: &Report) -> String {
    let snapshots = &report.snapshots;
    match report.verdict {
        Verdict::Ok => {
            let checked = match (snapshots.taken, snapshots.checked) {
                (taken, checked) if taken == checked => {
                    format!(
                        "{} taken, every one checked bit for bit",
                        plural(taken, "snapshot")
                    )
                }
                (taken, checked) => format!(
                    "{} taken, {} checked bit for bit",
                    plural(taken, "snapshot"),
                    count(checked)
                ),
            };
            format!("ok: {checked}, no violation")
        }
        Verdict::NothingChecked => format!("nothing checked: {}", report.unchecked.join("; ")),
        Verdict::Violated => format!(
            "VIOLATED: {} in {}",
            plural(report.violations.total(), "violation"),
            plural(snapshots.taken, "snapshot")
        ),
        Verdict::Error => {
            let error = report.error.as_deref().unwrap_or_default();
            format!(
                "could not finish: {}",
                printable(error.lines().next().unwrap_or("no reason given"))
            )
        }
    }
}

/// What was saved, and what that took.
fn saved_text(saved: &SaveCounts) -> String {
    let name = format!("{} in {}", saved.name, printable(&saved.store));
    if !saved.is_saved {
        return format!("NOT {name}");
    }
    format!(
        "{name}: {} written of {} in {}; {} chunks new, {} known, {} unread",
        bytes(saved.bytes_written),
        bytes(saved.memory_bytes),
        micros(saved.seconds * 1e6),
        count(saved.written),
        count(saved.found),
        count(saved.same)
    )
}

/// What was saved every so often.
fn checkpoints_text(counts: &CheckpointCounts) -> String {
    let mut text = format!(
        "{} of {} in {}",
        plural(counts.saved, "checkpoint"),
        counts.name,
        printable(&counts.store)
    );
    if let Some(last) = &counts.last {
        text.push_str(&format!(
            ", the last {last}; {} written, {} kept",
            bytes(counts.bytes_written),
            count(counts.kept)
        ));
    }
    if counts.failed > 0 {
        text.push_str(&format!("; {} NOT saved", count(counts.failed)));
    }
    text
}

/// Oracles on the first line of those that say what each has seen.
const ORACLES_A_LINE: usize = 5;

fn rows(report: &Report) -> Vec<(&'static str, String)> {
    let Report {
        config,
        guest,
        snapshots,
        faults,
        pins,
        dma,
        memory,
        platform,
        ..
    } = report;
    let mut rows = vec![
        ("run", ended(report)),
        ("asked for", asked(config)),
        (
            "guest",
            format!(
                "{} operations, {} a second",
                count(guest.ops),
                count(guest.ops_per_s as u64)
            ),
        ),
        (
            "snapshots",
            format!(
                "{} taken, {} checked ({}), {} restored",
                count(snapshots.taken),
                count(snapshots.checked),
                plural(report.checked_pages, "page"),
                count(snapshots.restored)
            ),
        ),
        (
            "in flight",
            format!(
                "{} with a device in the middle of a request",
                plural(snapshots.in_flight, "snapshot")
            ),
        ),
        ("", format!("{:>10} {:>10} {:>10}", "p50", "p99", "max")),
        (
            "pause",
            quantiles(&report.pause_us, "kick to last vCPU running again"),
        ),
        ("steps p50", steps(&report.steps_us)),
        (
            "stall",
            quantiles(&report.stall_us, "longest gap the guest saw"),
        ),
        (
            "faults",
            format!(
                "{} copied, {} reused, {} unshared, {} zero-filled",
                count(faults.copied),
                count(faults.reused),
                count(faults.unshared),
                count(faults.zero_filled)
            ),
        ),
        (
            "regions",
            format!(
                "{} copied whole ({}), {} split; {} copied ahead",
                count(faults.whole),
                plural(faults.neighbours, "page"),
                count(faults.split),
                count(faults.ahead)
            ),
        ),
        (
            "pins",
            format!(
                "{} fast, {} slow, {} registered",
                count(pins.fast),
                count(pins.slow),
                count(pins.registered)
            ),
        ),
        (
            "forks",
            format!(
                "{} copied at once",
                plural(faults.eager_copied, "pinned page")
            ),
        ),
        (
            "DMA",
            format!(
                "{} to the guest, {} from it, {}",
                plural(dma.to_guest, "request"),
                count(dma.from_guest),
                bytes(dma.bytes)
            ),
        ),
        (
            "memory",
            format!(
                "{} of {} committed at most, {} of {} mappings",
                bytes(memory.bytes_peak),
                bytes(memory.committed_peak),
                count(memory.vmas_peak),
                count(memory.vmas_limit)
            ),
        ),
    ];
    rows.extend(violations(&report.violations));
    if let Some(found) = found_by(faults) {
        let at = rows.iter().position(|(name, _)| *name == "regions");
        rows.insert(at.unwrap_or(rows.len()), ("found by", found));
    }
    if snapshots.dropped > 0 {
        let dropped = format!(
            "{} early, to make room for the guest's writes",
            plural(snapshots.dropped, "snapshot")
        );
        rows.insert(4, ("dropped", dropped));
    }
    if report.lines_lost > 0 {
        let lost = format!(
            "{} lost: nobody read them in time",
            plural(report.lines_lost, "line")
        );
        rows.push(("output", lost));
    }
    if let Some(every) = config.track_dirty {
        let dirty = &report.dirty;
        let told = format!(
            "asked {} times (every {}), {} told",
            count(dirty.rounds),
            exact_time(every),
            plural(dirty.pages, "page")
        );
        let forks = rows.iter().position(|(name, _)| *name == "forks");
        rows.insert(forks.map_or(rows.len(), |at| at + 1), ("dirty", told));
    }
    if let Some(fault) = config.inject {
        let oracle = fault.caught_by();
        let outcome = if report.violations.of(oracle) > 0 {
            format!("caught by {oracle}")
        } else if report.violations.total() > 0 {
            format!("caught, but not by {oracle}")
        } else {
            format!("NOT caught by {oracle}")
        };
        rows.push(("injected", format!("{fault}: {outcome}")));
    }
    if let Some(loaded) = &report.loaded {
        let from = format!("{} from {}", loaded.name, printable(&loaded.store));
        rows.extend(loaded_rows(&from, loaded));
    }
    if let Some(saved) = &report.saved {
        rows.push(("saved", saved_text(saved)));
    }
    if let Some(checkpoints) = &report.checkpoints {
        rows.push(("saved", checkpoints_text(checkpoints)));
    }
    rows.push(("policy", report.policy.clone()));
    rows.push((
        "platform",
        format!(
            "{}, Linux {}, {}",
            kvm_in_words(&platform.kvm, &platform.paging),
            platform.kernel,
            plural(platform.cpus, "CPU")
        ),
    ));
    rows.push(("seed", format!("{} (repeat with --seed {0})", config.seed)));
    rows
}

/// What was loaded: `from` where, and how much of it was read before the guest ran, or since.
pub(in crate::cli) fn loaded_rows(from: &str, loaded: &LoadCounts) -> Vec<(&'static str, String)> {
    if !loaded.is_lazy {
        let (memory, time) = (bytes(loaded.bytes), micros(loaded.seconds * 1e6));
        return vec![("loaded", format!("{from}: {memory} of memory in {time}"))];
    }
    let what = format!(
        "{from}: first instruction after {}, {} of {} chunks read since",
        micros(loaded.first_instruction_s * 1e6),
        count(loaded.read()),
        count(loaded.chunks)
    );
    let read_for = format!(
        "{} vcpus (waited {}, {} at most), {} devices, {} checks and saves, {} nobody yet",
        count(loaded.by_vcpus),
        micros(loaded.waited_s * 1e6),
        micros(loaded.waited_most_s * 1e6),
        count(loaded.by_host),
        count(loaded.by_readers),
        count(loaded.prefetched)
    );
    vec![("loaded", what), ("read for", read_for)]
}

/// How it was found which pages vCPUs wanted to write. `None` if they never faulted.
fn found_by(faults: &FaultCounts) -> Option<String> {
    let ways = [
        (faults.by_kvm, "kvm"),
        (faults.by_operand, "operand"),
        (faults.by_walk, "walk"),
        (faults.by_event, "event"),
        (faults.by_region, "region"),
        (faults.by_all, "all memory"),
        (faults.by_signal, "signal"),
        (faults.emulated, "emulation"),
    ];
    let ways = ways.into_iter().filter(|(times, _)| *times > 0);
    let ways = Vec::from_iter(ways.map(|(times, way)| format!("{way} {}", count(times))));
    (!ways.is_empty()).then(|| ways.join(", "))
}

fn ended(report: &Report) -> String {
    let ran = micros(report.duration_s * 1e6);
    match (report.ended_by, report.config.length) {
        (EndedBy::Duration, _) => format!("{ran}, as asked"),
        (EndedBy::Snapshots, _) => format!("{ran}, until the snapshots asked for were taken"),
        (EndedBy::CtrlC, RunLength::Duration(asked)) => {
            format!(
                "{ran} of {}, ended early by Ctrl-C or a signal",
                exact_time(asked)
            )
        }
        (EndedBy::CtrlC, RunLength::UNTIL_STOPPED) => {
            format!("{ran}, ended by Ctrl-C or a signal")
        }
        (EndedBy::CtrlC, RunLength::Snapshots(_)) => {
            format!("{ran}, ended early by Ctrl-C or a signal")
        }
        (EndedBy::GuestExit, _) => format!("{ran}, until the guest exited"),
        (EndedBy::GuestCrash, _) => format!("{ran}, until the guest crashed"),
        (EndedBy::Error, _) => format!("{ran}, until an error"),
    }
}

fn asked(config: &Config) -> String {
    format!(
        "{}, {}, {} by {}, {}, a snapshot every {}",
        printable(&config.guest.to_string()),
        plural(config.vcpus, "vCPU"),
        Size(config.memory),
        config.page_size,
        pattern_name(config.pattern),
        exact_time(config.snapshot_every)
    )
}

/// The median of each step of a snapshot: before the pause, and in it.
fn steps(steps: &StepQuantiles) -> String {
    let of = |step: &Quantiles| {
        let micros = step.p50.map(|micros| count(micros.round() as u64));
        micros.unwrap_or_else(|| "-".to_owned())
    };
    format!(
        "prepare {}; park {}, devices {}, fork {}, regs {}, resume {} µs",
        of(&steps.prepare),
        of(&steps.park),
        of(&steps.devices),
        of(&steps.fork),
        of(&steps.registers),
        of(&steps.resume)
    )
}

pub(super) fn quantiles(quantiles: &Quantiles, meaning: &str) -> String {
    let cell = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), micros);
    format!(
        "{:>10} {:>10} {:>10}   {meaning}",
        cell(quantiles.p50),
        cell(quantiles.p99),
        cell(quantiles.max)
    )
}

/// How many each oracle saw.
pub(super) fn violations(counts: &ViolationCounts) -> [(&'static str, String); 2] {
    let seen = Oracle::ALL.map(|oracle| format!("{oracle} {}", count(counts.of(oracle))));
    // They have no room on one line.
    let (some, others) = seen.split_at(ORACLES_A_LINE);
    [
        ("violations", some.join(", ") + ","),
        ("", others.join(", ")),
    ]
}

/// The KVM of a report, in words.
pub(super) fn kvm_in_words(kvm: &str, paging: &str) -> String {
    let kvm = match kvm {
        "none" => return "threads of this process (no KVM, no isolation)".to_owned(),
        // It has no other way.
        "pvm" => return "PVM (KVM without VMX or SVM)".to_owned(),
        "vmx" => "VMX",
        "svm" => "SVM",
        other => other,
    };
    let paging = match paging {
        "npt" => "with NPT",
        "ept-ad" => "with EPT (accessed and dirty bits)",
        "ept" => "with EPT (no accessed and dirty bits)",
        "shadow" if kvm == "VMX" => "without EPT",
        "shadow" if kvm == "SVM" => "without NPT",
        _ => return format!("KVM on {kvm}"),
    };
    format!("KVM on {kvm} {paging}")
}

pub(super) fn plural(number: u64, noun: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{} {noun}{s}", count(number))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::session::{config::Injection, report::tests::example};

    #[test]
    fn a_good_run_reads_like_this() {
        let text = render(&example());
        assert_eq!(
            text,
            "\
ok: 2,941 snapshots taken, every one checked bit for bit, no violation

run         60.0 s, as asked
asked for   payload, 2 vCPUs, 256 MiB by 2M, uniform, a snapshot every 20 ms
guest       1,234,567 operations, 20,576 a second
snapshots   2,941 taken, 2,941 checked (178,231,004 pages), 294 restored
in flight   3 snapshots with a device in the middle of a request
                   p50        p99        max
pause           812 µs    2.20 ms    5.18 ms   kick to last vCPU running again
steps p50   prepare 1,900; park 62, devices 3, fork 650, regs 3, resume 90 µs
stall          1.48 ms    9.12 ms    41.0 ms   longest gap the guest saw
faults      734,889 copied, 1,002 reused, 16 unshared, 61,402 zero-filled
found by    operand 700,123, walk 12
regions     2 copied whole (7 pages), 1 split; 3 copied ahead
pins        480,211 fast, 9,004 slow, 24 registered
forks       94,113 pinned pages copied at once
DMA         80,120 requests to the guest, 80,118 from it, 1.68 GiB
memory      1.19 GiB of 1.25 GiB committed at most, 31,004 of 65,530 mappings
violations  cut 0, isolation 0, coherence 0, life 0, tracking 0,
            identity 0, accounting 0
policy      exclusive
platform    PVM (KVM without VMX or SVM), Linux 6.18.0, 2 CPUs
seed        7 (repeat with --seed 7)
"
        );
        assert!(text.lines().count() <= 25);
        assert!(text.lines().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn what_was_loaded_and_saved_is_told() {
        use crate::session::report::LoadCounts;
        let mut report = example();
        report.loaded = Some(LoadCounts {
            store: "snaps".to_owned(),
            name: "warm".to_owned(),
            chunks: 128,
            bytes: 256 << 20,
            seconds: 0.171,
            first_instruction_s: 0.172,
            ..LoadCounts::default()
        });
        let saved = SaveCounts {
            store: "snaps".to_owned(),
            name: "next".to_owned(),
            is_saved: true,
            memory_bytes: 256 << 20,
            bytes_written: 20_480_000,
            written: 17,
            found: 1,
            same: 110,
            seconds: 0.812,
            name_is_taken: false,
        };
        report.saved = Some(saved.clone());
        let text = render(&report);
        let loaded = "loaded      warm from snaps: 256 MiB of memory in 171 ms\n";
        assert!(text.contains(loaded), "{text}");
        let told = "saved       next in snaps: 19.5 MiB written of 256 MiB in 812 ms; 17 chunks new, 1 known, 110 unread";
        assert!(text.contains(told), "{text}");
        report.saved = Some(SaveCounts {
            is_saved: false,
            ..saved
        });
        assert!(render(&report).contains("saved       NOT next in snaps\n"));
    }

    #[test]
    fn a_violated_run_says_so_first() {
        let mut report = example();
        report.verdict = Verdict::Violated;
        report.violations.coherence = 1;
        report.config.inject = Some(Injection::SharePinned);
        let text = render(&report);
        assert!(text.starts_with("VIOLATED: 1 violation in 2,941 snapshots\n\n"));
        assert!(text.contains("\ninjected    share-pinned: caught by coherence\n"));
        assert!(text.lines().count() <= 25);
    }

    #[test]
    fn a_crash_is_told_with_its_registers() {
        let mut report = example();
        report.verdict = Verdict::Error;
        report.ended_by = EndedBy::GuestCrash;
        report.error = Some("the guest crashed: triple fault\nrip 0x200010\x1b[0m".to_owned());
        let text = render(&report);
        assert!(text.starts_with(
            "could not finish: the guest crashed: triple fault\n  rip 0x200010\\u{1b}[0m\n\nrun "
        ));
        assert!(text.contains("60.0 s, until the guest crashed\n"));
        // A violation comes first, and the error in full after it.
        report.verdict = Verdict::Violated;
        let text = render(&report);
        assert!(text.starts_with("VIOLATED: "));
        assert!(text.contains("\n  the guest crashed: triple fault\n  rip"));
    }

    #[test]
    fn what_was_not_checked_is_not_claimed() {
        let mut report = example();
        report.snapshots.checked = 2_940;
        let text = render(&report);
        assert!(text.starts_with("ok: 2,941 snapshots taken, 2,940 checked bit for bit, no"));
        report.snapshots.taken = 0;
        report.snapshots.checked = 0;
        report.unchecked = vec!["no snapshot was taken".to_owned()];
        report.verdict = Verdict::NothingChecked;
        report.pause_us = Quantiles::default();
        report.steps_us.park = Quantiles::default();
        let text = render(&report);
        assert!(text.starts_with("nothing checked: no snapshot was taken\n"));
        assert!(text.contains("\npause                -          -          -   kick"));
        assert!(text.contains("; park -, devices 3, "), "{text}");
    }

    #[test]
    fn an_injected_fault_that_was_missed_is_told() {
        let mut report = example();
        report.config.inject = Some(Injection::StalePage);
        report.unchecked = vec!["the injected stale-page was NOT caught by life".to_owned()];
        report.verdict = Verdict::NothingChecked;
        let text = render(&report);
        let first = text.lines().next().unwrap();
        assert!(first.ends_with("the injected stale-page was NOT caught by life"));
        assert!(text.contains("\ninjected    stale-page: NOT caught by life\n"));
    }

    #[test]
    fn a_run_that_was_tracked_says_so() {
        let mut report = example();
        report.config.track_dirty = Some(Duration::from_millis(5));
        report.dirty.rounds = 12_001;
        report.dirty.pages = 1;
        let text = render(&report);
        let row = "\ndirty       asked 12,001 times (every 5 ms), 1 page told\nDMA ";
        assert!(text.contains(row), "{text}");
    }

    #[test]
    fn what_was_dropped_and_lost_is_told() {
        let mut report = example();
        report.snapshots.dropped = 12;
        report.lines_lost = 1;
        let text = render(&report);
        let row =
            " 294 restored\ndropped     12 snapshots early, to make room for the guest's writes\n";
        assert!(text.contains(row), "{text}");
        assert!(
            text.contains("\noutput      1 line lost: nobody read them in time\n"),
            "{text}"
        );
    }

    #[test]
    fn every_kvm_has_words() {
        for (kvm, paging, words) in [
            ("pvm", "shadow", "PVM (KVM without VMX or SVM)"),
            ("svm", "npt", "KVM on SVM with NPT"),
            ("svm", "shadow", "KVM on SVM without NPT"),
            (
                "vmx",
                "ept-ad",
                "KVM on VMX with EPT (accessed and dirty bits)",
            ),
            (
                "vmx",
                "ept",
                "KVM on VMX with EPT (no accessed and dirty bits)",
            ),
            ("vmx", "shadow", "KVM on VMX without EPT"),
            ("vmx", "unknown", "KVM on VMX"),
            ("unknown", "unknown", "KVM on unknown"),
        ] {
            assert_eq!(kvm_in_words(kvm, paging), words);
        }
    }

    #[test]
    fn an_interrupted_run_says_how_far_it_came() {
        let mut report = example();
        report.ended_by = EndedBy::CtrlC;
        report.duration_s = 4.2;
        let text = render(&report);
        assert!(text.contains("4.20 s of 10 s, ended early by Ctrl-C or a signal\n"));
    }
}
