//! Captures all registers of a vCPU, again and again.

use kvm_bindings::{kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_sync_regs, kvm_xcrs};
use kvm_ioctls::VcpuFd;

use super::{StateKind, VcpuState};
use crate::kvm::error::StateError;
use crate::kvm::msr::{self, MsrSet};

/// Registers that only code in ring 0 can change.
#[derive(Clone, Debug)]
struct Privileged {
    xcrs: kvm_xcrs,
    /// Without the clock's.
    msrs: Vec<kvm_msr_entry>,
    debug: kvm_debugregs,
    mp_state: kvm_mp_state,
}

impl Privileged {
    fn read(vcpu: &VcpuFd, msrs: &MsrSet) -> Result<Self, StateError> {
        let (_, steady) = split_clock(&msrs.kept);
        Ok(Self {
            // First: reading it moves a pending event to where the event registers show it.
            mp_state: vcpu
                .get_mp_state()
                .map_err(StateError::of("multiprocessing state"))?,
            xcrs: vcpu.get_xcrs().map_err(StateError::of("xcrs"))?,
            msrs: msr::read(vcpu, &steady)?,
            debug: vcpu
                .get_debug_regs()
                .map_err(StateError::of("debug registers"))?,
        })
    }
}

/// Captures the registers of one vCPU, again and again.
///
/// Every KVM call for a vCPU costs microseconds (about 7 on PVM), in which the guest stands still. So
/// registers that came with the last exit are taken from there, and those that ring 3 cannot change are read
/// once and kept until they are set: a guest without descriptor tables and system call entry points has no
/// way out of ring 3.
#[derive(Debug)]
pub(in crate::kvm) struct Capturer {
    msrs: MsrSet,
    clock: Vec<u32>,
    privileged: Option<Privileged>,
}

impl Capturer {
    /// A capturer of the MSRs in `msrs`.
    pub(in crate::kvm) fn new(msrs: MsrSet) -> Self {
        Self {
            clock: split_clock(&msrs.kept).0,
            msrs,
            privileged: None,
        }
    }

    /// Reads all registers. `exit` is what came with the last exit, if nothing was set since. The vCPU must
    /// have no port access half done.
    pub(in crate::kvm) fn capture(
        &mut self,
        vcpu: &VcpuFd,
        exit: Option<kvm_sync_regs>,
    ) -> Result<VcpuState, StateError> {
        let privileged = match self.privileged.take() {
            Some(privileged) => privileged,
            None => Privileged::read(vcpu, &self.msrs)?,
        };
        let exit = match exit {
            Some(exit) => exit,
            None => kvm_sync_regs {
                regs: vcpu.get_regs().map_err(StateError::of("registers"))?,
                sregs: vcpu
                    .get_sregs()
                    .map_err(StateError::of("system registers"))?,
                events: vcpu.get_vcpu_events().map_err(StateError::of("events"))?,
            },
        };
        let mut msrs = msr::read(vcpu, &self.clock)?;
        msrs.extend_from_slice(&privileged.msrs);
        let state = VcpuState {
            kind: StateKind::Kvm,
            regs: exit.regs,
            sregs: exit.sregs,
            xsave: vcpu
                .get_xsave()
                .map_err(StateError::of("xsave area"))?
                .region
                .to_vec(),
            xcrs: privileged.xcrs,
            msrs,
            left_out: self.msrs.left_out.clone(),
            events: exit.events,
            debug: privileged.debug,
            mp_state: privileged.mp_state,
        };
        if state.is_confined_to_ring_3() {
            self.privileged = Some(privileged);
        }
        Ok(state)
    }

    /// Registers were set: what was kept of them holds no longer.
    pub(in crate::kvm) fn forget(&mut self) {
        self.privileged = None;
    }
}

/// Splits MSRs into those of the clock and the others.
fn split_clock(indices: &[u32]) -> (Vec<u32>, Vec<u32>) {
    indices.iter().partition(|index| msr::is_clock(**index))
}
