//! The results of all hosts, kept in `docs/platforms.md` between two marks.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::NamedTempFile;

use super::boot::HostRun;
use super::programs::workspace;
use super::task::Suite;

const BEGIN: &str = "<!-- What `hosts --all` found begins here. -->\n";
const END: &str = "<!-- What `hosts --all` found ends here. -->\n";

/// Why results are not kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("{}: cannot read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: cannot write", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{}: has no place for results, from {BEGIN:?} to {END:?}", path.display())]
    NoPlace { path: PathBuf },
}

/// A table of what hosts have done: a line for each, a column for each suite.
pub(crate) fn table(runs: &[HostRun]) -> String {
    let mut rows = vec![vec![
        "host".to_owned(),
        "main job".to_owned(),
        "fork".to_owned(),
        "faults".to_owned(),
        "compare".to_owned(),
        "tests".to_owned(),
        "time".to_owned(),
        "kernel and processor".to_owned(),
    ]];
    for run in runs {
        let mut row = vec![run.host.name.to_owned()];
        row.extend(Suite::ALL.map(|suite| tally(run, suite)));
        row.push(format!("{:.0} s", run.took.as_secs_f64()));
        row.push(run.about.clone());
        rows.push(row);
    }
    aligned(&rows)
}

/// How many tasks of `suite` went as they must, of how many.
fn tally(run: &HostRun, suite: Suite) -> String {
    let all = run.tasks.iter().filter(|task| task.suite == Some(suite));
    let right = run
        .right()
        .filter(|done| run.task(done).suite == Some(suite));
    match all.count() {
        0 => "-".to_owned(),
        all => format!("{} of {all}", right.count()),
    }
}

/// A Markdown table, which is readable as it is.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths = Vec::from_iter((0..columns).map(width));
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (cell, &width) in row.iter().zip(&widths) {
            text.push_str(&format!("| {cell:<width$} "));
        }
        text.push_str("|\n");
        if number == 0 {
            text.push_str(&"|---".repeat(columns));
            text.push_str("|\n");
        }
    }
    text
}

/// What went wrong, a line each, as Markdown. Nothing if nothing did.
fn wrongs(runs: &[HostRun]) -> String {
    let mut text = String::new();
    for run in runs {
        let name = run.host.name;
        for done in &run.done {
            let task = run.task(done);
            if done.code != task.expected {
                let (title, code, expected) = (task.title(), done.code, task.expected);
                text.push_str(&format!(
                    "- {name}: `{title}`: exit code {code}, not {expected}\n"
                ));
            }
        }
        if let Some(trouble) = &run.trouble {
            let trouble = trouble.to_string();
            let first = trouble.lines().next().unwrap_or_default();
            text.push_str(&format!("- {name}: {first}\n"));
        }
    }
    text
}

/// Puts what hosts have done in the document, in place of what was there from the last time.
pub(crate) fn keep(runs: &[HostRun]) -> Result<PathBuf, RecordError> {
    let path = workspace().join("docs/platforms.md");
    let wrongs = match wrongs(runs).as_str() {
        "" => "Everything went as it must.\n".to_owned(),
        wrongs => format!("What did not:\n{wrongs}"),
    };
    let found = format!("{}\n{}\n{wrongs}", stamp(), table(runs));
    let text = fs::read_to_string(&path).map_err(|source| RecordError::Read {
        path: path.clone(),
        source,
    })?;
    let Some(text) = replaced(&text, &found) else {
        return Err(RecordError::NoPlace { path });
    };
    match write_whole(&path, &text) {
        Ok(()) => Ok(path),
        Err(source) => Err(RecordError::Write { path, source }),
    }
}

/// When this was, and what was run.
fn stamp() -> String {
    let said = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(workspace());
        let output = command.stdin(Stdio::null()).output().ok()?;
        let said = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| said.trim().to_owned())
    };
    let unknown = || "unknown".to_owned();
    let date = said("date", &["-u", "+%Y-%m-%d"]).unwrap_or_else(unknown);
    let commit = said("git", &["rev-parse", "--short", "HEAD"]).unwrap_or_else(unknown);
    let changed = said("git", &["status", "--porcelain"]).is_some_and(|said| !said.is_empty());
    let changed = if changed { ", with changes" } else { "" };
    format!("{date}, commit `{commit}`{changed}:\n")
}

/// `text` with `found` between the marks, or nothing if it has no marks.
fn replaced(text: &str, found: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{found}{END}{after}"))
}

/// Writes a file that is the old one or the new one at any instant.
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(text.as_bytes())?;
    // A temporary file is readable by its owner alone: it gets the permissions of the old one.
    fs::set_permissions(file.path(), fs::metadata(path)?.permissions())?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::boot::{BootError, Done};
    use crate::host;
    use crate::task::{self, Extent};

    #[test]
    fn new_results_take_the_place_of_old_ones_and_of_nothing_else() {
        let text = format!("before\n{BEGIN}old\n{END}after\n");
        let new = replaced(&text, "new\n").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}new\n{END}after\n"));
        assert_eq!(replaced("before\n", "new\n"), None);
        assert_eq!(replaced(&format!("{END}{BEGIN}"), "new\n"), None);
    }

    #[test]
    fn the_document_has_a_place_for_results() {
        let text = fs::read_to_string(workspace().join("docs/platforms.md")).unwrap();
        assert!(replaced(&text, "").is_some());
    }

    #[test]
    fn a_host_that_stopped_half_way_shows_in_table_and_list() {
        let tasks = task::tasks(Suite::Faults, Extent::Full, &[]);
        let (count, expected) = (tasks.len(), tasks[0].expected);
        let done = |task, code| Done {
            task,
            code,
            took: Duration::ZERO,
            output: Vec::new(),
        };
        let run = HostRun {
            done: vec![done(0, expected), done(1, 0)],
            trouble: Some(BootError::Interrupted),
            ..HostRun::new(&host::ALL[0], tasks)
        };
        let runs = [run];
        assert!(table(&runs).contains(&format!("| -        | -    | 1 of {count} |")));
        let wrongs = wrongs(&runs);
        assert!(wrongs.contains("exit code 0, not 3"), "{wrongs}");
        assert!(wrongs.ends_with("- amd: interrupted\n"), "{wrongs}");
    }

    #[test]
    fn a_table_lines_up() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = aligned(&[row(["host", "time"]), row(["amd-6.12", "1 s"])]);
        assert_eq!(
            text,
            "| host     | time |\n|---|---|\n| amd-6.12 | 1 s  |\n"
        );
    }

    #[test]
    fn a_document_is_replaced_whole_and_keeps_its_permissions() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("document");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        write_whole(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
