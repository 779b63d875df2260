//! What a person sees of a host while it is at work.

use std::io::{self, Write};

use super::boot::{Done, HostRun, Listener};
use super::say;
use super::task::{KILLED, Suite, Task};

/// Prints how tasks end, and the output of those that do not end well.
#[derive(Debug)]
pub(crate) struct Verdicts {
    /// The host they run on: others may be at work beside it.
    pub(crate) host: &'static str,
}

impl Listener for Verdicts {
    fn line(&mut self, _line: &str) {}

    fn done(&mut self, task: &Task, done: &Done) {
        print(&verdict(self.host, task, done));
    }
}

/// Prints what tasks print.
#[derive(Debug)]
pub(crate) struct Passage;

impl Listener for Passage {
    fn line(&mut self, line: &str) {
        print(line);
    }

    fn done(&mut self, task: &Task, done: &Done) {
        if done.code != task.expected {
            say(&format!("exit code {}", ended(task, done)));
        }
    }
}

/// Prints a line to standard output.
pub(crate) fn print(text: &str) {
    // Whoever does not listen has the exit code.
    let _ = writeln!(io::stdout(), "{text}");
}

/// A line on a task that has ended; more if it has not ended well.
fn verdict(host: &str, task: &Task, done: &Done) -> String {
    let took = done.took.as_secs_f64();
    let title = task.title();
    if done.code == task.expected {
        let mut text = format!("  ok     {took:>6.1} s  {host}: {title}");
        // What a test has left out is not to look like a test that passed.
        for line in &done.output {
            if task.suite == Some(Suite::Tests) && line.contains(": skipped: ") {
                text.push_str(&format!("\n                   {line}"));
            }
        }
        return text;
    }
    let mut text = format!(
        "  WRONG  {took:>6.1} s  {host}: {title}: exit code {}",
        ended(task, done)
    );
    for line in &done.output {
        text.push_str(&format!("\n         | {line}"));
    }
    text
}

/// How a task ended that ended wrongly.
fn ended(task: &Task, done: &Done) -> String {
    let why = if done.code == KILLED && done.took >= task.limit {
        format!(" (killed after {} s)", task.limit.as_secs())
    } else {
        String::new()
    };
    format!("{}{why}, not {}", done.code, task.expected)
}

/// A line on a host that has ended.
pub(crate) fn conclusion(run: &HostRun) -> String {
    let about = match run.about.as_str() {
        "" => String::new(),
        about => format!("; {about}"),
    };
    format!(
        "{}: {} of {} as they must be, in {:.0} s{about}",
        run.host.name,
        run.right().count(),
        run.tasks.len(),
        run.took.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::task;

    fn done(code: i32, seconds: u64, output: &[&str]) -> Done {
        Done {
            task: 0,
            code,
            took: Duration::from_secs(seconds),
            output: output.iter().map(|&line| line.to_owned()).collect(),
        }
    }

    #[test]
    fn what_went_well_is_a_line() {
        let task = Task::given(&["vmm".to_owned(), "-v".to_owned()]);
        let text = verdict("amd", &task, &done(0, 12, &["ok: 20 snapshots taken"]));
        assert_eq!(text, "  ok       12.0 s  amd: vmm -v");
    }

    #[test]
    fn what_did_not_is_shown_with_its_output() {
        let task = Task::given(&["vmm".to_owned()]);
        let text = verdict("amd", &task, &done(3, 2, &["a", "b"]));
        assert!(text.contains("WRONG"), "{text}");
        assert!(text.contains("exit code 3, not 0\n"), "{text}");
        assert!(text.ends_with("| a\n         | b"), "{text}");
    }

    #[test]
    fn a_task_that_hung_is_told_from_one_that_was_killed_otherwise() {
        let task = Task::given(&["vmm".to_owned()]);
        let limit = task.limit.as_secs();
        let text = verdict("amd", &task, &done(KILLED, limit, &[]));
        assert!(
            text.contains(&format!("(killed after {limit} s)")),
            "{text}"
        );
        let text = verdict("amd", &task, &done(KILLED, 1, &[]));
        assert!(!text.contains("killed"), "{text}");
    }

    #[test]
    fn tests_that_were_skipped_are_named() {
        let tasks = task::tasks(Suite::Tests, task::Extent::Full, &["cli".to_owned()]);
        let lines = ["four_gibibytes_run: skipped: too little", "test a ... ok"];
        let text = verdict("amd", &tasks[0], &done(0, 1, &lines));
        assert!(text.contains("skipped: too little"), "{text}");
        assert!(!text.contains("test a"), "{text}");
    }
}
