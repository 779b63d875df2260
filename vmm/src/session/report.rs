//! What a run found: counters, quantiles, the verdict, and the violations it rests on.
//!
//! [`Report`] is also the format of `--report`: field names are the JSON's, and a field is never renamed or
//! removed, only added. Times in it name their unit.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::config::Config;
pub use crate::check::{Oracle, Violation, ViolationCounts};
use palimpsest::kvm;

/// What a run amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything asked for was done and no oracle saw a violation.
    Ok,
    /// An oracle saw a violation.
    Violated,
    /// The run could not finish.
    Error,
    /// There was nothing that an oracle could have seen a violation in, or not enough.
    #[serde(rename = "nothing-checked")]
    NothingChecked,
}

impl Verdict {
    /// The verdict on a run. A violation outweighs an error: memory gone wrong is what makes a guest crash. `unchecked` says what was not
    /// looked at though it must be.
    pub const fn of(
        violations: &ViolationCounts,
        error: Option<&str>,
        unchecked: &[String],
    ) -> Self {
        if violations.total() > 0 {
            Self::Violated
        } else if error.is_some() {
            Self::Error
        } else if !unchecked.is_empty() {
            Self::NothingChecked
        } else {
            Self::Ok
        }
    }

    /// The verdict's name in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Violated => "violated",
            Self::Error => "error",
            Self::NothingChecked => "nothing-checked",
        }
    }
}

/// What ended a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndedBy {
    /// The time asked for was over.
    #[serde(rename = "duration")]
    Duration,
    /// The number of snapshots asked for was reached.
    #[serde(rename = "snapshots")]
    Snapshots,
    /// The user.
    #[serde(rename = "ctrl-c")]
    CtrlC,
    /// The guest, of its own will.
    #[serde(rename = "guest exit")]
    GuestExit,
    /// The guest crashed.
    #[serde(rename = "guest crash")]
    GuestCrash,
    /// The host failed.
    #[serde(rename = "error")]
    Error,
}

impl EndedBy {
    /// Whether the guest could run on.
    pub(super) fn leaves_the_guest_running(self) -> bool {
        matches!(self, Self::Duration | Self::Snapshots | Self::CtrlC)
    }
}

/// The machine a run was on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// The kind of KVM: `pvm`, `vmx`, `svm`, or `unknown`.
    pub kvm: String,
    /// How it translates a guest's addresses: `npt`, `ept-ad` (with accessed and dirty bits), `ept`, `shadow`, or `unknown`.
    // Reports of before it was asked for have none.
    #[serde(default = "unknown")]
    pub paging: String,
    /// Release of the host kernel.
    pub kernel: String,
    /// Host CPUs this process may run on.
    pub cpus: u64,
}

fn unknown() -> String {
    kvm::Paging::Unknown.name().to_owned()
}

impl From<&kvm::Platform> for Platform {
    fn from(platform: &kvm::Platform) -> Self {
        Self {
            kvm: platform.kvm.to_owned(),
            paging: platform.paging.name().to_owned(),
            kernel: platform.kernel.clone(),
            cpus: platform.cpus as u64,
        }
    }
}

/// What the guest got done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestCounts {
    /// Operations of all vCPUs.
    pub ops: u64,
    /// The same, a second of the run.
    pub ops_per_s: f64,
}

impl GuestCounts {
    /// `ops` operations in `time`.
    pub fn over(ops: u64, time: Duration) -> Self {
        let seconds = time.as_secs_f64();
        Self {
            ops,
            ops_per_s: if seconds > 0.0 {
                (ops as f64 / seconds * 10.0).round() / 10.0
            } else {
                0.0
            },
        }
    }
}

/// Quantiles of a time, in microseconds with one decimal; `None`, and `null` in JSON, if nothing was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// The median.
    pub p50: Option<f64>,
    /// What 99 of 100 do not exceed.
    pub p99: Option<f64>,
    /// The longest.
    pub max: Option<f64>,
}

impl Quantiles {
    /// Quantiles of a histogram of **nanoseconds**, such as [`nanoseconds`] makes.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        if histogram.is_empty() {
            return Self::default();
        }
        let micros = |nanos: u64| Some((nanos as f64 / 100.0).round() / 10.0);
        Self {
            p50: micros(histogram.value_at_quantile(0.5)),
            p99: micros(histogram.value_at_quantile(0.99)),
            max: micros(histogram.max()),
        }
    }
}

/// An empty histogram of nanoseconds up to an hour, three digits of each kept. Record with
/// [`Histogram::saturating_record`]; [`Quantiles::of`] reads it.
pub fn nanoseconds() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000_000, 3).expect("constant bounds are valid")
}

/// Snapshots, by what was done with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotCounts {
    /// Taken.
    pub taken: u64,
    /// Checked, every page of them.
    pub checked: u64,
    /// Restored.
    pub restored: u64,
    /// No longer kept though they should have been: the guest needed the memory.
    #[serde(default)]
    pub dropped: u64,
    /// Those of them in which a device was in the middle of a request: it did not reach the end of it in time.
    #[serde(default)]
    pub in_flight: u64,
}

/// Page faults, by how they were resolved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCounts {
    /// A write that kept its frame: it was the last owner.
    pub reused: u64,
    /// A write that got a copy.
    pub copied: u64,
    /// A read pin that got a frame of its own.
    pub unshared: u64,
    /// Copies a fork made at once, of pinned pages.
    pub eager_copied: u64,
    /// A write to memory that was never touched.
    pub zero_filled: u64,
    /// Pages copied beside one that was written, with all of their region.
    #[serde(default)]
    pub neighbours: u64,
    /// Regions of 2 MiB that were copied whole.
    #[serde(default)]
    pub whole: u64,
    /// Huge entries that became small ones.
    #[serde(default)]
    pub split: u64,
    /// Pages and regions that were copied ahead of the guest's writes, at no fault.
    #[serde(default)]
    pub ahead: u64,
    /// Faults of vCPUs whose page KVM named.
    #[serde(default)]
    pub by_kvm: u64,
    /// Faults of vCPUs that were about what their instruction wrote.
    #[serde(default)]
    pub by_operand: u64,
    /// Faults of vCPUs that were about a page table walked for their instruction.
    #[serde(default)]
    pub by_walk: u64,
    /// Faults of vCPUs that were about what the delivery of an event needs.
    #[serde(default)]
    pub by_event: u64,
    /// Faults of vCPUs for which the regions around them were made writable.
    #[serde(default)]
    pub by_region: u64,
    /// Faults of vCPUs for which a region farther away was made writable, on the way through all of memory.
    #[serde(default)]
    pub by_all: u64,
    /// Stores that KVM emulated and could not do itself.
    #[serde(default)]
    pub emulated: u64,
}

impl FaultCounts {
    /// Faults of all kinds. Eager copies are none: fork makes them, nobody waits at a page.
    pub const fn total(&self) -> u64 {
        self.reused + self.copied + self.unshared + self.zero_filled
    }
}

/// Pages pinned, by the way it was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinCounts {
    /// Without a lock.
    pub fast: u64,
    /// Under the region's lock.
    pub slow: u64,
    /// For registered buffers.
    pub registered: u64,
}

impl PinCounts {
    /// Pins taken by either path.
    pub const fn total(&self) -> u64 {
        self.fast + self.slow
    }
}

/// Transfers of the devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaCounts {
    /// Requests that wrote guest memory.
    pub to_guest: u64,
    /// Requests that read guest memory.
    pub from_guest: u64,
    /// Bytes of both.
    pub bytes: u64,
}

/// Dirty tracking, beside the running guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyCounts {
    /// How often it was asked which pages were written.
    pub rounds: u64,
    /// Pages in the answers.
    pub pages: u64,
}

/// What a run cost the host at its worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPeaks {
    /// Frames in use at once.
    pub frames_peak: u64,
    /// The same in bytes.
    pub bytes_peak: u64,
    /// Bytes of host memory that frames had at once, in use or not.
    pub committed_peak: u64,
    /// Mappings of this process at once.
    pub vmas_peak: u64,
    /// The most the kernel allows: `vm.max_map_count`.
    pub vmas_limit: u64,
}

/// What a run found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the program.
    pub version: String,
    /// The machine.
    pub platform: Platform,
    /// What was asked for.
    pub config: Config,
    /// Name of the copy-on-write policy.
    pub policy: String,
    /// What it amounts to.
    pub verdict: Verdict,
    /// Why the run could not finish. The first line is a sentence; more may follow, such as a crashed guest's registers.
    pub error: Option<String>,
    /// What was not checked though it must be, and what to do about it. A run without violations is not ok then.
    #[serde(default)]
    pub unchecked: Vec<String>,
    /// What ended the run.
    pub ended_by: EndedBy,
    /// How long the guest ran.
    pub duration_s: f64,
    /// What it got done.
    pub guest: GuestCounts,
    /// What the guest felt: the longest gap between two operations of one vCPU around each snapshot.
    pub stall_us: Quantiles,
    /// Snapshots.
    pub snapshots: SnapshotCounts,
    /// From the kick to the last vCPU running again, of each snapshot.
    pub pause_us: Quantiles,
    /// Page faults.
    pub faults: FaultCounts,
    /// Pages pinned.
    pub pins: PinCounts,
    /// Transfers.
    pub dma: DmaCounts,
    /// Dirty tracking.
    #[serde(default)]
    pub dirty: DirtyCounts,
    /// Pages of snapshots that were compared with what they must hold.
    pub checked_pages: u64,
    /// Violations.
    pub violations: ViolationCounts,
    /// What it cost the host.
    pub memory: MemoryPeaks,
    /// Lines that nobody read in time, of the guest's and of ours.
    #[serde(default)]
    pub lines_lost: u64,
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::{super::config, *};

    /// A report with every number different.
    pub(crate) fn example() -> Report {
        Report {
            version: "0.1.0".to_owned(),
            platform: Platform {
                kvm: "pvm".to_owned(),
                paging: "shadow".to_owned(),
                kernel: "6.18.0".to_owned(),
                cpus: 2,
            },
            config: config::tests::example(),
            policy: "exclusive".to_owned(),
            verdict: Verdict::Ok,
            error: None,
            unchecked: Vec::new(),
            ended_by: EndedBy::Duration,
            duration_s: 60.012,
            guest: GuestCounts {
                ops: 1_234_567,
                ops_per_s: 20_576.1,
            },
            stall_us: Quantiles {
                p50: Some(1_480.0),
                p99: Some(9_120.4),
                max: Some(41_000.0),
            },
            snapshots: SnapshotCounts {
                taken: 2_941,
                checked: 2_941,
                restored: 294,
                dropped: 0,
                in_flight: 3,
            },
            pause_us: Quantiles {
                p50: Some(812.3),
                p99: Some(2_204.1),
                max: Some(5_180.0),
            },
            faults: FaultCounts {
                reused: 1_002,
                copied: 734_889,
                unshared: 16,
                eager_copied: 94_113,
                zero_filled: 61_402,
                neighbours: 7,
                whole: 2,
                split: 1,
                ahead: 3,
                by_operand: 700_123,
                by_walk: 12,
                ..FaultCounts::default()
            },
            pins: PinCounts {
                fast: 480_211,
                slow: 9_004,
                registered: 24,
            },
            dma: DmaCounts {
                to_guest: 80_120,
                from_guest: 80_118,
                bytes: 1_804_000_000,
            },
            dirty: DirtyCounts::default(),
            checked_pages: 178_231_004,
            violations: ViolationCounts::default(),
            memory: MemoryPeaks {
                frames_peak: 312_004,
                bytes_peak: 1_277_968_384,
                committed_peak: 1_346_371_584,
                vmas_peak: 31_004,
                vmas_limit: 65_530,
            },
            lines_lost: 0,
        }
    }

    fn keys(value: &Value) -> Vec<&str> {
        value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect()
    }

    #[test]
    fn the_json_has_exactly_these_keys() {
        let json = serde_json::to_value(example()).unwrap();
        let expected: BTreeMap<&str, &[&str]> = BTreeMap::from([
            ("checked_pages", &[] as &[_]),
            (
                "config",
                &[
                    "copy_ahead",
                    "dma_devices",
                    "dump_guest_memory",
                    "guest",
                    "inject",
                    "keep",
                    "length",
                    "memory_bytes",
                    "page_size",
                    "pattern",
                    "policy",
                    "registered_buffers",
                    "restore_every",
                    "seed",
                    "snapshot_every_s",
                    "track_dirty_s",
                    "vcpus",
                ],
            ),
            ("dirty", &["pages", "rounds"]),
            ("dma", &["bytes", "from_guest", "to_guest"]),
            ("duration_s", &[]),
            ("ended_by", &[]),
            ("error", &[]),
            (
                "faults",
                &[
                    "ahead",
                    "by_all",
                    "by_event",
                    "by_kvm",
                    "by_operand",
                    "by_region",
                    "by_walk",
                    "copied",
                    "eager_copied",
                    "emulated",
                    "neighbours",
                    "reused",
                    "split",
                    "unshared",
                    "whole",
                    "zero_filled",
                ],
            ),
            ("guest", &["ops", "ops_per_s"]),
            ("lines_lost", &[]),
            (
                "memory",
                &[
                    "bytes_peak",
                    "committed_peak",
                    "frames_peak",
                    "vmas_limit",
                    "vmas_peak",
                ],
            ),
            ("pause_us", &["max", "p50", "p99"]),
            ("pins", &["fast", "registered", "slow"]),
            ("platform", &["cpus", "kernel", "kvm", "paging"]),
            ("policy", &[]),
            (
                "snapshots",
                &["checked", "dropped", "in_flight", "restored", "taken"],
            ),
            ("stall_us", &["max", "p50", "p99"]),
            ("unchecked", &[]),
            ("verdict", &[]),
            ("version", &[]),
            (
                "violations",
                &[
                    "accounting",
                    "coherence",
                    "cut",
                    "isolation",
                    "life",
                    "tracking",
                ],
            ),
        ]);
        assert_eq!(keys(&json), Vec::from_iter(expected.keys().copied()));
        for (key, inner) in expected {
            if json[key].is_object() {
                assert_eq!(keys(&json[key]), inner, "{key}");
            } else {
                assert!(inner.is_empty(), "{key} is not an object");
            }
        }
    }

    #[test]
    fn the_json_has_these_values() {
        let mut report = example();
        report.stall_us = Quantiles::default();
        report.ended_by = EndedBy::CtrlC;
        report.verdict = Verdict::Violated;
        let json = serde_json::to_value(report).unwrap();
        assert_eq!(json["verdict"], "violated");
        assert_eq!(json["ended_by"], "ctrl-c");
        assert_eq!(json["stall_us"]["p50"], Value::Null);
        assert_eq!(json["pause_us"]["p50"], 812.3);
        assert_eq!(json["error"], Value::Null);
        assert_eq!(json["config"]["guest"], "payload");
        assert_eq!(json["config"]["length"]["duration_s"], 10.0);
        assert_eq!(json["config"]["snapshot_every_s"], 0.02);
        assert_eq!(json["config"]["pattern"], "uniform");
    }

    #[test]
    fn a_report_survives_json() {
        let report = example();
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }

    #[test]
    fn names_match_the_json() {
        for verdict in [
            Verdict::Ok,
            Verdict::Violated,
            Verdict::Error,
            Verdict::NothingChecked,
        ] {
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.name());
        }
        for oracle in Oracle::ALL {
            assert_eq!(serde_json::to_value(oracle).unwrap(), oracle.name());
            let mut counts = ViolationCounts::default();
            counts.add(oracle);
            assert_eq!((counts.of(oracle), counts.total()), (1, 1));
            assert_eq!(
                serde_json::to_value(counts).unwrap()[oracle.name()],
                1,
                "{oracle}"
            );
        }
    }

    #[test]
    fn a_violation_outweighs_an_error() {
        let clean = ViolationCounts::default();
        let mut seen = clean;
        seen.add(Oracle::Life);
        let unchecked = ["no snapshot was taken".to_owned()];
        assert_eq!(Verdict::of(&clean, None, &[]), Verdict::Ok);
        assert_eq!(Verdict::of(&clean, Some("crash"), &[]), Verdict::Error);
        assert_eq!(Verdict::of(&seen, None, &[]), Verdict::Violated);
        assert_eq!(
            Verdict::of(&seen, Some("crash"), &unchecked),
            Verdict::Violated
        );
        // What was not checked is news only if all else went well.
        assert_eq!(
            Verdict::of(&clean, Some("crash"), &unchecked),
            Verdict::Error
        );
        assert_eq!(
            Verdict::of(&clean, None, &unchecked),
            Verdict::NothingChecked
        );
    }

    #[test]
    fn quantiles_are_microseconds_with_one_decimal() {
        let mut histogram = nanoseconds();
        assert_eq!(Quantiles::of(&histogram), Quantiles::default());
        for _ in 0..98 {
            histogram.saturating_record(12_300);
        }
        histogram.saturating_record(50_000);
        histogram.saturating_record(2_000_000);
        let quantiles = Quantiles::of(&histogram);
        assert_eq!(quantiles.p50, Some(12.3));
        assert_eq!(quantiles.p99, Some(50.0));
        // A histogram rounds up to the end of its bucket, a thousandth at most.
        let max = quantiles.max.unwrap();
        assert!((2_000.0..2_002.0).contains(&max), "{max}");
    }

    #[test]
    fn operations_a_second_is_never_infinite() {
        assert_eq!(GuestCounts::over(5, Duration::ZERO).ops_per_s, 0.0);
        assert_eq!(GuestCounts::over(5, Duration::from_secs(2)).ops_per_s, 2.5);
    }

    #[test]
    fn a_violation_shows_what_is_known_and_no_more() {
        let bare = Violation::new(Oracle::Accounting, "1 pin is left");
        assert_eq!(bare.to_string(), "violation of accounting: 1 pin is left");
        let full = Violation {
            snapshot: Some(12),
            gpa: Some(0x1234_5678),
            expected: "0x1".to_owned(),
            found: "0x2".to_owned(),
            last_writer: "vCPU 1, operation 99".to_owned(),
            frame: "pfn 7, shared".to_owned(),
            ..Violation::new(Oracle::Cut, "a page is newer than the registers")
        };
        assert_eq!(
            full.to_string(),
            "violation of cut: a page is newer than the registers\n\
             \x20 snapshot     12\n\
             \x20 page         gfn 0x12345, gpa 0x12345678\n\
             \x20 expected     0x1\n\
             \x20 found        0x2\n\
             \x20 last writer  vCPU 1, operation 99\n\
             \x20 frame        pfn 7, shared"
        );
    }
}
