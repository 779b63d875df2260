//! Builds the tables that a guest begins with.

use super::entry::{ACCESSED, DIRTY, ENTRIES, LARGE, PRESENT, USER, WRITABLE};
use crate::causes::Cause;
use crate::kvm::memory::GuestRam;
use crate::mm::{PAGE_SIZE, REGION_PAGES};

const GIB: u64 = 1 << 30;
const REGION_SIZE: u64 = REGION_PAGES * PAGE_SIZE;

/// Writes page tables for `memory` bytes of guest memory at `gpa`, and returns the gpa behind them.
///
/// A last partial 2 MiB is mapped whole: what the guest touches beyond its memory is MMIO, and so a crash.
/// There is a table of the third level for each 512 GiB, all of them before those of the second. `memory`
/// beyond 128 TiB, the lower half of what a table of the fourth level maps, is not mapped.
pub(in crate::kvm) fn write_page_tables(
    ram: &dyn GuestRam,
    gpa: u64,
    memory: u64,
) -> Result<u64, Cause> {
    let memory = memory.min(ENTRIES / 2 * ENTRIES * GIB);
    let gibs = memory.div_ceil(GIB);
    // One at least, as a walk expects.
    let pdpts = gibs.div_ceil(ENTRIES).max(1);
    let first_pdpt = gpa + PAGE_SIZE;
    let directories = first_pdpt + pdpts * PAGE_SIZE;
    let table = PRESENT | WRITABLE | USER | ACCESSED;
    let nth = |first: u64, n: u64| first + n * PAGE_SIZE;

    write_table(ram, gpa, (0..pdpts).map(|n| nth(first_pdpt, n) | table))?;
    for pdpt in 0..pdpts {
        let gibs = pdpt * ENTRIES..gibs.min((pdpt + 1) * ENTRIES);
        let entries = gibs.map(|gib| nth(directories, gib) | table);
        write_table(ram, nth(first_pdpt, pdpt), entries)?;
    }
    for gib in 0..gibs {
        let first = gib * ENTRIES;
        let last = memory.div_ceil(REGION_SIZE).min(first + ENTRIES);
        let pages = (first..last).map(|page| (page * REGION_SIZE) | table | DIRTY | LARGE);
        write_table(ram, directories + gib * PAGE_SIZE, pages)?;
    }
    Ok(directories + gibs * PAGE_SIZE)
}

/// Writes one table, the rest of it not present.
fn write_table(
    ram: &dyn GuestRam,
    gpa: u64,
    entries: impl Iterator<Item = u64>,
) -> Result<(), Cause> {
    let mut page = [0; PAGE_SIZE as usize];
    for (slot, entry) in page.chunks_exact_mut(8).zip(entries) {
        slot.copy_from_slice(&entry.to_le_bytes());
    }
    ram.write(gpa, &page)
}
