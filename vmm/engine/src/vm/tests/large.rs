//! Machines with much memory and many vCPUs, on hosts that have little of either.

use super::*;
use crate::host::Dumps;
use crate::host::tests::alone_at_guest_addresses;
use crate::kvm::{EntryState, MAX_VCPUS};
use crate::memory::MemoryOptions;
use crate::mm::{Exclusive, PAGE_SIZE};

const TIB: u64 = 1 << 40;

/// Where page tables are that have no room below the program.
const TABLES: u64 = 64 << 20;

/// What a few snapshots of little memory may take.
const SPARE: u64 = 256 << 20;

/// `mov rsi, address; l: lock inc qword ptr [rsi]; jmp l`
fn count_at(address: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0xbe];
    code.extend(address.to_le_bytes());
    code.extend([0xf0, 0x48, 0xff, 0x06, 0xeb, 0xfa]);
    code
}

/// Memory of `bytes` bytes, of which hardly any is used, with `code` in it.
fn memory_of(bytes: u64, placement: Placement, code: &[u8]) -> Memory {
    let frames = (bytes + SPARE) / PAGE_SIZE;
    let frames = Frames::with_limit(frames, SPARE / PAGE_SIZE, Dumps::WithoutGuest).unwrap();
    let options = MemoryOptions {
        placement,
        ..MemoryOptions::default()
    };
    let plain = |window| Box::new(window) as _;
    let memory = Memory::with(&frames, bytes, Exclusive, options, plain).unwrap();
    write_page_tables(memory.ram(), TABLES, bytes).unwrap();
    memory.ram().write(IMAGE_GPA, code).unwrap();
    memory
}

fn entry_of(_vcpu: usize) -> EntryState {
    EntryState {
        page_tables: TABLES,
        ..entry(IMAGE_GPA, 0)
    }
}

fn word_at(vm: &Vm, gpa: u64) -> u64 {
    let mut word = [0; 8];
    vm.ram().read(gpa, &mut word).unwrap();
    u64::from_le_bytes(word)
}

/// Starts a guest that counts in its last page; it is snapshotted, and goes back.
fn counts_at_its_end<'a>(by: impl Into<By<'a>>, memory: Memory, bytes: u64) {
    let last = bytes - PAGE_SIZE;
    let vm = Vm::builder(memory).build(by, 1).unwrap();
    vm.start(entry_of).unwrap();
    wait_until("counting", || word_at(&vm, last) > 100);
    let (snapshot, _) = vm.snapshot().unwrap();
    let mut counted = [0; 8];
    let frames = vm.memory().frames();
    frames.read(snapshot.memory(), last, &mut counted).unwrap();
    let counted = u64::from_le_bytes(counted);
    wait_until("counting on", || word_at(&vm, last) > counted);
    vm.restore(&snapshot).unwrap();
    wait_until("counting again", || word_at(&vm, last) > counted);
    // Page tables of a TiB are 4 MiB.
    let used = vm.memory().frames().pool().usage().committed * PAGE_SIZE;
    assert!(used < 128 << 20, "{used} bytes");
}

#[test]
fn a_tebibyte_of_which_little_is_used_runs() {
    let kvm = need_kvm!();
    let memory = memory_of(TIB, Placement::Anywhere, &count_at(TIB - PAGE_SIZE));
    counts_at_its_end(kvm, memory, TIB);
}

#[test]
fn without_kvm_a_tebibyte_of_which_little_is_used_runs() {
    let _alone = alone_at_guest_addresses();
    let code = count_at(TIB - PAGE_SIZE);
    let memory = memory_of(TIB, Placement::AtGuestAddresses, &code);
    counts_at_its_end(&User::open().unwrap(), memory, TIB);
}

/// All vCPUs add to one word, and a snapshot has what all had added at one instant.
fn all_run<'a>(by: impl Into<By<'a>>, placement: Placement, vcpus: usize) {
    let memory = memory_of(MEMORY * 8, placement, &count_at(DATA));
    let vm = Vm::builder(memory).build(by, vcpus).unwrap();
    vm.start(entry_of).unwrap();
    for _ in 0..3 {
        let (snapshot, _) = vm.snapshot().unwrap();
        assert_eq!(snapshot.vcpus().len(), vcpus);
        let mut counted = [0; 8];
        let frames = vm.memory().frames();
        frames.read(snapshot.memory(), DATA, &mut counted).unwrap();
        wait_until("counting on", || {
            word_at(&vm, DATA) > u64::from_le_bytes(counted)
        });
    }
}

#[test]
fn as_many_vcpus_as_there_can_be_run() {
    all_run(need_kvm!(), Placement::Anywhere, MAX_VCPUS);
}

#[test]
fn without_kvm_as_many_vcpus_as_there_can_be_run() {
    let _alone = alone_at_guest_addresses();
    let user = User::open().unwrap();
    all_run(&user, Placement::AtGuestAddresses, MAX_VCPUS);
}

#[test]
fn one_vcpu_more_is_refused() {
    let kvm = need_kvm!();
    let error = Vm::builder(memory(&[SPIN])).build(kvm, MAX_VCPUS + 1);
    let error = chain(&error.unwrap_err());
    assert!(
        error.contains("257 vcpus: a machine has 1 to 256"),
        "{error}"
    );
}
