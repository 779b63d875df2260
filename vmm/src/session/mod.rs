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
//! | [`kept`] | runs that are saved to a store, and that begin with what is in one |
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
pub mod kept;
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

use std::sync::atomic::{AtomicBool, Ordering};

use self::config::{Config, Injection, Untrusted};
use self::kept::{Keep, Lazy, Source};
use self::need::{MemoryPlan, NeedError};
use self::progress::Observer;
use self::report::Report;
pub use self::vm::PayloadVmError;
use crate::accel::{self, AccelError, Opened};
use crate::check::inject::{Faulty, PolicyFault};
use palimpsest::host::Limits;
use palimpsest::kvm::KvmError;
use palimpsest::mm::{AnyPolicy, CowPolicy};
use palimpsest::vm::CloneError;

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
    /// What it was to begin with could not be loaded.
    #[error(transparent)]
    Load(#[from] kept::LoadError),
    /// The vCPUs did not start.
    #[error("cannot start the vcpus")]
    Start(#[source] KvmError),
    /// They did not start where they were saved.
    #[error("cannot start the machine where it was saved")]
    Resume(#[from] CloneError),
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

/// What a run begins with.
#[derive(Debug)]
pub enum Beginning {
    /// A guest that is booted: its program.
    Boot(Vec<u8>),
    /// A guest that was saved, and runs on.
    Load(Box<Source>),
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
    run_from(config, Beginning::Boot(image), None, stop, observer)
}

/// The same of whatever it begins with; and when it is over, a last snapshot is saved as `keep` says, while it goes on.
///
/// # Errors
/// As [`run`]. What could not be saved is in the report.
pub fn run_from(
    config: &Config,
    beginning: Beginning,
    keep: Option<Keep>,
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
    // What is being saved, and what that has in common with what was loaded, are snapshots, too.
    // Each checkpoint is what the next has something in common with.
    let is_base = keep.as_ref().is_some_and(|keep| keep.every.is_some())
        || matches!(beginning, Beginning::Load(_));
    let more = usize::from(keep.is_some()) + usize::from(is_base);
    let planned = Config {
        keep: config.keep.saturating_add(more),
        ..config.clone()
    };
    let plan = MemoryPlan::new(&planned, &limits).map_err(|error| match beginning {
        Beginning::Boot(_) => error,
        Beginning::Load(_) => error.of_saved(),
    })?;
    let (events, inbox) = ports::events();
    let parts = match beginning {
        Beginning::Boot(image) => {
            let vm = vm::PayloadVm::build(&accelerator, config, image, policy, plan, events)?;
            (vm, None)
        }
        Beginning::Load(mut source) => {
            // Who loads as he goes holds the store, and nothing can be dropped from it.
            let every = keep.as_ref().and_then(|keep| keep.every.as_ref());
            if source.loading.lazy == Lazy::Auto
                && every.is_some_and(|every| every.keep_last.is_some())
            {
                source.loading.lazy = Lazy::Never;
            }
            source.is_trusted_under(&accelerator, config)?;
            let mut loading = |progress: &palimpsest::kept::Progress| {
                observer.loading(progress);
                !stop.load(Ordering::Relaxed)
            };
            let loaded = kept::load(
                &accelerator,
                config,
                &source,
                plan,
                events,
                kept::Purpose::Run,
                &mut loading,
            )?;
            drop(source);
            let (vm, begun) = drive::Begun::of(loaded, observer);
            (vm, Some(begun))
        }
    };
    let job = drive::Job {
        config,
        accelerator: &accelerator,
        keep,
        stop,
    };
    drive::Drive::start(job, parts, inbox, observer)?.run(name)
}
