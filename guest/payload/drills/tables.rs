//! Page tables: those that the VMM built, and some of the guest's own.

use super::{Vcpu, read, write};
use crate::abi::{PAGE_SIZE, PAGE_TABLES_GPA};

/// Bits of an entry.
pub const PRESENT: u64 = 1;
pub const WRITABLE: u64 = 1 << 1;
pub const USER: u64 = 1 << 2;
pub const ACCESSED: u64 = 1 << 5;
pub const DIRTY: u64 = 1 << 6;
pub const LARGE: u64 = 1 << 7;
/// An entry of a page or table that ring 3 may use for everything.
pub const ANY_USE: u64 = PRESENT | WRITABLE | USER;

/// Entries of a table.
pub const ENTRIES: u64 = 512;
/// The first entry that maps nothing in all of the VMM's tables, for guests of no more than [`MOST_MEMORY`].
const FIRST_UNUSED: u64 = ENTRIES / 2;
const MOST_MEMORY: u64 = FIRST_UNUSED << REGION_SHIFT;
/// Pages in which to look for unused entries: the root, its child, the directory, and the one behind, which
/// is no table.
pub const TABLES: u64 = 4;
/// Entries that map nothing, in each.
pub const UNUSED: u64 = ENTRIES - FIRST_UNUSED;

/// Address of unused entry `number` of page `table` of the VMM's tables. What is not present may be there.
pub fn unused_entry(vcpu: &Vcpu<'_>, table: u64, number: u64) -> u64 {
    assert!(
        vcpu.layout().memory <= MOST_MEMORY,
        "so much memory leaves no entries unused"
    );
    let entry = FIRST_UNUSED + number % UNUSED;
    PAGE_TABLES_GPA + table % TABLES * PAGE_SIZE + 8 * entry
}

/// Bytes that an entry of the root maps, and one of the level below, and so on.
const ROOT_SHIFT: u32 = 39;
const GIB_SHIFT: u32 = 30;
const REGION_SHIFT: u32 = 21;
const PAGE_SHIFT: u32 = 12;
/// Of the tables below the root entry of [`FreshAddresses`], those for small pages come first, those for
/// large ones are behind.
const FIRST_LARGE: u64 = ENTRIES / 2;

/// Pages that [`FreshAddresses`] need for their tables.
pub const FRESH_TABLES: u64 = 4;

/// Addresses of the guest's own, 512 at a time, that have never been in use: no CPU can have a stale
/// translation of them, so none needs to be flushed, which ring 3 could not do.
pub struct FreshAddresses {
    /// The lowest address.
    base: u64,
    /// A table of each level below the root, and a directory of large pages.
    gibs: u64,
    regions: u64,
    pages: u64,
    large: u64,
    /// Batches of addresses that were in use.
    batches: u64,
    large_batches: u64,
}

impl FreshAddresses {
    /// Those of vCPU `vcpu`, with their tables in the [`FRESH_TABLES`] pages from `tables` on.
    pub fn new(vcpu: u64, tables: u64) -> Self {
        let root_entry = 1 + vcpu;
        for word in 0..FRESH_TABLES * PAGE_SIZE / 8 {
            write(tables + 8 * word, 0);
        }
        write(
            PAGE_TABLES_GPA + 8 * root_entry,
            tables | ANY_USE | ACCESSED,
        );
        Self {
            base: root_entry << ROOT_SHIFT,
            gibs: tables,
            regions: tables + PAGE_SIZE,
            pages: tables + 2 * PAGE_SIZE,
            large: tables + 3 * PAGE_SIZE,
            batches: 0,
            large_batches: 0,
        }
    }

    /// Begins the next batch of 4 KiB pages: page `slot` gets `entries(slot)`. The batch before is no more.
    /// `accessed` is [`ACCESSED`] or 0, and goes into the tables on the way. `None` when all addresses were
    /// in use.
    pub fn next_pages(&mut self, accessed: u64, entries: impl Fn(u64) -> u64) -> Option<Batch> {
        let batch = self.batches;
        let (gib, region) = (batch / ENTRIES, batch % ENTRIES);
        if gib == FIRST_LARGE {
            return None;
        }
        self.batches += 1;
        if let Some(before) = batch.checked_sub(1) {
            write(self.regions + 8 * (before % ENTRIES), 0);
            if region == 0 {
                write(self.gibs + 8 * (gib - 1), 0);
            }
        }
        for slot in 0..ENTRIES {
            write(self.pages + 8 * slot, entries(slot));
        }
        write(self.regions + 8 * region, self.pages | ANY_USE | accessed);
        if region == 0 {
            write(self.gibs + 8 * gib, self.regions | ANY_USE | accessed);
        }
        Some(Batch {
            base: self.base | gib << GIB_SHIFT | region << REGION_SHIFT,
            table: self.pages,
            parent: self.regions + 8 * region,
            shift: PAGE_SHIFT,
        })
    }

    /// The same with 2 MiB pages.
    pub fn next_large_pages(
        &mut self,
        accessed: u64,
        entries: impl Fn(u64) -> u64,
    ) -> Option<Batch> {
        let gib = FIRST_LARGE + self.large_batches;
        if gib == ENTRIES {
            return None;
        }
        if self.large_batches > 0 {
            write(self.gibs + 8 * (gib - 1), 0);
        }
        self.large_batches += 1;
        for slot in 0..ENTRIES {
            write(self.large + 8 * slot, entries(slot));
        }
        let parent = self.gibs + 8 * gib;
        write(parent, self.large | ANY_USE | accessed);
        Some(Batch {
            base: self.base | gib << GIB_SHIFT,
            table: self.large,
            parent,
            shift: REGION_SHIFT,
        })
    }
}

/// 512 addresses, each of a page.
#[derive(Clone, Copy)]
pub struct Batch {
    base: u64,
    table: u64,
    parent: u64,
    shift: u32,
}

impl Batch {
    /// Address of page `slot`.
    pub fn gva(&self, slot: u64) -> u64 {
        self.base + (slot << self.shift)
    }

    /// The entry of page `slot`.
    pub fn entry(&self, slot: u64) -> u64 {
        read(self.table + 8 * slot)
    }

    /// Changes it.
    pub fn set_entry(&self, slot: u64, entry: u64) {
        write(self.table + 8 * slot, entry);
    }

    /// The entry of the table itself.
    pub fn parent(&self) -> u64 {
        read(self.parent)
    }
}
