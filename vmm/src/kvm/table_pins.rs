//! Pins of the page tables of a vCPU, where it is too late once it meets one that is read-only.
//!
//! A shadow MMU sets accessed and dirty bits in the guest's tables in the CPU's place, as a device would write there. If the page is
//! read-only it gives the guest a page fault instead, which nobody there handles; and on SVM nothing is left of a vCPU after that.
//! So tables are pinned whenever the vCPU has stood still. A page that was one once stays pinned although it is none just now: guests take
//! a table out, fill it, and put it in again, and a snapshot may come in between.
//!
//! Not covered: a page that a guest fills before a snapshot and makes a table for the first time after it.

use std::any::Any;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use guest::abi::PAGE_SIZE;
use kvm_bindings::kvm_sregs;

use super::memory::{GuestRam, MemoryError};
use super::paging::Walker;
use super::tables::MOST;

/// The pins, by the gpa of the table.
#[derive(Default)]
pub(super) struct TablePins(BTreeMap<u64, Box<dyn Any + Send>>);

impl TablePins {
    /// Pins the tables of a vCPU with these registers. If those that were tables before are many, they are let go.
    pub(super) fn hold(
        &mut self,
        sregs: &kvm_sregs,
        ram: &dyn GuestRam,
    ) -> Result<(), MemoryError> {
        let mut gpas = BTreeSet::new();
        Walker::new(ram, sregs).tables(MOST, &mut HashSet::new(), |gpa, _| {
            gpas.insert(gpa);
        })?;
        if self.0.len() > MOST {
            self.0.retain(|gpa, _| gpas.contains(gpa));
        }
        for gpa in gpas {
            if let Entry::Vacant(place) = self.0.entry(gpa) {
                place.insert(ram.pin(gpa, PAGE_SIZE)?);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for TablePins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use guest::abi::PAGE_TABLES_GPA;

    use super::super::paging::tests::Bytes;
    use super::super::paging::write_page_tables;
    use super::super::registers::entry_sregs;
    use super::*;

    #[test]
    fn what_was_a_table_stays_pinned() {
        let ram = Bytes::new(4 << 20);
        write_page_tables(&ram, 4 << 20).unwrap();
        let none = kvm_bindings::CpuId::from_entries(&[]).unwrap();
        let sregs = entry_sregs(&kvm_sregs::default(), &none);
        let mut pins = TablePins::default();
        pins.hold(&sregs, &ram).unwrap();
        let all = Vec::from_iter(pins.0.keys().copied());
        assert_eq!((all.len(), all[0]), (3, PAGE_TABLES_GPA));
        // The top has no entry any more.
        ram.write(PAGE_TABLES_GPA, &[0; PAGE_SIZE as usize])
            .unwrap();
        pins.hold(&sregs, &ram).unwrap();
        assert_eq!(Vec::from_iter(pins.0.keys().copied()), all);
        // And so it is with a vCPU that never had them.
        let mut other = TablePins::default();
        other.hold(&sregs, &ram).unwrap();
        assert_eq!(Vec::from_iter(other.0.into_keys()), [PAGE_TABLES_GPA]);
    }
}
