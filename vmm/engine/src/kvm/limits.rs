//! What KVM on this host can have of a machine: vCPUs, and memory.
//!
//! A machine that is too large is refused before anything of it is made, with the limit, and what it says.

use std::ops::Range;

use kvm_bindings::CpuId;
use kvm_ioctls::{Cap, Kvm as Device};

use super::error::{KvmError, MAX_VCPUS};
use super::registers::leaf;
use super::tables::Translation;
use crate::host::Limits;
use crate::mm::PAGE_SIZE;

/// Bytes of a memslot at most: KVM counts its pages in 31 bits (`KVM_MEM_MAX_NR_PAGES`), which is short of
/// 8 TiB by a page.
const SLOT: u64 = 4 << 40;

/// Bytes that KVM allocates for each page of a memslot at once where its MMU is a shadow: a head of a list of
/// who maps it, and a counter of who watches it (`memslot_rmap_alloc` in `arch/x86/kvm/x86.c`,
/// `kvm_page_track_create_memslot`).
const SHADOW_PAGE: u64 = 8 + 2;

/// Below this much memory nobody asks how much of the host's the tables may take.
const SMALL: u64 = 64 << 30;

/// Refuses more vCPUs than KVM runs in a machine.
///
/// # Errors
/// [`KvmError::HostVcpus`], with how many it runs.
pub(super) fn check_vcpus(kvm: &Device, vcpus: usize) -> Result<(), KvmError> {
    // Whoever has more needs not be asked.
    let most = match usize::try_from(kvm.check_extension_int(Cap::MaxVcpus)) {
        // "If the KVM_CAP_MAX_VCPUS does not exist, you should use KVM_CAP_NR_VCPUS", and 4 without that.
        Ok(0) | Err(_) => kvm.get_nr_vcpus(),
        Ok(most) => most,
    };
    let most = most.min(MAX_VCPUS);
    if vcpus > most {
        return Err(KvmError::HostVcpus { vcpus, most });
    }
    Ok(())
}

/// Refuses more memory than guests have physical addresses for, or than KVM can keep tables of.
///
/// # Errors
/// [`KvmError::PhysicalAddresses`] or [`KvmError::SlotTables`].
pub(super) fn check_memory(
    cpuid: &CpuId,
    translation: Translation,
    bytes: u64,
) -> Result<(), KvmError> {
    let bits = address_bits(cpuid);
    if bytes > 1 << bits {
        return Err(KvmError::PhysicalAddresses { bytes, bits });
    }
    if translation == Translation::Nested || bytes < SMALL {
        return Ok(());
    }
    let tables = bytes / PAGE_SIZE * SHADOW_PAGE;
    // Whoever cannot be asked leaves it to the kernel to refuse.
    let left = Limits::detect().map_or(u64::MAX, |limits| limits.memory().left);
    if tables > left / 2 {
        return Err(KvmError::SlotTables {
            bytes,
            tables,
            left,
        });
    }
    Ok(())
}

/// Bits of a guest's physical addresses: what the host's CPU has, and KVM shows.
fn address_bits(cpuid: &CpuId) -> u32 {
    /// What a CPU has that does not say.
    const LEAST: u32 = 36;
    let bits = leaf(cpuid, 0x8000_0008, 0).map_or(0, |leaf| leaf.eax & 0xff);
    match bits {
        LEAST..64 => bits,
        _ => LEAST,
    }
}

/// The memslots of so many bytes of memory.
pub(super) fn slots(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    (0..bytes)
        .step_by(SLOT as usize)
        .map(move |first| first..bytes.min(first + SLOT))
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    fn cpuid(bits: u32) -> CpuId {
        CpuId::from_entries(&[kvm_cpuid_entry2 {
            function: 0x8000_0008,
            eax: 0x3000 | bits,
            ..Default::default()
        }])
        .unwrap()
    }

    #[test]
    fn memory_is_bounded_by_physical_addresses() {
        let none = CpuId::from_entries(&[]).unwrap();
        for (cpuid, bits) in [(none, 36), (cpuid(39), 39), (cpuid(46), 46), (cpuid(5), 36)] {
            let check = |bytes| check_memory(&cpuid, Translation::Nested, bytes);
            assert!(check(1 << bits).is_ok());
            let error = check((1 << bits) + PAGE_SIZE).unwrap_err();
            assert!(
                matches!(error, KvmError::PhysicalAddresses { bits: of, .. } if of == bits),
                "{error}"
            );
        }
    }

    #[test]
    fn tables_of_a_shadow_are_bounded_by_the_hosts_memory() {
        let shadow = |bytes| check_memory(&cpuid(52), Translation::Shadow, bytes);
        assert!(shadow(64 << 20).is_ok());
        // 2.5 TiB of tables.
        let error = shadow(1 << 50).unwrap_err();
        assert!(matches!(error, KvmError::SlotTables { tables, .. } if tables == 5 << 39));
        assert!(check_memory(&cpuid(52), Translation::Nested, 1 << 50).is_ok());
    }

    #[test]
    fn memslots_are_all_of_memory_and_none_is_too_long() {
        const MAX_NR_PAGES: u64 = (1 << 31) - 1;
        for bytes in [PAGE_SIZE, 16 << 20, SLOT, SLOT + PAGE_SIZE, 64 << 40] {
            let mut end = 0;
            for slot in slots(bytes) {
                assert_eq!(slot.start, end);
                assert!(
                    slot.end > slot.start && (slot.end - slot.start) / PAGE_SIZE <= MAX_NR_PAGES
                );
                end = slot.end;
            }
            assert_eq!(end, bytes);
        }
        assert_eq!(slots(SLOT).count(), 1);
        assert_eq!(slots(64 << 40).count(), 16);
    }
}
