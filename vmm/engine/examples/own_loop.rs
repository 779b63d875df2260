//! A `KVM_RUN` loop of one's own on memory of the engine's: forks, copy-on-write and pins without its
//! machine.
//!
//! The guest counts in memory, and says so:
//! ```text
//!   1: inc qword ptr [rdi]
//!      out 0x10, al
//!      jmp 1b
//! ```
//! Who has a guest of their own knows what it writes. For any guest there is `palimpsest::kvm::Machine`,
//! which finds out.
#![allow(unsafe_code, reason = "what the crate of KVM's calls asks for")]

use std::error::Error;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use palimpsest::kvm::registers::{entry_fpu, entry_regs, entry_sregs};
use palimpsest::kvm::{EntryState, write_page_tables};
use palimpsest::memory::{Frames, Memory};
use palimpsest::mm::{Access, Gfn, PAGE_SIZE};

const MEMORY: u64 = 16 << 20;
// Where things are in guest memory.
const TASK: u64 = 0x2000;
const STACK_END: u64 = 0x9000;
const PAGE_TABLES: u64 = 0x1_0000;
const CODE: u64 = 0x20_0000;
const COUNTER: u64 = 0x40_0000;
const BUFFER: u64 = 0x60_0000;

const PROGRAM: [u8; 7] = [0x48, 0xff, 0x07, 0xe6, 0x10, 0xeb, 0xf9];

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let frames = Frames::new(4 * MEMORY)?;
    let memory = Memory::new(&frames, MEMORY)?;
    let ram = memory.ram();
    let end = write_page_tables(ram, PAGE_TABLES, MEMORY)?;
    ram.write(CODE, &PROGRAM)?;

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: memory.window().len(),
        userspace_addr: memory.window().host_address(),
        ..Default::default()
    };
    // SAFETY: the window is mapped for as long as `memory` lives, which is longer than the VM, and is the
    // guest's alone.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    vcpu.set_cpuid2(&cpuid)?;
    let entry = EntryState {
        rip: CODE,
        rsp: STACK_END,
        arguments: [COUNTER, 0],
        page_tables: PAGE_TABLES,
        task: TASK,
    };
    vcpu.set_sregs(&entry_sregs(&entry, &vcpu.get_sregs()?, &cpuid))?;
    vcpu.set_regs(&entry_regs(&entry))?;
    vcpu.set_fpu(&entry_fpu())?;

    // What the guest writes, and what a CPU with nested paging writes for it: the page tables that it walks.
    let written: Vec<Gfn> = (PAGE_TABLES..end)
        .step_by(PAGE_SIZE as usize)
        .chain([COUNTER])
        .map(Gfn::of_gpa)
        .collect();
    let mut faults = 0;
    let mut run = |vcpu: &mut VcpuFd, rounds: u64| -> Result<(), Box<dyn Error>> {
        let mut left = rounds;
        while left > 0 {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => left -= 1,
                Ok(other) => return Err(format!("the guest came out with {other:?}").into()),
                // A write to a page that is read-only: it is copied if somebody shares it, and writable
                // after.
                Err(error) if error.errno() == libc::EFAULT => {
                    for &gfn in &written {
                        ram.write_fault(gfn)?;
                    }
                    faults += 1;
                }
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    };

    run(&mut vcpu, 1000)?;
    let buffer = ram.pin(BUFFER, PAGE_SIZE, Access::Write)?;
    // The vCPU stands still: this is memory at one instant. What the device holds is copied, all else is
    // shared.
    let frozen = memory.space().fork()?;
    run(&mut vcpu, 1000)?;
    for slice in buffer.slices() {
        slice.copy_from(&[7u64; PAGE_SIZE as usize / 8]);
    }

    let mut now = [0; 8];
    let mut then = [0; 8];
    ram.read(COUNTER, &mut now)?;
    frames.read(&frozen, COUNTER, &mut then)?;
    let [now, then] = [now, then].map(u64::from_le_bytes);
    assert_eq!((now, then), (2000, 1000));
    let mut held = [0; 8];
    frames.read(&frozen, BUFFER, &mut held)?;
    assert_eq!(held, [0; 8]);
    println!("{then} then, {now} now, with {faults} write faults");
    Ok(())
}
