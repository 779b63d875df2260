//! Snapshots of a running VM: memory, vCPUs and devices as they were at one instant.
//!
//! ```text
//!            kick                                                resume
//!   vCPUs   ──┤ park │ capture registers, each on its own thread ├── run, and fault
//!   devices ──────┤ stop at a boundary │ capture ├──────────────── go on
//!   memory          ............... fork: write-protect, share, copy what is pinned
//!             |<------------------------- pause ----------------->|
//! ```
//! 1. vCPUs are kicked out of the guest and stand still; each captures its registers while the rest goes on.
//! 2. Devices stop between two requests: a completion and its data are both in the snapshot or neither is. A
//!    device that does not get there in time is recorded as in flight. Their states are captured.
//! 3. Memory is forked.
//! 4. The registers are collected; devices go on, then vCPUs.
//! 5. What the guest writes between all snapshots is copied ahead of it ([`Ahead`]); before the kick that
//!    rests, and most of what has changed is forked already ([`AddressSpace::prepare_fork`]).
//! 6. Everything else (checking, hashing) happens later, beside the running guest.
//!
//! A **restore** rewinds the same VM: vCPUs stand still, devices stop, requests on their way are given up and
//! their pins dropped; memory goes back (see [`AddressSpace::restore`]); devices take the requests that were
//! on their way in the snapshot again, from the memory just restored. What they hold for good stays pinned
//! throughout: memory goes back *into* its frames, so the device and the guest see the same before and after.
//!
//! Snapshots live in memory only: there is no file format yet.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::causes::Cause;
use crate::device::{Quiesce, Stopped};
use crate::host::Ahead;
use crate::mm::{self, AddressSpace, CowPolicy, FaultError, ForkError, Frozen, PageSet};
use crate::saved::Saved;
use crate::vcpus::{Capture, Paused, Vcpus, VcpusError};

/// How long devices may take to reach a boundary for a snapshot. A request is a few microseconds' work; the
/// rest is the host's scheduling.
const BOUNDARY_WAIT: Duration = Duration::from_millis(2);
/// The same for a restore, which cannot go on without.
const RESTORE_WAIT: Duration = Duration::from_secs(5);

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
}

impl<P: CowPolicy> fmt::Debug for Parts<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("devices", &self.devices.len())
            .field("pages", &self.space.pages())
            .finish_non_exhaustive()
    }
}

/// What is done before a snapshot's pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Preparation {
    /// Most of memory is forked while the guest runs, so that the pause is short. A page that the guest
    /// writes meanwhile is copied once more than without.
    #[default]
    Early,
    /// Nothing: for who has no memory for that.
    None,
}

/// When things happened.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The vCPUs were told to stop.
    pub kicked: Instant,
    /// The last of them was about to run again.
    pub running: Instant,
}

impl Timing {
    /// From the kick until the last vCPU was about to run again.
    pub fn pause(&self) -> Duration {
        self.running - self.kicked
    }
}

/// Why a snapshot could not be taken. The VM runs on, unless its vCPUs have ended or its memory is broken.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// vCPUs could not be stopped or captured.
    #[error("cannot stop and capture the vcpus")]
    Vcpus(#[from] VcpusError),
    /// Memory could not be forked.
    #[error("cannot fork guest memory")]
    Memory(#[from] ForkError),
    /// Whoever wanted the snapshot does not want it any more.
    #[error("the snapshot was called off")]
    CalledOff,
}

/// Why a VM could not be rewound. If anything of it was, it is stopped for good.
#[derive(Debug, thiserror::Error)]
pub enum RewindError {
    /// vCPUs could not be stopped or restored.
    #[error("cannot stop and restore the vcpus")]
    Vcpus(#[from] VcpusError),
    /// Memory could not be restored.
    #[error("cannot restore guest memory")]
    Memory(#[from] mm::RestoreError),
    /// Devices could not be restored.
    #[error("cannot restore the devices")]
    Devices(#[source] Cause),
    /// The snapshot is of a VM with other devices. Nothing has changed.
    #[error("the snapshot has {snapshot} devices, the guest {guest}")]
    DeviceCount {
        /// Devices of the snapshot.
        snapshot: usize,
        /// Devices there are.
        guest: usize,
    },
}

/// Keeps who copies ahead from working: a fork would wait for it.
struct Resting<'a>(Option<&'a Ahead>);

impl<'a> Resting<'a> {
    fn of(ahead: Option<&'a Ahead>) -> Self {
        ahead.into_iter().for_each(Ahead::rest);
        Self(ahead)
    }
}

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.into_iter().for_each(Ahead::work);
    }
}

impl<P: CowPolicy> Parts<'_, P> {
    /// Takes a snapshot of the running VM.
    ///
    /// A device that does not reach a boundary within 2 ms is captured as it is, with a request in flight.
    ///
    /// # Errors
    /// If the VM was not started, a vCPU has ended, or there is no memory for the copy of a pinned page. The
    /// VM is as it was, and runs on; but if its memory is broken ([`AddressSpace::check`]) it is stopped for
    /// good.
    pub fn take(&self) -> Result<(Snapshot, Timing), TakeError> {
        self.take_with(Preparation::Early, &|| true, || ())
    }

    /// [`Parts::take`], with two things to be done at the same instant: `may_fork` is asked when no vCPU runs
    /// any more, and can call it off; `after_memory` is called when memory was forked and nothing runs yet.
    ///
    /// # Errors
    /// As [`Parts::take`].
    pub fn take_with(
        &self,
        preparation: Preparation,
        may_fork: &dyn Fn() -> bool,
        after_memory: impl FnOnce(),
    ) -> Result<(Snapshot, Timing), TakeError> {
        self.note_protected();
        let _ahead = Resting::of(self.ahead);
        if preparation == Preparation::Early && self.vcpus.may_lose_write_access() {
            self.space.prepare_fork();
        }
        let mut paused = self.vcpus.pause(Capture::Registers)?;
        if !may_fork() {
            return Err(TakeError::CalledOff);
        }
        let kicked = paused.kicked();
        let stopped = Stopped::stop(self.devices.clone(), kicked + BOUNDARY_WAIT);
        let devices = self.devices.iter().map(|device| device.capture()).collect();
        let forked = self.space.fork().map_err(TakeError::from);
        let forked = forked.inspect(|_| after_memory());
        let kept = self.keep_tables_writable(&mut *paused);
        // A fork that fails leaves the guest as it was, unless its memory is not what it sees any more.
        let may_run_on = kept.is_ok() && self.space.check().is_ok();
        let memory = match forked.and_then(|memory| Ok(kept.map(|()| memory)?)) {
            Ok(memory) => memory,
            Err(error) => {
                if !may_run_on {
                    paused.stop();
                }
                return Err(error);
            }
        };
        let vcpus = paused.states()?;
        drop(stopped);
        let running = paused.resume();
        let snapshot = Snapshot::new(memory, vcpus, devices);
        Ok((snapshot, Timing { kicked, running }))
    }

    /// Rewinds the VM to `snapshot`, and lets it run on from there. The guest's clock is not rewound.
    ///
    /// `after_memory` is called when memory is back and nothing runs yet.
    ///
    /// # Errors
    /// If the snapshot has another number of devices, or the vCPUs cannot be stopped: the VM is as it was,
    /// and runs on. If anything fails later it is part old, part new, and its vCPUs are stopped for good: a
    /// device that does not reach a boundary within 5 s, memory of another size or pool, a state that is
    /// refused.
    pub fn restore(
        &self,
        snapshot: &Snapshot,
        after_memory: impl FnOnce(),
    ) -> Result<Timing, RewindError> {
        let (there, here) = (snapshot.devices.len(), self.devices.len());
        if there != here {
            return Err(RewindError::DeviceCount {
                snapshot: there,
                guest: here,
            });
        }
        let _ahead = Resting::of(self.ahead);
        self.note_protected();
        let mut paused = self.vcpus.pause(Capture::Nothing)?;
        let kicked = paused.kicked();
        let stopped = Stopped::stop(self.devices.clone(), kicked + RESTORE_WAIT);
        if let Err(error) = self.rewind(&mut *paused, snapshot, after_memory) {
            // Before the devices go on, which may complete what no vCPU is to see.
            paused.stop();
            return Err(error);
        }
        drop(stopped);
        let running = paused.resume();
        Ok(Timing { kicked, running })
    }

    /// Sets devices, memory and registers back, while nothing runs.
    fn rewind(
        &self,
        paused: &mut dyn Paused,
        snapshot: &Snapshot,
        after_memory: impl FnOnce(),
    ) -> Result<(), RewindError> {
        let mut devices = self.devices.iter();
        let released = devices.try_for_each(|device| device.release());
        released.map_err(RewindError::Devices)?;
        paused.before_restore()?;
        self.space.restore(&snapshot.memory)?;
        after_memory();
        for (device, state) in self.devices.iter().zip(&snapshot.devices) {
            device.restore(state).map_err(RewindError::Devices)?;
        }
        paused.restore(&snapshot.vcpus)?;
        // To pin what devices had in flight may have broken it.
        let is_whole = self.space.check().map_err(FaultError::from);
        is_whole.map_err(mm::RestoreError::from)?;
        self.keep_tables_writable(paused)?;
        Ok(())
    }

    /// Has `protect` take write access from pages of the running VM: while its vCPUs stand still, where it
    /// must not be taken from vCPUs that run.
    ///
    /// # Errors
    /// If the vCPUs cannot be stopped. If they cannot run on, they are stopped for good.
    pub fn while_protecting<R>(&self, protect: impl FnOnce() -> R) -> Result<R, VcpusError> {
        if self.vcpus.may_lose_write_access() {
            return Ok(protect());
        }
        self.note_protected();
        let mut paused = self.vcpus.pause(Capture::Nothing)?;
        let done = protect();
        if let Err(error) = self.keep_tables_writable(&mut *paused) {
            paused.stop();
            return Err(error);
        }
        Ok(done)
    }

    /// Has what becomes read-only noted for [`Parts::keep_tables_writable`], where that needs it.
    fn note_protected(&self) {
        if !self.vcpus.may_lose_write_access() {
            self.space.note_protected();
        }
    }

    /// To be called before the vCPUs run on, when memory has become read-only.
    fn keep_tables_writable(&self, paused: &mut dyn Paused) -> Result<(), VcpusError> {
        let protected = self.space.take_protected();
        let gfns = protected.iter().flat_map(PageSet::iter);
        paused.has_protected(&mut gfns.map(|gfn| gfn.0))
    }
}

#[cfg(test)]
pub(crate) mod tests;
