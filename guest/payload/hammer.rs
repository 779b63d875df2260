//! The operations: each checks one page and writes it anew.

use crate::abi::{BootInfo, FailureKind, Layout, PAGE_SIZE, Pattern};
use crate::area::Area;
use crate::formula::{PAGE_WORDS, Schedule, page_key};
use crate::hold::{self, Rewritten, Words};
use crate::vcpu::{Finding, Vcpu};

/// The operations of one vCPU.
pub struct Hammer {
    layout: Layout,
    pattern: Pattern,
    seed: u64,
    vcpu: u64,
    schedule: Schedule,
}

impl Hammer {
    /// The operations of vCPU `vcpu`.
    ///
    /// # Safety
    /// Only on that vCPU, and once: its slots are written through this alone.
    pub unsafe fn new(boot: &BootInfo, pattern: Pattern, vcpu: u64) -> Self {
        let layout = boot.layout;
        let slots = layout.slots(pattern, vcpu);
        Self {
            layout,
            pattern,
            seed: boot.seed,
            vcpu,
            schedule: Schedule::new(pattern, slots, boot.seed, vcpu),
        }
    }

    /// Does the next operation of `vcpu`: the page must hold what its last writer wrote,
    /// and gets all its words anew.
    pub fn operate(&self, vcpu: &mut Vcpu) {
        let op = vcpu.op();
        let slot = self.schedule.slot_of(op);
        let gpa = self.layout.slot_gpa(self.pattern, self.vcpu, slot);
        // SAFETY: a slot of this vCPU, which `new`'s caller promised to us alone.
        let page: Area<PAGE_SIZE> = unsafe { Area::new(gpa) };

        let old = match self.schedule.last_writer(slot, op) {
            Some(writer) => Words::of_key(page_key(self.seed, self.vcpu, writer)),
            None => Words::ZEROS,
        };
        let new = Words::of_key(page_key(self.seed, self.vcpu, op));
        match hold::rewrite(page, old, new, vcpu.held()) {
            Rewritten::Rightly => {}
            Rewritten::LostRegister => vcpu.report(Finding::of_registers(1, 0)),
            Rewritten::Not => {
                if let Some((word, expected, found)) = first_wrong_word(page, old) {
                    vcpu.report(Finding {
                        kind: FailureKind::Page,
                        gpa: page.gpa(8 * word),
                        expected,
                        found,
                        device: 0,
                        seq: 0,
                    });
                }
                for word in 0..PAGE_WORDS {
                    page.write(8 * word, new.word(word));
                }
            }
        }
        vcpu.complete_op();
    }
}

/// The first word of `page` that is not one of `words`, with both.
fn first_wrong_word(page: Area<PAGE_SIZE>, words: Words) -> Option<(u64, u64, u64)> {
    (0..PAGE_WORDS).find_map(|word| {
        let (expected, found) = (words.word(word), page.read::<u64>(8 * word));
        (expected != found).then_some((word, expected, found))
    })
}
