//! A report of `benches/stress.rs` for people.

use std::fmt::Write;

use vmm::cli::units::{bytes, count, micros};
use vmm::session::report::Quantiles;

use super::level::Flatness;
use super::report::StressReport;
use crate::summary::Summary;
use crate::text::{align, caveats, ratio};

/// All of `report`.
pub fn report(report: &StressReport) -> String {
    let platform = &report.platform;
    let mut text = format!(
        "loops: {} KVM, Linux {}, {} CPUs\n",
        platform.kvm, platform.kernel, platform.cpus
    );
    text.push_str(&caveats(platform, &report.skipped));
    let lines = loop_lines(report);
    // The first line is the header.
    if lines.len() > 1 {
        let _ = write!(text, "\n{}", align(&lines));
    }
    for line in details(report) {
        let _ = writeln!(text, "{line}");
    }
    if !report.copies.is_empty() {
        text.push_str("\na copy of a running VM that runs; ratios to ours in a shell\n");
        text.push_str(&align(&copies(report)));
    }
    let (wrong, loops) = (report.wrong(), report.loops());
    if !loops.is_empty() {
        let is_flat = loops.iter().all(|(_, _, flatness)| flatness.is_flat());
        let verdict = match wrong.len() {
            0 if is_flat => "nothing is wrong, and memory is flat".to_owned(),
            0 => "nothing is wrong; of memory too little was seen to say all".to_owned(),
            1 => "1 thing is wrong".to_owned(),
            n => format!("{n} things are wrong"),
        };
        let _ = writeln!(text, "\n{verdict}");
    }
    for what in wrong {
        let _ = writeln!(text, "  {what}");
    }
    text
}

fn loop_lines(report: &StressReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "times",
        "a second",
        "pause p50",
        "p99",
        "max",
        "first instr. p50",
        "p99",
        "max",
        "private",
        "frames",
        "flat",
        "wrong",
    ];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    let rate = |times: u64, seconds: f64| format!("{:.2}", times as f64 / seconds.max(1e-9));
    let none = || ["-"; 3].map(str::to_owned);
    if let Some(it) = &report.rewinds {
        for (name, times) in [("snapshots", it.snapshots), ("restores", it.restores)] {
            let mut line = vec![
                format!("{name}, {}", bytes(it.memory)),
                count(times),
                rate(times, it.seconds),
            ];
            line.extend(if name == "snapshots" {
                quantiles(&it.pause_us)
            } else {
                none()
            });
            line.extend(none());
            line.extend(memory(&it.flatness, &it.wrong));
            lines.push(line);
        }
    }
    if let Some(it) = &report.churn {
        let mut line = vec![
            format!("fork, run, drop, {}", bytes(it.memory)),
            count(it.clones),
            rate(it.clones, it.seconds),
        ];
        line.extend(summary(&it.pause_us));
        line.extend(summary(&it.first_instruction_us));
        line.extend(memory(&it.flatness, &it.wrong));
        lines.push(line);
    }
    if let Some(it) = &report.storms {
        let mut line = vec![
            format!("storms of {}, {}", it.clones, bytes(it.memory)),
            count(it.storms),
            rate(it.storms, it.seconds),
        ];
        line.extend(none());
        let firsts = [
            it.first_instruction_p50_us,
            it.first_instruction_p99_us,
            None,
        ];
        line.extend(firsts.map(|time| time.map_or("-".to_owned(), micros)));
        line.extend(memory(&it.flatness, &it.wrong));
        lines.push(line);
    }
    lines
}

fn details(report: &StressReport) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(it) = &report.rewinds {
        lines.push(format!(
            "snapshots: {} DMA requests beside",
            count(it.dma_requests)
        ));
    }
    if let Some(it) = &report.churn {
        lines.push(format!(
            "fork, run, drop: {} pages written by devices, {} words checked",
            count(it.device_pages),
            count(it.checked)
        ));
    }
    if let Some(it) = &report.storms
        && let (Some(made_in), Some(share)) = (it.made_in_s, it.root_share)
    {
        lines.push(format!(
            "storms: {} clones in {} (median), the root at {:.0}% meanwhile",
            it.clones,
            micros(made_in * 1e6),
            share * 100.0
        ));
    }
    lines
}

fn quantiles(of: &Quantiles) -> [String; 3] {
    [of.p50, of.p99, of.max].map(|time| time.map_or("-".to_owned(), micros))
}

fn summary(of: &Summary) -> [String; 3] {
    [of.p50, of.p99, of.max].map(micros)
}

/// Memory at the end, whether it is flat, and how much was wrong.
fn memory(flatness: &Flatness, wrong: &[String]) -> [String; 4] {
    let flat = match (flatness.is_flat(), flatness.grown.is_empty()) {
        (true, _) => "yes",
        (false, true) => "too short to say",
        (false, false) => "no",
    };
    let (private, frames) = match flatness.end {
        Some(end) => (bytes(end.private), bytes(end.frames)),
        None => ("-".to_owned(), "-".to_owned()),
    };
    [private, frames, flat.to_owned(), wrong.len().to_string()]
}

fn copies(report: &StressReport) -> Vec<Vec<String>> {
    let header = ["", "pause p50", "", "max", "first instr. p50", "", "max"];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    for cost in &report.copies {
        let ours = report
            .copies
            .iter()
            .find(|other| other.memory == cost.memory);
        let ours = ours.filter(|other| other.way != cost.way);
        let ratio = |number: fn(&crate::copies::CopyCost) -> f64| {
            ours.map_or(String::new(), |ours| ratio(number(cost), number(ours)))
        };
        lines.push(vec![
            format!("{}, {}", bytes(cost.memory), cost.way),
            micros(cost.pause_us.p50),
            ratio(|cost| cost.pause_us.p50),
            micros(cost.pause_us.max),
            micros(cost.first_instruction_us.p50),
            ratio(|cost| cost.first_instruction_us.p50),
            micros(cost.first_instruction_us.max),
        ]);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::churn::Churn;
    use super::super::level::Level;
    use super::*;
    use crate::copies::CopyCost;
    use crate::report::Platform;

    fn churn(grown: Vec<String>, wrong: Vec<String>) -> Churn {
        let level = Some(Level {
            private: 3 << 20,
            frames: 64 << 20,
        });
        Churn {
            memory: 64 << 20,
            clones: 1200,
            seconds: 60.0,
            first_instruction_us: Summary::default(),
            pause_us: Summary::default(),
            device_pages: 1,
            checked: 2,
            wrong,
            flatness: Flatness {
                beginning: level,
                end: level,
                grown,
            },
        }
    }

    fn example() -> StressReport {
        StressReport::new(Platform {
            kvm: "pvm".to_owned(),
            kernel: "6.18".to_owned(),
            cpus: 2,
            load: 0.0,
        })
    }

    #[test]
    fn what_is_fine_and_what_is_not_is_said() {
        let mut it = example();
        assert!(it.is_empty());
        let mut short = churn(Vec::new(), Vec::new());
        short.flatness.end = None;
        it.churn = Some(short);
        assert!(report(&it).contains("too short to say"));
        assert!(report(&it).contains("nothing is wrong; of memory too little"));
        it.churn = Some(churn(Vec::new(), Vec::new()));
        let fine = report(&it);
        assert!(
            fine.contains("nothing is wrong, and memory is flat"),
            "{fine}"
        );
        let line = fine
            .lines()
            .find(|line| line.starts_with("fork, run, drop, 64.0 MiB"));
        let line = line.unwrap_or_default();
        assert!(
            line.contains(" 20.00 ") && line.ends_with("yes      0"),
            "{fine}"
        );

        let grown = vec!["frames in use: 1 MiB, 99 MiB".to_owned()];
        it.churn = Some(churn(grown, vec!["a word".to_owned()]));
        let bad = report(&it);
        assert!(
            bad.contains("2 things are wrong\n  churn: a word\n"),
            "{bad}"
        );
        assert!(
            bad.contains("churn: not flat: frames in use: 1 MiB, 99 MiB"),
            "{bad}"
        );
    }

    #[test]
    fn ways_are_compared_with_ours_of_their_size() {
        let mut it = example();
        let cost = |way: &str, p50: f64| CopyCost {
            way: way.to_owned(),
            memory: 1 << 30,
            pause_us: Summary {
                p50,
                ..Summary::default()
            },
            first_instruction_us: Summary {
                p50: 2.0 * p50,
                ..Summary::default()
            },
        };
        it.copies = vec![cost("ours, in a shell", 100.0), cost("file", 30_000.0)];
        let text = report(&it);
        let line = text
            .lines()
            .find(|line| line.starts_with("1.00 GiB, file"))
            .unwrap();
        assert_eq!(line.matches("x300").count(), 2, "{text}");
    }
}
