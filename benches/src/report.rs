//! The numbers of a run.

use std::io;
use std::path::Path;
use std::{fs, iter};

use guest::abi::Pattern;
use palimpsest::kvm;
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::summary::Summary;
use crate::verdict::Verdict;

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this program.
    pub version: String,
    /// Where it ran.
    pub platform: Platform,
    /// What the machine does without a guest.
    pub machine: Machine,
    /// Snapshots measured of each.
    pub rounds: u64,
    /// What was measured.
    pub cells: Vec<Cell>,
    /// What was not, and why.
    pub skipped: Vec<Skipped>,
    /// What the numbers say about the targets.
    pub targets: Vec<Verdict>,
}

/// Where a run was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Platform {
    /// `"pvm"`, `"vmx"`, `"svm"` or `"unknown"`.
    pub kvm: String,
    /// Release of the host's kernel.
    pub kernel: String,
    /// CPUs.
    pub cpus: usize,
    /// Programs that ran or wanted to when this began (the load of the last minute): with any,
    /// the numbers are theirs too.
    pub load: f64,
}

/// One technique with one guest. Times are in microseconds, sizes in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Name of the technique.
    pub technique: String,
    /// Guest memory, all of it touched.
    pub memory: u64,
    /// Name of the pattern.
    pub pattern: String,
    /// vCPUs.
    pub vcpus: u64,
    /// Whether a device wrote beside.
    pub dma: bool,
    /// Bytes of a lap.
    pub sweep: u64,
    /// A lap without a snapshot.
    pub usual_lap_us: f64,
    /// The longest gap without a snapshot: what the machine does to a guest by itself.
    pub quiet_gap_us: f64,
    /// Writes a second without a snapshot.
    pub ops_per_s: f64,
    /// A pause in which registers are captured and nothing is done to memory, the median of some.
    pub empty_pause_us: f64,
    /// From the kick to the last vCPU running again.
    pub pause_us: Summary,
    /// What the guest lost over its first sweep after the snapshot.
    pub stall_us: Summary,
    /// The longest gap in it.
    pub gap_us: Summary,
    /// The stall by pages written.
    pub per_page_us: f64,
    /// Pages written until the end of that sweep.
    pub pages: u64,
    /// Bytes copied for a snapshot until then.
    pub copied: u64,
    /// Memory of guest, snapshot and tables then.
    pub peak_memory: u64,
    /// Bytes of tables that have memory behind them then, where the technique counts them.
    pub tables: Option<u64>,
    /// Writes with snapshots all the time.
    pub rates: Vec<Rate>,
    /// The first snapshot of fresh guests, if that was measured.
    #[serde(default)]
    pub first: Option<First>,
}

/// The first snapshot there ever is of a guest: memory for copies is new, and nothing is known yet of how it writes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct First {
    /// Guests that were booted for it.
    pub guests: u64,
    /// From the kick to the last vCPU running again.
    pub pause_us: Summary,
    /// What the guest lost over its first sweep after that.
    pub stall_us: Summary,
}

/// Snapshots all the time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Snapshots a second that were asked for.
    pub asked: f64,
    /// And how many there were.
    pub taken: f64,
    /// Writes a second, as a share of those without snapshots.
    pub share: f64,
    /// Pauses.
    pub pause_us: Summary,
}

/// What was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Name of the technique, and of the setting unless it is all of them.
    pub what: String,
    /// Why.
    pub why: String,
}

/// What the guest and its surroundings were, the technique aside: cells that are alike in this are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting<'a> {
    /// Guest memory.
    pub memory: u64,
    /// Name of the pattern.
    pub pattern: &'a str,
    /// vCPUs.
    pub vcpus: u64,
    /// Whether a device wrote beside.
    pub dma: bool,
}

impl Platform {
    /// Where this runs, and how busy it is.
    pub fn of(platform: &kvm::Platform) -> Self {
        let load = fs::read_to_string("/proc/loadavg").ok();
        let load = load.and_then(|text| text.split_whitespace().next()?.parse().ok());
        Self {
            kvm: platform.kvm.to_owned(),
            kernel: platform.kernel.clone(),
            cpus: platform.cpus,
            load: load.unwrap_or_default(),
        }
    }
}

impl Cell {
    /// What it was measured with.
    pub fn setting(&self) -> Setting<'_> {
        Setting {
            memory: self.memory,
            pattern: &self.pattern,
            vcpus: self.vcpus,
            dma: self.dma,
        }
    }

    /// Writes with `asked` snapshots a second.
    pub fn rate(&self, asked: f64) -> Option<&Rate> {
        self.rates.iter().find(|rate| rate.asked == asked)
    }
}

impl Report {
    /// The cell of `technique` in `setting`.
    pub fn cell(&self, technique: &str, setting: Setting<'_>) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.technique == technique && cell.setting() == setting)
    }

    /// All settings, in the order they were measured in.
    pub fn settings(&self) -> Vec<Setting<'_>> {
        let mut settings: Vec<Setting<'_>> = Vec::new();
        for cell in &self.cells {
            if !settings.contains(&cell.setting()) {
                settings.push(cell.setting());
            }
        }
        settings
    }

    /// Reads what a [`JsonFile`](crate::json_file::JsonFile) has of it.
    ///
    /// # Errors
    /// The host's, or that the file is no report.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }
}

/// What a pattern is called.
pub const fn pattern_name(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Dense => "dense",
        Pattern::Uniform => "uniform",
        Pattern::Hot => "hot",
        Pattern::Sparse => "sparse",
    }
}

/// The pattern of that name.
pub fn pattern_of(name: &str) -> Option<Pattern> {
    iter::successors(Some(0), |raw| Some(raw + 1))
        .map_while(Pattern::from_raw)
        .find(|pattern| pattern_name(*pattern) == name)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::json_file::JsonFile;
    use crate::verdict::Bound;

    /// A cell with every number different, scaled by `scale`.
    pub(crate) fn cell(technique: &str, memory: u64, pattern: &str, scale: f64) -> Cell {
        let summary = |p50: f64| Summary {
            count: 8,
            p50: p50 * scale,
            p99: p50 * scale * 3.0,
            max: p50 * scale * 4.0,
        };
        Cell {
            technique: technique.to_owned(),
            memory,
            pattern: pattern.to_owned(),
            vcpus: 1,
            dma: false,
            sweep: 128 << 20,
            usual_lap_us: 650.5,
            quiet_gap_us: 40.25,
            ops_per_s: 5.0e7,
            empty_pause_us: 150.5,
            pause_us: summary(250.0),
            stall_us: summary(20_000.0),
            gap_us: summary(900.0),
            per_page_us: 0.75 * scale,
            pages: 32_768,
            copied: 128 << 20,
            peak_memory: memory + (128 << 20),
            tables: None,
            first: None,
            rates: vec![
                Rate {
                    asked: 1.0,
                    taken: 1.0,
                    share: 0.95 / scale,
                    pause_us: summary(260.0),
                },
                Rate {
                    asked: 10.0,
                    taken: 9.5,
                    share: 0.70 / scale,
                    pause_us: summary(270.0),
                },
            ],
        }
    }

    /// A report of these cells.
    pub(crate) fn report(cells: Vec<Cell>) -> Report {
        Report {
            version: "0.1.0".to_owned(),
            platform: Platform {
                kvm: "pvm".to_owned(),
                kernel: "6.18.0".to_owned(),
                cpus: 2,
                load: 1.25,
            },
            machine: Machine {
                copy_us_per_page: 0.6,
                pin_ns: 28.5,
                pin_two_threads: 0.5,
            },
            rounds: 8,
            cells,
            skipped: vec![Skipped {
                what: "ours-2m".to_owned(),
                why: "this build has no 2 MiB frames".to_owned(),
            }],
            targets: Vec::new(),
        }
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let mut written = report(vec![
            cell("ours", 256 << 20, "hot", 1.0),
            // By a power of two: reading a number is not exact to the last bit.
            cell("fork", 256 << 20, "hot", 16.0),
        ]);
        written.targets = [Some(0.25), None]
            .map(|found| Verdict {
                what: "pause: ours / fork".to_owned(),
                bound: Bound::AtMost,
                limit: 0.5,
                found,
                where_: "1024 MiB, hot, 1 vcpus".to_owned(),
            })
            .to_vec();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        let file = JsonFile::prepare(Some(path.clone())).unwrap();
        assert!(!path.exists(), "checking leaves nothing behind");
        file.write(&written).unwrap();
        file.write(&written).unwrap();
        assert_eq!(Report::read(&path).unwrap(), written);
        let files = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(files, 1, "no temporary file is left");
        let prepare = |path: PathBuf| JsonFile::prepare(Some(path));
        assert!(prepare(directory.path().to_owned()).is_err());
        assert!(prepare(directory.path().join("no/report.json")).is_err());
    }

    #[test]
    fn something_else_is_no_report() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.json");
        fs::write(&path, "{\"version\": 1}").unwrap();
        assert!(Report::read(&path).is_err());
    }

    #[test]
    fn patterns_have_names() {
        for name in ["dense", "uniform", "hot", "sparse"] {
            assert_eq!(pattern_of(name).map(pattern_name), Some(name));
        }
        assert_eq!(pattern_of("denser"), None);
    }

    #[test]
    fn cells_are_found_by_what_they_were_measured_with() {
        let mut dma = cell("ours", 1 << 30, "hot", 2.0);
        dma.dma = true;
        let report = report(vec![
            cell("ours", 1 << 30, "hot", 1.0),
            dma.clone(),
            cell("ours", 1 << 30, "dense", 1.0),
        ]);
        assert_eq!(report.cell("ours", dma.setting()), Some(&dma));
        assert_eq!(report.cell("fork", dma.setting()), None);
        assert_eq!(report.settings().len(), 3);
        assert_eq!(dma.rate(10.0).map(|rate| rate.taken), Some(9.5));
        assert_eq!(dma.rate(5.0), None);
    }
}
