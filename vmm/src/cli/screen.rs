//! Standard error: lines, with a block below them on a terminal.

use std::{
    env,
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget};

use super::{outlet::Outlet, terminal::Terminal};

/// How often the block is redrawn, a second.
const REDRAWS: u8 = 5;
/// How long a reader of standard error may take nothing at the end.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Steps of the bar.
pub(super) const STEPS: u64 = 1000;

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

/// Standard error, shared by the status block and whoever else writes lines. Nobody who writes
/// waits for somebody to read.
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

    /// The bar of the block, on a terminal.
    pub(super) fn bar(&self) -> Option<&ProgressBar> {
        self.bar.as_ref()
    }

    /// Lines go above the block from now on.
    pub(super) fn raise_block(&self) {
        self.live.store(true, Ordering::Relaxed);
    }

    /// Takes the block off the screen.
    pub(super) fn clear_block(&self) {
        self.live.store(false, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
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
            // Standard error is where an error would be told.
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
