//! Snapshots of a running VM: memory, vCPUs and devices as they were at one instant.
//!
//! ```text
//!            kick                                                resume
//!   vCPUs   ──┤ park │ capture registers, each on its own thread ├── run, and fault
//!   devices ──────┤ stop at a boundary │ capture ├────────────────┤ go on
//!   memory          ............... fork: write-protect, share, copy what is pinned
//!             |<------------------------- pause ----------------->|
//! ```
//! 1. vCPUs are kicked out of the guest and stand still; each captures its registers while the rest goes on.
//! 2. Devices stop between two requests: a completion and its data are both in the snapshot or neither is. A
//!    device that does not get there in time is recorded as in flight. Their states are captured.
//! 3. Memory is forked.
//! 4. The registers are collected; vCPUs go on, then devices.
//! 5. What the guest writes between all snapshots is copied ahead of it ([`Ahead`]); before the kick that
//!    rests, and most of what has changed is forked already ([`AddressSpace::prepare_fork`]).
//! 6. Everything else (checking, hashing) happens later, beside the running guest.
//!
//! A **restore** rewinds the same VM: vCPUs stand still, devices stop, requests on their way are given up and
//! their pins dropped; memory goes back (see [`AddressSpace::restore`]); devices take the requests that were
//! on their way in the snapshot again, from the memory just restored. What they hold for good stays pinned
//! throughout: memory goes back *into* its frames, so the device and the guest see the same before and after.
//!
//! Snapshots live in memory. [`kept`](crate::kept) makes files of them, and them of files.
//!
//! | file | concept |
//! |---|---|
//! | `take` | taking a snapshot |
//! | `restore` | rewinding a VM to one |
//! | `protect` | taking write access from pages of a VM that runs |
//! | `resting` | whoever copies ahead rests meanwhile |

mod protect;
mod resting;
mod restore;
mod take;
#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::restore::RewindError;
pub use self::take::{Preparation, TakeError};
use crate::aside::Aside;
use crate::device::Quiesce;
use crate::host::{Ahead, Precedence};
use crate::mm::{AddressSpace, CowPolicy, Frozen};
use crate::saved::Saved;
use crate::vcpus::Vcpus;

/// One snapshot. Dropping it gives its memory back.
#[derive(Debug)]
pub struct Snapshot {
    memory: Arc<Frozen>,
    vcpus: Vec<Saved>,
    devices: Vec<Saved>,
}

impl Snapshot {
    /// A snapshot of parts that were captured at the same instant, or read from where they were stored.
    /// `devices` are in the order in which the VM has them.
    pub fn new(memory: Arc<Frozen>, vcpus: Vec<Saved>, devices: Vec<Saved>) -> Self {
        Self {
            memory,
            vcpus,
            devices,
        }
    }

    /// Memory. Whoever keeps a share of it keeps its frames.
    pub fn memory(&self) -> &Arc<Frozen> {
        &self.memory
    }

    /// Registers, by vCPU.
    pub fn vcpus(&self) -> &[Saved] {
        &self.vcpus
    }

    /// Devices, in the order of the VM's.
    pub fn devices(&self) -> &[Saved] {
        &self.devices
    }
}

/// The parts of a VM that a snapshot is of.
pub struct Parts<'a, P: CowPolicy> {
    /// Its vCPUs.
    pub vcpus: &'a dyn Vcpus,
    /// Its devices, in the order in which they are stopped.
    pub devices: Vec<&'a dyn Quiesce>,
    /// Its memory.
    pub space: &'a AddressSpace<P>,
    /// Who copies ahead of its writes, if anybody does.
    pub ahead: Option<&'a Ahead>,
    /// Who else computes beside it, and steps aside while its vCPUs are stopped and started.
    pub aside: Option<&'a Aside>,
    /// Whether it comes before other machines of the process, which it does while its memory changes as a
    /// whole.
    pub precedence: Option<&'a Precedence>,
}

impl<P: CowPolicy> fmt::Debug for Parts<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("devices", &self.devices.len())
            .field("pages", &self.space.pages())
            .finish_non_exhaustive()
    }
}

/// When the steps of a snapshot, or of a restore, were done.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// It began, and the guest ran still.
    pub began: Instant,
    /// The vCPUs were told to stop.
    pub kicked: Instant,
    /// All of them stood still.
    pub parked: Instant,
    /// Devices stood still.
    pub quiesced: Instant,
    /// Memory was forked, or set back.
    pub memory: Instant,
    /// Registers were collected, or set back, and vCPUs could go on.
    pub registers: Instant,
    /// The last vCPU was about to run again.
    pub running: Instant,
}

impl Timing {
    /// From the kick until the last vCPU was about to run again.
    pub fn pause(&self) -> Duration {
        self.running.saturating_duration_since(self.kicked)
    }

    /// What each step took.
    pub fn steps(&self) -> Steps {
        let from = |earlier, later: Instant| later.saturating_duration_since(earlier);
        Steps {
            prepare: from(self.began, self.kicked),
            park: from(self.kicked, self.parked),
            devices: from(self.parked, self.quiesced),
            memory: from(self.quiesced, self.memory),
            registers: from(self.memory, self.registers),
            resume: from(self.registers, self.running),
        }
    }
}

/// What the steps of a snapshot, or of a restore, took. All but the first are the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// What was done while the guest ran.
    pub prepare: Duration,
    /// From the kick until all vCPUs stood still.
    pub park: Duration,
    /// Until devices did.
    pub devices: Duration,
    /// To fork memory, or to set it back.
    pub memory: Duration,
    /// To collect registers, or to set them back.
    pub registers: Duration,
    /// Until the last vCPU was about to run again.
    pub resume: Duration,
}
