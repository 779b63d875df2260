//! What a run found: counters, quantiles, the verdict, and the violations it rests on.
//!
//! [`Report`] is also the format of `--report`: field names are the JSON's, and a field is never renamed or
//! removed, only added. Times in it name their unit.

mod counts;
mod kept;
mod quantiles;
mod verdict;

use serde::{Deserialize, Serialize};

pub use self::counts::{
    DirtyCounts, DmaCounts, FaultCounts, GuestCounts, MemoryPeaks, PinCounts, SnapshotCounts,
};
pub use self::kept::{CheckpointCounts, LoadCounts, SaveCounts};
pub use self::quantiles::{Quantiles, StepQuantiles, StepTimes, nanoseconds};
pub use self::verdict::Verdict;
use super::config::Config;
use crate::accel::Accel;
pub use crate::check::{Oracle, Violation, ViolationCounts};
use palimpsest::kvm;

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
    /// What ran the vCPUs: `kvm`, or `user` for threads of the process.
    // Reports of before there was a choice have none.
    #[serde(default = "by_kvm")]
    pub accel: String,
    /// The kind of KVM: `pvm`, `vmx`, `svm`, or `unknown`; `none` if it was not used.
    pub kvm: String,
    /// How it translates a guest's addresses: `npt`, `ept-ad` (with accessed and dirty bits),
    /// `ept`, `shadow`, `host` (they are the host's), or `unknown`.
    // Reports of before it was asked for have none.
    #[serde(default = "unknown")]
    pub paging: String,
    /// Release of the host kernel.
    pub kernel: String,
    /// Host CPUs this process may run on.
    pub cpus: u64,
}

fn by_kvm() -> String {
    Accel::Kvm.to_string()
}

fn unknown() -> String {
    kvm::Paging::Unknown.name().to_owned()
}

impl From<&kvm::Platform> for Platform {
    fn from(platform: &kvm::Platform) -> Self {
        let accel = match platform.kvm {
            "none" => Accel::User,
            _ => Accel::Kvm,
        };
        Self {
            accel: accel.to_string(),
            kvm: platform.kvm.to_owned(),
            paging: platform.paging.name().to_owned(),
            kernel: platform.kernel.clone(),
            cpus: platform.cpus as u64,
        }
    }
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
    /// Why the run could not finish. The first line is a sentence; more may follow, such as a
    /// crashed guest's registers.
    pub error: Option<String>,
    /// What was not checked though it must be, and what to do about it. A run without
    /// violations is not ok then.
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
    /// The steps of it, and what was done before.
    #[serde(default)]
    pub steps_us: StepQuantiles,
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
    /// Random numbers of the guest's that were read and compared.
    // Reports of before it drew any have none.
    #[serde(default)]
    pub checked_draws: u64,
    /// Violations.
    pub violations: ViolationCounts,
    /// What it cost the host.
    pub memory: MemoryPeaks,
    /// Lines that nobody read in time, of the guest's and of ours.
    #[serde(default)]
    pub lines_lost: u64,
    /// What was loaded from a store, if the run began with that. It is the first of the snapshots.
    #[serde(default)]
    pub loaded: Option<LoadCounts>,
    /// What was saved to a store, if that was asked for.
    #[serde(default)]
    pub saved: Option<SaveCounts>,
    /// What was saved every so often, if that was asked for.
    #[serde(default)]
    pub checkpoints: Option<CheckpointCounts>,
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::{super::config, *};

    fn p50(micros: f64) -> Quantiles {
        Quantiles {
            p50: Some(micros),
            ..Quantiles::default()
        }
    }

    /// A report with every number different.
    pub(crate) fn example() -> Report {
        Report {
            version: "0.1.0".to_owned(),
            platform: Platform {
                accel: "kvm".to_owned(),
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
            steps_us: StepQuantiles {
                prepare: p50(1_900.0),
                park: p50(61.8),
                devices: p50(3.2),
                fork: p50(650.4),
                registers: p50(2.9),
                resume: p50(90.0),
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
            checked_draws: 92_001,
            violations: ViolationCounts::default(),
            memory: MemoryPeaks {
                frames_peak: 312_004,
                bytes_peak: 1_277_968_384,
                committed_peak: 1_346_371_584,
                vmas_peak: 31_004,
                vmas_limit: 65_530,
            },
            lines_lost: 0,
            loaded: None,
            saved: None,
            checkpoints: None,
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
            ("checked_draws", &[] as &[_]),
            ("checkpoints", &[]),
            ("checked_pages", &[]),
            (
                "config",
                &[
                    "accel",
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
                    "trust_guest",
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
                    "by_signal",
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
            ("loaded", &[]),
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
            ("platform", &["accel", "cpus", "kernel", "kvm", "paging"]),
            ("policy", &[]),
            ("saved", &[]),
            (
                "snapshots",
                &["checked", "dropped", "in_flight", "restored", "taken"],
            ),
            ("stall_us", &["max", "p50", "p99"]),
            (
                "steps_us",
                &["devices", "fork", "park", "prepare", "registers", "resume"],
            ),
            ("unchecked", &[]),
            ("verdict", &[]),
            ("version", &[]),
            (
                "violations",
                &[
                    "accounting",
                    "coherence",
                    "cut",
                    "identity",
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
