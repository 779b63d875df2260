//! KVM's own writes to guest memory: paravirtual clock, steal time, asynchronous page faults, end of
//! interrupt.
//!
//! A guest asks for these by an MSR that names an address, and KVM writes there from then on, by no vCPU's
//! instruction and through no fault that anybody would see. So they are not offered ([`mask`]), and a guest
//! that sets the MSR all the same has the page *pinned* for as long as it is set: KVM is a device, and the
//! protocol says what a pinned page is. The page stays writable and where it is; snapshots get copies of it.
//!
//! How: writes to these MSRs exit to the VMM ([`guard`], `KVM_X86_SET_MSR_FILTER`), which pins and then sets
//! the MSR itself. A restore sets MSRs too, and goes the same way.
//!
//! Not covered: kernels before 5.10 have no such filter. There the features are merely not offered.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;

use kvm_bindings::{
    CpuId, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, kvm_enable_cap, kvm_msr_entry,
};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use vmm_sys_util::errno;

use super::memory::GuestRam;
use crate::causes::Cause;

/// CPUID leaf with KVM's features.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Its features that make KVM write to guest memory: `KVM_FEATURE_CLOCKSOURCE`, `_CLOCKSOURCE2`, `_ASYNC_PF`,
/// `_STEAL_TIME`, `_PV_EOI`, `_ASYNC_PF_VMEXIT`, `_ASYNC_PF_INT` (`arch/x86/include/uapi/asm/kvm_para.h`).
const WRITES_MEMORY: u32 = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10 | 1 << 14;

/// An MSR that has KVM write to memory.
struct Writer {
    index: u32,
    /// Bits of its value that are the address.
    address: u64,
    /// Bits of which one must be set for KVM to write.
    enabled: u64,
    /// Bytes that are written.
    len: u64,
}

/// By `Documentation/virt/kvm/x86/msr.rst`.
const WRITERS: [Writer; 7] = [
    // MSR_KVM_WALL_CLOCK and MSR_KVM_SYSTEM_TIME, old and new.
    Writer::new(0x11, !0, !0, 12),
    Writer::new(0x12, !1, 1, 32),
    Writer::new(0x4b56_4d00, !0, !0, 12),
    Writer::new(0x4b56_4d01, !1, 1, 32),
    // MSR_KVM_ASYNC_PF_EN, MSR_KVM_STEAL_TIME, MSR_KVM_PV_EOI_EN
    Writer::new(0x4b56_4d02, !0x3f, 1, 64),
    Writer::new(0x4b56_4d03, !0x3f, 1, 64),
    Writer::new(0x4b56_4d04, !3, 1, 4),
];

impl Writer {
    const fn new(index: u32, address: u64, enabled: u64, len: u64) -> Self {
        Self {
            index,
            address,
            enabled,
            len,
        }
    }

    /// Where KVM writes while the MSR is `value`.
    fn target(&self, value: u64) -> Option<u64> {
        (value & self.enabled != 0).then_some(value & self.address)
    }
}

fn writer(index: u32) -> Option<&'static Writer> {
    WRITERS.iter().find(|writer| writer.index == index)
}

/// Takes the features out of `cpuid` that make KVM write to guest memory.
pub(super) fn mask(cpuid: &mut CpuId) {
    for leaf in cpuid.as_mut_slice() {
        if leaf.function == KVM_FEATURES {
            leaf.eax &= !WRITES_MEMORY;
        }
    }
}

/// Makes a guest's writes to these MSRs exit, where the kernel can.
pub(super) fn guard(vm: &VmFd) -> Result<(), errno::Error> {
    if !vm.check_extension(Cap::X86UserSpaceMsr) || !vm.check_extension(Cap::X86MsrFilter) {
        return Ok(());
    }
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [KVM_MSR_EXIT_REASON_FILTER.into(), 0, 0, 0],
        ..Default::default()
    })?;
    // A bit that is 0 denies.
    let range = |base, count| MsrFilterRange {
        flags: MsrFilterRangeFlags::WRITE,
        base,
        msr_count: count,
        bitmap: &[0],
    };
    vm.set_msr_filter(
        MsrFilterDefaultAction::ALLOW,
        &[range(0x11, 2), range(0x4b56_4d00, 5)],
    )
}

/// The pages that KVM writes for one vCPU, pinned.
#[derive(Default)]
pub(super) struct Targets(BTreeMap<u32, (u64, Box<dyn Any + Send>)>);

impl fmt::Debug for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

impl Targets {
    /// MSR `index` is about to be set to `value`: pins what KVM will write because of it, and gives the pin
    /// to be kept until [`Targets::has_set`] says that the MSR is set.
    pub(super) fn pin(&self, index: u32, value: u64, ram: &dyn GuestRam) -> Result<Pinned, Cause> {
        let target = writer(index).and_then(|writer| Some((writer.target(value)?, writer.len)));
        Ok(match target {
            Some((gpa, len)) => Pinned(Some((gpa, ram.pin(gpa, len)?))),
            None => Pinned(None),
        })
    }

    /// MSR `index` is set: what it named before is let go.
    pub(super) fn has_set(&mut self, index: u32, pinned: Pinned) {
        match pinned.0 {
            Some(target) => self.0.insert(index, target),
            None => self.0.remove(&index),
        };
    }

    /// Pins what KVM writes once the MSRs are `msrs`, and gives what it writes now back to be kept until they
    /// are.
    pub(super) fn replace(
        &mut self,
        msrs: &[kvm_msr_entry],
        ram: &dyn GuestRam,
    ) -> Result<Self, Cause> {
        let mut next = Self::default();
        for msr in msrs {
            let pinned = next.pin(msr.index, msr.data, ram)?;
            next.has_set(msr.index, pinned);
        }
        Ok(std::mem::replace(self, next))
    }
}

/// A page that KVM is about to write.
pub(super) struct Pinned(Option<(u64, Box<dyn Any + Send>)>);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::paging::tests::Bytes;
    use kvm_bindings::kvm_cpuid_entry2;

    #[test]
    fn only_features_that_write_memory_are_masked() {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let mut cpuid = CpuId::from_entries(&[leaf(1, !0), leaf(KVM_FEATURES, !0)]).unwrap();
        mask(&mut cpuid);
        assert_eq!(cpuid.as_slice()[0].eax, !0);
        assert_eq!(cpuid.as_slice()[1].eax, !0x4479);
    }

    #[test]
    fn a_page_is_pinned_for_as_long_as_its_msr_is_set() {
        let ram = Bytes::new(0x1_0000);
        let mut targets = Targets::default();
        let mut set = |index, value| {
            let pinned = targets.pin(index, value, &ram)?;
            targets.has_set(index, pinned);
            Ok::<_, Cause>(ram.pinned())
        };
        assert_eq!(set(0x4b56_4d01, 0x3001).unwrap(), [(0x3000, 32)]);
        assert_eq!(
            set(0x4b56_4d03, 0x4041).unwrap(),
            [(0x3000, 32), (0x4040, 64)]
        );
        // The same again, elsewhere, off.
        assert_eq!(
            set(0x4b56_4d01, 0x5001).unwrap(),
            [(0x4040, 64), (0x5000, 32)]
        );
        assert_eq!(set(0x4b56_4d03, 0x4040).unwrap(), [(0x5000, 32)]);
        // What is no memory is refused, and nothing changes.
        assert!(set(0x4b56_4d01, 0x10_0001).is_err());
        assert_eq!(ram.pinned(), [(0x5000, 32)]);
        // Another MSR has nothing to do with it.
        assert_eq!(set(0x10, 0x3001).unwrap(), [(0x5000, 32)]);
    }

    #[test]
    fn a_restore_pins_the_new_before_it_lets_go_of_the_old() {
        let ram = Bytes::new(0x1_0000);
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let mut targets = Targets::default();
        let old = targets.replace(&[msr(0x12, 0x3001)], &ram).unwrap();
        drop(old);
        let old = targets.replace(&[msr(0x12, 0x4001), msr(0x10, 1)], &ram);
        assert_eq!(ram.pinned(), [(0x3000, 32), (0x4000, 32)]);
        drop(old.unwrap());
        assert_eq!(ram.pinned(), [(0x4000, 32)]);
        assert!(targets.replace(&[msr(0x12, 0x10_0001)], &ram).is_err());
        assert_eq!(ram.pinned(), [(0x4000, 32)]);
    }
}
