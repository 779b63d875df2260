//! The bits of a page-table entry.

use crate::mm::PAGE_SIZE;

pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
/// In a page directory or a PDPT: this entry maps a page, not a table.
pub(super) const LARGE: u64 = 1 << 7;
/// Bits of an entry that are an address, before the page's own offset bits are taken away.
pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Entries of a table.
pub(super) const ENTRIES: u64 = 512;

/// Bytes of a table.
pub(in crate::kvm) type Page = [u8; PAGE_SIZE as usize];

/// Whether `entry` would have bits to set if it was one of a page table, of a guest with `memory` bytes.
pub(in crate::kvm) fn has_bits_to_set(entry: u64, memory: u64) -> bool {
    const BITS: u64 = ACCESSED | DIRTY;
    entry & PRESENT != 0 && entry & BITS != BITS && entry & ADDRESS < memory
}
