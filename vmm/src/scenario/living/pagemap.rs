//! What `/proc/<pid>/pagemap` says about a page.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;

use super::actor::PAGE_BYTES;
use super::process::Process;
use palimpsest::mm::Pfn;

/// One word of a pagemap (`Documentation/admin-guide/mm/pagemap.rst`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry(u64);

impl Entry {
    const FRAME: u64 = (1 << 55) - 1;
    const MAPPED_ONCE: u64 = 1 << 56;
    const SWAPPED: u64 = 1 << 62;
    const PRESENT: u64 = 1 << 63;

    pub(super) fn of(process: &Process, address: u64) -> io::Result<Self> {
        let mut bytes = [0; 8];
        process
            .open("pagemap", OpenOptions::new().read(true))?
            .read_exact_at(&mut bytes, address / PAGE_BYTES * 8)?;
        Ok(Self(u64::from_ne_bytes(bytes)))
    }

    /// Whether nothing was ever there.
    pub(super) fn is_empty(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) == 0
    }

    /// The frame, if there is one and the kernel shows its number, which takes `CAP_SYS_ADMIN`.
    pub(super) fn frame(self) -> Option<Pfn> {
        let frame = self.0 & Self::FRAME;
        (self.0 & Self::PRESENT != 0 && frame != 0).then_some(Pfn(frame))
    }

    /// Whether there is a frame and one page table maps it. This is not the exclusive bit, which
    /// the kernel shows to nobody.
    pub(super) fn is_mapped_once(self) -> bool {
        self.0 & (Self::PRESENT | Self::MAPPED_ONCE) == Self::PRESENT | Self::MAPPED_ONCE
    }
}
