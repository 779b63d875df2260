//! What is shown while a run goes on.
//!
//! Everything goes to standard error. On a terminal that is one block, redrawn in place, with the guest's
//! console and violations above it; elsewhere it is a line now and then, with no control characters.

use std::sync::{Arc, atomic::AtomicBool};

use indicatif::{ProgressBar, ProgressStyle};

use palimpsest::kept;

use super::{
    printable::printable,
    progress_text::{block, line, violations},
    screen::{STEPS, Screen},
    snapshot::Transfer,
    teller::Teller,
};
use crate::session::{
    config::RunLength,
    progress::{Observer, Progress},
    report::Violation,
};

/// A line of the guest's that is longer is cut in two.
const LONGEST_LINE: usize = 4096;

/// Shows a run.
#[derive(Debug)]
pub(crate) struct Status {
    teller: Teller,
    length: RunLength,
    /// A violation was seen, and the block is styled for it.
    violated: bool,
    /// What the guest printed since its last newline.
    console: String,
    /// What is said of what is being saved.
    transfer: Transfer,
}

impl Status {
    /// Shows a run of `length` that `stop` ends early.
    pub(crate) fn new(screen: Screen, length: RunLength, stop: Arc<AtomicBool>) -> Self {
        if let Some(bar) = screen.bar() {
            bar.set_style(block_style("green"));
        }
        Self {
            teller: Teller::new(screen, stop),
            length,
            violated: false,
            console: String::new(),
            transfer: Transfer::default(),
        }
    }

    /// Takes the block off the screen.
    pub(crate) fn finish(mut self) {
        if !self.console.is_empty() {
            let rest = std::mem::take(&mut self.console);
            self.console_line(&rest);
        }
        self.teller.screen.clear_block();
        // What is printed next may go to the same terminal.
        self.teller.screen.finish();
    }

    fn console_line(&self, line: &str) {
        self.teller
            .screen
            .line(&format!("guest: {}", printable(line)));
    }

    fn draw(&mut self, bar: &ProgressBar, progress: &Progress) {
        if !self.violated && progress.violations.total() > 0 {
            self.violated = true;
            bar.set_style(block_style("red.bold"));
        }
        self.teller.screen.raise_block();
        bar.set_position(done(self.length, progress));
        bar.set_prefix(violations(&progress.violations));
        let mut message = block(self.length, progress);
        if let Some(transfer) = self.transfer.text() {
            message.push('\n');
            message.push_str(transfer);
        }
        bar.set_message(message);
    }
}

impl Observer for Status {
    fn progress(&mut self, progress: &Progress) {
        self.teller.note_stop();
        if let Some(bar) = self.teller.screen.bar().cloned() {
            self.draw(&bar, progress);
        } else if self.teller.line_is_due(progress.elapsed) {
            self.teller.screen.line(&line(self.length, progress));
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
        self.teller.violation("", violation);
    }

    fn note(&mut self, text: &str) {
        self.teller.screen.line(text);
    }

    fn loading(&mut self, progress: &kept::Progress) {
        self.teller.note_stop();
        self.transfer.tell("loading", progress, &self.teller.screen);
        if progress.done == progress.bytes {
            self.transfer = Transfer::default();
        }
    }

    fn saving(&mut self, progress: &kept::Progress) {
        self.transfer.tell("saving", progress, &self.teller.screen);
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
    use std::time::Duration;

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
}
