//! Makes virtual machines and vCPUs of KVM's.

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::io::Errno;

use super::error::KvmError;
use super::msr::MsrSet;
use super::open::Kvm;
use super::registers::vcpu_cpuid;

impl Kvm {
    /// MSRs that can't be saved or set back here: snapshots are without them. Makes a virtual machine to find
    /// out.
    ///
    /// # Errors
    /// If it can't be made.
    pub fn unsaved_msrs(&self) -> Result<Vec<u32>, KvmError> {
        Ok(self.probed_msrs()?.left_out)
    }

    /// MSRs that are saved and set back here, as [`Kvm::unsaved_msrs`].
    ///
    /// # Errors
    /// As that.
    pub fn saved_msrs(&self) -> Result<Vec<u32>, KvmError> {
        Ok(self.probed_msrs()?.kept)
    }

    fn probed_msrs(&self) -> Result<MsrSet, KvmError> {
        if let Some(msrs) = self.msrs.get() {
            return Ok(msrs.clone());
        }
        let vm = create_vm(self)?;
        let vcpu = create_vcpu(&vm, 0, &vcpu_cpuid(&self.cpuid, 0))?;
        msr_set(self, &vcpu, 0)
    }
}

/// Creates the VM. The call allocates much, and gives up with `EINTR` when a signal comes in between.
pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.fd.create_vm() {
            Ok(vm) => return Ok(vm),
            Err(error) if error.errno() == Errno::INTR.raw_os_error() => {}
            Err(source) => return Err(KvmError::CreateVm { source }),
        }
    }
}

/// Creates vCPU `vcpu`.
pub(super) fn create_vcpu(vm: &VmFd, vcpu: usize, cpuid: &CpuId) -> Result<VcpuFd, KvmError> {
    let error = |source| KvmError::CreateVcpu { vcpu, source };
    let fd = vm.create_vcpu(vcpu as u64).map_err(error)?;
    fd.set_cpuid2(cpuid).map_err(error)?;
    Ok(fd)
}

/// The MSRs to save, probed with the first vCPU of this KVM.
pub(super) fn msr_set(kvm: &Kvm, fd: &VcpuFd, vcpu: usize) -> Result<MsrSet, KvmError> {
    if let Some(msrs) = kvm.msrs.get() {
        return Ok(msrs.clone());
    }
    let msrs = MsrSet::probe(&kvm.fd, fd).map_err(|source| KvmError::State { vcpu, source })?;
    Ok(kvm.msrs.get_or_init(|| msrs).clone())
}
