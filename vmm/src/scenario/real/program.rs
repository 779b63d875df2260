//! What every guest of a stage has beside its address space: page tables and the puppet, in
//! frames of the stage's own.
//!
//! All guests see the same frames. The puppet writes nothing but its mailbox and what it is told to, so its
//! code is read-only. Its page tables are not: with nested paging a walk of them counts as a write. All bits
//! that a walk sets are set from the start.

use std::sync::Arc;

use guest::abi::{IMAGE_GPA, PAGE_TABLES_GPA};

use crate::boot::write_page_tables;
use palimpsest::causes::Cause;
use palimpsest::host::{PhysMap, Window};
use palimpsest::kvm::{BootError, GuestRam, Image};
use palimpsest::mm::{Gfn, Mmu, MmuError, PAGE_SIZE, Pfn, Protection};

/// Page tables of a guest of less than 1 GiB: PML4, PDPT, page directory.
const TABLES: u64 = 3;

/// Page tables and program, loaded.
#[derive(Debug)]
pub(super) struct Program {
    physmap: Arc<PhysMap>,
    runs: [FrameRun; 2],
    entry: u64,
    /// The page behind all that a guest has.
    end: Gfn,
}

/// Pages of guest memory that are in frames which follow each other.
#[derive(Clone, Copy, Debug)]
struct FrameRun {
    first: Gfn,
    frame: Pfn,
    pages: u64,
    protection: Protection,
}

impl FrameRun {
    fn has(&self, gfn: Gfn) -> bool {
        (self.first.0..self.first.0 + self.pages).contains(&gfn.0)
    }
}

impl Program {
    /// Frames that [`Program::load`] needs.
    pub(super) fn frames(image: &Image) -> u64 {
        TABLES + image_pages(image)
    }

    /// The page behind the program.
    pub(super) fn end_of(image: &Image) -> Gfn {
        Gfn(Gfn::of_gpa(IMAGE_GPA).0 + image_pages(image))
    }

    /// Loads `image` and page tables, for guests whose memory ends before page `end`, into the frames from
    /// `first` on, which have memory, all zeros.
    pub(super) fn load(
        physmap: Arc<PhysMap>,
        first: Pfn,
        image: &Image,
        end: Gfn,
    ) -> Result<Self, BootError> {
        let program = Self {
            physmap,
            runs: [
                FrameRun {
                    first: Gfn::of_gpa(PAGE_TABLES_GPA),
                    frame: first,
                    pages: TABLES,
                    protection: Protection::ReadWrite,
                },
                FrameRun {
                    first: Gfn::of_gpa(IMAGE_GPA),
                    frame: Pfn(first.0 + TABLES),
                    pages: image_pages(image),
                    protection: Protection::ReadOnly,
                },
            ],
            entry: image.entry(),
            end,
        };
        image.load(&program)?;
        write_page_tables(&program, program.len())?;
        Ok(program)
    }

    /// The puppet's first instruction.
    pub(super) fn entry(&self) -> u64 {
        self.entry
    }

    /// Makes `window` show it.
    pub(super) fn show(&self, window: &Window) -> Result<(), MmuError> {
        self.runs
            .iter()
            .try_for_each(|run| window.map(run.first, run.frame, run.pages, run.protection))
    }

    /// Whether `gfn` is of it and can be written.
    pub(super) fn is_writable(&self, gfn: Gfn) -> bool {
        let writable = |run: &FrameRun| run.protection == Protection::ReadWrite && run.has(gfn);
        self.runs.iter().any(writable)
    }

    /// Where the `len` bytes at `gpa`, which lie in one page, are in the physmap.
    fn find(&self, gpa: u64, len: usize) -> Result<(Pfn, u64), Cause> {
        let (gfn, offset) = (Gfn::of_gpa(gpa), gpa % PAGE_SIZE);
        let frame = self.runs.iter().find_map(|run| {
            let page = gfn.0.checked_sub(run.first.0)?;
            (page < run.pages).then_some(Pfn(run.frame.0 + page))
        });
        frame
            .filter(|_| len as u64 <= PAGE_SIZE - offset)
            .map(|frame| (frame, offset))
            .ok_or_else(|| format!("{len} bytes at {gpa:#x} are not of the program").into())
    }
}

impl GuestRam for Program {
    fn len(&self) -> u64 {
        self.end.gpa()
    }

    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        Err(format!("{:?} is of the program, which nobody writes", Gfn(gfn)).into())
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        let (frame, offset) = self.find(gpa, buf.len())?;
        let bytes = self.physmap.slice(frame, offset, buf.len() as u64);
        bytes.copy_to(buf);
        Ok(())
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        let (frame, offset) = self.find(gpa, buf.len())?;
        let bytes = self.physmap.slice(frame, offset, buf.len() as u64);
        bytes.copy_from(buf);
        Ok(())
    }
}

fn image_pages(image: &Image) -> u64 {
    (image.end() - IMAGE_GPA).div_ceil(PAGE_SIZE)
}
