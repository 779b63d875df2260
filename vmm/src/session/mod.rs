//! A run: boots a guest, takes, checks and restores snapshots of it while it runs, and reports.
//!
//! One thread (the caller's) drives: it takes snapshots when they are due, retires old ones, rewinds, listens
//! to the guest and tells the [`Observer`]. vCPUs, devices and the checker have threads of their own.
//!
//! | file | concept |
//! |---|---|
//! | [`config`] | what a run is asked to do |
//! | [`need`] | what a run needs of the host's memory, and what it may take |
//! | [`compare`] | the same race under every policy |
//! | [`report`] | what it found |
//! | [`progress`] | how it is watched |
//! | `vm` | the VM, put together |
//! | `ports` | what the guest writes to its ports |
//! | `drive` | a run that goes on: its loop, snapshots, restores, end |
//! | [`family`] | a run of many machines: a guest, clones of it, clones of those |
//! | `end` | how a run ended |
//! | `failure` | what a guest says that it has seen go wrong |
//! | `life` | whether a rewound guest runs on |
//! | `occasion` | what an injected fault needs to be seen |
//! | `faults` | vCPUs and devices that do wrong on purpose |
//! | `skew` | one vCPU's memory set back, as a fault |
//! | `stall` | what the guest felt |
//! | `tracker` | dirty tracking beside the run |

pub mod compare;
pub mod config;
mod drive;
mod end;
mod failure;
pub mod family;
mod faults;
mod life;
pub mod need;
mod occasion;
mod ports;
pub mod progress;
pub mod report;
mod skew;
mod stall;
mod tracker;
mod vm;

use std::sync::atomic::AtomicBool;

use self::config::{Config, Injection, Untrusted};
use self::need::{MemoryPlan, NeedError};
use self::progress::Observer;
use self::report::Report;
pub use self::vm::PayloadVmError;
use crate::accel::{self, AccelError, Opened};
use crate::check::inject::{Faulty, PolicyFault};
use palimpsest::host::Limits;
use palimpsest::kvm::KvmError;
use palimpsest::mm::{AnyPolicy, CowPolicy};

/// Why a run could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Nothing that runs vCPUs.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// The guest would run without isolation, and nobody has said that it is trusted.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// How much memory there is could not be found out.
    #[error("cannot tell how much memory this host has")]
    Limits(#[source] std::io::Error),
    /// There is not enough memory.
    #[error(transparent)]
    Need(#[from] NeedError),
    /// The VM could not be put together.
    #[error(transparent)]
    Build(#[from] PayloadVmError),
    /// The vCPUs did not start.
    #[error("cannot start the vcpus")]
    Start(#[source] KvmError),
    /// No thread for the checker.
    #[error("cannot start the checker")]
    Checker(#[source] std::io::Error),
}

/// The policy that `config` asks for, or has spoilt.
fn policy_of(config: &Config) -> AnyPolicy {
    match config.inject {
        Some(Injection::SharePinned) => Box::new(Faulty(PolicyFault::SharePinned)),
        Some(Injection::ReuseShared) => Box::new(Faulty(PolicyFault::ReuseShared)),
        _ => config.policy.make(),
    }
}

/// Runs `image` as `config` says, until the run is over or `stop` is set.
///
/// # Errors
/// If the guest could not be started. Whatever happens after that is in the report.
pub fn run(
    config: &Config,
    image: Vec<u8>,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Report, RunError> {
    let policy = policy_of(config);
    let name = policy.name();
    let Opened { accelerator, note } = accel::open(config.accel)?;
    config.trusts_its_guest_under(&accelerator)?;
    if let Some(note) = note {
        observer.note(&note);
    }
    let limits = Limits::detect().map_err(RunError::Limits)?;
    let plan = MemoryPlan::new(config, &limits)?;
    let (events, inbox) = ports::events();
    let vm = vm::PayloadVm::build(&accelerator, config, image, policy, plan, events)?;
    drive::Drive::start(vm, config, inbox, stop, observer)?.run(name, accelerator.platform())
}
