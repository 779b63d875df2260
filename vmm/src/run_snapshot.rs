//! A snapshot of a run: which one it is, and what is in it in the words of the program.

use palimpsest::kvm::{StateError, VcpuState};
use palimpsest::mm::Frozen;
use palimpsest::snapshot;

use crate::dma::{DeviceRestoreError, DeviceState};

/// A part of a snapshot has a state that is of another kind than a run's.
#[derive(Debug, thiserror::Error)]
pub enum ForeignStateError {
    /// A vCPU's is not KVM's.
    #[error("a vcpu of the snapshot makes no sense")]
    Vcpu(#[from] StateError),
    /// A device's is not a DMA engine's.
    #[error("a device of the snapshot makes no sense")]
    Device(#[from] DeviceRestoreError),
}

/// One snapshot of a run. Dropping it gives its memory back.
#[derive(Debug)]
pub struct RunSnapshot {
    number: u64,
    parent: Option<u64>,
    taken: snapshot::Snapshot,
    vcpus: Vec<VcpuState>,
    devices: Vec<DeviceState>,
}

impl RunSnapshot {
    /// Snapshot `number` of a run, whose VM ran on from `parent`.
    ///
    /// # Errors
    /// If its vCPUs are not KVM's, or its devices not DMA engines.
    pub fn new(
        number: u64,
        parent: Option<u64>,
        taken: snapshot::Snapshot,
    ) -> Result<Self, ForeignStateError> {
        let vcpus = taken.vcpus().iter().map(VcpuState::of_saved);
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        let devices = taken.devices().iter().map(DeviceState::of_saved);
        let devices = devices.collect::<Result<_, _>>()?;
        Ok(Self {
            number,
            parent,
            taken,
            vcpus,
            devices,
        })
    }

    /// Its number in the run, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The snapshot the VM ran on from, last before this one: the one restored last, or else taken last.
    pub fn parent(&self) -> Option<u64> {
        self.parent
    }

    /// What the engine has taken, which it can restore.
    pub fn taken(&self) -> &snapshot::Snapshot {
        &self.taken
    }

    /// Memory.
    pub fn memory(&self) -> &Frozen {
        self.taken.memory()
    }

    /// Registers, by vCPU.
    pub fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    /// Devices, by number.
    pub fn devices(&self) -> &[DeviceState] {
        &self.devices
    }
}
