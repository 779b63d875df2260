//! Sets all registers of a vCPU.

#![expect(unsafe_code, reason = "KVM_SET_XSAVE, whose size the kernel decides")]

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;

use super::{StateKind, VcpuState};
use crate::kvm::error::StateError;
use crate::kvm::extended::{XSAVE_BYTES, XSAVE_WORDS};
use crate::kvm::msr;

/// What restoring does with the guest's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The time-stamp counter runs on: for rewinding a machine in place. A guest that measures its own gaps
    /// then sees how long it stood still, and never sees time run backwards.
    Keep,
    /// The time-stamp counter goes back to where it was captured: for a new machine, whose own counter begins
    /// at zero. Hosts that run the guest on their own counter (PVM) accept this without effect: there the
    /// counter is the host's.
    Rewind,
}

/// CR4: global pages.
const CR4_PGE: u64 = 1 << 7;

impl VcpuState {
    /// Sets all registers. `xsave_fits` is the caller's word that the kernel takes no more than 4 KiB of
    /// XSAVE area.
    pub(in crate::kvm) fn restore(
        &self,
        vcpu: &VcpuFd,
        clock: Clock,
        _xsave_fits: XsaveFits,
    ) -> Result<(), StateError> {
        self.must_be(StateKind::Kvm)?;
        let mut xsave = kvm_xsave::default();
        if self.xsave.len() != XSAVE_WORDS {
            return Err(StateError::XsaveSize {
                words: self.xsave.len(),
            });
        }
        xsave.region.copy_from_slice(&self.xsave);

        vcpu.set_mp_state(self.mp_state)
            .map_err(StateError::of("multiprocessing state"))?;
        // Memory was set back by the host's hand, page tables with it, and KVM flushes what the CPU keeps of
        // them only when a control register changes (`__set_sregs_common` in `arch/x86/kvm/x86.c`). So one
        // does, there and back.
        let mut other = self.sregs;
        other.cr4 ^= CR4_PGE;
        vcpu.set_sregs(&other)
            .map_err(StateError::of("system registers"))?;
        // System registers before XCRs and XSAVE: CR4.OSXSAVE governs them.
        vcpu.set_sregs(&self.sregs)
            .map_err(StateError::of("system registers"))?;
        vcpu.set_regs(&self.regs)
            .map_err(StateError::of("registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(StateError::of("xcrs"))?;
        // SAFETY: the kernel reads the size it gave for KVM_CAP_XSAVE2, which `XsaveFits` says is no more
        // than what `kvm_xsave` has.
        unsafe { vcpu.set_xsave(&xsave) }.map_err(StateError::of("xsave area"))?;
        let msrs: Vec<_> = self
            .msrs
            .iter()
            .filter(|msr| clock == Clock::Rewind || !msr::is_clock(msr.index))
            .copied()
            .collect();
        msr::write(vcpu, &msrs)?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(StateError::of("debug registers"))?;
        // Last: setting the general registers drops a pending exception.
        vcpu.set_vcpu_events(&self.events)
            .map_err(StateError::of("events"))
    }
}

/// Proof that the kernel's XSAVE area is no larger than [`XSAVE_BYTES`], so that `KVM_SET_XSAVE` stays inside
/// `kvm_xsave`.
///
/// It is larger only where a process has asked the kernel for dynamically enabled state (AMX), which this one
/// does not.
#[derive(Clone, Copy, Debug)]
pub(in crate::kvm) struct XsaveFits(());

impl XsaveFits {
    /// `xsave2` is what the VM answers for `KVM_CAP_XSAVE2`; 0 on kernels that only know the fixed size.
    pub(in crate::kvm) fn check(xsave2: i32) -> Option<Self> {
        (xsave2 <= XSAVE_BYTES as i32).then_some(Self(()))
    }
}
