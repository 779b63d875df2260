//! Faults that are put into the implementation.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::check::Oracle;

/// A fault put into the implementation, to see that an oracle catches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Injection {
    /// A fork shares frames that devices have pinned, instead of copying them at once [caught
    /// by: coherence, isolation]
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
    /// One page that is written all the time is kept back from the answers of dirty
    /// tracking [caught by: tracking]
    ForgetDirty,
    /// A restored guest keeps the generation of the snapshot, and draws the same random numbers again [caught
    /// by: identity]
    SameGeneration,
}

impl Injection {
    /// Every fault there is.
    pub const ALL: [Self; 11] = [
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
        Self::SameGeneration,
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
            Self::SameGeneration => "same-generation",
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
            Self::SameGeneration => Oracle::Identity,
        }
    }

    /// Whether the fault is about DMA, so that without devices it never happens.
    pub(super) const fn needs_devices(self) -> bool {
        matches!(self, Self::SharePinned | Self::RunDevices | Self::LeakPin)
    }

    /// Whether a guest shows the fault only if its memory, registers and requests are known beforehand, or
    /// how many operations it has done. A pin that is left shows whatever the guest does.
    pub(super) const fn needs_payload(self) -> bool {
        !matches!(self, Self::LeakPin)
    }

    /// Whether the fault is about dirty tracking.
    pub(super) const fn needs_tracking(self) -> bool {
        matches!(self, Self::ForgetDirty)
    }

    /// Whether the fault is the exclusive policy done wrong.
    pub(super) const fn needs_exclusive(self) -> bool {
        matches!(self, Self::SharePinned | Self::ReuseShared)
    }

    /// Whether the fault is about restoring, so that without restores it never happens.
    pub(super) const fn needs_restores(self) -> bool {
        matches!(self, Self::StalePage | Self::SameGeneration)
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

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
}
