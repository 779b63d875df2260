//! Walks the guest's page tables.

use std::collections::HashSet;

use kvm_bindings::kvm_sregs;

use super::entry::{ACCESSED, ADDRESS, DIRTY, ENTRIES, LARGE, PRESENT, Page, USER, WRITABLE};
use crate::causes::Cause;
use crate::kvm::memory::GuestRam;
use crate::mm::PAGE_SIZE;

/// CR0: paging is on.
pub(super) const CR0_PG: u64 = 1 << 31;
/// EFER: 64-bit mode is active.
pub(super) const EFER_LMA: u64 = 1 << 10;
/// CR4: five levels of tables instead of four.
pub(super) const CR4_LA57: u64 = 1 << 12;

/// What an access does to the page-table entries on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kvm) enum Touch {
    /// A read or a fetch: sets accessed bits.
    Read,
    /// A write: sets the dirty bit of the last entry too.
    Write,
}

/// A page-table entry on the way to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kvm) struct Step {
    /// The entry's gpa.
    pub(in crate::kvm) slot: u64,
    /// The entry.
    entry: u64,
    /// Whether the access has to set its accessed or dirty bit.
    pub(in crate::kvm) sets_bit: bool,
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
pub(in crate::kvm) struct Walker<'a> {
    ram: &'a dyn GuestRam,
    root: u64,
    mode: Mode,
}

impl<'a> Walker<'a> {
    /// A walker of the tables that the control registers choose.
    pub(in crate::kvm) fn new(ram: &'a dyn GuestRam, sregs: &kvm_sregs) -> Self {
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
    pub(in crate::kvm) fn translates(&self) -> bool {
        self.mode != Mode::Legacy
    }

    /// Translates `gva`, and calls `on_step` with every table entry on the way, from the root down. `None` if
    /// `gva` is not mapped, or a table lies outside of memory; the steps until there were reported.
    pub(in crate::kvm) fn translate(
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
    pub(in crate::kvm) fn allows(&self, gva: u64, touch: Touch) -> Result<bool, Cause> {
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
    pub(in crate::kvm) fn tables(
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
    pub(in crate::kvm) fn read(&self, gva: u64, buf: &mut [u8]) -> Result<usize, Cause> {
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
