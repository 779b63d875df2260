//! The guest's page tables: builds the first ones, and walks whatever ones the guest has.
//!
//! What is built maps guest-virtual addresses one to one on guest-physical ones in 2 MiB pages, for ring 3, with every
//! accessed and dirty bit set. So the CPU never has to write to a page table, which keeps page-table pages out of write
//! faults; the walk nevertheless reports the tables where it would, for guests that bring their own.

use guest::abi::{MAX_MEMORY, PAGE_SIZE, PAGE_TABLES_GPA, REGION_SIZE};

use super::memory::{GuestRam, MemoryError};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// In a page directory or a PDPT: this entry maps a page, not a table.
const LARGE: u64 = 1 << 7;
/// Bits of an entry that are an address, before the page's own offset bits are taken away.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// CR4: five levels of tables instead of four.
const CR4_LA57: u64 = 1 << 12;

const ENTRIES: u64 = 512;
const GIB: u64 = 1 << 30;

/// Writes page tables for `memory` bytes of guest memory at [`PAGE_TABLES_GPA`], and returns the gpa behind them.
///
/// A last partial 2 MiB is mapped whole: what the guest touches beyond its memory is MMIO, and so a crash.
/// `memory` beyond [`MAX_MEMORY`] is cut: the tables' place in guest memory ends there.
pub(super) fn write_page_tables(ram: &dyn GuestRam, memory: u64) -> Result<u64, MemoryError> {
    let memory = memory.min(MAX_MEMORY);
    let pdpt = PAGE_TABLES_GPA + PAGE_SIZE;
    let directories = PAGE_TABLES_GPA + 2 * PAGE_SIZE;
    let gibs = memory.div_ceil(GIB);
    let table = PRESENT | WRITABLE | USER | ACCESSED;

    write_table(ram, PAGE_TABLES_GPA, [pdpt | table].into_iter())?;
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
) -> Result<(), MemoryError> {
    let mut page = [0; PAGE_SIZE as usize];
    for (slot, entry) in page.chunks_exact_mut(8).zip(entries) {
        slot.copy_from_slice(&entry.to_le_bytes());
    }
    ram.write(gpa, &page)
}

/// What an access does to the page-table entries on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    /// A read or a fetch: sets accessed bits.
    Read,
    /// A write: sets the dirty bit of the last entry too.
    Write,
}

/// Walks the guest's page tables.
pub(super) struct Walker<'a> {
    ram: &'a dyn GuestRam,
    root: u64,
    levels: u32,
}

impl<'a> Walker<'a> {
    /// A walker of the tables that `cr3` and `cr4` choose. The guest must be in 64-bit mode.
    pub(super) fn new(ram: &'a dyn GuestRam, cr3: u64, cr4: u64) -> Self {
        Self {
            ram,
            root: cr3 & ADDRESS,
            levels: if cr4 & CR4_LA57 != 0 { 5 } else { 4 },
        }
    }

    /// Translates `gva`, and calls `table` with the gpa of every entry that the access would have to write
    /// to set an accessed or dirty bit. `None` if `gva` is not mapped, or a table lies outside of memory.
    pub(super) fn translate(
        &self,
        gva: u64,
        touch: Touch,
        mut table: impl FnMut(u64),
    ) -> Result<Option<u64>, MemoryError> {
        let mut base = self.root;
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * level;
            let slot = base + (gva >> shift) % ENTRIES * 8;
            if slot + 8 > self.ram.len() {
                return Ok(None);
            }
            let mut entry = [0; 8];
            self.ram.read(slot, &mut entry)?;
            let entry = u64::from_le_bytes(entry);
            if entry & PRESENT == 0 {
                return Ok(None);
            }
            let leaf = level == 0 || (level < 3 && entry & LARGE != 0);
            let unset_dirty = leaf && touch == Touch::Write && entry & DIRTY == 0;
            if entry & ACCESSED == 0 || unset_dirty {
                table(slot);
            }
            if leaf {
                let offset = (1 << shift) - 1;
                return Ok(Some(entry & ADDRESS & !offset | gva & offset));
            }
            base = entry & ADDRESS;
        }
        Ok(None)
    }

    /// Copies up to `buf.len()` bytes at `gva`, stopping at the first that is not mapped. Returns how many there were.
    pub(super) fn read(&self, gva: u64, buf: &mut [u8]) -> Result<usize, MemoryError> {
        let mut done = 0;
        while done < buf.len() {
            let gva = gva.wrapping_add(done as u64);
            let Some(gpa) = self.translate(gva, Touch::Read, |_| {})? else {
                break;
            };
            let in_page = (PAGE_SIZE - gva % PAGE_SIZE) as usize;
            let count = in_page.min(buf.len() - done);
            if gpa + count as u64 > self.ram.len() {
                break;
            }
            self.ram.read(gpa, &mut buf[done..done + count])?;
            done += count;
        }
        Ok(done)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Guest memory that is only bytes.
    pub(crate) struct Bytes(Mutex<Vec<u8>>);

    impl Bytes {
        pub(crate) fn new(len: u64) -> Self {
            Self(Mutex::new(vec![0; len as usize]))
        }
        pub(crate) fn put(&self, gpa: u64, entry: u64) {
            self.write(gpa, &entry.to_le_bytes()).unwrap();
        }
    }

    impl GuestRam for Bytes {
        fn len(&self) -> u64 {
            self.0.lock().unwrap().len() as u64
        }
        fn write_fault(&self, _: u64) -> Result<bool, MemoryError> {
            Ok(true)
        }
        fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
            let memory = self.0.lock().unwrap();
            let from = memory
                .get(gpa as usize..gpa as usize + buf.len())
                .ok_or("outside memory")?;
            buf.copy_from_slice(from);
            Ok(())
        }
        fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), MemoryError> {
            let mut memory = self.0.lock().unwrap();
            memory
                .get_mut(gpa as usize..gpa as usize + buf.len())
                .ok_or("outside memory")?
                .copy_from_slice(buf);
            Ok(())
        }
    }

    fn walk(ram: &dyn GuestRam, gva: u64, touch: Touch) -> (Option<u64>, Vec<u64>) {
        let mut tables = Vec::new();
        let gpa = Walker::new(ram, PAGE_TABLES_GPA, 0)
            .translate(gva, touch, |slot| tables.push(slot))
            .unwrap();
        (gpa, tables)
    }

    #[test]
    fn built_tables_map_one_to_one_and_need_no_bits_set() {
        let ram = Bytes::new(4 << 20);
        let end = write_page_tables(&ram, (1 << 30) + (5 << 20)).unwrap();
        assert_eq!(end, PAGE_TABLES_GPA + 4 * PAGE_SIZE);
        for gva in [0, 0x1234, 0x20_0007, (1 << 30) - 1, (1 << 30) + (5 << 20)] {
            assert_eq!(walk(&ram, gva, Touch::Write), (Some(gva), vec![]));
        }
        // The last partial 2 MiB is mapped whole, and nothing beyond it.
        let end = (1 << 30) + (6 << 20);
        assert_eq!(walk(&ram, end - 1, Touch::Read).0, Some(end - 1));
        assert_eq!(walk(&ram, end, Touch::Read).0, None);
        assert_eq!(walk(&ram, 1 << 39, Touch::Read).0, None);
    }

    #[test]
    fn small_and_huge_pages_and_missing_bits() {
        let ram = Bytes::new(4 << 20);
        let (pml4, pdpt, pd, pt) = (PAGE_TABLES_GPA, 0x2_0000, 0x3_0000, 0x4_0000);
        let bits = PRESENT | WRITABLE | USER;
        ram.put(pml4, pdpt | bits | ACCESSED);
        ram.put(pdpt, pd | bits | ACCESSED);
        ram.put(pdpt + 8, (3 << 30) | bits | ACCESSED | LARGE);
        ram.put(pd, pt | bits);
        ram.put(pt + 5 * 8, 0x7_7000 | bits | ACCESSED);
        assert_eq!(walk(&ram, 0x5123, Touch::Read), (Some(0x7_7123), vec![pd]));
        assert_eq!(
            walk(&ram, 0x5123, Touch::Write),
            (Some(0x7_7123), vec![pd, pt + 5 * 8])
        );
        let huge = (1 << 30) + 0x1234_5678;
        assert_eq!(
            walk(&ram, huge, Touch::Write),
            (Some((3 << 30) + 0x1234_5678), vec![pdpt + 8])
        );
        assert_eq!(walk(&ram, 0x6000, Touch::Read).0, None);
    }

    #[test]
    fn tables_outside_of_memory_are_not_mapped() {
        let ram = Bytes::new(1 << 20);
        ram.put(PAGE_TABLES_GPA, 0xdead_beef_f000 | PRESENT | ACCESSED);
        assert_eq!(walk(&ram, 0, Touch::Read).0, None);
        let mut buf = [0; 4];
        let walker = Walker::new(&ram, u64::MAX, 0);
        assert_eq!(walker.read(0, &mut buf).unwrap(), 0);
    }
}
