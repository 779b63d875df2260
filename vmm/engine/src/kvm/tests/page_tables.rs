//! Page tables that are restored.

use ::guest::abi::PAGE_TABLES_GPA;

use super::guest::{Guest, wait_until};
use super::{DATA, need_kvm};
use crate::kvm::*;
use crate::vcpus::Capture;

/// A guest that waits for a word at [`FLAG`]. At 1 it sets the entry of its page directory that maps
/// [`ELSEWHERE`] to the word at [`ENTRY`]; at 1 and at 3 it tells at [`FOUND`] what it reads there, and sets
/// the flag to 2.
const TABLE_CHANGER: &[u8] = &[
    0x8b, 0x04, 0x25, 0x00, 0x10, 0x80, 0x00, // wait: mov eax, [FLAG]
    0x83, 0xf8, 0x01, 0x74, 0x09, // cmp eax, 1; je change
    0x83, 0xf8, 0x03, 0x74, 0x14, // cmp eax, 3; je look
    0xf3, 0x90, 0xeb, 0xeb, // pause; jmp wait
    0x48, 0x8b, 0x1c, 0x25, 0x10, 0x10, 0x80, 0x00, // change: mov rbx, [ENTRY]
    0x48, 0x89, 0x1c, 0x25, 0x20, 0x23, 0x01, 0x00, // mov [SLOT], rbx
    0x48, 0x8b, 0x1c, 0x25, 0x00, 0x00, 0x80, 0x0c, // look: mov rbx, [ELSEWHERE]
    0x48, 0x89, 0x1c, 0x25, 0x08, 0x10, 0x80, 0x00, // mov [FOUND], rbx
    0xc7, 0x04, 0x25, 0x00, 0x10, 0x80, 0x00, 2, 0, 0, 0, // mov dword [FLAG], 2
    0xeb, 0xbe, // jmp wait
];

const FLAG: u64 = 0x80_1000;

const FOUND: u64 = FLAG + 8;

const ENTRY: u64 = FLAG + 16;

/// The entry of the page directory for 2 MiB that have no memory of their own.
const SLOT: u64 = PAGE_TABLES_GPA + 0x2000 + 100 * 8;

/// The guest reads by the tables it has after a restore: neither a vCPU's TLB nor KVM's shadow of other
/// tables is left.
#[test]
fn a_restore_of_page_tables_is_seen() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[TABLE_CHANGER]);
    let put = |gpa, word: u64| guest.ram.write(gpa, &word.to_le_bytes()).unwrap();
    // Present, writable, for ring 3, accessed, dirty, huge.
    let to = |gpa: u64| gpa | 0b1110_0111;
    put(DATA, 0xaaaa);
    put(DATA + 0x20_0000, 0xbbbb);
    put(SLOT, to(DATA));
    put(ENTRY, to(DATA + 0x20_0000));
    guest.start();
    let paused = guest.machine.pause(Capture::Registers).unwrap();
    let states = paused.states().unwrap();
    drop(paused);
    // Nothing was read there before the change, so that no old translation can be left that only `invlpg`
    // would end.
    put(FLAG, 1);
    wait_until("change", || guest.ram.word(FLAG) == 2);
    assert_eq!(guest.ram.word(FOUND), 0xbbbb);

    let paused = guest.machine.pause(Capture::Nothing).unwrap();
    let tables = paused.page_tables().unwrap();
    put(SLOT, to(DATA));
    put(FLAG, 3);
    paused.restore(&states, Clock::Keep, &tables).unwrap();
    drop(paused);
    wait_until("look", || guest.ram.word(FLAG) == 2);
    assert_eq!(guest.ram.word(FOUND), 0xaaaa);
}
