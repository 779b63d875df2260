//! Plots what `cargo bench -p benches --bench snapshot -- --json` has measured: pause against memory size,
//! and the guest's speed against snapshots a second, one line a technique. Or draws a snapshot of a run's trace
//! (`vmm --trace`): what each thread did around it.

mod chart;
mod rows;
mod svg;
mod trace;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use benches::report::{Cell, Report, Setting};
use benches::technique::Kind;
use clap::Parser;
use vmm::cli::chain;
use vmm::cli::units::{bytes, micros};

use chart::{Axis, Chart, Scale, Series};
use rows::Timeline;

/// What is seen of a trace before and after the pause, in microseconds.
const BEFORE: f64 = 1500.0;
const AFTER: f64 = 3500.0;
/// The same where the pause itself is drawn, in parts of it.
const MARGIN: f64 = 0.15;

/// Plot what `cargo bench -p benches --bench snapshot -- --json` has measured, as SVG files; or draw a
/// snapshot of a trace that `vmm --trace` has written, the one with the median pause.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    /// The numbers, or the trace
    #[arg(value_name = "FILE.json")]
    result: PathBuf,

    /// Where the plots go; made if it is not there
    #[arg(value_name = "OUT_DIR")]
    out: PathBuf,
}

/// Why there are no plots.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "{}: cannot read as a result of the snapshot bench, nor as a trace",
        path.display()
    )]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: has nothing to plot", path.display())]
    Empty { path: PathBuf },
    #[error("{}: cannot write", path.display())]
    Write { path: PathBuf, source: io::Error },
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
    let path = args.result.clone();
    let drawings = read(&path).map_err(|source| Error::Read { path, source })?;
    if drawings.is_empty() {
        let path = args.result.clone();
        return Err(Error::Empty { path });
    }
    let written = |path: &Path, done: io::Result<()>| {
        let path = path.to_owned();
        done.map_err(|source| Error::Write { path, source })
    };
    written(&args.out, fs::create_dir_all(&args.out))?;
    for (name, svg) in drawings {
        let path = args.out.join(name);
        written(&path, fs::write(&path, svg))?;
        // Whoever does not listen finds the file anyway.
        let _ = writeln!(io::stdout(), "{}", path.display());
    }
    Ok(())
}

/// The drawings of a file, by the names of theirs.
fn read(path: &Path) -> io::Result<Vec<(String, String)>> {
    let file = fs::read(path)?;
    let is_trace = serde_json::from_slice(&file).ok();
    if let Some(threads) = is_trace.as_ref().and_then(trace::threads) {
        return Ok(timelines(&threads));
    }
    let report = Report::read(path)?;
    let plots = plots(&report).into_iter();
    Ok(plots.map(|(name, chart)| (name, chart.svg())).collect())
}

/// A snapshot of a trace, and its pause alone.
fn timelines(threads: &[trace::Thread]) -> Vec<(String, String)> {
    let Some(pause) = trace::typical_pause(threads) else {
        return Vec::new();
    };
    let took = pause.1 - pause.0;
    let draw = |name: &str, title: &str, (from, to)| {
        let timeline = Timeline {
            title: title.to_owned(),
            subtitle: format!("the pause was {}, the median of the run", micros(took)),
            threads,
            from,
            to,
            pause,
        };
        (name.to_owned(), timeline.svg())
    };
    let around = (pause.0 - BEFORE, pause.1 + AFTER);
    let of_it = (pause.0 - MARGIN * took, pause.1 + MARGIN * took);
    vec![
        draw("snapshot.svg", "A snapshot of a running guest", around),
        draw("pause.svg", "The pause of a snapshot", of_it),
    ]
}

/// All plots that `report` has the numbers for, by file name.
fn plots(report: &Report) -> Vec<(String, Chart)> {
    let settings = report.settings();
    let mut plots = Vec::new();
    let mut done: Vec<Setting<'_>> = Vec::new();
    for setting in &settings {
        // Settings that differ in memory alone are one plot.
        let any_size = Setting {
            memory: 0,
            ..*setting
        };
        if !done.contains(&any_size) {
            done.push(any_size);
            plots.push((
                format!("pause-{}.svg", name(any_size)),
                pause_plot(report, any_size),
            ));
        }
    }
    for setting in settings {
        let chart = speed_plot(report, setting);
        if !chart.series.is_empty() {
            let size = bytes(setting.memory).replace(' ', "");
            plots.push((format!("speed-{}-{size}.svg", name(setting)), chart));
        }
    }
    plots
}

/// What a setting is called, its memory aside.
fn name(setting: Setting<'_>) -> String {
    let dma = if setting.dma { "-dma" } else { "" };
    format!("{}-{}vcpu{dma}", setting.pattern, setting.vcpus)
}

/// The same for people.
fn title(setting: Setting<'_>) -> String {
    let s = if setting.vcpus == 1 { "" } else { "s" };
    let dma = if setting.dma { ", with DMA" } else { "" };
    format!("{}, {} vCPU{s}{dma}", setting.pattern, setting.vcpus)
}

fn subtitle(report: &Report, what: &str) -> String {
    let platform = &report.platform;
    format!(
        "{what}; {} KVM, Linux {}, {} CPUs",
        platform.kvm, platform.kernel, platform.cpus
    )
}

/// One line for each technique that has points.
fn series<'a>(
    report: &'a Report,
    points: impl Fn(&'a Cell) -> Vec<(f64, f64)>,
    which: impl Fn(&Cell) -> bool,
) -> Vec<Series> {
    let mut all = Vec::new();
    for (style, kind) in Kind::ALL.into_iter().enumerate() {
        let mut points: Vec<(f64, f64)> = report
            .cells
            .iter()
            .filter(|cell| cell.technique == kind.name() && which(cell))
            .flat_map(&points)
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        if !points.is_empty() {
            all.push(Series {
                name: kind.name().to_owned(),
                style,
                points,
            });
        }
    }
    all
}

fn pause_plot(report: &Report, any_size: Setting<'_>) -> Chart {
    let series = series(
        report,
        |cell| vec![(cell.memory as f64, cell.pause_us.p50)],
        |cell| {
            let setting = Setting {
                memory: 0,
                ..cell.setting()
            };
            setting == any_size
        },
    );
    let points = || series.iter().flat_map(|line| &line.points);
    Chart {
        title: format!("Pause of a snapshot: {}", title(any_size)),
        subtitle: subtitle(report, &format!("median of {}", report.rounds)),
        x: Axis::of_values(
            "guest memory, all of it touched",
            points().map(|p| p.0),
            |v| bytes(v as u64),
        ),
        y: Axis::decades("pause (log scale)", points().map(|p| p.1), short_time),
        series,
    }
}

fn speed_plot(report: &Report, setting: Setting<'_>) -> Chart {
    let series = series(
        report,
        |cell| {
            let rates = cell.rates.iter();
            rates.map(|rate| (rate.asked, rate.share * 100.0)).collect()
        },
        |cell| cell.setting() == setting,
    );
    let points = || series.iter().flat_map(|line| &line.points);
    // On a busy machine a guest may be faster with snapshots than it was without.
    let top = points().fold(100.0f64, |top, p| top.max(p.1));
    let ticks = (top / 20.0).ceil() as u32;
    Chart {
        title: format!(
            "Speed of the guest: {}, {}",
            bytes(setting.memory),
            title(setting)
        ),
        subtitle: subtitle(report, "100% is the same guest without snapshots"),
        x: Axis::of_values(
            "snapshots a second, asked for",
            points().map(|p| p.0),
            |v| v.to_string(),
        ),
        y: Axis {
            name: "writes a second".to_owned(),
            scale: Scale::Linear,
            ticks: (0..=ticks)
                .map(|n| (f64::from(n) * 20.0, format!("{}%", n * 20)))
                .collect(),
        },
        series,
    }
}

/// A power of ten of microseconds, without the digits that say how exact it is.
fn short_time(us: f64) -> String {
    micros(us).replace(".00", "").replace(".0 ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULT: &str = include_str!("../../../testdata/snapshot.json");

    fn example() -> Report {
        serde_json::from_str(RESULT).unwrap()
    }

    #[test]
    fn every_pattern_has_a_plot_and_every_setting_its_speed() {
        let plots = plots(&example());
        let names: Vec<&str> = plots.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "pause-hot-1vcpu.svg",
                "speed-hot-1vcpu-256MiB.svg",
                "speed-hot-1vcpu-1.00GiB.svg"
            ]
        );
        for (_, chart) in &plots {
            svg::tests::assert_well_formed(&chart.svg());
        }
    }

    #[test]
    fn a_technique_has_the_same_style_in_every_plot() {
        for (_, chart) in plots(&example()) {
            for series in chart.series {
                assert_eq!(Kind::ALL[series.style].name(), series.name);
            }
        }
    }

    #[test]
    fn a_line_has_a_point_for_every_size() {
        let (_, chart) = plots(&example()).swap_remove(0);
        let fork = chart.series.iter().find(|s| s.name == "fork").unwrap();
        let sizes: Vec<f64> = fork.points.iter().map(|p| p.0).collect();
        assert_eq!(sizes, [(256u64 << 20) as f64, (1u64 << 30) as f64]);
    }

    #[test]
    fn times_at_ticks_are_short() {
        assert_eq!(short_time(100.0), "100 µs");
        assert_eq!(short_time(1.0), "1 µs");
        assert_eq!(short_time(10.0), "10 µs");
        assert_eq!(short_time(10_000.0), "10 ms");
        assert_eq!(short_time(1e6), "1 s");
    }

    #[test]
    fn a_trace_is_drawn_and_one_without_snapshots_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (result, out) = (
            directory.path().join("t.json"),
            directory.path().join("out"),
        );
        let draw = |trace: &serde_json::Value| {
            fs::write(&result, trace.to_string()).unwrap();
            run(&Args {
                result: result.clone(),
                out: out.clone(),
            })
        };
        let none = serde_json::json!({"traceEvents": []});
        assert!(matches!(draw(&none), Err(Error::Empty { .. })));
        draw(&trace::tests::example()).unwrap();
        for name in ["snapshot.svg", "pause.svg"] {
            let svg = fs::read_to_string(out.join(name)).unwrap();
            svg::tests::assert_well_formed(&svg);
            assert!(svg.contains("200 µs"), "the median pause");
        }
    }

    #[test]
    fn files_are_written_where_they_are_wanted() {
        let directory = tempfile::tempdir().unwrap();
        let result = directory.path().join("r.json");
        fs::write(&result, RESULT).unwrap();
        let out = directory.path().join("new/plots");
        run(&Args {
            result: result.clone(),
            out: out.clone(),
        })
        .unwrap();
        assert_eq!(fs::read_dir(&out).unwrap().count(), 3);
        fs::write(&result, "{}").unwrap();
        assert!(matches!(
            run(&Args { result, out }),
            Err(Error::Read { .. })
        ));
    }
}
