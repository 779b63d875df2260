//! The guest: a page of code with a few loops. A snapshot's registers decide in which of them a clone begins.
//!
//! Every loop can be interrupted anywhere: what it has done is in its registers, and what its memory must
//! hold follows from those ([`stamp_at`]).

use guest::abi::{IMAGE_GPA, PAGE_SIZE, PORT_CONSOLE, REGION_SIZE};
use palimpsest::kvm::{EntryState, StateError, VcpuState};
use palimpsest::saved::Saved;
use palimpsest::snapshot::Snapshot;
use std::sync::Arc;
use vmm::boot;

/// Where what the loops write begins: behind all that a guest boots with.
pub const DATA_GPA: u64 = 2 * REGION_SIZE;

const ANNOUNCE_AT: usize = 0x00;
const COUNT_AT: usize = 0x20;
const SWEEP_AT: usize = 0x40;
const STAMP_AT: usize = 0x80;
const READ_AT: usize = 0xc0;
const CODE_LEN: usize = 0x100;

/// Says that it runs, and goes to where R9 says.
const ANNOUNCE: &[u8] = &[
    0x66, 0xba, 0x00, 0x05, 0xef, // mov dx, PORT_CONSOLE; out dx, eax
    0x41, 0xff, 0xe1, // jmp r9
];
/// Counts the word at RDI, for ever.
const COUNT: &[u8] = &[
    0x48, 0xff, 0x07, // l: inc qword [rdi]
    0xeb, 0xfb, // jmp l
];
/// Says that it is there, and writes a word a page from RDI up to RSI, over and over.
const SWEEP: &[u8] = &[
    0x66, 0xba, 0x00, 0x05, 0xef, // l: mov dx, PORT_CONSOLE; out dx, eax
    0x48, 0x89, 0xf9, // mov rcx, rdi
    0x48, 0x89, 0x01, // m: mov [rcx], rax
    0x48, 0x81, 0xc1, 0x00, 0x10, 0x00, 0x00, // add rcx, PAGE_SIZE
    0x48, 0x39, 0xf1, // cmp rcx, rsi
    0x72, 0xf1, // jb m
    0x48, 0xff, 0xc0, // inc rax
    0xeb, 0xe4, // jmp l
];
/// Writes its number in a page a time, from RDI up to RSI, over and over. When R8 was counted down to 0 it
/// says so, once.
const STAMP: &[u8] = &[
    0x48, 0x89, 0xf9, // k: mov rcx, rdi
    0x48, 0xff, 0xc0, // l: inc rax
    0x48, 0x89, 0x01, // mov [rcx], rax
    0x49, 0xff, 0xc8, // dec r8
    0x74, 0x0e, // jz done
    0x48, 0x81, 0xc1, 0x00, 0x10, 0x00, 0x00, // m: add rcx, PAGE_SIZE
    0x48, 0x39, 0xf1, // cmp rcx, rsi
    0x72, 0xe9, // jb l
    0xeb, 0xe4, // jmp k
    0x66, 0xba, 0x00, 0x05, 0xef, // done: mov dx, PORT_CONSOLE; out dx, eax
    0xeb, 0xeb, // jmp m
];
/// As [`SWEEP`], but it reads.
const READ: &[u8] = &[
    0x66, 0xba, 0x00, 0x05, 0xef, // l: mov dx, PORT_CONSOLE; out dx, eax
    0x48, 0x89, 0xf9, // mov rcx, rdi
    0x48, 0x8b, 0x01, // m: mov rax, [rcx]
    0x48, 0x81, 0xc1, 0x00, 0x10, 0x00, 0x00, // add rcx, PAGE_SIZE
    0x48, 0x39, 0xf1, // cmp rcx, rsi
    0x72, 0xf1, // jb m
    0xeb, 0xe7, // jmp l
];
/// Of [`STAMP`]: the number is counted, and not written yet.
const STAMP_UNWRITTEN: u64 = IMAGE_GPA + STAMP_AT as u64 + 6;
const _: () = {
    assert!(PORT_CONSOLE == 0x500 && PAGE_SIZE == 0x1000);
    assert!(ANNOUNCE.len() <= COUNT_AT - ANNOUNCE_AT && COUNT.len() <= SWEEP_AT - COUNT_AT);
    assert!(SWEEP.len() <= STAMP_AT - SWEEP_AT && STAMP.len() <= READ_AT - STAMP_AT);
    assert!(READ.len() <= CODE_LEN - READ_AT);
};

/// What lies at [`IMAGE_GPA`].
pub fn code() -> [u8; CODE_LEN] {
    let mut code = [0; CODE_LEN];
    for (at, part) in [
        (ANNOUNCE_AT, ANNOUNCE),
        (COUNT_AT, COUNT),
        (SWEEP_AT, SWEEP),
        (STAMP_AT, STAMP),
        (READ_AT, READ),
    ] {
        code[at..at + part.len()].copy_from_slice(part);
    }
    code
}

/// What a guest does from its boot on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Counts in memory.
    Count,
    /// Waits at the gate, and writes a word in each of so many bytes' pages when it is let on, over and over.
    Sweep(u64),
    /// Writes its number in a page a time, round so many bytes.
    Stamp(u64),
}

impl Program {
    /// Where the vCPU begins.
    pub fn entry(self) -> EntryState {
        let (at, bytes) = match self {
            Self::Count => (COUNT_AT, PAGE_SIZE),
            Self::Sweep(bytes) => (SWEEP_AT, bytes),
            Self::Stamp(bytes) => (STAMP_AT, bytes),
        };
        EntryState {
            arguments: [DATA_GPA, DATA_GPA + bytes],
            ..boot::low_entry(IMAGE_GPA + at as u64, 0)
        }
    }
}

/// What a clone does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begins {
    /// It says that it runs, and then goes on where the snapshot was taken.
    Announcing,
    /// The same, and if it [stamps](Program::Stamp) it says when it has done so many operations.
    Operations(u64),
    /// It becomes a [`Program::Sweep`].
    Sweeping(u64),
    /// The same, but it reads a word in each page.
    Reading(u64),
}

/// `snapshot` with registers by which a clone of it begins so.
///
/// # Errors
/// If its registers make no sense.
pub fn beginning(snapshot: &Snapshot, begins: Begins) -> Result<Snapshot, StateError> {
    let mut vcpus = Vec::new();
    for saved in snapshot.vcpus() {
        let state = VcpuState::of_saved(saved)?;
        vcpus.push(Saved::new(state_beginning(state, begins)));
    }
    let memory = Arc::clone(snapshot.memory());
    Ok(Snapshot::new(memory, vcpus, snapshot.devices().to_vec()))
}

/// The same of one vCPU's state.
pub fn state_beginning(state: VcpuState, begins: Begins) -> VcpuState {
    let (mut regs, sregs) = (*state.regs(), *state.sregs());
    regs.r9 = regs.rip;
    regs.rip = IMAGE_GPA + ANNOUNCE_AT as u64;
    match begins {
        Begins::Announcing => {}
        Begins::Operations(operations) => regs.r8 = operations,
        Begins::Sweeping(bytes) => {
            regs.rip = IMAGE_GPA + SWEEP_AT as u64;
            (regs.rdi, regs.rsi) = (DATA_GPA, DATA_GPA + bytes);
        }
        Begins::Reading(bytes) => {
            regs.rip = IMAGE_GPA + READ_AT as u64;
            (regs.rdi, regs.rsi) = (DATA_GPA, DATA_GPA + bytes);
        }
    }
    state.with_registers(regs, sregs)
}

/// What is in page `page` of those that a guest [stamps](Program::Stamp), of which there are `pages`, when
/// its vCPU is in `state`.
pub fn stamp_at(state: &VcpuState, pages: u64, page: u64) -> u64 {
    let regs = state.regs();
    let written = regs.rax - u64::from(regs.rip == STAMP_UNWRITTEN);
    last_number(written, pages, page)
}

/// What is in page `page` of `pages` when the numbers from 1 up to `written` were written to them, one after
/// the other and round and round: the last of those that go to this page, 0 if none did.
pub fn last_number(written: u64, pages: u64, page: u64) -> u64 {
    match (written + pages - page - 1) / pages {
        0 => 0,
        rounds => (rounds - 1) * pages + page + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(rax: u64, rip: u64) -> VcpuState {
        let mut entry = VcpuState::of(Default::default(), Default::default(), Vec::new());
        let (mut regs, sregs) = (*entry.regs(), *entry.sregs());
        (regs.rax, regs.rip) = (rax, rip);
        entry = entry.with_registers(regs, sregs);
        entry
    }

    #[test]
    fn stamps_follow_from_registers() {
        let pages = 5;
        let mut memory = [0; 5];
        for number in 0..23 {
            if number > 0 {
                let unwritten = state(number, STAMP_UNWRITTEN);
                let is: Vec<_> = (0..pages)
                    .map(|page| stamp_at(&unwritten, pages, page))
                    .collect();
                assert_eq!(is, memory, "{number} is not written yet");
                memory[(number - 1) as usize % 5] = number;
            }
            let written = state(number, IMAGE_GPA);
            let is: Vec<_> = (0..pages)
                .map(|page| stamp_at(&written, pages, page))
                .collect();
            assert_eq!(is, memory, "{number}");
        }
    }
}
