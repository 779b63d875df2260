//! The registers a vCPU starts with: 64-bit mode, ring 3.
//!
//! The state is legal on VMX and SVM, and the only one in which PVM runs guest code natively: it interprets
//! ring 0. There are no descriptor tables; segments are what is written here, and an exception ends in a
//! triple fault. The only memory it relies on beside the page tables is a page of zeros, for a task state
//! segment.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs, kvm_xcrs,
};

use super::paravirt;
use crate::mm::PAGE_SIZE;

/// Where a vCPU begins, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// Its first instruction.
    pub rip: u64,
    /// Its stack pointer.
    pub rsp: u64,
    /// What it finds in RDI and RSI: the arguments of a function in C.
    pub arguments: [u64; 2],
    /// The gpa of the page tables: see [`write_page_tables`](super::write_page_tables).
    pub page_tables: u64,
    /// The gpa of a page that is zero and stays so.
    ///
    /// It is the task state segment. PVM runs the guest with RFLAGS of its own, in which the I/O privilege
    /// level is 0. It then asks the TSS whether a port may be used, as a CPU would: a TSS of zeros has its
    /// I/O bitmap at offset 0, and a bit that is 0 allows a port. A page of them allows ports up to 0x7fff.
    pub task: u64,
}

/// RFLAGS: the bit that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;
/// RFLAGS: interrupts on, as they are in ring 3 under any system. There are none to come. The emulator of the
/// Intel host gives its host no interrupt while a guest has them off, and then nothing ends a guest that
/// spins.
const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS: I/O privilege level 3, so that `out` in ring 3 exits to the VMM instead of faulting. PVM loses it
/// as soon as the guest has run: see [`EntryState::task`].
const RFLAGS_IOPL3: u64 = 3 << 12;

/// CR0: PE, MP, ET, NE, WP, PG.
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// CR4: PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// CR4: XSAVE and XGETBV are usable.
const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4: ring 3 may read and set the bases of FS and GS.
const CR4_FSGSBASE: u64 = 1 << 16;
/// EFER: LME, LMA, NX.
const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;

/// State components a guest may have if the CPU has them: x87, SSE, AVX, AVX-512. The area they need fits
/// into the 4 KiB that `KVM_GET_XSAVE` transfers.
const XCR0_WANTED: u64 = 0b1110_0111;
/// x87 and SSE: what is always there.
const XCR0_LEAST: u64 = 0b11;

/// General registers before the first instruction.
pub fn entry_regs(entry: &EntryState) -> kvm_regs {
    let [rdi, rsi] = entry.arguments;
    kvm_regs {
        rip: entry.rip,
        rdi,
        rsi,
        rsp: entry.rsp,
        rflags: RFLAGS_FIXED | RFLAGS_IF | RFLAGS_IOPL3,
        ..Default::default()
    }
}

/// System registers before the first instruction; `reset` is what KVM gave the vCPU.
pub fn entry_sregs(entry: &EntryState, reset: &kvm_sregs, cpuid: &CpuId) -> kvm_sregs {
    let data = segment(0x2b, 3, false);
    let code = segment(0x33, 11, true);
    // A busy 64-bit TSS: VMX asks for one, PVM uses it.
    let task = kvm_segment {
        base: entry.task,
        limit: PAGE_SIZE as u32 - 1,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    let no_table = kvm_segment {
        type_: 2,
        unusable: 1,
        ..Default::default()
    };
    let mut sregs = *reset;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.tr = task;
    sregs.ldt = no_table;
    sregs.gdt = kvm_dtable::default();
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0;
    sregs.cr3 = entry.page_tables;
    sregs.cr4 = CR4 | entry_xcr0(cpuid).map_or(0, |_| CR4_OSXSAVE) | entry_fsgsbase(cpuid);
    sregs.efer = EFER;
    sregs
}

/// A flat segment of ring 3. The selectors are those of Linux's user segments.
fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// The bit of CR4 by which ring 3 has `wrfsbase` and its like, if the CPU has them. PVM lets guests use them
/// in any case.
fn entry_fsgsbase(cpuid: &CpuId) -> u64 {
    const FSGSBASE: u32 = 1;
    let has = leaf(cpuid, 7, 0).is_some_and(|leaf| leaf.ebx & FSGSBASE != 0);
    if has { CR4_FSGSBASE } else { 0 }
}

/// A leaf of CPUID.
pub(super) fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    let found = |entry: &&kvm_cpuid_entry2| (entry.function, entry.index) == (function, index);
    cpuid.as_slice().iter().find(found)
}

/// XCR0 before the first instruction; `None` if guests have no XSAVE.
fn entry_xcr0(cpuid: &CpuId) -> Option<u64> {
    const XSAVE: u32 = 1 << 26;
    leaf(cpuid, 1, 0).filter(|leaf| leaf.ecx & XSAVE != 0)?;
    let area = leaf(cpuid, 0xd, 0)?;
    let supported = u64::from(area.eax) | u64::from(area.edx) << 32;
    let wanted = supported & XCR0_WANTED;
    // The three AVX-512 components come together or not at all, and not without AVX.
    let avx512 = 0b1110_0000;
    let wanted = if wanted & (avx512 | 0b100) == (avx512 | 0b100) {
        wanted
    } else {
        wanted & !avx512
    };
    Some(wanted | XCR0_LEAST)
}

/// Extended control registers before the first instruction, if guests have any.
pub fn entry_xcrs(cpuid: &CpuId) -> Option<kvm_xcrs> {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = entry_xcr0(cpuid)?;
    Some(xcrs)
}

/// The FPU as `fninit` and a reset MXCSR leave it: all exceptions masked.
pub fn entry_fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

/// The CPUID of vCPU `vcpu`: what KVM supports, with the vCPU's own number where a CPU says which one it is,
/// and without what makes KVM write to guest memory.
pub fn vcpu_cpuid(supported: &CpuId, vcpu: u8) -> CpuId {
    let mut cpuid = supported.clone();
    paravirt::mask(&mut cpuid);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(vcpu) << 24,
            0xb | 0x1f => entry.edx = u32::from(vcpu),
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
pub(crate) mod tests {
    use guest::abi::{BOOT_INFO_GPA, PAGE_TABLES_GPA, stack_top};

    use super::*;

    /// Where vCPU `vcpu` of a guest of ours begins.
    pub(crate) fn entry(rip: u64, vcpu: u64) -> EntryState {
        EntryState {
            rip,
            rsp: stack_top(vcpu),
            arguments: [BOOT_INFO_GPA, vcpu],
            page_tables: PAGE_TABLES_GPA,
            task: 0x2000,
        }
    }

    fn cpuid(xsave: bool, components: u32) -> CpuId {
        CpuId::from_entries(&[
            kvm_cpuid_entry2 {
                function: 1,
                ecx: u32::from(xsave) << 26,
                ebx: 0xff12_3456,
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: 0xd,
                eax: components,
                ..Default::default()
            },
        ])
        .unwrap()
    }

    #[test]
    fn ring_3_in_64_bit_mode() {
        let sregs = entry_sregs(&entry(0x20_0000, 1), &kvm_sregs::default(), &cpuid(true, 7));
        assert_eq!((sregs.cs.dpl, sregs.ss.dpl), (3, 3));
        assert_eq!((sregs.cs.selector & 3, sregs.ss.selector & 3), (3, 3));
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        assert_eq!(sregs.cr4 & CR4_OSXSAVE, CR4_OSXSAVE);
        assert_eq!(sregs.cr4 & CR4_FSGSBASE, 0);
        let leaf_7 = kvm_cpuid_entry2 {
            function: 7,
            ebx: 1,
            ..Default::default()
        };
        let cpuid = CpuId::from_entries(&[leaf_7]).unwrap();
        let sregs = entry_sregs(&entry(0x20_0000, 1), &kvm_sregs::default(), &cpuid);
        assert_eq!(sregs.cr4 & (CR4_FSGSBASE | CR4_OSXSAVE), CR4_FSGSBASE);
        let regs = entry_regs(&entry(0x20_0000, 1));
        assert_eq!(regs.rflags, 0x3202);
        assert_eq!((regs.rdi, regs.rsi), (BOOT_INFO_GPA, 1));
        assert_eq!(regs.rsp % 16, 0);
    }

    #[test]
    fn xcr0_follows_the_cpu() {
        let xcr0 = |xsave, components| {
            entry_xcrs(&cpuid(xsave, components)).map(|xcrs| xcrs.xcrs[0].value)
        };
        assert_eq!(xcr0(false, 7), None);
        assert_eq!(xcr0(true, 7), Some(7));
        assert_eq!(xcr0(true, 3), Some(3));
        assert_eq!(xcr0(true, 0x602e7), Some(0xe7));
        assert_eq!(xcr0(true, 0x67), Some(7));
    }

    #[test]
    fn cpuid_has_the_vcpus_number() {
        let cpuid = vcpu_cpuid(&cpuid(true, 7), 5);
        assert_eq!(cpuid.as_slice()[0].ebx, 0x0512_3456);
    }
}
