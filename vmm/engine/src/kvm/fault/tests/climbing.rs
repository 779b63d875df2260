//! How a fault that comes back climbs.

use std::ops::Range;
use std::sync::Mutex;

use super::*;
use crate::causes::Cause;
use crate::kvm::error::VcpuRunError;
use crate::mm::PAGE_SIZE;

/// Memory of which nothing is writable but what was asked for, in order.
struct Protected {
    bytes: Bytes,
    asked: Mutex<Vec<u64>>,
}

impl GuestRam for Protected {
    fn len(&self) -> u64 {
        self.bytes.len()
    }
    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        let mut asked = self.asked.lock().unwrap();
        let first = !asked.contains(&gfn);
        if first {
            asked.push(gfn);
        }
        Ok(first)
    }
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        self.bytes.read(gpa, buf)
    }
    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        self.bytes.write(gpa, buf)
    }
}

/// A vCPU at some code, and what its faults make of the memory.
struct Climber {
    ram: Protected,
    regs: kvm_regs,
    sregs: kvm_sregs,
    gpas: Option<Range<u64>>,
    ladder: Ladder,
}

impl Climber {
    fn at(code: &[u8]) -> Self {
        let (bytes, asked) = (guest(code), Mutex::default());
        let regs = kvm_regs {
            rdi: 0x30_0000,
            rsp: 0x1000,
            ..entry_regs(&entry(CODE, 0))
        };
        Self {
            ram: Protected { bytes, asked },
            regs,
            sregs: sregs(),
            gpas: None,
            ladder: Ladder::new(),
        }
    }

    fn climb(&mut self) -> Result<Option<Rung>, VcpuRunError> {
        let fault = WriteFault {
            regs: &self.regs,
            sregs: &self.sregs,
            gpas: self.gpas.clone(),
            cpuid: &no_cpuid(),
            xsave: &|| None,
        };
        self.ladder.climb(&fault, &self.ram)
    }

    /// Climbs once, and says what was made writable by it.
    fn step(&mut self) -> (Option<Rung>, Vec<u64>) {
        let before = self.ram.asked.lock().unwrap().len();
        let rung = self.climb().unwrap();
        (rung, self.ram.asked.lock().unwrap()[before..].to_vec())
    }

    /// Climbs in vain as often as it takes to try something else.
    fn stay(&mut self) {
        for _ in 0..Ladder::TRIES {
            assert_eq!(self.step(), (None, vec![]));
        }
    }
}

#[test]
fn a_fault_that_comes_back_climbs_to_all_of_memory_and_ends() {
    let mut vcpu = Climber::at(STORE);
    assert_eq!(vcpu.step(), (Some(Rung::Operand), vec![0x300]));
    assert_eq!(vcpu.step(), (Some(Rung::Walk), TABLES.to_vec()));
    // Nothing is left of these: enter again first, since another vCPU may be the first to write.
    vcpu.stay();
    // The stack, and the task's segment.
    assert_eq!(vcpu.step(), (Some(Rung::Event), vec![0, 2]));
    vcpu.stay();
    // The regions of code and operand, which are one, and of the stack: all there is.
    let (rung, gfns) = vcpu.step();
    assert_eq!(rung, Some(Rung::Region));
    assert_eq!(gfns.len(), 0x400 - 6);
    for _ in 0..Ladder::LIMIT {
        assert_eq!(vcpu.step(), (None, vec![]));
    }
    let error = vcpu.climb().unwrap_err();
    let VcpuRunError::Fault { source } = error else {
        panic!("{error:?}");
    };
    assert_eq!(
        source.to_string(),
        "write fault at rip 0x200000 (mov) came back 101 times although all it could be about is writable; \
         tried: kvm's word (0 pages), operands (1 pages), page tables (3 pages), event delivery (5 pages), \
         regions (1024 pages), all of memory (1024 pages)"
    );
}

/// Such as a load of what is hidden, which another vCPU has just been shown: that is no reason to show more.
#[test]
fn who_was_not_first_is_at_a_loss_only_when_the_fault_has_come_back() {
    let mut vcpu = Climber::at(&[0x90]);
    let mut barren = 0;
    while barren <= Ladder::TRIES {
        assert!(!vcpu.ladder.is_at_a_loss());
        barren = match vcpu.step() {
            (None, _) => barren + 1,
            // Tables are made writable on the way.
            (Some(_), _) => 0,
        };
    }
    assert!(vcpu.ladder.is_at_a_loss());
    // As long as something can be done about it it is no failure, however often that is.
    for _ in 0..2 * Ladder::LIMIT {
        vcpu.ladder.was_helped();
        let _ = vcpu.climb().unwrap();
    }
    assert!(vcpu.ladder.is_at_a_loss());
    vcpu.regs.rip += 1;
    assert_eq!(vcpu.step(), (None, vec![]));
    assert!(!vcpu.ladder.is_at_a_loss());
}

#[test]
fn all_of_memory_is_taken_by_regions() {
    // In 32-bit paging there are no other rungs.
    let mut vcpu = Climber::at(STORE);
    vcpu.sregs.efer = 0;
    let rungs = Vec::from_iter((0..12).map(|_| vcpu.step().0));
    let mut expected = vec![None; 12];
    expected[9..11].fill(Some(Rung::All));
    assert_eq!(rungs, expected);
}

#[test]
fn kvms_word_comes_first_and_is_not_the_last() {
    let mut vcpu = Climber::at(STORE);
    vcpu.gpas = Some(0x31_0800..0x31_1800);
    assert_eq!(vcpu.step(), (Some(Rung::Kvm), vec![0x310, 0x311]));
    assert_eq!(vcpu.step(), (Some(Rung::Operand), vec![0x300]));
    // Where there is no memory its word is worth nothing.
    let mut vcpu = Climber::at(STORE);
    vcpu.gpas = Some(MEMORY..MEMORY + PAGE_SIZE);
    assert_eq!(vcpu.step(), (Some(Rung::Operand), vec![0x300]));
}

#[test]
fn what_writes_nothing_is_entered_again_before_anything_else_is_tried() {
    // nop: another vCPU has put it in the place of a store.
    let mut vcpu = Climber::at(&[0x90]);
    assert_eq!(vcpu.step(), (None, vec![]));
    // And now the store is back.
    vcpu.ram.bytes.write(CODE, STORE).unwrap();
    assert_eq!(vcpu.step(), (Some(Rung::Operand), vec![0x300]));
}

#[test]
fn progress_begins_at_the_first_rung_again() {
    let mut vcpu = Climber::at(&[0x90]);
    for _ in 0..4 {
        assert_eq!(vcpu.step(), (None, vec![]));
        // Another element of a string instruction is another fault.
        vcpu.regs.rcx += 1;
    }
    // A kick between two faults: a page is protected again and again, and another vCPU is always the first to
    // write it.
    for _ in 0..4 {
        assert_eq!(vcpu.step(), (None, vec![]));
        vcpu.ladder.step_down();
    }
    // But not for ever.
    let mut ends = false;
    for _ in 0..=Ladder::LIMIT {
        vcpu.ladder.step_down();
        ends |= vcpu.climb().is_err();
    }
    assert!(ends);
}
