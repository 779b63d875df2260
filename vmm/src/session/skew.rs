//! One vCPU's memory, set back to an earlier instant: an injected fault.
//!
//! All pages that are compared with that vCPU's registers alone agree with them then. Only the marks that
//! vCPUs leave in each other's pages show that the other vCPUs are of another instant. The random numbers it
//! has drawn are not set back: if there are any, `identity` has something to say, too.

use std::mem::offset_of;

use guest::abi::{Layout, VcpuPage};
use guest::formula::{PAGE_WORDS, Schedule, page_word};

use super::config::Config;
use palimpsest::host::Ram;
use palimpsest::kvm::VcpuState;

/// What was in memory before it was set back.
#[derive(Debug, Default)]
pub(super) struct SkewedMemory(Vec<(u64, Vec<u8>)>);

impl SkewedMemory {
    /// Sets the pages that vCPU 0 writes back to what they were when it had the registers `older`, by the
    /// formula. It has done `done` operations since it was booted, or one or two more.
    pub(super) fn new(
        ram: &Ram,
        layout: &Layout,
        config: &Config,
        older: &VcpuState,
        done: u64,
    ) -> Self {
        let (pattern, seed) = (config.pattern, config.seed);
        let schedule = Schedule::new(pattern, layout.slots(pattern, 0), seed, 0);
        let then = older.mm7();
        let mut was = Self::default();
        for op in then..done + 2 {
            let slot = schedule.slot_of(op);
            let writer = schedule.last_writer(slot, then);
            let word = |n| writer.map_or(0, |writer| page_word(seed, 0, writer, n));
            let words = (0..PAGE_WORDS).flat_map(|n| word(n).to_le_bytes());
            was.put(ram, layout.slot_gpa(pattern, 0, slot), words.collect());
        }
        let counter = layout.vcpu_page(0) + offset_of!(VcpuPage, ops) as u64;
        was.put(ram, counter, then.to_le_bytes().to_vec());
        was
    }

    fn put(&mut self, ram: &Ram, gpa: u64, bytes: Vec<u8>) {
        let mut before = vec![0; bytes.len()];
        match ram
            .read(gpa, &mut before)
            .and_then(|()| ram.write(gpa, &bytes))
        {
            Ok(()) => self.0.push((gpa, before)),
            Err(error) => tracing::warn!(%error, "cannot set a vcpu's page back"),
        }
    }

    /// Undoes it.
    pub(super) fn undo(self, ram: &Ram) {
        for (gpa, bytes) in self.0.into_iter().rev() {
            if let Err(error) = ram.write(gpa, &bytes) {
                tracing::warn!(%error, "cannot put a vcpu's page right again");
            }
        }
    }
}
