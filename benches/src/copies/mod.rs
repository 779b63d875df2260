//! Ways to make a copy of a running VM that runs: ours, and those it is measured against.
//!
//! The guest is the same, and paused in the same way; what differs is what is done meanwhile, and after. A
//! copy begins with an `out`, and is held when that is seen ([`gate`](crate::clones::gate)).
//!
//! | way | in the pause | after it | whose |
//! |---|---|---|---|
//! | ours | snapshot | clone, in a shell that is ready or not | this repository |
//! | fork | `fork()` of the VMM | the child makes a VM: KVM's do not survive a fork | fork-server fuzzers |
//! | file | all memory is written to a file | which a new VM maps privately | Firecracker |
//! | copy | all memory is copied, by all cores | a new VM runs on the copy | any VMM |
//!
//! | file | concept |
//! |---|---|
//! | `original` | the VM that is copied by any way but ours |
//! | `child` | a VM in a child process |

mod child;
mod original;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use guest::abi::PAGE_SIZE;
use palimpsest::kvm::Kvm;
use serde::{Deserialize, Serialize};

pub use self::original::{Copied, Original};
use crate::clones::bare::Bare;
use crate::clones::parent::{Entries, Parent, ParentConfig};
use crate::clones::program::{Begins, Program, beginning};
use crate::clones::{MeasureError, check};
use crate::summary::{Summary, Times};
use crate::technique::PageSize;

/// What the guest writes, over and over.
const WRITTEN: u64 = 8 << 20;

/// A way to make a copy that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Ours, in a shell that is ready.
    OursPool,
    /// Ours.
    Ours,
    /// `fork()`, 4 KiB pages.
    Fork,
    /// `fork()`, transparent huge pages.
    ForkThp,
    /// By a file.
    File,
    /// By a copy of memory.
    Copy,
}

impl Way {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 6] = [
        Self::OursPool,
        Self::Ours,
        Self::Fork,
        Self::ForkThp,
        Self::File,
        Self::Copy,
    ];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OursPool => "ours, in a shell",
            Self::Ours => "ours",
            Self::Fork => "fork",
            Self::ForkThp => "fork-thp",
            Self::File => "file",
            Self::Copy => "copy",
        }
    }

    /// Bytes that it takes for a guest of `memory` bytes.
    pub const fn needs(self, memory: u64) -> u64 {
        match self {
            Self::OursPool | Self::Ours | Self::Fork | Self::ForkThp => memory + 8 * WRITTEN,
            Self::File | Self::Copy => 2 * memory + 8 * WRITTEN,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a way costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyCost {
    /// Which way.
    pub way: String,
    /// Bytes of guest memory, all resident.
    pub memory: u64,
    /// How long the original stood still.
    pub pause_us: Summary,
    /// From the wish to the first instruction of the copy.
    pub first_instruction_us: Summary,
}

/// Measures `way` over `rounds` copies, after one that does not count. One lives at a time.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    way: Way,
    memory: u64,
    rounds: u64,
    stop: &AtomicBool,
) -> Result<CopyCost, MeasureError> {
    let [mut pauses, mut firsts] = [const { Times::new() }; 2];
    let mut record = |round: u64, (pause, first): (Duration, Duration)| {
        if round > 0 {
            pauses.record(pause);
            firsts.record(first);
        }
    };
    match way {
        Way::OursPool | Way::Ours => {
            let parent = Parent::boot(
                kvm,
                &ParentConfig {
                    memory,
                    entries: Entries::Huge,
                    program: Program::Stamp(WRITTEN),
                    clones: 1,
                    copies: 8 * WRITTEN,
                },
            )?;
            for round in 0..=rounds {
                check(stop)?;
                parent.wait_for_word(0, parent.word(0)? + 2 * WRITTEN / PAGE_SIZE)?;
                let shell = match way {
                    Way::OursPool => Some(parent.shell(kvm)?),
                    _ => None,
                };
                let wish = Instant::now();
                let (taken, timing) = parent.vm().snapshot()?;
                let snapshot = beginning(&taken, Begins::Announcing)?;
                let clone = parent.start_clone(kvm, &snapshot, shell)?;
                record(round, (timing.pause(), clone.first_instruction(wish)?));
            }
        }
        Way::Fork | Way::ForkThp | Way::File | Way::Copy => {
            let pages = match way {
                Way::Fork => PageSize::Small,
                _ => PageSize::Huge,
            };
            let bare = Bare::open()?;
            let original = Original::boot(kvm, memory, pages, WRITTEN)?;
            for round in 0..=rounds {
                check(stop)?;
                original.wait_for_round()?;
                let copied = original.copy(&bare, way)?;
                record(round, (copied.pause, copied.first_instruction));
                drop(copied);
                original.settle()?;
            }
        }
    }
    Ok(CopyCost {
        way: way.name().to_owned(),
        memory,
        pause_us: pauses.summary().unwrap_or_default(),
        first_instruction_us: firsts.summary().unwrap_or_default(),
    })
}
