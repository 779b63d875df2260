//! What is shown while a run goes on.
//!
//! Everything goes to standard error. On a terminal that is one block, redrawn in place, with the guest's
//! console and violations above it; elsewhere it is a line now and then, with no control characters.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

use super::{
    printable::printable,
    progress_text::{block, line, violations},
    screen::{STEPS, Screen},
};
use crate::session::{
    config::RunLength,
    progress::{Observer, Progress},
    report::{Oracle, Violation},
};

/// Time from one line to the next, off a terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// When the first of them is written.
const FIRST_LINE: Duration = Duration::from_secs(1);
/// Violations of each oracle that are shown; the others are only counted.
const SHOWN: u64 = 5;
/// A line of the guest's that is longer is cut in two.
const LONGEST_LINE: usize = 4096;

/// Shows a run.
#[derive(Debug)]
pub(crate) struct Status {
    screen: Screen,
    length: RunLength,
    stop: Arc<AtomicBool>,
    stop_noted: bool,
    next_line: Duration,
    /// A violation was seen, and the block is styled for it.
    violated: bool,
    /// Violations seen, by position in [`Oracle::ALL`].
    seen: [u64; Oracle::ALL.len()],
    /// What the guest printed since its last newline.
    console: String,
}

impl Status {
    /// Shows a run of `length` that `stop` ends early.
    pub(crate) fn new(screen: Screen, length: RunLength, stop: Arc<AtomicBool>) -> Self {
        if let Some(bar) = screen.bar() {
            bar.set_style(block_style("green"));
        }
        Self {
            screen,
            length,
            stop,
            stop_noted: false,
            next_line: FIRST_LINE,
            violated: false,
            seen: [0; Oracle::ALL.len()],
            console: String::new(),
        }
    }

    /// Takes the block off the screen.
    pub(crate) fn finish(mut self) {
        if !self.console.is_empty() {
            let rest = std::mem::take(&mut self.console);
            self.console_line(&rest);
        }
        self.screen.clear_block();
        // What is printed next may go to the same terminal.
        self.screen.finish();
    }

    fn console_line(&self, line: &str) {
        self.screen.line(&format!("guest: {}", printable(line)));
    }

    fn draw(&mut self, bar: &ProgressBar, progress: &Progress) {
        if !self.violated && progress.violations.total() > 0 {
            self.violated = true;
            bar.set_style(block_style("red.bold"));
        }
        self.screen.raise_block();
        bar.set_position(done(self.length, progress));
        bar.set_prefix(violations(progress));
        bar.set_message(block(self.length, progress));
    }
}

impl Observer for Status {
    fn progress(&mut self, progress: &Progress) {
        if !self.stop_noted && self.stop.load(Ordering::Relaxed) {
            self.stop_noted = true;
            self.note("stopping: checking what was taken (Ctrl-C again kills)");
        }
        if let Some(bar) = self.screen.bar().cloned() {
            self.draw(&bar, progress);
        } else if progress.elapsed >= self.next_line {
            // After a long wait there is one line, not one for each that was missed.
            while self.next_line <= progress.elapsed {
                self.next_line += LINE_EVERY;
            }
            self.screen.line(&line(self.length, progress));
        }
    }

    fn console(&mut self, text: &str) {
        self.console.push_str(text);
        while let Some(end) = self.console.find('\n') {
            let line: String = self.console.drain(..=end).collect();
            self.console_line(line.trim_end());
        }
        if self.console.len() > LONGEST_LINE {
            let line = std::mem::take(&mut self.console);
            self.console_line(&line);
        }
    }

    fn violation(&mut self, violation: &Violation) {
        let oracle = violation.oracle;
        let seen = &mut self.seen[oracle as usize];
        *seen += 1;
        if *seen <= SHOWN {
            self.screen.line(&violation.to_string());
        } else if *seen == SHOWN + 1 {
            self.screen.line(&format!(
                "more violations of {oracle}: from here on they are only counted"
            ));
        }
    }

    fn note(&mut self, text: &str) {
        self.screen.line(text);
    }
}

/// The block: a bar, the counters, and the violations in `colour`.
///
/// It begins with an empty line. The `^C` that a terminal echoes pushes the block up by one, and what is on
/// its first line then stays on the screen.
fn block_style(colour: &str) -> ProgressStyle {
    ProgressStyle::with_template(&format!(
        "\n[{{bar:58.cyan}}]\n{{msg}}\nviolations  {{prefix:.{colour}}}"
    ))
    .expect("the template is constant")
    .progress_chars("=> ")
}

/// Steps of the bar that are done.
fn done(length: RunLength, progress: &Progress) -> u64 {
    let part = match length {
        RunLength::Duration(total) => progress.elapsed.as_secs_f64() / total.as_secs_f64(),
        RunLength::Snapshots(total) => progress.snapshots as f64 / total as f64,
    };
    (part * STEPS as f64).clamp(0.0, STEPS as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::super::progress_text::tests::{TEN_SECONDS, example};
    use super::*;

    #[test]
    fn a_run_of_snapshots_is_measured_in_snapshots() {
        let length = RunLength::Snapshots(252);
        assert_eq!(done(length, &example()), STEPS / 2);
        let line = line(length, &example());
        assert!(line.starts_with("2.5 s: 480,123"), "{line}");
        assert!(line.contains("126 of 252 snapshots"), "{line}");
    }

    #[test]
    fn the_bar_never_overflows() {
        let late = Progress {
            elapsed: Duration::from_secs(11),
            ..example()
        };
        assert_eq!(done(TEN_SECONDS, &late), STEPS);
        assert_eq!(done(TEN_SECONDS, &Progress::default()), 0);
    }

    #[test]
    fn both_styles_are_templates() {
        block_style("green");
        block_style("red.bold");
    }

    #[test]
    fn an_oracle_is_its_position() {
        for (position, oracle) in Oracle::ALL.into_iter().enumerate() {
            assert_eq!(oracle as usize, position);
        }
    }
}
