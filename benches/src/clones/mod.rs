//! What clones of a running VM cost, beside a VM that is merely made: for `benches/clone.rs`.
//!
//! | file | concept |
//! |---|---|
//! | [`program`] | the guest: a page of code, in which a clone can be started anywhere |
//! | [`gate`] | where a guest says that it runs, and waits |
//! | [`parent`] | a VM of which clones are made, and its clones |
//! | [`bare`] | a VM with nothing of ours |
//! | [`price`] | from the wish for a clone to its first instruction, beside a bare VM |
//! | [`idle`] | what a clone takes that does nothing |
//! | [`crowd`] | many clones of a parent that runs |
//! | [`pause`] | how long a parent stands still for a snapshot, with clones and without |
//! | [`rewrite`] | a clone that writes all of its memory |
//! | [`report`], [`targets`], [`text`] | the numbers, what they should be, the same for people |

pub mod bare;
pub mod crowd;
pub mod gate;
pub mod idle;
pub mod parent;
pub mod pause;
pub mod price;
pub mod program;
pub mod report;
pub mod rewrite;
pub mod targets;
#[cfg(test)]
mod tests;
pub mod text;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use guest::abi::{LOW_MEMORY, REGION_SIZE};
use palimpsest::causes::Cause;
use palimpsest::kvm::{BootError, KvmError, PlatformError, StateError};
use palimpsest::memory::MemoryError;
use palimpsest::mm::ForkError;
use palimpsest::snapshot::TakeError;
use palimpsest::vm::{self, BuildError, ShellError};
use vmm::cli::units::{bytes, parse_size};

use crate::technique::TechniqueError;

/// Why there is no number.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// No KVM.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// No memory for a guest.
    #[error("cannot have memory for a guest")]
    Memory(#[from] MemoryError),
    /// The machine has too little memory.
    #[error("it needs {} MiB of memory, and {} MiB are available", needed >> 20, available >> 20)]
    NoMemory {
        /// Bytes it could take.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// Guest memory could not be reached.
    #[error("cannot reach guest memory")]
    Reach(#[source] Cause),
    /// The guest's first memory could not be written.
    #[error("cannot load the guest")]
    Boot(#[from] BootError),
    /// The VM could not be put together.
    #[error("cannot make the virtual machine")]
    Build(#[from] BuildError),
    /// vCPUs could not be started or paused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No shell for a clone.
    #[error("cannot make a shell for a clone")]
    Shell(#[from] ShellError),
    /// The clone could not be started.
    #[error(transparent)]
    Clone(#[from] vm::ForkError),
    /// No snapshot.
    #[error("cannot take a snapshot")]
    Take(#[from] TakeError),
    /// Memory could not be forked.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// A vCPU's state makes no sense.
    #[error("the snapshot's registers make no sense")]
    State(#[from] StateError),
    /// KVM refused something to a bare VM.
    #[error("kvm refuses to {what}")]
    Bare {
        /// What.
        what: &'static str,
        /// KVM's reason.
        source: kvm_ioctls::Error,
    },
    /// A bare VM came out of KVM as it should not.
    #[error("a bare virtual machine came out of kvm with {exit}")]
    BareExit {
        /// How.
        exit: String,
    },
    /// The host refused.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
    /// A technique that ours is measured against failed.
    #[error(transparent)]
    Technique(#[from] TechniqueError),
    /// A guest has ended that should run on.
    #[error("the guest has ended: {0}")]
    Ended(String),
    /// A guest says nothing.
    #[error("the guest has said nothing for {} s", gate::PATIENCE.as_secs())]
    Silent,
    /// Somebody pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// The least memory of a guest that is measured.
const LEAST_MEMORY: u64 = 32 << 20;

/// The size of a guest's memory, in words: at least 32 MiB, and whole regions of 2 MiB.
///
/// # Errors
/// If it is no size, or no such.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    let memory = parse_size(text).map_err(|error| error.to_string())?;
    let range = LEAST_MEMORY..=LOW_MEMORY;
    if !range.contains(&memory) || !memory.is_multiple_of(REGION_SIZE) {
        return Err(format!(
            "a guest has {} to {}, in steps of 2 MiB",
            bytes(LEAST_MEMORY),
            bytes(LOW_MEMORY)
        ));
    }
    Ok(memory)
}

/// Fails if somebody has pressed Ctrl-C.
///
/// # Errors
/// That says so.
pub fn check(stop: &AtomicBool) -> Result<(), MeasureError> {
    match stop.load(Ordering::Relaxed) {
        true => Err(MeasureError::Interrupted),
        false => Ok(()),
    }
}
