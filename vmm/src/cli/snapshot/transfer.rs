//! How far a save or a load is: bytes, rate, time left.

use std::time::Duration;

use palimpsest::kept::Progress;

use crate::cli::screen::{STEPS, Screen};
use crate::cli::units::{bytes, time};

/// Time from one line to the next, off a terminal, and when the first is written.
const LINE_EVERY: Duration = Duration::from_secs(2);
const FIRST_LINE: Duration = Duration::from_secs(1);

/// Tells how far a save or a load is.
#[derive(Debug)]
pub(crate) struct Transfer {
    text: Option<String>,
    next_line: Duration,
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            text: None,
            next_line: FIRST_LINE,
        }
    }
}

impl Transfer {
    /// What was told last.
    pub(crate) fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// Tells `progress` of what is being done, on a terminal when the block is drawn next, elsewhere in a line now and
    /// then.
    pub(crate) fn tell(&mut self, what: &str, progress: &Progress, screen: &Screen) {
        let text = text(what, progress);
        if let Some(bar) = screen.bar() {
            let part = progress.done as f64 / progress.bytes.max(1) as f64;
            bar.set_position((part * STEPS as f64) as u64);
            bar.set_message(text.clone());
        } else if progress.elapsed >= self.next_line {
            self.next_line = progress.elapsed + LINE_EVERY;
            screen.line(&text);
        }
        self.text = Some(text);
    }
}

/// `progress` in one line.
fn text(what: &str, progress: &Progress) -> String {
    let mut text = format!(
        "{what:<11} {} of {}, {}/s",
        bytes(progress.done),
        bytes(progress.bytes),
        bytes(progress.rate() as u64)
    );
    match progress.left() {
        Some(left) if progress.done < progress.bytes => {
            text.push_str(&format!(", {} left", time(left)));
        }
        _ => {}
    }
    let saved = &progress.saved;
    if saved.written > 0 {
        text.push_str(&format!("; {} written", bytes(saved.bytes_written)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_rate_and_time_left_are_told() {
        let mut progress = Progress {
            done: 256 << 20,
            bytes: 1 << 30,
            elapsed: Duration::from_millis(500),
            ..Progress::default()
        };
        let told = text("loading", &progress);
        assert_eq!(
            told,
            "loading     256 MiB of 1.00 GiB, 512 MiB/s, 1.50 s left"
        );
        progress.done = 1 << 30;
        (progress.saved.written, progress.saved.bytes_written) = (3, 5 << 20);
        let told = text("saving", &progress);
        assert_eq!(
            told,
            "saving      1.00 GiB of 1.00 GiB, 2.00 GiB/s; 5.00 MiB written"
        );
        let told = text("saving", &Progress::default());
        assert_eq!(told, "saving      0 B of 0 B, 0 B/s");
    }
}
