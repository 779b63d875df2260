//! What a run is asked to do, and the limits it is held to.
//!
//! A [`Config`] that [`Config::validate`] let pass can still fail to start: a guest image larger than the
//! one assumed here leaves less room, and the host's memory may be gone a moment later. Both are found, and
//! said, when the run starts.

use std::{fmt, path::PathBuf, time::Duration};

use guest::abi::{self, Layout, Pattern};
use serde::{Deserialize, Serialize};

use super::need::{NeedError, Plan};
use crate::check::Oracle;
use crate::policy::Policy;
use palimpsest::host::Limits;

/// End of the guest image that [`Config::validate`] assumes: well above that of the payload.
const ASSUMED_IMAGE_END: u64 = 4 << 20;

/// No time in a [`Config`] is longer, so that adding one to a clock never overflows.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Everything that decides how a run goes. Two runs with equal configurations do the same work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The program the guest runs.
    pub guest: GuestSource,
    /// Bytes of guest memory.
    #[serde(rename = "memory_bytes")]
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u64,
    /// When the run is over.
    pub length: RunLength,
    /// Time from one snapshot to the next.
    #[serde(rename = "snapshot_every_s", with = "seconds")]
    pub snapshot_every: Duration,
    /// Snapshots that are alive at once; the oldest is dropped for the next.
    pub keep: usize,
    /// After every this many snapshots the guest is rewound to one of those kept; 0 is never.
    pub restore_every: u64,
    /// Number of DMA devices.
    pub dma_devices: u64,
    /// Buffers each device registers: it holds them pinned from one request to another. Every second one is for reading only, and is released
    /// and registered anew over and over; the others are held to the end.
    pub registered_buffers: u64,
    /// How vCPUs choose the pages they write.
    #[serde(with = "pattern")]
    pub pattern: Pattern,
    /// Seed of every formula and of every choice the session makes.
    pub seed: u64,
    /// Time from one question for the pages written since to the next; `None` asks nothing.
    #[serde(rename = "track_dirty_s", with = "optional_seconds", default)]
    pub track_dirty: Option<Duration>,
    /// The copy-on-write policy that memory is kept by.
    // Reports of before there was a choice have none.
    #[serde(default)]
    pub policy: Policy,
    /// Largest pages that memory is kept in.
    // As for the policy.
    #[serde(default)]
    pub page_size: PageSize,
    /// Whether a thread copies after each snapshot what the guest writes between all of them, before the guest faults on it.
    // As for the policy.
    #[serde(default)]
    pub copy_ahead: bool,
    /// Whether core dumps of this process have the guest's memory in them.
    // As for the policy.
    #[serde(default)]
    pub dump_guest_memory: bool,
    /// The fault to inject, if any.
    pub inject: Option<Injection>,
}

/// Largest pages that guest memory is kept in, protected by and copied in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum PageSize {
    /// Huge pages, split where pages are written one by one: short pauses, and memory by 2 MiB
    #[default]
    #[serde(rename = "2M")]
    #[value(name = "2M")]
    Huge,
    /// Base pages alone: memory by the page, and a fault for each that is written
    #[serde(rename = "4K")]
    #[value(name = "4K")]
    Base,
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Huge => "2M",
            Self::Base => "4K",
        })
    }
}

/// Where the guest program comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestSource {
    /// The built-in payload.
    Payload,
    /// An ELF that follows the ABI.
    // Serde refuses paths that are not UTF-8. A report must not be lost over one.
    File(#[serde(serialize_with = "lossy_path")] PathBuf),
}

impl fmt::Display for GuestSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Payload => f.write_str("payload"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// When a run is over, if nothing ends it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunLength {
    /// After this much time.
    #[serde(rename = "duration_s", with = "seconds")]
    Duration(Duration),
    /// After this many snapshots.
    #[serde(rename = "snapshots")]
    Snapshots(u64),
}

/// A fault put into the implementation, to see that an oracle catches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Injection {
    /// A fork shares frames that devices have pinned, instead of copying them at once [caught by: coherence, isolation]
    SharePinned,
    /// The pages that vCPUs count their operations in stay writable after a snapshot [caught by: isolation]
    SkipWriteProtect,
    /// Devices are not stopped for a snapshot, and complete requests in the middle of it [caught by: cut]
    RunDevices,
    /// A write to a shared frame takes the frame over without a copy [caught by: isolation]
    ReuseShared,
    /// One pin is never released [caught by: accounting]
    LeakPin,
    /// A restore leaves one page as it was, which the guest will look at soon [caught by: life]
    StalePage,
    /// vCPU registers are captured only after the vCPUs ran on [caught by: cut]
    LateRegisters,
    /// The extended registers of a vCPU are captured from an earlier instant [caught by: cut]
    StaleRegisters,
    /// One vCPU's registers and pages are captured from an earlier instant than the others' [caught by: cut]
    SkewVcpus,
    /// One page that is written all the time is kept back from the answers of dirty tracking [caught by: tracking]
    ForgetDirty,
}

impl Injection {
    /// Every fault there is.
    pub const ALL: [Self; 10] = [
        Self::SharePinned,
        Self::SkipWriteProtect,
        Self::RunDevices,
        Self::ReuseShared,
        Self::LeakPin,
        Self::StalePage,
        Self::LateRegisters,
        Self::StaleRegisters,
        Self::SkewVcpus,
        Self::ForgetDirty,
    ];

    /// The fault's name, as `--inject` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SharePinned => "share-pinned",
            Self::SkipWriteProtect => "skip-write-protect",
            Self::RunDevices => "run-devices",
            Self::ReuseShared => "reuse-shared",
            Self::LeakPin => "leak-pin",
            Self::StalePage => "stale-page",
            Self::LateRegisters => "late-registers",
            Self::StaleRegisters => "stale-registers",
            Self::SkewVcpus => "skew-vcpus",
            Self::ForgetDirty => "forget-dirty",
        }
    }

    /// The oracle this fault is there to trip. Others may see it too.
    pub const fn caught_by(self) -> Oracle {
        match self {
            Self::SharePinned => Oracle::Coherence,
            Self::SkipWriteProtect | Self::ReuseShared => Oracle::Isolation,
            Self::RunDevices | Self::LateRegisters | Self::StaleRegisters | Self::SkewVcpus => {
                Oracle::Cut
            }
            Self::LeakPin => Oracle::Accounting,
            Self::StalePage => Oracle::Life,
            Self::ForgetDirty => Oracle::Tracking,
        }
    }

    /// Whether the fault is about DMA, so that without devices it never happens.
    const fn needs_devices(self) -> bool {
        matches!(self, Self::SharePinned | Self::RunDevices | Self::LeakPin)
    }

    /// Whether a guest shows the fault only if its memory, registers and requests are known beforehand, or how many operations it has
    /// done. A pin that is left shows whatever the guest does.
    const fn needs_payload(self) -> bool {
        !matches!(self, Self::LeakPin)
    }

    /// Whether the fault is about dirty tracking.
    const fn needs_tracking(self) -> bool {
        matches!(self, Self::ForgetDirty)
    }

    /// Whether the fault is the exclusive policy done wrong.
    const fn needs_exclusive(self) -> bool {
        matches!(self, Self::SharePinned | Self::ReuseShared)
    }

    /// Whether the fault is about restoring, so that without restores it never happens.
    const fn needs_restores(self) -> bool {
        matches!(self, Self::StalePage)
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The name of `pattern`, as `--pattern` takes it.
pub const fn pattern_name(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Dense => "dense",
        Pattern::Uniform => "uniform",
        Pattern::Hot => "hot",
        Pattern::Sparse => "sparse",
    }
}

/// The pattern called `name`, if there is one.
pub fn pattern_named(name: &str) -> Option<Pattern> {
    [
        Pattern::Dense,
        Pattern::Uniform,
        Pattern::Hot,
        Pattern::Sparse,
    ]
    .into_iter()
    .find(|pattern| pattern_name(*pattern) == name)
}

/// Why a [`Config`] is refused. Each names the flag and the limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No vCPU, or too many.
    #[error("--vcpus {given}: a guest has 1 to {} vCPUs", abi::MAX_VCPUS)]
    Vcpus {
        /// What was asked for.
        given: u64,
    },
    /// Too many devices.
    #[error(
        "--dma-devices {given}: a guest has at most {} devices",
        abi::MAX_DEVICES
    )]
    Devices {
        /// What was asked for.
        given: u64,
    },
    /// Too many registered buffers.
    #[error(
        "--registered-buffers {given}: a device registers at most {} buffers",
        abi::MAX_REGISTERED
    )]
    RegisteredBuffers {
        /// What was asked for.
        given: u64,
    },
    /// Less memory than the parts of the guest need.
    #[error(
        "--memory {}: a guest of this shape needs at least {} (--vcpus {vcpus}, --dma-devices {devices})",
        Size(*given),
        Size(*minimum)
    )]
    MemoryTooSmall {
        /// What was asked for, in bytes.
        given: u64,
        /// What is needed, in bytes.
        minimum: u64,
        /// vCPUs of the guest.
        vcpus: u64,
        /// Devices of the guest.
        devices: u64,
    },
    /// More memory than a guest can address.
    #[error("--memory {}: a guest has at most {}", Size(*given), Size(abi::MAX_MEMORY))]
    MemoryTooLarge {
        /// What was asked for, in bytes.
        given: u64,
    },
    /// Memory that is not whole pages.
    #[error("--memory {}: must be a multiple of {}", Size(*given), Size(abi::PAGE_SIZE))]
    MemoryNotPages {
        /// What was asked for, in bytes.
        given: u64,
    },
    /// More than the host has to give.
    #[error(transparent)]
    Need(#[from] NeedError),
    /// No snapshot would be kept.
    #[error("--keep 0: at least 1 snapshot must be kept, or there is none to check")]
    KeepNone,
    /// A time or a count that must not be zero is.
    #[error("{flag} 0: must be more than zero")]
    Zero {
        /// The flag.
        flag: &'static str,
    },
    /// A time that is out of reason.
    #[error("{flag}: must be at most {} days", LONGEST.as_secs() / 86_400)]
    TooLong {
        /// The flag.
        flag: &'static str,
    },
    /// The fault to inject only shows in a guest that is known word for word.
    #[error(
        "--inject {fault}: only --guest payload can show this fault, no other guest's memory can be foretold"
    )]
    InjectionNeedsPayload {
        /// The fault.
        fault: Injection,
    },
    /// The fault to inject is about devices, and there are none.
    #[error("--inject {fault}: this fault needs --dma-devices 1 or more")]
    InjectionNeedsDevices {
        /// The fault.
        fault: Injection,
    },
    /// The fault to inject is about registered buffers, and there are none.
    #[error("--inject {fault}: this fault needs --registered-buffers 1 or more")]
    InjectionNeedsBuffers {
        /// The fault.
        fault: Injection,
    },
    /// The fault to inject is about dirty tracking, and there is none.
    #[error("--inject {fault}: this fault needs --track-dirty")]
    InjectionNeedsTracking {
        /// The fault.
        fault: Injection,
    },
    /// The fault to inject is one of the exclusive policy, and another one runs.
    #[error(
        "--inject {fault}: this is a fault of --policy exclusive, and cannot be put into {policy}"
    )]
    InjectionNeedsExclusive {
        /// The fault.
        fault: Injection,
        /// The policy.
        policy: Policy,
    },
    /// The fault to inject is about two vCPUs, and there is one.
    #[error("--inject {fault}: this fault needs --vcpus 2 or more")]
    InjectionNeedsVcpus {
        /// The fault.
        fault: Injection,
    },
    /// The fault to inject is about restores, and there are none.
    #[error("--inject {fault}: this fault needs --restore-every 1 or more")]
    InjectionNeedsRestores {
        /// The fault.
        fault: Injection,
    },
}

impl Config {
    /// Refuses what makes no sense, and what `host` cannot give.
    pub fn validate(&self, host: &Limits) -> Result<(), ConfigError> {
        if self.vcpus == 0 || self.vcpus > abi::MAX_VCPUS {
            return Err(ConfigError::Vcpus { given: self.vcpus });
        }
        if self.dma_devices > abi::MAX_DEVICES {
            return Err(ConfigError::Devices {
                given: self.dma_devices,
            });
        }
        if self.registered_buffers > abi::MAX_REGISTERED {
            return Err(ConfigError::RegisteredBuffers {
                given: self.registered_buffers,
            });
        }
        self.validate_memory()?;
        if self.keep == 0 {
            return Err(ConfigError::KeepNone);
        }
        validate_time("--snapshot-every", self.snapshot_every)?;
        if let Some(every) = self.track_dirty {
            validate_time("--track-dirty", every)?;
        }
        match self.length {
            RunLength::Duration(duration) => validate_time("--duration", duration)?,
            RunLength::Snapshots(0) => {
                return Err(ConfigError::Zero {
                    flag: "--snapshots",
                });
            }
            RunLength::Snapshots(_) => {}
        }
        self.validate_injection()?;
        Plan::new(self, host)?;
        Ok(())
    }

    fn validate_injection(&self) -> Result<(), ConfigError> {
        match self.inject {
            Some(fault) if fault.needs_payload() && self.guest != GuestSource::Payload => {
                Err(ConfigError::InjectionNeedsPayload { fault })
            }
            Some(fault) if fault.needs_devices() && self.dma_devices == 0 => {
                Err(ConfigError::InjectionNeedsDevices { fault })
            }
            Some(fault @ Injection::SharePinned) if self.registered_buffers == 0 => {
                Err(ConfigError::InjectionNeedsBuffers { fault })
            }
            Some(fault @ Injection::SkewVcpus) if self.vcpus < 2 => {
                Err(ConfigError::InjectionNeedsVcpus { fault })
            }
            Some(fault) if fault.needs_restores() && self.restore_every == 0 => {
                Err(ConfigError::InjectionNeedsRestores { fault })
            }
            Some(fault) if fault.needs_tracking() && self.track_dirty.is_none() => {
                Err(ConfigError::InjectionNeedsTracking { fault })
            }
            Some(fault) if fault.needs_exclusive() && self.policy != Policy::Exclusive => {
                Err(ConfigError::InjectionNeedsExclusive {
                    fault,
                    policy: self.policy,
                })
            }
            _ => Ok(()),
        }
    }

    fn layout_in(&self, memory: u64) -> Option<Layout> {
        Layout::new(
            memory,
            ASSUMED_IMAGE_END,
            self.vcpus,
            self.dma_devices,
            self.registered_buffers,
        )
    }

    /// The least memory that a guest of this shape has room in. Counts are in range.
    pub(super) fn smallest_guest(&self) -> u64 {
        // Where the hammered memory begins does not depend on how much there is, so the largest guest
        // tells what the smallest one needs.
        self.layout_in(abi::MAX_MEMORY)
            .map_or(abi::MAX_MEMORY, |layout| {
                layout.hammer_base + self.vcpus * abi::REGION_SIZE
            })
    }

    // Comes after the counts are known to be in range.
    fn validate_memory(&self) -> Result<(), ConfigError> {
        let given = self.memory;
        let minimum = self.smallest_guest();
        if given < minimum {
            return Err(ConfigError::MemoryTooSmall {
                given,
                minimum,
                vcpus: self.vcpus,
                devices: self.dma_devices,
            });
        }
        if given > abi::MAX_MEMORY {
            return Err(ConfigError::MemoryTooLarge { given });
        }
        if !given.is_multiple_of(abi::PAGE_SIZE) {
            return Err(ConfigError::MemoryNotPages { given });
        }
        debug_assert!(self.layout_in(given).is_some());
        Ok(())
    }
}

fn validate_time(flag: &'static str, time: Duration) -> Result<(), ConfigError> {
    if time.is_zero() {
        Err(ConfigError::Zero { flag })
    } else if time > LONGEST {
        Err(ConfigError::TooLong { flag })
    } else {
        Ok(())
    }
}

/// A number of bytes, displayed exactly, in the largest unit that divides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 3] = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// Durations as seconds.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(value.as_secs_f64())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(from)?).map_err(D::Error::custom)
    }
}

/// Durations that may be missing as seconds, or `null`.
mod optional_seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Duration>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(|time| time.as_secs_f64()).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Duration>, D::Error> {
        Option::<f64>::deserialize(from)?
            .map(|seconds| Duration::try_from_secs_f64(seconds).map_err(D::Error::custom))
            .transpose()
    }
}

/// Patterns by name.
mod pattern {
    use guest::abi::Pattern;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &Pattern, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(super::pattern_name(*value))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Pattern, D::Error> {
        let name = String::deserialize(from)?;
        super::pattern_named(&name)
            .ok_or_else(|| D::Error::custom(format_args!("unknown pattern {name:?}")))
    }
}

fn lossy_path<S: serde::Serializer>(path: &std::path::Path, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&path.to_string_lossy())
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::ValueEnum;

    use super::*;

    fn host() -> Limits {
        Limits::of_host(2 << 30)
    }

    /// What the command line gives when nothing is asked for.
    pub(crate) fn example() -> Config {
        Config {
            guest: GuestSource::Payload,
            memory: 256 << 20,
            vcpus: 2,
            length: RunLength::Duration(Duration::from_secs(10)),
            snapshot_every: Duration::from_millis(20),
            keep: 4,
            restore_every: 10,
            dma_devices: 2,
            registered_buffers: 4,
            pattern: Pattern::Uniform,
            seed: 7,
            track_dirty: None,
            policy: Policy::Exclusive,
            page_size: PageSize::Huge,
            copy_ahead: false,
            dump_guest_memory: false,
            inject: None,
        }
    }

    fn refusal(change: impl FnOnce(&mut Config)) -> String {
        let mut config = example();
        change(&mut config);
        config.validate(&host()).unwrap_err().to_string()
    }

    #[test]
    fn the_default_is_accepted() {
        assert_eq!(example().validate(&host()), Ok(()));
    }

    #[test]
    fn vcpus_are_bounded() {
        assert_eq!(
            refusal(|c| c.vcpus = 0),
            "--vcpus 0: a guest has 1 to 16 vCPUs"
        );
        assert_eq!(
            refusal(|c| c.vcpus = 17),
            "--vcpus 17: a guest has 1 to 16 vCPUs"
        );
    }

    #[test]
    fn devices_and_buffers_are_bounded() {
        assert_eq!(
            refusal(|c| c.dma_devices = 9),
            "--dma-devices 9: a guest has at most 8 devices"
        );
        assert_eq!(
            refusal(|c| c.registered_buffers = 17),
            "--registered-buffers 17: a device registers at most 16 buffers"
        );
    }

    #[test]
    fn memory_is_bounded_by_the_layout() {
        assert_eq!(
            refusal(|c| c.memory = 3 << 10),
            "--memory 3 KiB: a guest of this shape needs at least 12 MiB (--vcpus 2, --dma-devices 2)"
        );
        assert_eq!(
            refusal(|c| c.memory = 129 << 30),
            "--memory 129 GiB: a guest has at most 128 GiB"
        );
        assert_eq!(
            refusal(|c| c.memory = (256 << 20) + 1),
            "--memory 268435457 B: must be a multiple of 4 KiB"
        );
    }

    #[test]
    fn the_smallest_memory_named_is_accepted() {
        for vcpus in [1, 2, 16] {
            for dma_devices in [0, 1, 8] {
                let mut config = Config {
                    memory: 0,
                    vcpus,
                    dma_devices,
                    ..example()
                };
                let Err(ConfigError::MemoryTooSmall { minimum, .. }) = config.validate(&host())
                else {
                    panic!("{config:?} has no memory");
                };
                config.memory = minimum;
                assert_eq!(config.validate(&host()), Ok(()));
                config.memory = minimum - abi::PAGE_SIZE;
                assert!(config.validate(&host()).is_err());
            }
        }
    }

    #[test]
    fn memory_is_bounded_by_the_host() {
        let refused = refusal(|c| c.memory = 4 << 30);
        assert!(
            refused.starts_with("--memory 4 GiB: this run needs ")
                && refused.ends_with("and this host leaves it 1843 MiB"),
            "{refused}"
        );
    }

    #[test]
    fn zeros_are_refused() {
        assert_eq!(
            refusal(|c| c.keep = 0),
            "--keep 0: at least 1 snapshot must be kept, or there is none to check"
        );
        assert_eq!(
            refusal(|c| c.snapshot_every = Duration::ZERO),
            "--snapshot-every 0: must be more than zero"
        );
        assert_eq!(
            refusal(|c| c.track_dirty = Some(Duration::ZERO)),
            "--track-dirty 0: must be more than zero"
        );
        assert_eq!(
            refusal(|c| c.length = RunLength::Duration(Duration::ZERO)),
            "--duration 0: must be more than zero"
        );
        assert_eq!(
            refusal(|c| c.length = RunLength::Snapshots(0)),
            "--snapshots 0: must be more than zero"
        );
    }

    #[test]
    fn times_that_would_overflow_a_clock_are_refused() {
        assert_eq!(
            refusal(|c| c.length = RunLength::Duration(Duration::MAX)),
            "--duration: must be at most 365 days"
        );
        assert_eq!(
            refusal(|c| c.snapshot_every = Duration::MAX),
            "--snapshot-every: must be at most 365 days"
        );
    }

    #[test]
    fn a_fault_that_could_never_happen_is_refused() {
        assert_eq!(
            refusal(|c| {
                c.inject = Some(Injection::SharePinned);
                c.dma_devices = 0;
            }),
            "--inject share-pinned: this fault needs --dma-devices 1 or more"
        );
        assert_eq!(
            refusal(|c| {
                c.inject = Some(Injection::StalePage);
                c.restore_every = 0;
            }),
            "--inject stale-page: this fault needs --restore-every 1 or more"
        );
        assert_eq!(
            refusal(|c| {
                c.inject = Some(Injection::SharePinned);
                c.registered_buffers = 0;
            }),
            "--inject share-pinned: this fault needs --registered-buffers 1 or more"
        );
        assert_eq!(
            refusal(|c| c.inject = Some(Injection::ForgetDirty)),
            "--inject forget-dirty: this fault needs --track-dirty"
        );
        assert_eq!(
            refusal(|c| {
                c.inject = Some(Injection::ReuseShared);
                c.policy = Policy::Mapcount;
            }),
            "--inject reuse-shared: this is a fault of --policy exclusive, and cannot be put into mapcount"
        );
    }

    #[test]
    fn a_fault_that_a_foreign_guest_cannot_show_is_refused() {
        let foreign = GuestSource::File("a.elf".into());
        for fault in Injection::ALL {
            let config = Config {
                guest: foreign.clone(),
                inject: Some(fault),
                track_dirty: Some(Duration::from_millis(5)),
                ..example()
            };
            let refused = config.validate(&host()).err();
            assert_eq!(
                refused == Some(ConfigError::InjectionNeedsPayload { fault }),
                fault.needs_payload(),
                "{fault}: {refused:?}"
            );
            let payload = Config {
                guest: GuestSource::Payload,
                ..config
            };
            assert_eq!(payload.validate(&host()), Ok(()), "{fault}");
        }
    }

    #[test]
    fn a_fault_has_one_name_everywhere() {
        assert_eq!(Injection::value_variants(), Injection::ALL);
        for fault in Injection::ALL {
            let value = fault.to_possible_value().unwrap();
            assert_eq!(value.get_name(), fault.name());
            assert_eq!(serde_json::to_value(fault).unwrap(), fault.name());
            let help = value.get_help().unwrap().to_string();
            let (_, oracles) = help.split_once("[caught by: ").unwrap();
            assert!(oracles.starts_with(fault.caught_by().name()), "{help}");
        }
    }

    #[test]
    fn a_configuration_survives_json() {
        let mut config = example();
        for (length, inject) in [
            (RunLength::Snapshots(3), None),
            (
                RunLength::Duration(Duration::from_micros(1_234_567)),
                Some(Injection::LeakPin),
            ),
        ] {
            config.length = length;
            config.inject = inject;
            config.track_dirty = inject.map(|_| Duration::from_micros(7_500));
            config.guest = GuestSource::File("a.elf".into());
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);
        }
    }

    #[test]
    fn a_configuration_of_before_there_was_a_choice_can_be_read() {
        let mut json = serde_json::to_value(example()).unwrap();
        for key in ["policy", "track_dirty_s", "page_size", "copy_ahead"] {
            json.as_object_mut().unwrap().remove(key).unwrap();
        }
        let read: Config = serde_json::from_value(json).unwrap();
        assert_eq!(read, example());
    }

    #[test]
    fn a_path_that_is_not_utf8_does_not_lose_the_report() {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
        let guest = GuestSource::File(OsStr::from_bytes(b"a\xff.elf").into());
        assert!(serde_json::to_string(&guest).is_ok());
    }

    #[test]
    fn sizes_are_exact() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (3 << 10, "3 KiB"),
            (256 << 20, "256 MiB"),
            (1 << 40, "1024 GiB"),
            ((1 << 30) + 512, "1073742336 B"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
