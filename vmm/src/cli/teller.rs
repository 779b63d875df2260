//! What is told of a run and of a family alike while they go on: when a line is due off a terminal, that
//! Ctrl-C was seen, and violations, of which only the first few are shown.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::screen::Screen;
use crate::session::report::{Oracle, Violation};

/// Time from one line to the next, off a terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// When the first of them is written.
const FIRST_LINE: Duration = Duration::from_secs(1);
/// Violations of each oracle that are shown; the others are only counted.
const SHOWN: u64 = 5;

/// Tells it, on a screen.
#[derive(Debug)]
pub(super) struct Teller {
    pub(super) screen: Screen,
    stop: Arc<AtomicBool>,
    stop_noted: bool,
    next_line: Duration,
    /// Violations seen, by position in [`Oracle::ALL`].
    seen: [u64; Oracle::ALL.len()],
}

impl Teller {
    /// Tells of what `stop` ends early.
    pub(super) fn new(screen: Screen, stop: Arc<AtomicBool>) -> Self {
        Self {
            screen,
            stop,
            stop_noted: false,
            next_line: FIRST_LINE,
            seen: [0; Oracle::ALL.len()],
        }
    }

    /// Says, once, that the end was asked for.
    pub(super) fn note_stop(&mut self) {
        if !self.stop_noted && self.stop.load(Ordering::Relaxed) {
            self.stop_noted = true;
            self.screen
                .line("stopping: checking what was taken (Ctrl-C again kills)");
        }
    }

    /// Whether a line is due `elapsed` after the start. It is not due again at once.
    pub(super) fn line_is_due(&mut self, elapsed: Duration) -> bool {
        let is_due = elapsed >= self.next_line;
        // After a long wait there is one line, not one for each that was missed.
        while self.next_line <= elapsed {
            self.next_line += LINE_EVERY;
        }
        is_due
    }

    /// Shows `violation`, of the machine that `of` names, if it is one of the first of its oracle.
    pub(super) fn violation(&mut self, of: &str, violation: &Violation) {
        let oracle = violation.oracle;
        let seen = &mut self.seen[oracle as usize];
        *seen += 1;
        if *seen <= SHOWN {
            self.screen.line(&format!("{of}{violation}"));
        } else if *seen == SHOWN + 1 {
            self.screen.line(&format!(
                "more violations of {oracle}: from here on they are only counted"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oracle_is_its_position() {
        for (position, oracle) in Oracle::ALL.into_iter().enumerate() {
            assert_eq!(oracle as usize, position);
        }
    }

    #[test]
    fn a_long_wait_owes_one_line() {
        let mut teller = Teller::new(Screen::new(), Arc::new(AtomicBool::new(false)));
        let at = Duration::from_millis;
        assert!(!teller.line_is_due(at(999)));
        assert!(teller.line_is_due(at(8_000)));
        assert!(!teller.line_is_due(at(8_001)));
        assert!(teller.line_is_due(at(9_000)));
    }
}
