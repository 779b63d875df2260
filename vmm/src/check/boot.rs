//! What is known of a guest since it booted. This decides what a snapshot must hold, not the snapshot itself.

use std::collections::HashMap;
use std::mem::offset_of;
use std::ops::{Range, RangeInclusive};

use guest::abi::{
    DRAWS_BY_FORMULA, DrawLog, FOLLOWS_FORMULA, GENERATION_GPA, GenerationPage, Layout, PAGE_SIZE,
    PAGE_TABLES_GPA, VcpuPage, page_tables_size,
};

use super::hashes::{self, Hashes};
use super::identity::{Found, Observation, due};
use super::view::Page;
use super::violation::{Oracle, Violation};
use palimpsest::host::Ram;
use palimpsest::kvm::VcpuState;

/// What a vCPU has said of itself once its memory followed the formula.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Declared {
    /// [`VcpuPage::held`].
    pub(super) held: u64,
    /// [`VcpuPage::holds`].
    pub(super) holds: [u64; 3],
    /// Whether it draws numbers by the formula.
    pub(super) draws: bool,
}

/// A guest that follows the formula.
#[derive(Debug)]
pub struct Boot {
    pub(super) vcpus: Vec<Declared>,
    /// Registers that only booting sets are as they are here.
    pub(super) registers: Vec<VcpuState>,
    pub(super) pages: Reference,
}

impl Boot {
    /// What the running guest in `ram` says of itself. `None` if it does not follow the formula, or not yet.
    ///
    /// `registers` is asked for those of its vCPUs.
    ///
    /// # Errors
    /// Those of `registers`.
    pub fn latch<E>(
        ram: &Ram,
        layout: &Layout,
        pages: &Reference,
        registers: impl FnOnce() -> Result<Vec<VcpuState>, E>,
    ) -> Result<Option<Self>, E> {
        let word = |vcpu, offset: usize| {
            let mut bytes = [0; 8];
            let gpa = layout.vcpu_page(vcpu) + offset as u64;
            ram.read(gpa, &mut bytes)
                .map_or(0, |()| u64::from_le_bytes(bytes))
        };
        let follows = |vcpu| word(vcpu, offset_of!(VcpuPage, formula)) == FOLLOWS_FORMULA;
        if !(0..layout.vcpus).all(follows) {
            return Ok(None);
        }
        let holds = |vcpu, n: usize| word(vcpu, offset_of!(VcpuPage, holds) + 8 * n);
        let draws = offset_of!(VcpuPage, draws) + offset_of!(DrawLog, draws);
        let vcpus = (0..layout.vcpus).map(|vcpu| Declared {
            held: word(vcpu, offset_of!(VcpuPage, held)),
            holds: [holds(vcpu, 0), holds(vcpu, 1), holds(vcpu, 2)],
            draws: word(vcpu, draws) == DRAWS_BY_FORMULA,
        });
        Ok(Some(Self {
            vcpus: vcpus.collect(),
            registers: registers()?,
            pages: pages.clone(),
        }))
    }

    /// The registers that only booting sets, of each vCPU.
    pub fn registers(&self) -> &[VcpuState] {
        &self.registers
    }

    /// What vCPUs have drawn that have done so many operations.
    pub(super) fn draws(
        &self,
        snapshot: Option<u64>,
        found: Found,
        ops: impl IntoIterator<Item = RangeInclusive<u64>>,
    ) -> Observation {
        let due = |(ops, of): (RangeInclusive<u64>, &Declared)| of.draws.then(|| due(ops));
        Observation {
            snapshot,
            found,
            due: ops.into_iter().zip(&self.vcpus).map(due).collect(),
        }
    }

    /// What vCPUs have drawn that stand still. `word` says what is in their guest's memory, by gpa.
    pub fn draws_at_rest(&self, layout: &Layout, word: impl Fn(u64) -> u64) -> Observation {
        let ops = (0..layout.vcpus).map(|vcpu| {
            let counted = word(layout.vcpu_page(vcpu) + offset_of!(VcpuPage, ops) as u64);
            // The registers may be one ahead.
            counted..=counted.saturating_add(1)
        });
        let ops = Vec::from_iter(ops);
        self.draws(None, Found::read(layout, word), ops)
    }
}

/// Pages that nobody writes once the guest runs: its code and constant data, page tables, descriptors, and
/// what is left free. The generation, and what is counted beside it, is for another oracle.
#[derive(Clone, Debug, Default)]
pub struct Reference {
    hashes: Hashes,
}

impl Reference {
    /// What is in `ram` before the guest runs, whose program may write the addresses `writable`.
    pub fn new(ram: &Ram, layout: &Layout, writable: &[Range<u64>]) -> Self {
        let [stacks, _] = layout.stacks();
        let generation = GENERATION_GPA..GENERATION_GPA + GenerationPage::len_for(layout.vcpus);
        let changing: Vec<_> = [stacks, generation]
            .into_iter()
            .chain(writable.iter().cloned())
            .map(|gpas| gpas.start / PAGE_SIZE..gpas.end.div_ceil(PAGE_SIZE))
            .collect();
        let mut hashes = HashMap::new();
        let mut bytes = vec![0; PAGE_SIZE as usize];
        // The guest's own areas come next. Of these only what follows a formula is known, and checked by it.
        let tables = match layout.page_tables {
            PAGE_TABLES_GPA => 0..0,
            above => above..above + page_tables_size(layout.memory),
        };
        let below = 0..layout.vcpu_base / PAGE_SIZE;
        for gfn in below.chain(tables.start / PAGE_SIZE..tables.end / PAGE_SIZE) {
            if changing.iter().any(|pages| pages.contains(&gfn))
                || ram.read(gfn * PAGE_SIZE, &mut bytes).is_err()
            {
                continue;
            }
            let mut page = Page::zeros();
            for (word, bytes) in page.iter_mut().zip(bytes.as_chunks().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            hashes.insert(gfn, hashes::of(&page));
        }
        Self { hashes }
    }

    /// Its pages by number, and what each hashes to.
    pub fn pages(&self) -> Vec<(u64, u64)> {
        let mut pages: Vec<_> = self
            .hashes
            .iter()
            .map(|(&gfn, &hash)| (gfn, hash))
            .collect();
        pages.sort_unstable();
        pages
    }

    /// One of pages that were kept elsewhere.
    pub fn of_pages(pages: impl IntoIterator<Item = (u64, u64)>) -> Self {
        Self {
            hashes: pages.into_iter().collect(),
        }
    }

    /// Compares the pages of snapshot `number`, which has `found`, with what they were.
    pub(super) fn check(&self, number: u64, found: &Hashes, report: &mut dyn FnMut(Violation)) {
        let zeros = hashes::of_zeros();
        for (&gfn, &expected) in &self.hashes {
            let found = found.get(&gfn).copied().unwrap_or(zeros);
            if found != expected {
                let mut v = Violation::new(
                    Oracle::Cut,
                    "a page that nobody writes is not what it was before the guest ran",
                );
                v.snapshot = Some(number);
                v.gpa = Some(gfn * PAGE_SIZE);
                v.expected = format!("hash {expected:#018x}");
                v.found = format!("hash {found:#018x}");
                report(v);
            }
        }
    }
}
