//! Which MSRs can be saved and set back.
//!
//! KVM lists the MSRs that a VMM should save. On some hosts (PVM) part of them cannot be read, or not be set
//! to the value just read. Those are left out, and named, instead of failing every snapshot.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::error::StateError;

/// Time-stamp counter.
const IA32_TSC: u32 = 0x10;
/// Offset the guest has given its own time-stamp counter.
const IA32_TSC_ADJUST: u32 = 0x3b;
/// Time-stamp counter value at which the local APIC's timer fires.
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// MSRs of a Hyper-V hypervisor. KVM lists them always; a guest has them only if its CPUID says so, and ours
/// does not.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// Whether `index` is part of the vCPU's time.
pub(super) fn is_clock(index: u32) -> bool {
    matches!(index, IA32_TSC | IA32_TSC_ADJUST | IA32_TSC_DEADLINE)
}

/// The MSRs of KVM's list, sorted by whether they can be saved and set back.
#[derive(Clone, Debug)]
pub(super) struct MsrSet {
    pub(super) kept: Vec<u32>,
    pub(super) left_out: Vec<u32>,
}

impl MsrSet {
    /// Tries every MSR on `vcpu`, which must have its CPUID and must not have run yet.
    pub(super) fn probe(kvm: &kvm_ioctls::Kvm, vcpu: &VcpuFd) -> Result<Self, StateError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(StateError::of("msr list"))?;
        let (kept, left_out) = list
            .as_slice()
            .iter()
            .copied()
            .filter(|index| !HYPER_V.contains(index))
            .partition(|index| restorable(vcpu, *index));
        Ok(Self { kept, left_out })
    }
}

/// Whether MSR `index` can be read, and set to what was read.
fn restorable(vcpu: &VcpuFd, index: u32) -> bool {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let Ok(mut one) = Msrs::from_entries(&[entry]) else {
        return false;
    };
    // A clock that is read and set back loses time, and KVM is known to accept it.
    matches!(vcpu.get_msrs(&mut one), Ok(1))
        && (is_clock(index) || matches!(vcpu.set_msrs(&one), Ok(1)))
}

/// Reads MSRs `indices`.
pub(super) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let entries: Vec<_> = indices
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| StateError::TooManyMsrs {
        count: entries.len(),
    })?;
    let count = vcpu.get_msrs(&mut msrs).map_err(StateError::of("msrs"))?;
    match indices.get(count) {
        None => Ok(msrs.as_slice().to_vec()),
        Some(&index) => Err(StateError::Msr { index }),
    }
}

/// Sets MSRs to `entries`.
pub(super) fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let msrs = Msrs::from_entries(entries).map_err(|_| StateError::TooManyMsrs {
        count: entries.len(),
    })?;
    let count = vcpu.set_msrs(&msrs).map_err(StateError::of("msrs"))?;
    match entries.get(count) {
        None => Ok(()),
        Some(entry) => Err(StateError::Msr { index: entry.index }),
    }
}
