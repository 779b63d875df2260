//! A snapshot of a run: which one it is, and what is in it in the words of the program.

use std::sync::Arc;

use palimpsest::kvm::{StateError, VcpuState};
use palimpsest::mm::Frozen;
use palimpsest::snapshot;

use crate::dma::{DeviceRestoreError, DeviceState};
use crate::incarnation::Incarnation;

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
    incarnation: Option<Arc<Incarnation>>,
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
            incarnation: None,
            taken,
            vcpus,
            devices,
        })
    }

    /// The same, of a guest that was in `incarnation`.
    #[must_use]
    pub fn of(self, incarnation: Arc<Incarnation>) -> Self {
        Self {
            incarnation: Some(incarnation),
            ..self
        }
    }

    /// Its number in the run, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The snapshot the VM ran on from, last before this one: the one restored last, or else taken last.
    pub fn parent(&self) -> Option<u64> {
        self.parent
    }

    /// The incarnation that the guest was in, if that is known.
    pub fn incarnation(&self) -> Option<&Arc<Incarnation>> {
        self.incarnation.as_ref()
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

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_sregs};
    use palimpsest::host::PhysMap;
    use palimpsest::mm::{AddressSpace, Exclusive, FramePool, Gfn, Mmu, MmuError, Pfn, Protection};
    use palimpsest::saved::Saved;
    use virtio_queue::QueueState;

    use super::*;

    /// There is no window: nobody runs.
    struct NoWindow;

    impl Mmu for NoWindow {
        fn map(&self, _: Gfn, _: Pfn, _: u64, _: Protection) -> Result<(), MmuError> {
            Ok(())
        }
        fn protect(&self, _: Gfn, _: u64, _: Protection) -> Result<(), MmuError> {
            Ok(())
        }
    }

    /// A snapshot of these parts, with memory that nobody has written.
    fn taken(vcpus: Vec<Saved>, devices: Vec<Saved>) -> snapshot::Snapshot {
        let physmap = PhysMap::new(1024).unwrap();
        let pool = FramePool::new(physmap as _, 1024, 1024).unwrap();
        let space = AddressSpace::new(Arc::clone(&pool), Exclusive, Box::new(NoWindow), 512);
        let memory = space.unwrap().fork().unwrap();
        snapshot::Snapshot::new(memory, vcpus, devices)
    }

    fn vcpu(rip: u64) -> VcpuState {
        let regs = kvm_regs {
            rip,
            ..kvm_regs::default()
        };
        VcpuState::of(regs, kvm_sregs::default(), Vec::new())
    }

    fn device(pending: u16) -> DeviceState {
        DeviceState {
            queue: QueueState::default(),
            pending: vec![pending],
            in_flight: None,
            registered: Vec::new(),
        }
    }

    /// As it comes back from where it was stored.
    fn stored(saved: &Saved) -> Saved {
        Saved::stored(saved.version(), saved.to_bytes())
    }

    #[test]
    fn states_are_those_of_vcpus_and_devices_in_order_stored_or_not() {
        let vcpus = [1, 2].map(vcpu);
        let devices = [3, 4, 5].map(device);
        for keep in [Saved::clone, stored] {
            let saved_vcpus = vcpus.iter().map(|v| keep(&Saved::new(v.clone())));
            let saved_devices = devices.iter().map(|d| keep(&Saved::new(d.clone())));
            let taken = taken(saved_vcpus.collect(), saved_devices.collect());
            let snapshot = RunSnapshot::new(7, Some(4), taken).unwrap();
            assert_eq!((snapshot.number(), snapshot.parent()), (7, Some(4)));
            assert_eq!(
                (snapshot.vcpus(), snapshot.devices()),
                (&vcpus[..], &devices[..])
            );
        }
    }

    #[test]
    fn a_part_of_another_kind_is_refused() {
        let (vcpu, device) = (|| Saved::new(vcpu(1)), || Saved::new(device(2)));
        let refused =
            |vcpus, devices| RunSnapshot::new(1, None, taken(vcpus, devices)).unwrap_err();
        for other in [Saved::stored(99, vec![]), Saved::stored(1, vec![0xff])] {
            let error = refused(vec![vcpu(), other.clone()], vec![device()]);
            assert!(matches!(error, ForeignStateError::Vcpu(_)), "{error}");
            let error = refused(vec![vcpu()], vec![device(), other]);
            assert!(matches!(error, ForeignStateError::Device(_)), "{error}");
        }
        let error = refused(vec![device()], vec![]);
        assert!(matches!(error, ForeignStateError::Vcpu(_)), "{error}");
        let error = refused(vec![vcpu()], vec![vcpu()]);
        assert!(matches!(error, ForeignStateError::Device(_)), "{error}");
    }
}
