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
/// `memory` beyond 512 GiB, which is what one table of the third level maps, is not mapped.
pub(in crate::kvm) fn write_page_tables(
    ram: &dyn GuestRam,
    gpa: u64,
    memory: u64,
) -> Result<u64, Cause> {
    let memory = memory.min(ENTRIES * GIB);
    let pdpt = gpa + PAGE_SIZE;
    let directories = gpa + 2 * PAGE_SIZE;
    let gibs = memory.div_ceil(GIB);
    let table = PRESENT | WRITABLE | USER | ACCESSED;

    write_table(ram, gpa, [pdpt | table].into_iter())?;
    write_table(
        ram,
        pdpt,
        (0..gibs).map(|gib| (directories + gib * PAGE_SIZE) | table),
    )?;
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
