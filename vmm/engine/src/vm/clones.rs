//! Starting a VM as a snapshot says: a clone, if its memory is one of that snapshot's.
//!
//! ```text
//!   snapshot ──> memory: Memory::clone_of      shares every frame, copies none
//!                vCPUs, devices: the builder   new ones, or those of a shell
//!                     │
//!   start_from        devices become what they were, in the clone's own memory; what was in flight is taken
//!                     again from there
//!                     last changes to memory: the clone learns who it is
//!                     registers, then the vCPUs run, then the devices
//! ```
//! The parent need not know. What of it was in flight goes on, and is the parent's.

use std::time::Instant;

use super::Vm;
use crate::causes::Cause;
use crate::device::Stopped;
use crate::kvm::{Clock, KvmError, StateError, VcpuState};
use crate::mm::{CowPolicy, Gfn};
use crate::snapshot::Snapshot;
use crate::timeline::span;

/// Why a VM could not be started as a snapshot says. It has not run, and never will.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// The snapshot is of a VM with other devices.
    #[error("the snapshot has {snapshot} devices, the clone {clone}")]
    DeviceCount {
        /// Devices of the snapshot.
        snapshot: usize,
        /// Devices of the VM that is to be its clone.
        clone: usize,
    },
    /// A vCPU's state makes no sense.
    #[error("vcpu {vcpu} of the snapshot makes no sense")]
    State {
        /// Which.
        vcpu: usize,
        /// Why.
        source: StateError,
    },
    /// Devices could not become what they were.
    #[error("cannot restore the devices from the snapshot")]
    Devices(#[source] Cause),
    /// The last changes to its memory could not be made.
    #[error("cannot tell the clone who it is")]
    Identity(#[source] Cause),
    /// vCPUs could not be set or started.
    #[error("cannot start the vcpus from the snapshot")]
    Vcpus(#[from] KvmError),
}

impl<P: CowPolicy> Vm<P> {
    /// Starts the VM, which was not started before, as `snapshot` says: registers and devices of that instant,
    /// in the memory it has, which is a clone of the snapshot's ([`Memory::clone_of`]). Returns when the last
    /// vCPU was about to run.
    ///
    /// `identity` is called when memory and devices are as they were and no vCPU has run yet: what tells this
    /// VM from all others is written there, such as a generation id. It is not called for who it is not.
    ///
    /// The time-stamp counter goes on from where it was captured, if the host can have it so.
    ///
    /// [`Memory::clone_of`]: crate::memory::Memory::clone_of
    ///
    /// # Errors
    /// See [`CloneError`]. The VM does not run, and is only good to be dropped; the snapshot is as it was.
    pub fn start_from(
        &self,
        snapshot: &Snapshot,
        identity: impl FnOnce() -> Result<(), Cause>,
    ) -> Result<Instant, CloneError> {
        let _span = span!("start clone");
        let _first = self.ram().precedence().take();
        let (theirs, ours) = (snapshot.devices().len(), self.devices.len());
        if theirs != ours {
            return Err(CloneError::DeviceCount {
                snapshot: theirs,
                clone: ours,
            });
        }
        let vcpus = snapshot.vcpus().iter().enumerate().map(|(vcpu, saved)| {
            VcpuState::of_saved(saved).map_err(|source| CloneError::State { vcpu, source })
        });
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
        let step = span!("devices");
        // They have not begun anything: there is nothing to wait for.
        let devices = self.devices.iter().map(|device| &**device).collect();
        let stopped = Stopped::stop(devices, Instant::now());
        for (device, state) in self.devices.iter().zip(snapshot.devices()) {
            device.restore(state).map_err(CloneError::Devices)?;
        }
        drop(step);
        identity().map_err(CloneError::Identity)?;
        self.keep_tables_of_clone_writable()?;
        self.machine.show_what_kvm_reads(&vcpus)?;
        let _step = span!("registers, resume");
        let started = self
            .machine
            .start_from_then(&vcpus, Clock::Rewind, || drop(stopped))?;
        Ok(started)
    }

    /// All of a clone's memory is read-only at first. Where KVM must not find page tables so, that is looked
    /// through ([`Machine::may_lose_write_access`](crate::kvm::Machine::may_lose_write_access)).
    fn keep_tables_of_clone_writable(&self) -> Result<(), KvmError> {
        if self.machine.may_lose_write_access() {
            return Ok(());
        }
        let space = self.memory.space();
        let shown = (0..space.pages()).filter(|gfn| {
            let entry = space.entry(Gfn(*gfn));
            entry.is_ok_and(|entry| entry.is_present() && !entry.is_writable())
        });
        self.machine.keep_tables_writable(shown)
    }
}
