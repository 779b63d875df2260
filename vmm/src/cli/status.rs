//! What is shown while a run goes on.
//!
//! Everything goes to standard error. On a terminal that is one block, redrawn in place, with the guest's console and
//! violations above it; elsewhere it is a line now and then, with no control characters.

use std::{
    env,
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    outlet::Outlet,
    terminal::Terminal,
    units::{bytes, count, exact_time, time},
};
use crate::session::{
    config::RunLength,
    progress::{Observer, Progress},
    report::{Oracle, Violation},
};

/// How often the block is redrawn, a second.
const REDRAWS: u8 = 5;
/// Time from one line to the next, off a terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// When the first of them is written.
const FIRST_LINE: Duration = Duration::from_secs(1);
/// How long a reader of standard error may take nothing at the end.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Violations of each oracle that are shown; the others are only counted.
const SHOWN: u64 = 5;
/// Steps of the bar.
const STEPS: u64 = 1000;
/// A line of the guest's that is longer is cut in two.
const LONGEST_LINE: usize = 4096;

/// Whether text may be in colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colours {
    On,
    Off,
}

impl Colours {
    /// On a terminal that has them, unless `NO_COLOR` says otherwise.
    pub(crate) fn on(stream: &impl IsTerminal) -> Self {
        let unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if is_screen(stream) && !unwanted {
            Self::On
        } else {
            Self::Off
        }
    }
}

/// Whether `stream` is a terminal that moves its cursor.
fn is_screen(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// Standard error, shared by the status block and whoever else writes lines. Nobody who writes waits for somebody to read.
#[derive(Clone, Debug)]
pub(crate) struct Screen {
    /// `None` if there is no thread for it.
    outlet: Option<Outlet>,
    /// `None` off a terminal.
    bar: Option<ProgressBar>,
    /// The block is on the screen: lines must go above it.
    live: Arc<AtomicBool>,
}

impl Screen {
    /// Finds out what standard error is.
    pub(crate) fn new() -> Self {
        let outlet = Outlet::to(&io::stderr()).ok();
        let terminal = outlet.clone().filter(|_| is_screen(&io::stderr()));
        Self {
            outlet,
            bar: terminal.map(|outlet| {
                let terminal = Box::new(Terminal::new(outlet));
                let target = ProgressDrawTarget::term_like_with_hz(terminal, REDRAWS);
                ProgressBar::with_draw_target(Some(STEPS), target)
            }),
            live: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Whether colours may be used.
    pub(crate) fn colours(&self) -> Colours {
        Colours::on(&io::stderr())
    }

    /// Writes `text`, which may be several lines, above the block.
    pub(crate) fn line(&self, text: &str) {
        match (&self.bar, &self.outlet) {
            (Some(bar), _) if self.live.load(Ordering::Relaxed) => bar.println(text),
            (_, Some(outlet)) => outlet.send(format!("{text}\n")),
            // Whoever closed standard error does not want to know.
            (_, None) => drop(writeln!(io::stderr(), "{text}")),
        }
    }

    /// Texts that nobody read in time.
    pub(crate) fn lost(&self) -> u64 {
        self.outlet.as_ref().map_or(0, Outlet::lost)
    }

    /// Waits for what was written last, if somebody reads it.
    pub(crate) fn finish(&self) {
        if let Some(outlet) = &self.outlet {
            // There is nobody to be told.
            let _ = outlet.finish(LAST_WORDS);
        }
    }
}

/// For the log, which writes one whole event at a time.
impl Write for Screen {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.line(String::from_utf8_lossy(event).trim_end());
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Shows a run.
#[derive(Debug)]
pub(crate) struct Status {
    screen: Screen,
    length: RunLength,
    stop: Arc<AtomicBool>,
    stop_noted: bool,
    next_line: Duration,
    /// The style of the block says so too.
    violated: bool,
    /// Violations seen, by position in [`Oracle::ALL`].
    seen: [u64; Oracle::ALL.len()],
    /// What the guest printed since its last newline.
    console: String,
}

impl Status {
    /// Shows a run of `length` that `stop` ends early.
    pub(crate) fn new(screen: Screen, length: RunLength, stop: Arc<AtomicBool>) -> Self {
        if let Some(bar) = &screen.bar {
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
        self.screen.live.store(false, Ordering::Relaxed);
        if let Some(bar) = &self.screen.bar {
            bar.finish_and_clear();
        }
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
        self.screen.live.store(true, Ordering::Relaxed);
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
        if let Some(bar) = self.screen.bar.clone() {
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
/// It begins with an empty line. The `^C` that a terminal echoes pushes the block up by one, and what is on its first
/// line then stays on the screen.
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

/// Progress in words, with the end if it is known.
fn so_far(length: RunLength, progress: &Progress) -> (String, String) {
    let elapsed = format!("{:.1} s", progress.elapsed.as_secs_f64());
    let snapshots = count(progress.snapshots);
    match length {
        RunLength::Duration(total) => (format!("{elapsed} of {}", exact_time(total)), snapshots),
        RunLength::Snapshots(total) => (elapsed, format!("{snapshots} of {}", count(total))),
    }
}

fn block(length: RunLength, p: &Progress) -> String {
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

fn line(length: RunLength, p: &Progress) -> String {
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
        violations(p)
    )
}

/// Violations by oracle, those that have none left out.
fn violations(progress: &Progress) -> String {
    let seen: Vec<String> = Oracle::ALL
        .into_iter()
        .filter(|oracle| progress.violations.of(*oracle) > 0)
        .map(|oracle| format!("{oracle} {}", count(progress.violations.of(oracle))))
        .collect();
    if seen.is_empty() {
        "none".to_owned()
    } else {
        seen.join(", ")
    }
}

/// `text` with control characters spelled out: a guest must not drive the user's terminal.
pub(crate) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\t' {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::report::{DirtyCounts, FaultCounts, PinCounts, ViolationCounts};

    const TEN_SECONDS: RunLength = RunLength::Duration(Duration::from_secs(10));

    fn example() -> Progress {
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
    fn only_oracles_that_saw_something_are_listed() {
        let mut progress = example();
        assert_eq!(violations(&progress), "none");
        progress.violations.isolation = 1_200;
        progress.violations.life = 1;
        assert_eq!(violations(&progress), "isolation 1,200, life 1");
    }

    #[test]
    fn a_guest_cannot_drive_the_terminal() {
        assert_eq!(printable("\x1b[2Jhé\tx\r"), "\\u{1b}[2Jhé\tx\\r");
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
