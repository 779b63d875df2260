//! How far a run is, in words.

use super::units::{bytes, count, exact_time, time};
use crate::session::{
    config::RunLength,
    progress::Progress,
    report::{Oracle, ViolationCounts},
};

/// Progress in words, with the end if it is known.
fn so_far(length: RunLength, progress: &Progress) -> (String, String) {
    let elapsed = format!("{:.1} s", progress.elapsed.as_secs_f64());
    let snapshots = count(progress.snapshots);
    match length {
        RunLength::Duration(total) => (format!("{elapsed} of {}", exact_time(total)), snapshots),
        RunLength::UNTIL_STOPPED => (elapsed, snapshots),
        RunLength::Snapshots(total) => (elapsed, format!("{snapshots} of {}", count(total))),
    }
}

/// All there is to say, a line for each kind of thing.
pub(super) fn block(length: RunLength, p: &Progress) -> String {
    let (elapsed, snapshots) = so_far(length, p);
    let pauses = match (p.last_pause, p.worst_pause) {
        (Some(last), Some(worst)) => format!("last {}, worst {}", time(last), time(worst)),
        _ => "none yet".to_owned(),
    };
    [
        ("time", elapsed),
        (
            "guest",
            format!(
                "{} operations/s, {} in all",
                count(p.ops_per_s as u64),
                count(p.ops)
            ),
        ),
        (
            "snapshots",
            format!(
                "{snapshots}, {} checked, {} restored",
                count(p.checked),
                count(p.restored)
            ),
        ),
        ("pause", pauses),
        (
            "faults",
            format!(
                "{} copied, {} reused, {} unshared, {} zero-filled",
                count(p.faults.copied),
                count(p.faults.reused),
                count(p.faults.unshared),
                count(p.faults.zero_filled)
            ),
        ),
        (
            "pins",
            format!(
                "{} fast, {} slow, {} registered",
                count(p.pins.fast),
                count(p.pins.slow),
                count(p.pins.registered)
            ),
        ),
        (
            "forks",
            format!(
                "{} pinned pages copied at once",
                count(p.faults.eager_copied)
            ),
        ),
        (
            "dirty",
            format!(
                "asked {} times, {} pages told",
                count(p.dirty.rounds),
                count(p.dirty.pages)
            ),
        ),
        (
            "DMA",
            format!("{} requests, {}", count(p.dma_requests), bytes(p.dma_bytes)),
        ),
        (
            "memory",
            format!(
                "{} in use of {} committed, {} mappings",
                bytes(p.frames_in_use * guest::abi::PAGE_SIZE),
                bytes(p.frames_committed * guest::abi::PAGE_SIZE),
                count(p.vmas)
            ),
        ),
    ]
    .into_iter()
    .filter(|(name, _)| *name != "dirty" || p.dirty.rounds > 0)
    .map(|(name, value)| format!("{name:<11} {value}"))
    .collect::<Vec<_>>()
    .join("\n")
}

/// The most of it in one line.
pub(super) fn line(length: RunLength, p: &Progress) -> String {
    let (elapsed, snapshots) = so_far(length, p);
    let pause = p
        .worst_pause
        .map(|worst| format!("worst pause {}, ", time(worst)))
        .unwrap_or_default();
    format!(
        "{elapsed}: {} operations/s, {snapshots} snapshots, {} checked, {} restored, {pause}\
         {} faults, {} pins, {} DMA requests, violations: {}",
        count(p.ops_per_s as u64),
        count(p.checked),
        count(p.restored),
        count(p.faults.total()),
        count(p.pins.total()),
        count(p.dma_requests),
        violations(&p.violations)
    )
}

/// Violations by oracle, those that have none left out.
pub(super) fn violations(counts: &ViolationCounts) -> String {
    let seen: Vec<String> = Oracle::ALL
        .into_iter()
        .filter(|oracle| counts.of(*oracle) > 0)
        .map(|oracle| format!("{oracle} {}", count(counts.of(oracle))))
        .collect();
    if seen.is_empty() {
        "none".to_owned()
    } else {
        seen.join(", ")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::session::report::{DirtyCounts, FaultCounts, PinCounts};

    pub(in super::super) const TEN_SECONDS: RunLength =
        RunLength::Duration(Duration::from_secs(10));

    pub(in super::super) fn example() -> Progress {
        Progress {
            elapsed: Duration::from_millis(2_540),
            total: Some(Duration::from_secs(10)),
            ops: 1_234_567,
            ops_per_s: 480_123.9,
            snapshots: 126,
            checked: 125,
            restored: 12,
            last_pause: Some(Duration::from_micros(812)),
            worst_pause: Some(Duration::from_micros(2_204)),
            faults: FaultCounts {
                reused: 12,
                copied: 31_004,
                unshared: 3,
                eager_copied: 4_032,
                zero_filled: 61_402,
                ..FaultCounts::default()
            },
            pins: PinCounts {
                fast: 20_002,
                slow: 311,
                registered: 24,
            },
            dirty: DirtyCounts::default(),
            dma_requests: 3_401,
            dma_bytes: 38_000_000,
            violations: ViolationCounts::default(),
            frames_in_use: 98_304,
            frames_committed: 131_072,
            vmas: 31_004,
        }
    }

    #[test]
    fn the_block_is_aligned_and_fits_a_terminal() {
        let block = block(TEN_SECONDS, &example());
        assert_eq!(
            block,
            "time        2.5 s of 10 s\n\
             guest       480,123 operations/s, 1,234,567 in all\n\
             snapshots   126, 125 checked, 12 restored\n\
             pause       last 812 µs, worst 2.20 ms\n\
             faults      31,004 copied, 12 reused, 3 unshared, 61,402 zero-filled\n\
             pins        20,002 fast, 311 slow, 24 registered\n\
             forks       4,032 pinned pages copied at once\n\
             DMA         3,401 requests, 36.2 MiB\n\
             memory      384 MiB in use of 512 MiB committed, 31,004 mappings"
        );
        assert!(block.lines().all(|line| line.chars().count() < 80));
    }

    #[test]
    fn dirty_tracking_has_a_line_when_there_is_any() {
        let mut progress = example();
        progress.dirty.rounds = 1_200;
        progress.dirty.pages = 34_000;
        let block = block(TEN_SECONDS, &progress);
        let row = "\ndirty       asked 1,200 times, 34,000 pages told\nDMA ";
        assert!(block.contains(row), "{block}");
    }

    #[test]
    fn the_line_says_the_same() {
        assert_eq!(
            line(TEN_SECONDS, &example()),
            "2.5 s of 10 s: 480,123 operations/s, 126 snapshots, 125 checked, 12 restored, \
             worst pause 2.20 ms, 92,421 faults, 20,313 pins, 3,401 DMA requests, violations: none"
        );
    }

    #[test]
    fn only_oracles_that_saw_something_are_listed() {
        let mut progress = example();
        assert_eq!(violations(&progress.violations), "none");
        progress.violations.isolation = 1_200;
        progress.violations.life = 1;
        assert_eq!(violations(&progress.violations), "isolation 1,200, life 1");
    }
}
