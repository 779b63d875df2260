//! A write fault as it comes out of the guest.

use std::ops::Range;

use kvm_bindings::{CpuId, kvm_regs, kvm_sregs, kvm_xsave};

use crate::kvm::memory::GuestRam;
use crate::mm::PAGE_SIZE;

/// A vCPU that could not write, as it came out of the guest.
pub(in super::super) struct WriteFault<'a> {
    pub(in super::super) regs: &'a kvm_regs,
    pub(in super::super) sregs: &'a kvm_sregs,
    /// Where, if KVM says so: guest-physical.
    pub(in super::super) gpas: Option<Range<u64>>,
    /// Says where vector registers are in the XSAVE area.
    pub(in super::super) cpuid: &'a CpuId,
    /// The XSAVE area, read only if an address is in a vector register.
    pub(in super::super) xsave: &'a dyn Fn() -> Option<kvm_xsave>,
}

/// Frames of guest memory: what lies beyond is MMIO and cannot be what faulted.
pub(super) fn frames(ram: &dyn GuestRam) -> u64 {
    ram.len().div_ceil(PAGE_SIZE)
}
