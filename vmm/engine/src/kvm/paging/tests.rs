//! Tables that were built, changed, and walked.

use std::any::Any;
use std::sync::{Arc, Mutex};

use guest::abi::PAGE_TABLES_GPA;
use kvm_bindings::kvm_sregs;

use super::entry::{ACCESSED, DIRTY, LARGE, PRESENT, USER, WRITABLE};
use super::walk::{CR0_PG, EFER_LMA};
use super::*;
use crate::causes::Cause;
use crate::kvm::memory::GuestRam;
use crate::mm::PAGE_SIZE;

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
fn tables_of_more_than_one_third_level_table_maps_are_all_there() {
    const GIB: u64 = 1 << 30;
    let ram = Bytes::new(8 << 20);
    let memory = 1025 * GIB + (3 << 20);
    let end = write_page_tables(&ram, PAGE_TABLES_GPA, memory).unwrap();
    // One of the fourth level, three of the third, and one for each GiB that is begun.
    assert_eq!(end, PAGE_TABLES_GPA + (1 + 3 + 1026) * PAGE_SIZE);
    for gva in [0, 512 * GIB - 1, 512 * GIB, 1024 * GIB + 5, memory - 1] {
        assert_eq!(walk(&ram, gva, Touch::Write), (Some(gva), vec![]));
    }
    assert_eq!(walk(&ram, memory + (1 << 20), Touch::Read).0, None);
    assert_eq!(walk(&ram, 1026 * GIB, Touch::Read).0, None);
    assert_eq!(walk(&ram, 1536 * GIB, Touch::Read).0, None);
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
