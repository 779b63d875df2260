//! What a run is asked to do, and the limits it is held to.
//!
//! A [`Config`] that [`Config::validate`] let pass can still fail to start: a guest image larger than the
//! one assumed there leaves less room, and the host's memory may be gone a moment later. Both are found, and
//! said, when the run starts.
//!
//! | file | concept |
//! |---|---|
//! | `injection` | the faults that can be put into the implementation |
//! | `validate` | what is refused, and why |
//! | `pattern` | patterns by name |
//! | `seconds` | durations in JSON |
//! | `size` | numbers of bytes for people |

mod injection;
mod pattern;
pub(in crate::session) mod seconds;
mod size;
mod validate;

use std::{fmt, path::PathBuf, time::Duration};

use guest::abi::Pattern;
use serde::{Deserialize, Serialize};

use crate::accel::Accel;
use crate::policy::Policy;

pub use self::injection::Injection;
pub use self::pattern::{pattern_name, pattern_named};
pub use self::size::Size;
pub use self::validate::{ConfigError, Untrusted};

/// Everything that decides how a run goes. Two runs with equal configurations do the same work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The program the guest runs.
    pub guest: GuestSource,
    /// What runs its vCPUs.
    // Reports of before there was a choice have none.
    #[serde(default)]
    pub accel: Accel,
    /// Whether a program that is not the built-in one may run without isolation.
    // As for the accelerator.
    #[serde(default)]
    pub trust_guest: bool,
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
    /// Buffers each device registers: it holds them pinned from one request to another. Every second one is
    /// for reading only, and is released and registered anew over and over; the others are held to the end.
    pub registered_buffers: u64,
    /// How vCPUs choose the pages they write.
    #[serde(with = "pattern")]
    pub pattern: Pattern,
    /// Seed of every formula and of every choice the session makes.
    pub seed: u64,
    /// Time from one question for the pages written since to the next; `None` asks nothing.
    #[serde(rename = "track_dirty_s", with = "seconds::optional", default)]
    pub track_dirty: Option<Duration>,
    /// The copy-on-write policy that memory is kept by.
    // Reports of before there was a choice have none.
    #[serde(default)]
    pub policy: Policy,
    /// Largest pages that memory is kept in.
    // As for the policy.
    #[serde(default)]
    pub page_size: PageSize,
    /// Whether a thread copies after each snapshot what the guest writes between all of them,
    /// before the guest faults on it.
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

impl RunLength {
    /// When somebody ends it: after more snapshots than can be taken.
    pub const UNTIL_STOPPED: Self = Self::Snapshots(u64::MAX);
}

fn lossy_path<S: serde::Serializer>(path: &std::path::Path, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&path.to_string_lossy())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What the command line gives when nothing is asked for.
    pub(crate) fn example() -> Config {
        Config {
            guest: GuestSource::Payload,
            accel: Accel::Auto,
            trust_guest: false,
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
        let keys = [
            "policy",
            "track_dirty_s",
            "page_size",
            "copy_ahead",
            "accel",
            "trust_guest",
        ];
        for key in keys {
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
}
