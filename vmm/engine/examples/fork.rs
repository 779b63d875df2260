//! Boots a guest, takes a snapshot while it runs and while a device holds its memory, and rewinds it; then forks
//! it: a clone runs on beside it.
//!
//! The guest counts in memory, for ever:
//! ```text
//!   1: inc qword ptr [rdi]
//!      jmp 1b
//! ```

use std::error::Error;
use std::thread;

use palimpsest::kvm::{EntryState, Kvm, write_page_tables};
use palimpsest::memory::{Frames, Memory, MemoryOptions};
use palimpsest::mm::{Access, PAGE_SIZE};
use palimpsest::vm::Vm;

const MEMORY: u64 = 16 << 20;
// Where things are in guest memory.
const TASK: u64 = 0x2000;
const STACK_END: u64 = 0x9000;
const PAGE_TABLES: u64 = 0x1_0000;
const CODE: u64 = 0x20_0000;
const COUNTER: u64 = 0x40_0000;
const BUFFER: u64 = 0x60_0000;

const PROGRAM: [u8; 5] = [0x48, 0xff, 0x07, 0xeb, 0xfb];

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::open()?;
    // Room for the guest, and for what snapshots need copies of.
    let frames = Frames::new(4 * MEMORY)?;
    let memory = Memory::new(&frames, MEMORY)?;
    let ram = memory.ram().clone();
    write_page_tables(&ram, PAGE_TABLES, MEMORY)?;
    ram.write(CODE, &PROGRAM)?;

    let vm = Vm::builder(memory)
        .on_stop(|vcpu, outcome| eprintln!("vcpu {vcpu} has ended: {outcome}"))
        .build(&kvm, 1)?;
    vm.start(|_vcpu| EntryState {
        rip: CODE,
        rsp: STACK_END,
        arguments: [COUNTER, 0],
        page_tables: PAGE_TABLES,
        task: TASK,
    })?;
    let count = || -> Result<u64, Box<dyn Error>> {
        let mut word = [0; 8];
        ram.read(COUNTER, &mut word)?;
        Ok(u64::from_le_bytes(word))
    };
    let wait_for = |least| -> Result<(), Box<dyn Error>> {
        while count()? < least {
            thread::yield_now();
        }
        Ok(())
    };
    wait_for(1000)?;

    // A device holds a buffer of the guest's: it writes there, whatever happens to the rest of memory.
    let buffer = ram.pin(BUFFER, PAGE_SIZE, Access::Write)?;

    let (snapshot, timing) = vm.snapshot()?;
    let at = |gpa| -> Result<u64, Box<dyn Error>> {
        let mut word = [0; 8];
        frames.read(snapshot.memory(), gpa, &mut word)?;
        Ok(u64::from_le_bytes(word))
    };
    let then = at(COUNTER)?;
    println!("the guest stood still for {:?}, at {then}", timing.pause());

    // Nothing that happens from here on shows in the snapshot, and the guest sees what its device writes.
    wait_for(then + 1000)?;
    for slice in buffer.slices() {
        slice.copy_from(&[7u64; PAGE_SIZE as usize / 8]);
    }
    let mut seen = [0; 8];
    ram.read(BUFFER, &mut seen)?;
    assert_eq!(u64::from_le_bytes(seen), 7);
    assert_eq!((at(COUNTER)?, at(BUFFER)?), (then, 0));

    // Back, and on from there. The buffer is held still: it is what the guest had in it.
    let before = count()?;
    vm.restore(&snapshot)?;
    ram.read(BUFFER, &mut seen)?;
    assert_eq!(u64::from_le_bytes(seen), 0);
    wait_for(then + 1)?;
    println!(
        "rewound from {before} to {then}, and it is at {} now",
        count()?
    );

    // A clone, from where the guest is now. Neither sees what the other writes.
    let forked = vm.fork(&kvm, MemoryOptions::default(), |clone| clone, |_| Ok(()))?;
    let begun = {
        let mut word = [0; 8];
        frames.read(forked.snapshot.memory(), COUNTER, &mut word)?;
        u64::from_le_bytes(word)
    };
    let count_of_clone = || -> Result<u64, Box<dyn Error>> {
        let mut word = [0; 8];
        forked.vm.ram().read(COUNTER, &mut word)?;
        Ok(u64::from_le_bytes(word))
    };
    while count_of_clone()? < begun + 1000 {
        thread::yield_now();
    }
    println!(
        "forked at {begun}: the clone is at {} now, its parent at {}",
        count_of_clone()?,
        count()?
    );
    Ok(())
}
