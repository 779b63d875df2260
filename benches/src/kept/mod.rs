//! What keeping snapshots as files costs, beside plain ways to do the same: for `benches/kept.rs`.
//!
//! Files are in one directory, which is on the disk that is measured, and in the page cache when they are
//! read again: whoever reads a snapshot that is not there waits for the disk first, in any way.
//!
//! | file | concept |
//! |---|---|
//! | [`content`] | what memory is filled with: nothing of it is zero, twice there or can be compressed |
//! | [`store`](mod@store) | stores to measure with |
//! | [`load`] | from the wish for a VM to its first instruction, and its first pass over memory |
//! | [`save`] | a save beside a guest that runs, against writing and hashing as much |
//! | [`increment`] | a save of what has changed, against the first |
//! | [`verify`] | reading all of a snapshot, against hashing as much |
//! | [`clones`] | memory of clones of one that was loaded |
//! | [`report`], [`targets`], [`text`] | the numbers, what they should be, the same for people |

pub mod clones;
pub mod content;
pub mod increment;
pub mod load;
pub mod report;
pub mod save;
pub mod store;
pub mod targets;
#[cfg(test)]
mod tests;
pub mod text;
pub mod verify;

use std::io;

use palimpsest::kept::store::StoreError;
use palimpsest::kept::{LoadError, Refusal, SaveError};
use palimpsest::kvm::{KvmError, StateError};
use palimpsest::memory::MemoryError;
use palimpsest::mm::ForkError;
use palimpsest::snapshot::TakeError;
use palimpsest::vm::{BuildError, CloneError};

use crate::clones::MeasureError;
use crate::vm::VmError;

/// Why there is no number.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// What is measured against could not be, or a guest of the clones' kind.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// The measuring guest could not be made, or ended.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No save.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// No load.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What was saved here cannot run here.
    #[error("what was saved here cannot run here")]
    Refused(#[from] Refusal),
    /// Its registers make no sense.
    #[error("registers of a snapshot make no sense")]
    State(#[from] StateError),
    /// No machine for what was loaded.
    #[error("cannot make the virtual machine")]
    Build(#[from] BuildError),
    /// It could not be started.
    #[error(transparent)]
    Start(#[from] CloneError),
    /// The host refused.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
    /// The disk has too little room.
    #[error("it needs {} MiB of disk, and {} MiB are free", needed >> 20, free >> 20)]
    NoRoom {
        /// Bytes it could take.
        needed: u64,
        /// Bytes there are.
        free: u64,
    },
    /// A measurement is of nothing.
    #[error("{0}")]
    Wrong(String),
}

impl KeptError {
    /// Whether the host is merely too small for it.
    pub fn is_of_size(&self) -> bool {
        use MeasureError::NoMemory;
        matches!(
            self,
            Self::NoRoom { .. }
                | Self::Measure(NoMemory { .. })
                | Self::Vm(VmError::NoMemory { .. })
        )
    }

    /// Whether somebody has pressed Ctrl-C.
    pub fn is_interruption(&self) -> bool {
        matches!(
            self,
            Self::Measure(MeasureError::Interrupted) | Self::Vm(VmError::Interrupted)
        )
    }
}

macro_rules! by_measure_error {
    ($($error:ty),*) => {$(
        impl From<$error> for KeptError {
            fn from(error: $error) -> Self {
                Self::Measure(error.into())
            }
        }
    )*};
}
by_measure_error!(MemoryError, ForkError, TakeError, KvmError);

/// The error of something that the host refused.
fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> KeptError {
    move |source| KeptError::Host {
        what,
        source: source.into(),
    }
}
