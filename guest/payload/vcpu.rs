//! What a vCPU says of itself: the operation counter, the failures and the gaps.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;
use core::mem::offset_of;

use crate::abi::{
    BootInfo, FOLLOWS_FORMULA, Failure, FailureKind, GAP_BUCKETS, GAP_SHIFT, Gap, Layout,
    PORT_FAILURE, VCPU_STRIDE, VcpuPage, mark_offset,
};
use crate::area::Area;
use crate::formula::mark_target;
use crate::registers::Held;
use crate::{hold, port};

/// A vCPU, seen from the inside.
pub struct Vcpu {
    index: u64,
    layout: Layout,
    page: Area<VCPU_STRIDE>,
    op: u64,
    last_tsc: Option<u64>,
    seed: u64,
    /// What the registers hold now.
    held: Held,
    /// Which of them.
    families: u64,
}

/// A check that did not hold, but for what the vCPU adds to it.
pub struct Finding {
    /// What was checked.
    pub kind: FailureKind,
    /// Gpa of the wrong word.
    pub gpa: u64,
    /// What it should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
    /// Device of a DMA failure, else 0.
    pub device: u64,
    /// Sequence number of a DMA failure's request, else 0.
    pub seq: u64,
}

impl Finding {
    /// A register is not what it should be. It is no place in memory.
    pub fn of_registers(expected: u64, found: u64) -> Self {
        Self {
            kind: FailureKind::Register,
            gpa: 0,
            expected,
            found,
            device: 0,
            seq: 0,
        }
    }
}

impl Vcpu {
    /// vCPU `index`, before its first operation.
    ///
    /// # Safety
    /// Only on vCPU `index`, once: its page is written through this alone, and the marks.
    pub unsafe fn new(boot: &BootInfo, index: u64) -> Self {
        let mut vcpu = Self {
            index,
            layout: boot.layout,
            // SAFETY: the caller's promise.
            page: unsafe { Area::new(boot.layout.vcpu_page(index)) },
            op: 0,
            last_tsc: None,
            seed: boot.seed,
            held: Held::new(boot.seed, index, 0),
            families: hold::families(),
        };
        let at = |word: usize| (offset_of!(VcpuPage, holds) + 8 * word) as u64;
        for (word, gpa) in hold::addresses().into_iter().enumerate() {
            vcpu.page.write(at(word), gpa);
        }
        vcpu.page
            .write(offset_of!(VcpuPage, held) as u64, vcpu.families);
        vcpu.count(0);
        vcpu
    }

    /// Says that from here on this vCPU's memory, and that of the devices it drives,
    /// is what the formulas say.
    pub fn announce_formula(&self) {
        let at = offset_of!(VcpuPage, formula) as u64;
        self.page.write(at, FOLLOWS_FORMULA);
    }

    /// The operation that is being done, or next.
    pub fn op(&self) -> u64 {
        self.op
    }

    /// What the registers hold in this operation.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Ends the operation that was being done: all its stores are before this, all later ones behind.
    pub fn complete_op(&mut self) {
        if let Some((expected, found)) = hold::first_lost(&self.held, self.families) {
            self.report(Finding::of_registers(expected, found));
        }
        self.op += 1;
        self.count(self.op);
        self.page.write(offset_of!(VcpuPage, ops) as u64, self.op);
        if let Some(other) = mark_target(self.layout.vcpus, self.index, self.op) {
            // SAFETY: the page of another vCPU, in which this mark is ours alone.
            let page: Area<VCPU_STRIDE> = unsafe { Area::new(self.layout.vcpu_page(other)) };
            page.write(mark_offset(self.index), self.op);
        }
        // SAFETY: rdtsc is there, and allowed in ring 3.
        let now = unsafe { _rdtsc() };
        if let Some(last) = self.last_tsc {
            // A restored guest may find the clock set back.
            self.note_gap(now, now.saturating_sub(last));
        }
        self.last_tsc = Some(now);
        self.page.write(offset_of!(VcpuPage, last_tsc) as u64, now);
    }

    /// Tells the VMM of a check that did not hold.
    #[cold]
    pub fn report(&mut self, finding: Finding) {
        let count = offset_of!(VcpuPage, failures) as u64;
        self.page.write(count, self.page.read::<u64>(count) + 1);
        let failure = Failure {
            kind: finding.kind as u64,
            vcpu: self.index,
            op: self.op,
            gpa: finding.gpa,
            expected: finding.expected,
            found: finding.found,
            device: finding.device,
            seq: finding.seq,
        };
        port::out_pointer(PORT_FAILURE, &failure);
    }

    /// Puts `op` where the VMM looks for it in the registers, and then what they hold in that operation.
    fn count(&mut self, op: u64) {
        self.held = Held::new(self.seed, self.index, op);
        // SAFETY: no compiled code uses the MMX registers, or the x87 ones they are part of. Memory is
        // clobbered by default, so that the compiler moves no store across; x86 moves none past another, and
        // a vCPU is stopped between two instructions.
        unsafe {
            asm!("movq mm7, {}", in(reg) op, out("mm7") _, options(nostack, preserves_flags));
        }
        hold::set(&self.held, self.families);
    }

    fn note_gap(&self, now: u64, ticks: u64) {
        let tag = now >> GAP_SHIFT;
        let bucket = offset_of!(VcpuPage, gaps) + tag as usize % GAP_BUCKETS * size_of::<Gap>();
        let tag_at = (bucket + offset_of!(Gap, tag)) as u64;
        let ticks_at = (bucket + offset_of!(Gap, ticks)) as u64;
        if self.page.read::<u64>(tag_at) != tag {
            // Emptied first: a reader must not take the new gap for one of the old bucket.
            self.page.write(ticks_at, 0u64);
            self.page.write(tag_at, tag);
            self.page.write(ticks_at, ticks);
        } else if self.page.read::<u64>(ticks_at) < ticks {
            self.page.write(ticks_at, ticks);
        }
    }
}
