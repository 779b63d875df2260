//! What is shown while a family lives: a block with its tree on a terminal, a line now and then elsewhere.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use indicatif::ProgressStyle;

use super::tree;
use crate::cli::printable::printable;
use crate::cli::progress_text::violations;
use crate::cli::screen::{STEPS, Screen};
use crate::cli::snapshot::Transfer;
use crate::cli::teller::Teller;
use crate::cli::units::{bytes, count};
use crate::session::family::config::FamilyConfig;
use crate::session::family::progress::{FamilyObserver, FamilyProgress, Phase};
use crate::session::report::Violation;

/// Lines of the tree.
const TREE: usize = 12;

/// Shows a family.
pub(super) struct ForkStatus {
    teller: Teller,
    total: Duration,
    transfer: Transfer,
}

impl ForkStatus {
    pub(super) fn new(screen: Screen, config: &FamilyConfig, stop: Arc<AtomicBool>) -> Self {
        if let Some(bar) = screen.bar() {
            // An empty line first: see the block of a run.
            let style = ProgressStyle::with_template("\n[{bar:58.cyan}]\n{msg}");
            bar.set_style(
                style
                    .expect("the template is constant")
                    .progress_chars("=> "),
            );
        }
        Self {
            teller: Teller::new(screen, stop),
            total: config.warm_up + config.duration,
            transfer: Transfer::default(),
        }
    }

    /// Takes the block off the screen.
    pub(super) fn finish(self) {
        self.teller.screen.clear_block();
        self.teller.screen.finish();
    }
}

impl FamilyObserver for ForkStatus {
    fn loading(&mut self, progress: &palimpsest::kept::Progress) {
        self.transfer.tell("loading", progress, &self.teller.screen);
    }

    fn progress(&mut self, progress: &FamilyProgress) {
        self.teller.note_stop();
        if let Some(bar) = self.teller.screen.bar().cloned() {
            self.teller.screen.raise_block();
            let part = progress.elapsed.as_secs_f64() / self.total.as_secs_f64();
            bar.set_position((part * STEPS as f64).clamp(0.0, STEPS as f64) as u64);
            bar.set_message(block(progress));
        } else if self.teller.line_is_due(progress.elapsed) {
            self.teller.screen.line(&line(progress));
        }
    }

    fn console(&mut self, machine: usize, text: &str) {
        let text = printable(text.trim_end());
        self.teller
            .screen
            .line(&format!("machine {machine}: {text}"));
    }

    fn violation(&mut self, machine: Option<usize>, violation: &Violation) {
        let of = machine.map(|machine| format!("machine {machine}: "));
        self.teller
            .violation(of.as_deref().unwrap_or_default(), violation);
    }

    fn note(&mut self, text: &str) {
        self.teller.screen.line(text);
    }
}

fn phase(phase: Phase) -> String {
    match phase {
        Phase::WarmingUp => "the root warms up".to_owned(),
        Phase::Forking { generation } => format!("forking, generation {generation}"),
        Phase::Running => "all run".to_owned(),
        Phase::Shrinking => "the root is gone, and every third".to_owned(),
        Phase::Ending => "looking at all once more".to_owned(),
    }
}

fn operations(progress: &FamilyProgress) -> String {
    let all: f64 = progress.members.iter().map(|m| m.ops_per_s).sum();
    count(all as u64)
}

fn block(p: &FamilyProgress) -> String {
    let rows = [
        ("time", format!("{:.1} s", p.elapsed.as_secs_f64())),
        ("phase", phase(p.phase)),
        (
            "machines",
            format!(
                "{} live, of {}; {} operations/s in all",
                count(p.members.len() as u64),
                count(p.wanted),
                operations(p)
            ),
        ),
        (
            "snapshots",
            format!("{}, {} checked", count(p.snapshots), count(p.checked)),
        ),
        (
            "memory",
            format!("{} of {}", bytes(p.bytes_in_use), bytes(p.bytes_limit)),
        ),
        ("violations", violations(&p.violations)),
    ];
    let rows = rows.map(|(name, value)| format!("{name:<11} {value}"));
    let tree = tree::lines(&p.members, TREE);
    let all: Vec<String> = rows.into_iter().chain(tree).collect();
    all.join("\n")
}

fn line(p: &FamilyProgress) -> String {
    format!(
        "{:.1} s: {}: {} of {} machines, {} operations/s, {} snapshots, {} checked, {}, violations: {}",
        p.elapsed.as_secs_f64(),
        phase(p.phase),
        count(p.members.len() as u64),
        count(p.wanted),
        operations(p),
        count(p.snapshots),
        count(p.checked),
        bytes(p.bytes_in_use),
        violations(&p.violations)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::family::progress::MemberProgress;
    use crate::session::report::{Oracle, ViolationCounts};

    #[test]
    fn a_line_says_what_goes_on() {
        let mut progress = FamilyProgress {
            elapsed: Duration::from_millis(2_345),
            phase: Phase::Forking { generation: 2 },
            members: vec![MemberProgress {
                id: 0,
                parent: None,
                depth: 0,
                ops: 12,
                ops_per_s: 4_321.0,
            }],
            wanted: 7,
            snapshots: 9,
            checked: 8,
            violations: ViolationCounts::default(),
            bytes_in_use: 3 << 20,
            bytes_limit: 1 << 30,
        };
        progress.violations.add(Oracle::Isolation);
        assert_eq!(
            line(&progress),
            "2.3 s: forking, generation 2: 1 of 7 machines, 4,321 operations/s, 9 snapshots, 8 checked, \
             3.00 MiB, violations: isolation 1"
        );
        let block = block(&progress);
        assert!(block.ends_with("\nroot  4,321 operations/s"), "{block}");
        assert!(block.contains("machines    1 live, of 7; "), "{block}");
    }
}
