//! What makes no sense in a [`Config`], or is more than the host can give.

use std::time::Duration;

use guest::abi::{self, Layout};

use super::super::need::{MemoryPlan, NeedError};
use super::{Config, GuestSource, Injection, RunLength, Size};
use crate::policy::Policy;
use palimpsest::host::Limits;
use palimpsest::vm::Accelerator;

/// End of the guest image that [`Config::validate`] assumes: well above that of the payload.
const ASSUMED_IMAGE_END: u64 = 4 << 20;

/// No time in a [`Config`] is longer, so that adding one to a clock never overflows.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

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

/// A program that nobody said is trusted would run without isolation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--guest {guest}: without KVM a guest is code of this process, and can do whatever the process can; if \
     you trust this program, say --trust-guest"
)]
pub struct Untrusted {
    /// The program.
    pub guest: String,
}

impl Config {
    /// Refuses a program that nobody said is trusted where `accelerator` isolates nothing.
    ///
    /// # Errors
    /// That it is to be trusted first.
    pub fn trusts_its_guest_under(&self, accelerator: &Accelerator) -> Result<(), Untrusted> {
        match (accelerator, &self.guest) {
            (Accelerator::User(_), GuestSource::File(_)) if !self.trust_guest => Err(Untrusted {
                guest: self.guest.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Refuses what makes no sense, and what `host` cannot give.
    pub fn validate(&self, host: &Limits) -> Result<(), ConfigError> {
        self.validate_all_but_room()?;
        MemoryPlan::new(self, host)?;
        Ok(())
    }

    /// Refuses what makes no sense.
    pub fn validate_all_but_room(&self) -> Result<(), ConfigError> {
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
        self.validate_injection()
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
    pub(in crate::session) fn smallest_guest(&self) -> u64 {
        // Where the hammered memory begins does not depend on how much there is up to here, so the largest
        // of these guests tells what the smallest one needs.
        self.layout_in(abi::LOW_MEMORY)
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

#[cfg(test)]
mod tests {
    use palimpsest::kvm::Kvm;
    use palimpsest::user::User;

    use super::super::tests::example;
    use super::*;

    fn host() -> Limits {
        Limits::of_host(2 << 30)
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
            "--vcpus 0: a guest has 1 to 256 vCPUs"
        );
        assert_eq!(
            refusal(|c| c.vcpus = 257),
            "--vcpus 257: a guest has 1 to 256 vCPUs"
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
            refusal(|c| c.memory = 65 << 40),
            "--memory 65 TiB: a guest has at most 64 TiB"
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
                c.inject = Some(Injection::SameGeneration);
                c.restore_every = 0;
            }),
            "--inject same-generation: this fault needs --restore-every 1 or more"
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
    fn only_a_guest_of_somebody_elses_must_be_trusted_and_only_without_kvm() {
        let user = Accelerator::User(User::open().unwrap());
        let mut config = example();
        assert_eq!(config.trusts_its_guest_under(&user), Ok(()));
        config.guest = GuestSource::File("a.elf".into());
        let refused = config.trusts_its_guest_under(&user).unwrap_err();
        let said = refused.to_string();
        assert!(said.starts_with("--guest a.elf: without KVM"), "{said}");
        if let Ok(kvm) = Kvm::open() {
            assert_eq!(
                config.trusts_its_guest_under(&Accelerator::Kvm(kvm)),
                Ok(())
            );
        }
        config.trust_guest = true;
        assert_eq!(config.trusts_its_guest_under(&user), Ok(()));
    }
}
