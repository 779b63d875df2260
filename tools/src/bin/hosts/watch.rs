//! An emulator at work: what it says is read as it comes, and one that hangs, or is not
//! wanted any more, is killed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::results::{Event, Reader};

/// How long the phases of a host may last.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// From the start until the first task can run.
    pub(crate) boot: Duration,
    /// Each task, by number, by the clock on the wall.
    pub(crate) tasks: Vec<Duration>,
    /// Between a task and the next, and from the last one until the host is off.
    pub(crate) between: Duration,
}

/// Why a host did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchError {
    #[error("cannot run the emulator")]
    Start(#[source] io::Error),
    #[error("cannot read what the host says")]
    Read(#[source] io::Error),
    #[error("interrupted")]
    Interrupted,
    #[error("the host has no /dev/kvm")]
    NoKvm,
    #[error("the emulator ended early, with {0}")]
    Ended(ExitStatus),
    #[error("the host was not up after {0:?}, and was killed")]
    NotUp(Duration),
    #[error("task {task} was not over after {limit:?}, and the host was killed")]
    Hangs { task: usize, limit: Duration },
    #[error("nothing came for {0:?} between two tasks, and the host was killed")]
    Silent(Duration),
}

/// Where a host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Boots,
    Runs(usize),
    Between,
    Over,
}

impl Limits {
    fn of(&self, phase: Phase) -> Duration {
        match phase {
            Phase::Boots => self.boot,
            Phase::Runs(task) => self.tasks.get(task).copied().unwrap_or(self.between),
            Phase::Between | Phase::Over => self.between,
        }
    }
}

/// Runs `command` until the host is off, and passes on what it says in the file `results`.
pub(crate) fn watch(
    command: &mut Command,
    results: &Path,
    limits: &Limits,
    stop: &AtomicBool,
    mut tell: impl FnMut(&Event),
) -> Result<(), WatchError> {
    // It must be there to be read.
    File::create(results).map_err(WatchError::Read)?;
    let mut file = File::open(results).map_err(WatchError::Read)?;
    let mut emulator = Running(
        command
            .stdin(Stdio::null())
            .spawn()
            .map_err(WatchError::Start)?,
    );
    let mut reader = Reader::default();
    let mut phase = Phase::Boots;
    let mut since = Instant::now();
    loop {
        // Asked before the output is read: what is read after the end is complete then.
        let ended = emulator.0.try_wait().map_err(WatchError::Read)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(WatchError::Read)?;
        for event in reader.feed(&bytes) {
            tell(&event);
            let next = match event {
                Event::NoKvm => return Err(WatchError::NoKvm),
                Event::Begun(task, _) => Phase::Runs(task),
                Event::Ready(_) | Event::Ended(..) => Phase::Between,
                Event::Done(_) => Phase::Over,
                Event::Host(_) | Event::Line(_) => continue,
            };
            (phase, since) = (next, Instant::now());
        }
        if let Some(status) = ended {
            return match phase {
                Phase::Over => Ok(()),
                _ => Err(WatchError::Ended(status)),
            };
        }
        if stop.load(Ordering::Relaxed) {
            return Err(WatchError::Interrupted);
        }
        let limit = limits.of(phase);
        if since.elapsed() > limit {
            return match phase {
                Phase::Boots => Err(WatchError::NotUp(limit)),
                Phase::Runs(task) => Err(WatchError::Hangs { task, limit }),
                Phase::Between => Err(WatchError::Silent(limit)),
                // All there was to do is done; that it does not switch itself off is its own affair.
                Phase::Over => Ok(()),
            };
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// An emulator, which ends with this.
#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // A terminal's program is ended by the one that made the terminal, which must hear of it.
        let pid = Pid::from_child(&self.0);
        if matches!(self.0.try_wait(), Ok(None)) && kill_process(pid, Signal::TERM).is_ok() {
            for _ in 0..40 {
                if !matches!(self.0.try_wait(), Ok(None)) {
                    return;
                }
                thread::sleep(Duration::from_millis(50));
            }
        }
        // It has ended already, or it will not.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last `count` lines of the file at `path`, as far as it has any.
pub(crate) fn last_lines(path: &Path, count: usize) -> Vec<String> {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().map(str::trim_end);
    let lines = Vec::from_iter(lines.filter(|line| !line.is_empty()));
    let skipped = lines.len().saturating_sub(count);
    lines[skipped..]
        .iter()
        .map(|&line| line.to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Watches a shell that plays a host: `script` writes to `$0`.
    fn play(
        script: &str,
        limits: &Limits,
        stop: &AtomicBool,
    ) -> (Result<(), WatchError>, Vec<Event>) {
        let folder = tempfile::tempdir().unwrap();
        let results = folder.path().join("results");
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&results);
        let mut events = Vec::new();
        let result = watch(&mut command, &results, limits, stop, |event| {
            events.push(event.clone());
        });
        (result, events)
    }

    /// Limits that no test reaches.
    fn limits() -> Limits {
        let long = Duration::from_secs(600);
        Limits {
            boot: long,
            tasks: vec![long],
            between: long,
        }
    }

    static GO: AtomicBool = AtomicBool::new(false);

    #[test]
    fn a_host_that_runs_its_tasks_and_ends_is_well() {
        let script = r#"printf '@ready 1\n@begin 0 1\n.x\n@end 0 0 2\n@done 2\n' >> "$0"; exit 1"#;
        let (result, events) = play(script, &limits(), &GO);
        result.unwrap();
        assert_eq!(events.len(), 5);
        assert_eq!(events[2], Event::Line("x".to_owned()));
    }

    #[test]
    fn an_emulator_that_ends_early_is_an_error() {
        let (result, events) = play(
            r#"printf '@ready 1\n@begin 0 1\n' >> "$0"; exit 7"#,
            &limits(),
            &GO,
        );
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("ended early") && error.contains('7'),
            "{error}"
        );
        assert_eq!(events.len(), 2);
    }

    #[test]
    fn a_host_that_hangs_is_killed_wherever_it_does() {
        // Only where it hangs is there a limit that it can reach.
        let at_once = Duration::from_millis(1);
        let boot = Limits {
            boot: at_once,
            ..limits()
        };
        let task = Limits {
            tasks: vec![at_once],
            ..limits()
        };
        let between = Limits {
            between: at_once,
            ..limits()
        };
        let cases = [
            (boot, "", "not up after"),
            (task, r"@begin 0 1\n", "task 0 was not over"),
            (between, r"@begin 0 1\n@end 0 0 2\n", "between two tasks"),
        ];
        for (limits, said, expected) in cases {
            let script = format!(r#"printf '{said}' >> "$0"; exec sleep 600"#);
            let (result, _) = play(&script, &limits, &GO);
            let error = result.unwrap_err().to_string();
            assert!(error.contains(expected), "{said}: {error}");
        }
        // Over is over.
        let over = Limits {
            between: at_once,
            ..limits()
        };
        let (result, _) = play(r#"echo '@done 2' >> "$0"; exec sleep 600"#, &over, &GO);
        result.unwrap();
    }

    #[test]
    fn one_that_has_no_kvm_is_not_waited_for() {
        let (result, _) = play(r#"echo @nokvm >> "$0"; exec sleep 600"#, &limits(), &GO);
        assert!(matches!(result, Err(WatchError::NoKvm)));
    }

    #[test]
    fn an_interrupt_kills_it() {
        let (result, _) = play("exec sleep 600", &limits(), &AtomicBool::new(true));
        assert!(matches!(result, Err(WatchError::Interrupted)));
        // Even one that does not listen.
        let (result, _) = play(
            "trap '' TERM; while :; do sleep 1; done",
            &limits(),
            &AtomicBool::new(true),
        );
        assert!(matches!(result, Err(WatchError::Interrupted)));
    }

    #[test]
    fn the_last_lines_are_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        assert_eq!(last_lines(&path, 2).len(), 0);
        fs::write(&path, "a\n\r\nb\r\nc").unwrap();
        assert_eq!(last_lines(&path, 2), ["b", "c"]);
        assert_eq!(last_lines(&path, 9), ["a", "b", "c"]);
    }
}
