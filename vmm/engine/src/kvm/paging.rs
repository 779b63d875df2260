//! The guest's page tables: builds the first ones, and walks whatever ones the guest has.
//!
//! What is built maps guest-virtual addresses one to one on guest-physical ones in 2 MiB pages, for ring 3,
//! with every accessed and dirty bit set. So the CPU never has to write to a page table, which keeps
//! page-table pages out of write faults where it honours the bits; with nested paging every walk counts as a
//! write, whatever they say. A walk therefore reports every table entry on its way, and which of them it
//! would have to change.

use std::collections::HashSet;

use kvm_bindings::kvm_sregs;

use super::memory::GuestRam;
use crate::causes::Cause;
use crate::mm::{PAGE_SIZE, REGION_PAGES};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// In a page directory or a PDPT: this entry maps a page, not a table.
const LARGE: u64 = 1 << 7;
/// Bits of an entry that are an address, before the page's own offset bits are taken away.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// CR0: paging is on.
const CR0_PG: u64 = 1 << 31;
/// EFER: 64-bit mode is active.
const EFER_LMA: u64 = 1 << 10;
/// CR4: five levels of tables instead of four.
const CR4_LA57: u64 = 1 << 12;

const ENTRIES: u64 = 512;
const GIB: u64 = 1 << 30;
const REGION_SIZE: u64 = REGION_PAGES * PAGE_SIZE;

/// Bytes of a table.
pub(super) type Page = [u8; PAGE_SIZE as usize];

/// Writes page tables for `memory` bytes of guest memory at `gpa`, and returns the gpa behind them.
///
/// A last partial 2 MiB is mapped whole: what the guest touches beyond its memory is MMIO, and so a crash.
/// `memory` beyond 512 GiB, which is what one table of the third level maps, is not mapped.
pub(super) fn write_page_tables(ram: &dyn GuestRam, gpa: u64, memory: u64) -> Result<u64, Cause> {
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

/// Whether `entry` would have bits to set if it was one of a page table, of a guest with `memory` bytes.
pub(super) fn has_bits_to_set(entry: u64, memory: u64) -> bool {
    const BITS: u64 = ACCESSED | DIRTY;
    entry & PRESENT != 0 && entry & BITS != BITS && entry & ADDRESS < memory
}

/// What an access does to the page-table entries on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    /// A read or a fetch: sets accessed bits.
    Read,
    /// A write: sets the dirty bit of the last entry too.
    Write,
}

/// A page-table entry on the way to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// The entry's gpa.
    pub(super) slot: u64,
    /// The entry.
    entry: u64,
    /// Whether the access has to set its accessed or dirty bit.
    pub(super) sets_bit: bool,
}

/// How guest-virtual addresses become guest-physical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Paging is off: they are the same.
    Flat,
    /// 64-bit mode, with so many levels of tables.
    Long { levels: u32 },
    /// 32-bit paging, which is not walked here.
    Legacy,
}

/// Walks the guest's page tables.
pub(super) struct Walker<'a> {
    ram: &'a dyn GuestRam,
    root: u64,
    mode: Mode,
}

impl<'a> Walker<'a> {
    /// A walker of the tables that the control registers choose.
    pub(super) fn new(ram: &'a dyn GuestRam, sregs: &kvm_sregs) -> Self {
        let mode = if sregs.cr0 & CR0_PG == 0 {
            Mode::Flat
        } else if sregs.efer & EFER_LMA == 0 {
            Mode::Legacy
        } else if sregs.cr4 & CR4_LA57 == 0 {
            Mode::Long { levels: 4 }
        } else {
            Mode::Long { levels: 5 }
        };
        Self {
            ram,
            root: sregs.cr3 & ADDRESS,
            mode,
        }
    }

    /// Whether addresses can be translated at all.
    pub(super) fn translates(&self) -> bool {
        self.mode != Mode::Legacy
    }

    /// Translates `gva`, and calls `on_step` with every table entry on the way, from the root down. `None` if
    /// `gva` is not mapped, or a table lies outside of memory; the steps until there were reported.
    pub(super) fn translate(
        &self,
        gva: u64,
        touch: Touch,
        mut on_step: impl FnMut(Step),
    ) -> Result<Option<u64>, Cause> {
        let levels = match self.mode {
            Mode::Flat => return Ok(Some(gva)),
            Mode::Legacy => return Ok(None),
            Mode::Long { levels } => levels,
        };
        let mut base = self.root;
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let slot = base + (gva >> shift) % ENTRIES * 8;
            if slot + 8 > self.ram.len() {
                return Ok(None);
            }
            let mut entry = [0; 8];
            self.ram.read(slot, &mut entry)?;
            let entry = u64::from_le_bytes(entry);
            let present = entry & PRESENT != 0;
            let leaf = level == 0 || (level < 3 && entry & LARGE != 0);
            let unset_dirty = leaf && touch == Touch::Write && entry & DIRTY == 0;
            on_step(Step {
                slot,
                entry,
                sets_bit: present && (entry & ACCESSED == 0 || unset_dirty),
            });
            if !present {
                return Ok(None);
            }
            if leaf {
                let offset = (1 << shift) - 1;
                return Ok(Some(entry & ADDRESS & !offset | gva & offset));
            }
            base = entry & ADDRESS;
        }
        Ok(None)
    }

    /// Whether the tables let ring 3 access `gva`.
    pub(super) fn allows(&self, gva: u64, touch: Touch) -> Result<bool, Cause> {
        let wanted = match touch {
            Touch::Read => USER,
            Touch::Write => USER | WRITABLE,
        };
        let mut rights = wanted;
        let gpa = self.translate(gva, touch, |step| rights &= step.entry)?;
        Ok(gpa.is_some() && rights == wanted)
    }

    /// Calls `on_table` with every page of the tables, by its gpa, once for each level that it is used at.
    /// `false` if there are more than `most`, or they are not walked here.
    pub(super) fn tables(
        &self,
        most: usize,
        seen: &mut HashSet<(u32, u64)>,
        mut on_table: impl FnMut(u64, &Page),
    ) -> Result<bool, Cause> {
        let levels = match self.mode {
            Mode::Flat => return Ok(true),
            Mode::Legacy => return Ok(false),
            Mode::Long { levels } => levels,
        };
        let mut next = vec![(levels - 1, self.root)];
        let mut page: Page = [0; PAGE_SIZE as usize];
        while let Some((level, gpa)) = next.pop() {
            if gpa + PAGE_SIZE > self.ram.len() || !seen.insert((level, gpa)) {
                continue;
            }
            if seen.len() > most {
                return Ok(false);
            }
            self.ram.read(gpa, &mut page)?;
            on_table(gpa, &page);
            let (entries, _) = page.as_chunks::<8>();
            for entry in entries.iter().map(|entry| u64::from_le_bytes(*entry)) {
                let leaf = level == 0 || (level < 3 && entry & LARGE != 0);
                if entry & PRESENT != 0 && !leaf {
                    next.push((level - 1, entry & ADDRESS));
                }
            }
        }
        Ok(true)
    }

    /// Copies up to `buf.len()` bytes at `gva`, stopping at the first that is not mapped. Returns how many
    /// there were.
    pub(super) fn read(&self, gva: u64, buf: &mut [u8]) -> Result<usize, Cause> {
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
    use guest::abi::PAGE_TABLES_GPA;
    use std::any::Any;
    use std::sync::{Arc, Mutex};

    /// Guest memory that is only bytes, all of it writable, a list of what is pinned, and one of what was
    /// asked to be made writable.
    pub(crate) struct Bytes(Mutex<Vec<u8>>, Arc<Mutex<Vec<(u64, u64)>>>, Mutex<Vec<u64>>);

    /// A pin of [`Bytes`].
    struct BytesPin(u64, Arc<Mutex<Vec<(u64, u64)>>>);

    impl Drop for BytesPin {
        fn drop(&mut self) {
            let mut pinned = self.1.lock().unwrap();
            let at = pinned.iter().position(|(gpa, _)| *gpa == self.0);
            pinned.remove(at.unwrap());
        }
    }

    impl Bytes {
        pub(crate) fn new(len: u64) -> Self {
            Self(
                Mutex::new(vec![0; len as usize]),
                Arc::default(),
                Mutex::default(),
            )
        }
        /// What was asked to be made writable, by page, in order.
        pub(crate) fn faults(&self) -> Vec<u64> {
            self.2.lock().unwrap().clone()
        }
        /// What is pinned, by address.
        pub(crate) fn pinned(&self) -> Vec<(u64, u64)> {
            let mut pinned = self.1.lock().unwrap().clone();
            pinned.sort_unstable();
            pinned
        }
        pub(crate) fn put(&self, gpa: u64, entry: u64) {
            self.write(gpa, &entry.to_le_bytes()).unwrap();
        }
    }

    impl GuestRam for Bytes {
        fn len(&self) -> u64 {
            self.0.lock().unwrap().len() as u64
        }
        fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
            self.2.lock().unwrap().push(gfn);
            Ok(true)
        }
        fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
            let memory = self.0.lock().unwrap();
            let from = memory
                .get(gpa as usize..gpa as usize + buf.len())
                .ok_or("outside memory")?;
            buf.copy_from_slice(from);
            Ok(())
        }
        fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
            let mut memory = self.0.lock().unwrap();
            memory
                .get_mut(gpa as usize..gpa as usize + buf.len())
                .ok_or("outside memory")?
                .copy_from_slice(buf);
            Ok(())
        }
        fn pin(&self, gpa: u64, len: u64) -> Result<Box<dyn Any + Send>, Cause> {
            if gpa + len > self.len() {
                return Err("outside memory".into());
            }
            self.1.lock().unwrap().push((gpa, len));
            Ok(Box::new(BytesPin(gpa, Arc::clone(&self.1))))
        }
    }

    /// System registers of 64-bit mode, with the tables at `cr3`.
    fn long_mode(cr3: u64) -> kvm_sregs {
        kvm_sregs {
            cr0: CR0_PG,
            cr3,
            efer: EFER_LMA,
            ..Default::default()
        }
    }

    /// Where `gva` is, and the entries whose bits an access sets.
    fn walk(ram: &dyn GuestRam, gva: u64, touch: Touch) -> (Option<u64>, Vec<u64>) {
        let mut tables = Vec::new();
        let gpa = Walker::new(ram, &long_mode(PAGE_TABLES_GPA))
            .translate(gva, touch, |step| {
                if step.sets_bit {
                    tables.push(step.slot);
                }
            })
            .unwrap();
        (gpa, tables)
    }

    #[test]
    fn built_tables_map_one_to_one_and_need_no_bits_set() {
        let ram = Bytes::new(4 << 20);
        let end = write_page_tables(&ram, PAGE_TABLES_GPA, (1 << 30) + (5 << 20)).unwrap();
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
    fn which_entries_have_bits_to_set() {
        let memory = 4 << 20;
        let all = PRESENT | WRITABLE | USER | ACCESSED | DIRTY;
        let no_execute = 1 << 63;
        for (entry, has) in [
            (0x1000 | all, false),
            (0x1000 | all & !ACCESSED, true),
            (0x1000 | all & !DIRTY, true),
            // A supervisor may write there all the same.
            (0x1000 | PRESENT | USER | ACCESSED, true),
            (0x1000 | no_execute | PRESENT, true),
            (0x20_0000 | PRESENT | LARGE, true),
            (0x1000 | all & !PRESENT & !ACCESSED, false),
            (0x3f_f000 | PRESENT, true),
            (0x40_0000 | PRESENT, false),
            (PRESENT, true),
            (0, false),
        ] {
            assert_eq!(has_bits_to_set(entry, memory), has, "{entry:#x}");
        }
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
        let walker = Walker::new(&ram, &long_mode(u64::MAX));
        assert_eq!(walker.read(0, &mut buf).unwrap(), 0);
    }

    #[test]
    fn every_entry_on_the_way_is_told() {
        let ram = Bytes::new(4 << 20);
        write_page_tables(&ram, PAGE_TABLES_GPA, 4 << 20).unwrap();
        let steps = |gva| {
            let mut steps = Vec::new();
            let walker = Walker::new(&ram, &long_mode(PAGE_TABLES_GPA));
            let gpa = walker.translate(gva, Touch::Read, |step| steps.push(step.slot));
            (gpa.unwrap(), steps)
        };
        let (pml4, pdpt, pd) = (PAGE_TABLES_GPA, 0x1_1000, 0x1_2000);
        assert_eq!(
            steps(0x20_0007),
            (Some(0x20_0007), vec![pml4, pdpt, pd + 8])
        );
        // Up to the entry that is not there.
        assert_eq!(steps(0x40_0000), (None, vec![pml4, pdpt, pd + 16]));
        assert_eq!(steps(1 << 40), (None, vec![pml4 + 16]));
    }

    #[test]
    fn every_level_must_allow_an_access() {
        let ram = Bytes::new(4 << 20);
        write_page_tables(&ram, PAGE_TABLES_GPA, 4 << 20).unwrap();
        let allows = |gva, touch| {
            let walker = Walker::new(&ram, &long_mode(PAGE_TABLES_GPA));
            walker.allows(gva, touch).unwrap()
        };
        assert!(allows(0x20_0000, Touch::Read) && allows(0x20_0000, Touch::Write));
        assert!(!allows(0x40_0000, Touch::Read));
        for slot in [0, 0x1000, 0x2008].map(|slot| PAGE_TABLES_GPA + slot) {
            let mut entry = [0; 8];
            ram.read(slot, &mut entry).unwrap();
            let entry = u64::from_le_bytes(entry);
            ram.put(slot, entry & !WRITABLE);
            assert!(allows(0x20_0000, Touch::Read) && !allows(0x20_0000, Touch::Write));
            ram.put(slot, entry & !USER);
            assert!(!allows(0x20_0000, Touch::Read));
            ram.put(slot, entry);
        }
    }

    #[test]
    fn without_paging_addresses_are_physical_and_32_bit_paging_is_refused() {
        let ram = Bytes::new(1 << 20);
        let flat = kvm_sregs::default();
        let walker = Walker::new(&ram, &flat);
        assert!(walker.translates());
        assert_eq!(
            walker.translate(0x1234, Touch::Write, |_| {}).unwrap(),
            Some(0x1234)
        );
        let legacy = kvm_sregs {
            efer: 0,
            ..long_mode(0)
        };
        let walker = Walker::new(&ram, &legacy);
        assert!(!walker.translates());
        assert_eq!(walker.translate(0, Touch::Read, |_| {}).unwrap(), None);
    }
}
