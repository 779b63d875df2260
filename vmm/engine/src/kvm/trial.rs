//! Registers tried on a vCPU that never runs.

use kvm_ioctls::Cap;

use super::create::{create_vcpu, create_vm};
use super::error::KvmError;
use super::open::Kvm;
use super::registers;
use super::state::{Clock, VcpuState, XsaveFits};

impl Kvm {
    /// Sets `states` on the vCPUs of a VM without memory, which is gone when this returns: whether KVM takes them
    /// here. Nothing runs. What it cannot say is what they do when they run.
    ///
    /// # Errors
    /// If KVM does not, of the first vCPU whose state it does not take; or has no VM for that.
    pub fn try_states(&self, states: &[VcpuState]) -> Result<(), KvmError> {
        let vm = create_vm(self)?;
        let xsave2 = vm.check_extension_int(Cap::Xsave2);
        let fits = XsaveFits::check(xsave2).ok_or(KvmError::XsaveSize { bytes: xsave2 })?;
        for (vcpu, state) in states.iter().enumerate() {
            let cpuid = registers::vcpu_cpuid(&self.cpuid, vcpu as u8);
            let fd = create_vcpu(&vm, vcpu, &cpuid)?;
            let set = state.restore(&fd, Clock::Rewind, fits);
            set.map_err(|source| KvmError::State { vcpu, source })?;
        }
        Ok(())
    }
}
