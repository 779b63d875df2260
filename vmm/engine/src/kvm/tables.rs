//! Whether a restore has changed the guest's page tables.
//!
//! Where the MMU is a shadow (PVM; SVM and VMX without nested paging), KVM keeps its own copy of the guest's
//! page tables, made as the guest writes them. What the host writes it does not notice: after a restore by
//! the host's hand the copy would be of tables that are no more. So the tables are looked at before and
//! after, and where they differ KVM is made to forget its copy. With nested paging there is none; the vCPUs'
//! own TLBs are flushed with their registers.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher};

use kvm_bindings::kvm_sregs;

use super::memory::GuestRam;
use super::paging::Walker;
use super::platform::{Paging, Platform};
use super::state::VcpuState;
use crate::causes::Cause;

/// The most table pages that are looked at. A guest with more is taken for changed.
pub(in crate::kvm) const MOST: usize = 4096;

/// What a guest's page tables were. By default unknown.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PageTables(Option<u64>);

impl PageTables {
    /// The tables of vCPUs with these system registers. Unknown, and so never the same as others, if there is
    /// a vCPU that can change to tables that are not among them.
    pub(super) fn of<'a>(
        vcpus: impl Iterator<Item = (&'a kvm_sregs, Confined)>,
        ram: &dyn GuestRam,
    ) -> Result<Self, Cause> {
        let mut hasher = DefaultHasher::new();
        let mut seen = HashSet::new();
        for (sregs, confined) in vcpus {
            if confined == Confined::No {
                return Ok(Self(None));
            }
            let all = Walker::new(ram, sregs).tables(MOST, &mut seen, |gpa, page| {
                hasher.write_u64(gpa);
                hasher.write(page);
            })?;
            if !all {
                return Ok(Self(None));
            }
        }
        Ok(Self(Some(hasher.finish())))
    }

    /// Whether these are known to be the tables `other`.
    pub(super) fn are(&self, other: &Self) -> bool {
        self.0.is_some() && self == other
    }
}

/// Whether a vCPU is confined to ring 3, where it cannot change to other tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Confined {
    Yes,
    No,
}

/// How guest-virtual addresses are translated on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Translation {
    /// By the guest's own tables, and the host's below them: NPT, EPT.
    Nested,
    /// By KVM's copy of the guest's tables.
    Shadow,
    /// The same on SVM, where nothing is left of a vCPU that could not go on.
    ShadowOnSvm,
}

impl Translation {
    /// That of `platform`. Where the kernel does not say, what costs more and is right in any case.
    pub(super) fn of(platform: &Platform) -> Self {
        match platform.paging {
            Paging::Npt | Paging::EptAd | Paging::Ept | Paging::Host => Self::Nested,
            Paging::Shadow | Paging::Unknown if platform.kvm == "svm" => Self::ShadowOnSvm,
            Paging::Shadow | Paging::Unknown => Self::Shadow,
        }
    }
}

/// Whether vCPUs in these states may begin with memory that is hidden from them, on `platform`. Where KVM reads the
/// guest's tables by itself, and nobody is told that it could not, only such as cannot change to others and have no
/// handler for what KVM gives them then; and none where nothing is left of one that has met that.
pub(crate) fn may_begin_hidden(platform: &Platform, states: &[VcpuState]) -> bool {
    let is_confined = |state: &VcpuState| state.confined() == Confined::Yes;
    match Translation::of(platform) {
        Translation::Nested => true,
        Translation::Shadow => states.iter().all(is_confined),
        Translation::ShadowOnSvm => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::paging::tests::Bytes;
    use super::super::paging::write_page_tables;
    use super::super::registers::entry_sregs;
    use super::super::registers::tests::entry;
    use super::*;
    use guest::abi::PAGE_TABLES_GPA;

    fn tables(ram: &Bytes, confined: Confined) -> PageTables {
        let none = kvm_bindings::CpuId::from_entries(&[]).unwrap();
        let sregs = entry_sregs(&entry(0x20_0000, 0), &kvm_sregs::default(), &none);
        PageTables::of([(&sregs, confined)].into_iter(), ram).unwrap()
    }

    #[test]
    fn a_changed_entry_of_any_level_is_seen() {
        let ram = Bytes::new(4 << 20);
        write_page_tables(&ram, PAGE_TABLES_GPA, 4 << 20).unwrap();
        let before = tables(&ram, Confined::Yes);
        assert!(before.are(&tables(&ram, Confined::Yes)));
        for gpa in [0, 0x1000, 0x2008, 0x2ff8].map(|slot| PAGE_TABLES_GPA + slot) {
            let mut entry = [0; 8];
            ram.read(gpa, &mut entry).unwrap();
            ram.put(gpa, u64::from_le_bytes(entry) ^ 1 << 9);
            assert!(!before.are(&tables(&ram, Confined::Yes)), "{gpa:#x}");
            ram.put(gpa, u64::from_le_bytes(entry));
        }
        assert!(before.are(&tables(&ram, Confined::Yes)));
        // Memory that is no table does not matter.
        ram.put(0x20_0000, 7);
        assert!(before.are(&tables(&ram, Confined::Yes)));
    }

    #[test]
    fn who_can_change_tables_has_unknown_ones() {
        let ram = Bytes::new(4 << 20);
        write_page_tables(&ram, PAGE_TABLES_GPA, 4 << 20).unwrap();
        let unknown = tables(&ram, Confined::No);
        assert!(!unknown.are(&tables(&ram, Confined::No)));
        assert!(!unknown.are(&tables(&ram, Confined::Yes)));
    }

    #[test]
    fn tables_that_are_their_own_tables_end() {
        let ram = Bytes::new(4 << 20);
        for slot in 0..512 {
            ram.put(PAGE_TABLES_GPA + slot * 8, PAGE_TABLES_GPA | 0b111);
        }
        assert!(tables(&ram, Confined::Yes).are(&tables(&ram, Confined::Yes)));
    }
}
