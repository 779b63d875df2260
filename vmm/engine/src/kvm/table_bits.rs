//! Pages that must not be read-only when KVM meets them, where nothing is left of a vCPU after that.
//!
//! A shadow MMU sets accessed and dirty bits in the guest's tables in the CPU's place, as a device would
//! write there (`update_accessed_dirty_bits` in `arch/x86/kvm/mmu/paging_tmpl.h`). If the page is read-only
//! it gives the guest a page fault instead, which nobody there handles; and on SVM nothing is left of a vCPU
//! after that.
//!
//! Any page may become a table at any time, so it goes by what a page holds: whatever has just become
//! read-only is looked through for words that would be entries with bits to set, and is made writable again
//! if there are any. A page that is read-only and has none gets none without a write, and that makes it
//! writable. A page too many costs a copy at each fork.
//!
//! Not covered: tables of 32-bit paging, whose entries have 4 bytes.

use super::memory::GuestRam;
use super::paging::{self, Page};
use crate::causes::Cause;
use crate::mm::PAGE_SIZE;

/// Makes those of some pages writable in which KVM may have bits to set.
pub(super) fn keep_writable(
    ram: &dyn GuestRam,
    gfns: impl Iterator<Item = u64>,
) -> Result<(), Cause> {
    let mut page: Page = [0; PAGE_SIZE as usize];
    for gfn in gfns {
        ram.read(gfn * PAGE_SIZE, &mut page)?;
        let (words, _) = page.as_chunks::<8>();
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        if words.any(|word| paging::has_bits_to_set(word, ram.len())) {
            ram.write_fault(gfn)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::paging::tests::Bytes;
    use super::*;

    #[test]
    fn what_could_be_a_table_with_bits_to_set_becomes_writable() {
        let ram = Bytes::new(8 * PAGE_SIZE);
        // The last word of a page, the first, one without bits to set, none, and one that is not asked about.
        for (gpa, entry) in [
            (0x1ff8, 0x3007),
            (0x2000, 0x1),
            (0x3008, 0x1067),
            (0x5000, 0x1),
        ] {
            ram.put(gpa, entry);
        }
        keep_writable(&ram, 0..5).unwrap();
        assert_eq!(ram.faults(), [1, 2]);
        keep_writable(&ram, 5..6).unwrap();
        assert_eq!(ram.faults(), [1, 2, 5]);
        assert!(keep_writable(&ram, 8..9).is_err());
    }
}
