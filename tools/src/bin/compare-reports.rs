//! Puts several reports of `vmm --report` side by side.
//!
//! The first is what the others are compared with. Whether a larger number is better or worse
//! is for the reader to say.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use vmm::{
    cli::{
        chain,
        units::{bytes, count, micros},
    },
    session::report::Report,
};

/// Put reports of `vmm --report` side by side, with ratios against the first.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    /// The reports; the first is what the others are compared with
    #[arg(required = true, value_name = "REPORT.json")]
    reports: Vec<PathBuf>,
}

/// Why there is nothing to compare.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{}: cannot read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: is not a report of vmm --report", path.display())]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("cannot print")]
    Print(#[source] io::Error),
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If even this cannot be written, the exit code is all there is.
            let _ = writeln!(io::stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Error> {
    let reports = args
        .reports
        .iter()
        .map(|path| Ok((path.display().to_string(), read(path)?)))
        .collect::<Result<Vec<_>, Error>>()?;
    match io::stdout().write_all(table(&reports).as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Print(error)),
        _ => Ok(()),
    }
}

fn read(path: &Path) -> Result<Report, Error> {
    let json = fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&json).map_err(|source| Error::Parse {
        path: path.to_owned(),
        source,
    })
}

/// What a row shows of a report.
enum Cell {
    /// Words.
    Text(String),
    /// A number, and how it reads. `None` if the run has none.
    Number(Option<f64>, fn(f64) -> String),
}

impl Cell {
    fn count(number: u64) -> Self {
        Self::Number(Some(number as f64), |n| count(n as u64))
    }

    fn rate(number: f64) -> Self {
        Self::Number(Some(number), |n| count(n as u64))
    }

    fn bytes(number: u64) -> Self {
        Self::Number(Some(number as f64), |n| bytes(n as u64))
    }

    fn micros(number: Option<f64>) -> Self {
        Self::Number(number, micros)
    }

    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(Some(number), display) => display(*number),
            Self::Number(None, _) => "-".to_owned(),
        }
    }

    /// How this compares with `first`, if both are numbers and there is a ratio.
    fn ratio(&self, first: &Self) -> String {
        match (self, first) {
            (Self::Number(Some(number), _), Self::Number(Some(first), _)) if *first > 0.0 => {
                format!("{:.2}x", number / first)
            }
            _ => String::new(),
        }
    }
}

/// The rows of one report. Every report has the same.
fn rows(report: &Report) -> Vec<(&'static str, Cell)> {
    let Report {
        config,
        pause_us: pause,
        stall_us: stall,
        faults,
        pins,
        dma,
        ..
    } = report;
    vec![
        ("verdict", Cell::Text(report.verdict.name().to_owned())),
        ("violations", Cell::count(report.violations.total())),
        ("platform", Cell::Text(report.platform.kvm.clone())),
        ("policy", Cell::Text(report.policy.clone())),
        ("vCPUs", Cell::count(config.vcpus)),
        ("guest memory", Cell::bytes(config.memory)),
        ("duration", Cell::micros(Some(report.duration_s * 1e6))),
        ("operations/s", Cell::rate(report.guest.ops_per_s)),
        ("snapshots", Cell::count(report.snapshots.taken)),
        ("restored", Cell::count(report.snapshots.restored)),
        ("pause p50", Cell::micros(pause.p50)),
        ("pause p99", Cell::micros(pause.p99)),
        ("pause max", Cell::micros(pause.max)),
        ("stall p50", Cell::micros(stall.p50)),
        ("stall p99", Cell::micros(stall.p99)),
        ("stall max", Cell::micros(stall.max)),
        ("faults", Cell::count(faults.total())),
        ("copied", Cell::count(faults.copied)),
        ("eager copied", Cell::count(faults.eager_copied)),
        ("pins fast", Cell::count(pins.fast)),
        ("pins slow", Cell::count(pins.slow)),
        ("DMA bytes", Cell::bytes(dma.bytes)),
        ("memory peak", Cell::bytes(report.memory.bytes_peak)),
        ("mappings peak", Cell::count(report.memory.vmas_peak)),
    ]
}

/// `reports`, by name, as columns. The first has no ratios.
fn table(reports: &[(String, Report)]) -> String {
    let columns: Vec<_> = reports.iter().map(|(_, report)| rows(report)).collect();
    let Some(first) = columns.first() else {
        return String::new();
    };
    let header = std::iter::once(String::new()).chain(
        reports
            .iter()
            .enumerate()
            .flat_map(|(column, (name, _))| [name.clone()].into_iter().chain(blank(column))),
    );
    let mut lines: Vec<Vec<String>> = vec![header.collect()];
    for (row, (name, reference)) in first.iter().enumerate() {
        let mut line = vec![(*name).to_owned()];
        for (column, rows) in columns.iter().enumerate() {
            let cell = &rows[row].1;
            line.push(cell.text());
            line.extend(blank(column).map(|_| cell.ratio(reference)));
        }
        lines.push(line);
    }
    align(&lines)
}

/// Room for a ratio, which every column but the first has.
fn blank(column: usize) -> Option<String> {
    (column > 0).then(String::new)
}

/// `lines` with their fields in columns: the first to the left, the others to the right.
fn align(lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut row = format!("{:<1$}", line[0], widths[0]);
        for (field, width) in line.iter().zip(&widths).skip(1) {
            row.push_str(&format!("  {field:>width$}"));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = include_str!("../../testdata/report.json");

    fn example() -> Report {
        serde_json::from_str(REPORT).unwrap()
    }

    #[test]
    fn the_others_have_ratios_against_the_first() {
        let one = example();
        let mut two = example();
        two.guest.ops_per_s = one.guest.ops_per_s / 2.0;
        two.pause_us.max = None;
        let table = table(&[("a.json".to_owned(), one), ("b.json".to_owned(), two)]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "                  a.json     b.json");
        assert_eq!(lines[1], "verdict               ok         ok");
        let line = |name| *lines.iter().find(|line| line.starts_with(name)).unwrap();
        assert_eq!(
            line("operations/s"),
            "operations/s      20,576     10,288  0.50x"
        );
        assert_eq!(line("pause max"), "pause max        5.18 ms          -");
        // There is no ratio to zero.
        assert_eq!(line("violations"), "violations             0          0");
    }

    #[test]
    fn one_report_is_a_table_too() {
        let table = table(&[("a.json".to_owned(), example())]);
        assert!(table.lines().all(|line| !line.ends_with('x')), "{table}");
    }

    #[test]
    fn a_file_that_is_missing_is_named() {
        let error = read(Path::new("/no/such.json")).unwrap_err();
        assert_eq!(
            chain(&error),
            "/no/such.json: cannot read: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_file_that_is_no_report_is_named() {
        let error = read(Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/Cargo.toml"
        )))
        .unwrap_err();
        let error = chain(&error);
        assert!(
            error.contains("Cargo.toml: is not a report of vmm --report: "),
            "{error}"
        );
    }
}
