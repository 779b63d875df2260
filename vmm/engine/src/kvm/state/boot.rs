//! Registers that a guest of ring 3 has from its boot, and cannot change.

use kvm_bindings::{kvm_msr_entry, kvm_segment};

use super::VcpuState;
use crate::kvm::msr;

impl VcpuState {
    /// Registers that ring 3 cannot set, and that differ from those of `boot`: what they are called, what
    /// they are, what they were.
    pub fn set_by_boot(&self, boot: &Self) -> Vec<(String, String, String)> {
        let (now, then) = (self.set_once(), boot.set_once());
        let mut differ: Vec<_> = now
            .into_iter()
            .zip(then)
            .filter(|(now, then)| now != then)
            .map(|((name, now), (_, then))| (name.to_owned(), now, then))
            .collect();
        let was = |index| boot.msrs.iter().find(|msr| msr.index == index);
        let hex = |msr: &kvm_msr_entry| format!("{:#x}", msr.data);
        differ.extend(
            self.msrs
                .iter()
                .filter(|msr| !msr::is_clock(msr.index))
                .filter(|msr| was(msr.index).is_none_or(|was| was.data != msr.data))
                .map(|msr| {
                    let name = format!("msr {:#x}", msr.index);
                    (
                        name,
                        hex(msr),
                        was(msr.index).map_or("none".to_owned(), hex),
                    )
                }),
        );
        differ
    }

    fn set_once(&self) -> [(&'static str, String); 11] {
        let s = &self.sregs;
        let segment =
            |s: &kvm_segment| format!("{:#x} of level {}, limit {:#x}", s.selector, s.dpl, s.limit);
        [
            ("cr0", format!("{:#x}", s.cr0)),
            ("cr3", format!("{:#x}", s.cr3)),
            ("cr4", format!("{:#x}", s.cr4)),
            ("efer", format!("{:#x}", s.efer)),
            ("cs", segment(&s.cs)),
            ("ss", segment(&s.ss)),
            ("tr", format!("{} at {:#x}", segment(&s.tr), s.tr.base)),
            ("gdt", format!("{:#x} at {:#x}", s.gdt.limit, s.gdt.base)),
            ("idt", format!("{:#x} at {:#x}", s.idt.limit, s.idt.base)),
            ("xcr0", format!("{:#x}", self.xcrs.xcrs[0].value)),
            ("debug registers", format!("{:x?}", self.debug)),
        ]
    }
}
