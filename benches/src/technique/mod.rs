//! Ways to take a snapshot of a running guest, behind one trait: ours, and those it is measured against.
//!
//! Each is as good as the projects that use it make it, or better where that was easy: what they do beside
//! (writing a file, compressing, a network) is left out. Every snapshot of every technique is guest memory at
//! one instant and stays so for as long as it lives; `tests` holds each of them to it. One snapshot lives at
//! a time: the one before is dropped before the next is taken, outside the pause.
//!
//! | file | technique | whose |
//! |---|---|---|
//! | `ours` | shadow page table and window, copy-on-write resolved on the vCPU's thread | this repository |
//! | `fork` | `fork()` of the VMM: the kernel's copy-on-write under KVM | fork-server fuzzers |
//! | `uffd` | userfaultfd write-protect and a handler thread | QEMU's background snapshot, forkd |
//! | `copy` | stop, copy everything, go on | Firecracker's full snapshot |
//!
//! `anonymous` is the guest memory of all but ours.

mod anonymous;
mod copy;
mod fork;
mod ours;
#[cfg(test)]
pub(crate) mod tests;
mod uffd;

use std::fmt;
use std::io;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use palimpsest::causes::Cause;
use palimpsest::host::{Placement, Window};
use palimpsest::kvm::{GuestRam, Memslot};
use palimpsest::memory::Frames;
use palimpsest::mm::{ForkError, Frozen};

pub(crate) use anonymous::Anonymous;
pub use anonymous::PageSize;
pub(crate) use copy::copy_all;
pub(crate) use fork::{Child, wait_for_the_end};
pub use ours::Granularity;

/// A technique at work on the memory of one guest.
pub trait Technique: Send + Sync {
    /// What KVM is told guest memory is.
    fn slot(&self) -> Arc<dyn Memslot>;

    /// The window that a guest without KVM sees memory through, if the technique has one.
    fn window(&self) -> Option<Arc<Window>> {
        None
    }

    /// Guest memory, for whoever loads a program into it, and for faults that KVM hands to the VMM.
    fn ram(&self) -> Arc<dyn GuestRam>;

    /// The frames that guest memory is in, if the technique is one of ours.
    fn frames(&self) -> Option<&Frames> {
        None
    }

    /// Puts memory behind `gpas`, as a guest that writes them all does, but faster. What lies in no such
    /// range may be left out of snapshots.
    fn populate(&self, gpas: Range<u64>) -> Result<(), TechniqueError>;

    /// Does what can be done for the next snapshot while the guest still runs.
    fn prepare(&self) -> Result<(), TechniqueError> {
        Ok(())
    }

    /// Takes a snapshot of memory. No vCPU runs and no device writes.
    fn snapshot(&self) -> Result<Box<dyn SnapshotMemory + '_>, TechniqueError>;

    /// Does what is left of a snapshot once the guest runs on.
    fn resumed(&self) {}

    /// Bytes copied so far, where the technique knows.
    fn copied(&self) -> Option<u64>;

    /// Bytes of tables that have memory behind them just now, where the technique has any that it can count.
    fn tables(&self) -> Option<u64> {
        None
    }

    /// Brings memory back to its best after a snapshot was dropped, as a patient host would in time.
    fn settle(&self) -> Result<(), TechniqueError> {
        Ok(())
    }

    /// A device that writes to `gpas` in the way the technique allows.
    fn device(&self, gpas: Range<u64>) -> Result<Box<dyn BenchDevice>, TechniqueError>;
}

/// A snapshot of memory. Dropping it gives its memory back.
pub trait SnapshotMemory {
    /// Copies memory out as it was when the snapshot was taken.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), TechniqueError>;

    /// The frozen address space that it is, if it is one of ours.
    fn frozen(&self) -> Option<&Arc<Frozen>> {
        None
    }

    /// The process that holds it, if that is not this one.
    fn process(&self) -> Option<i32> {
        None
    }
}

/// Writes guest memory beside the vCPUs.
pub trait BenchDevice: Send {
    /// Fills the page at `gpa` with `word`.
    fn write_page(&mut self, gpa: u64, word: u64) -> Result<(), TechniqueError>;
}

/// Why a technique did not work.
#[derive(Debug, thiserror::Error)]
pub enum TechniqueError {
    /// This machine, or this build, cannot do it: it is left out.
    #[error("{why}")]
    Unavailable {
        /// In a sentence, with what to do about it.
        why: String,
    },
    /// The host refused.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
    /// Guest memory could not be reached.
    #[error("cannot reach guest memory")]
    Memory(#[source] Cause),
    /// Our fork failed.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// The technique keeps one snapshot, and it is still there.
    #[error("the snapshot before is still alive")]
    Busy,
}

/// Turns the host's reason into an error of ours.
fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> TechniqueError {
    move |source| TechniqueError::Host {
        what,
        source: source.into(),
    }
}

/// The techniques.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Ours, as it comes.
    Ours,
    /// Ours, its guest run without KVM.
    OursUser,
    /// Ours, without the thread that copies ahead.
    OursAlone,
    /// Ours, held to 4 KiB.
    Ours4k,
    /// Ours, held to 2 MiB.
    Ours2m,
    /// `fork()`, 4 KiB pages.
    Fork,
    /// `fork()`, transparent huge pages.
    ForkThp,
    /// userfaultfd, 4 KiB pages.
    Uffd,
    /// userfaultfd, transparent huge pages.
    UffdThp,
    /// Stop and copy.
    Copy,
}

impl Kind {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 10] = [
        Self::Ours,
        Self::OursUser,
        Self::OursAlone,
        Self::Ours4k,
        Self::Ours2m,
        Self::Fork,
        Self::ForkThp,
        Self::Uffd,
        Self::UffdThp,
        Self::Copy,
    ];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::OursUser => "ours-user",
            Self::OursAlone => "ours-alone",
            Self::Ours4k => "ours-4k",
            Self::Ours2m => "ours-2m",
            Self::Fork => "fork",
            Self::ForkThp => "fork-thp",
            Self::Uffd => "uffd-wp",
            Self::UffdThp => "uffd-thp",
            Self::Copy => "copy",
        }
    }

    /// What it does, and which project does so, in a line.
    pub const fn about(self) -> &'static str {
        match self {
            Self::Ours => "this repository, as it comes",
            Self::OursUser => "this repository without KVM: the guest as threads of the VMM",
            Self::OursAlone => "this repository, without the thread that copies ahead",
            Self::Ours4k => "this repository, held to 4 KiB",
            Self::Ours2m => "this repository, held to 2 MiB",
            Self::Fork => "fork() of the VMM, 4 KiB pages: the kernel's copy-on-write",
            Self::ForkThp => "fork() of the VMM, transparent huge pages",
            Self::Uffd => "userfaultfd write-protect, 4 KiB pages: QEMU's background snapshot",
            Self::UffdThp => "userfaultfd write-protect, transparent huge pages, as QEMU asks for",
            Self::Copy => "stop and copy everything, all cores: Firecracker's full snapshot",
        }
    }

    /// Whether it is measured by default.
    pub const fn is_default(self) -> bool {
        match self {
            Self::Ours
            | Self::OursUser
            | Self::Ours4k
            | Self::Fork
            | Self::ForkThp
            | Self::Uffd
            | Self::Copy => true,
            Self::OursAlone | Self::Ours2m | Self::UffdThp => false,
        }
    }

    /// Is one of ours.
    pub const fn is_ours(self) -> bool {
        matches!(
            self,
            Self::Ours | Self::OursUser | Self::OursAlone | Self::Ours4k | Self::Ours2m
        )
    }

    /// Whether its guest is run by KVM.
    pub const fn needs_kvm(self) -> bool {
        !matches!(self, Self::OursUser)
    }

    /// The technique, at work on `memory` bytes of guest memory that were never touched.
    pub fn start(self, memory: u64) -> Result<Arc<dyn Technique>, TechniqueError> {
        let placement = if self.needs_kvm() {
            Placement::Anywhere
        } else {
            Placement::AtGuestAddresses
        };
        let ours = |granularity, ahead| {
            let ours = ours::Ours::new(memory, placement, granularity, ahead)?;
            Ok(Arc::new(ours) as Arc<dyn Technique>)
        };
        match self {
            Self::Ours | Self::OursUser => ours(Granularity::Adaptive, true),
            Self::OursAlone => ours(Granularity::Adaptive, false),
            Self::Ours4k => ours(Granularity::Small, true),
            Self::Ours2m => ours(Granularity::Huge, true),
            Self::Fork => Ok(Arc::new(fork::Fork::new(memory, PageSize::Small)?)),
            Self::ForkThp => Ok(Arc::new(fork::Fork::new(memory, PageSize::Huge)?)),
            Self::Uffd => Ok(Arc::new(uffd::Uffd::new(memory, PageSize::Small)?)),
            Self::UffdThp => Ok(Arc::new(uffd::Uffd::new(memory, PageSize::Huge)?)),
            Self::Copy => Ok(Arc::new(copy::StopAndCopy::new(memory)?)),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no technique's.
#[derive(Debug, thiserror::Error)]
#[error("there is no such technique; there are {}", Kind::ALL.map(Kind::name).join(", "))]
pub struct UnknownTechnique;

impl FromStr for Kind {
    type Err = UnknownTechnique;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or(UnknownTechnique)
    }
}
