//! A VM with nothing of ours: KVM's, a memslot on memory that is there, a vCPU with its registers, on a
//! thread. The crate kvm-ioctls alone makes it. It is what a clone is measured against, and what other ways
//! to copy a running VM are given to run their copies in.
#![expect(
    unsafe_code,
    reason = "the memslot: the kernel is given a range of host memory"
)]

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::abi::IMAGE_GPA;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Error as Errno, VcpuExit, VcpuFd, VmFd};
use palimpsest::kvm::{GuestRam, Memslot, VcpuState};
use vmm::boot;
use vmm::cli::chain;

use super::MeasureError;
use super::gate::Gate;
use super::program::code;
use crate::technique::{Anonymous, PageSize};

/// KVM, and the CPUID that vCPUs get.
pub struct Bare {
    kvm: kvm_ioctls::Kvm,
    cpuid: CpuId,
}

/// The registers that a vCPU begins with.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl From<&VcpuState> for Registers {
    fn from(state: &VcpuState) -> Self {
        Self {
            regs: *state.regs(),
            sregs: *state.sregs(),
        }
    }
}

/// What KVM refused.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    what: &'static str,
    source: Errno,
}

impl From<Refused> for MeasureError {
    fn from(Refused { what, source }: Refused) -> Self {
        Self::Bare { what, source }
    }
}

fn refused(what: &'static str) -> impl FnOnce(Errno) -> Refused {
    move |source| Refused { what, source }
}

/// A VM of KVM's with a vCPU that has not run.
pub struct BareVm {
    vcpu: VcpuFd,
    _vm: VmFd,
}

/// How a run of a vCPU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By an `out`.
    Out,
    /// By something else.
    Other,
}

impl Bare {
    /// Opens KVM.
    ///
    /// # Errors
    /// KVM's.
    pub fn open() -> Result<Self, MeasureError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(refused("be opened"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.map_err(refused("tell its cpuid"))?;
        Ok(Self { kvm, cpuid })
    }

    /// A VM whose memory is the `len` bytes at `address`, with a vCPU. Allocates nothing, and takes no lock:
    /// a child of a process with many threads may call it.
    ///
    /// # Safety
    /// The memory is there for as long as the VM is, and nobody has references into it.
    ///
    /// # Errors
    /// KVM's.
    pub unsafe fn create(&self, address: u64, len: u64) -> Result<BareVm, Refused> {
        const EINTR: i32 = 4;
        let vm = loop {
            match self.kvm.create_vm() {
                Ok(vm) => break vm,
                // The call is long, and gives up when a signal comes in between.
                Err(error) if error.errno() == EINTR => {}
                Err(error) => return Err(refused("make a virtual machine")(error)),
            }
        };
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: len,
            userspace_addr: address,
        };
        // SAFETY: the caller's word.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("take its memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(refused("make a vcpu"))?;
        let cpuid = vcpu.set_cpuid2(&self.cpuid);
        cpuid.map_err(refused("take its own cpuid"))?;
        Ok(BareVm { vcpu, _vm: vm })
    }
}

impl BareVm {
    /// Sets the vCPU's registers. Allocates nothing.
    ///
    /// # Errors
    /// KVM's.
    pub fn set(&self, registers: &Registers) -> Result<(), Refused> {
        let set = self.vcpu.set_sregs(&registers.sregs);
        set.map_err(refused("set system registers"))?;
        let set = self.vcpu.set_regs(&registers.regs);
        set.map_err(refused("set registers"))
    }

    /// Runs the vCPU until it comes out of the guest. Allocates nothing.
    ///
    /// # Errors
    /// KVM's.
    pub fn run(&mut self) -> Result<Exit, Refused> {
        const EINTR: i32 = 4;
        const EAGAIN: i32 = 11;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(..)) => return Ok(Exit::Out),
                Ok(_) => return Ok(Exit::Other),
                Err(error) if matches!(error.errno(), EINTR | EAGAIN) => {}
                Err(error) => return Err(refused("run the vcpu")(error)),
            }
        }
    }
}

/// A bare VM whose vCPU runs on a thread of its own, and is held at each `out` until it is let on.
pub struct BareMachine {
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
    memory: Arc<Anonymous>,
}

impl BareMachine {
    /// Makes one on `memory`, and starts it with `registers`.
    ///
    /// # Errors
    /// KVM's; the host's, if it has no more threads.
    pub(crate) fn start(
        bare: &Bare,
        memory: &Arc<Anonymous>,
        registers: Registers,
    ) -> Result<Self, MeasureError> {
        let address = memory.host_address().as_ptr().expose_provenance() as u64;
        // SAFETY: the result keeps the memory until the thread has ended, which has the VM. It is only
        // reached by raw pointers.
        let mut vm = unsafe { bare.create(address, Memslot::len(&**memory)) }?;
        let gate = Gate::new();
        let its = Arc::clone(&gate);
        let life = move || {
            let mut exit = vm.set(&registers).and_then(|()| vm.run());
            let why = loop {
                match exit {
                    Ok(Exit::Out) if its.arrive() => exit = vm.run(),
                    Ok(Exit::Out) => return,
                    Ok(Exit::Other) => break "it came out of kvm without an `out`".to_owned(),
                    Err(refused) => break chain(&MeasureError::from(refused)),
                }
            };
            its.has_ended(why);
        };
        let thread = thread::Builder::new().name("bare".to_owned()).spawn(life);
        let thread = thread.map_err(|source| MeasureError::Host {
            what: "start a thread",
            source,
        })?;
        Ok(Self {
            gate,
            thread: Some(thread),
            memory: Arc::clone(memory),
        })
    }

    /// Waits for its first instruction. How long after `began` that was.
    ///
    /// # Errors
    /// If it has ended, or it takes too long.
    pub fn first_instruction(&self, began: Instant) -> Result<Duration, MeasureError> {
        Ok(self.gate.wait(1)?.saturating_duration_since(began))
    }

    /// Where it says that it runs, and is held.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Copies its memory out.
    ///
    /// # Errors
    /// If it has no such bytes.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MeasureError> {
        GuestRam::read(&*self.memory, gpa, buf).map_err(MeasureError::Reach)
    }
}

impl Drop for BareMachine {
    fn drop(&mut self) {
        self.gate.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Memory of `bytes` bytes with the guest's code and page tables in it.
///
/// # Errors
/// If the host has no room for it.
pub(crate) fn memory_with_code(
    bytes: u64,
    pages: PageSize,
) -> Result<Arc<Anonymous>, MeasureError> {
    let memory = Anonymous::new(bytes, pages)?;
    boot::write_page_tables(&*memory, bytes)?;
    let written = GuestRam::write(&*memory, IMAGE_GPA, &code());
    written.map_err(MeasureError::Reach)?;
    Ok(memory)
}
