//! Makes a machine: its memslot, its vCPU threads, its doorbells.

#![expect(
    unsafe_code,
    reason = "the memslot: the kernel is given a range of host memory"
)]

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::{Backend, Machine, OnStop};
use crate::kvm::control::Control;
use crate::kvm::counters::Counters;
use crate::kvm::create::{create_vcpu, create_vm, msr_set};
use crate::kvm::error::{KvmError, MAX_VCPUS};
use crate::kvm::fault::Ladder;
use crate::kvm::kick;
use crate::kvm::limits;
use crate::kvm::memory::{GuestRam, Memslot};
use crate::kvm::open::Kvm;
use crate::kvm::outcome::Outcome;
use crate::kvm::paravirt::{self, Targets};
use crate::kvm::port::PortHandler;
use crate::kvm::registers;
use crate::kvm::state::{Capturer, XsaveFits};
use crate::kvm::tables::Translation;
use crate::kvm::vcpu::{SyncRegs, Vcpu};
use crate::kvm::watch::Watch;

/// A virtual machine of KVM's.
struct KvmVm {
    fd: VmFd,
    /// Where the memslot points.
    _slot: Arc<dyn Memslot>,
    regions: Vec<kvm_userspace_memory_region>,
}

impl Backend for KvmVm {
    fn kick(&self, thread: &JoinHandle<()>) -> io::Result<()> {
        kick::kick(thread)
    }

    fn register_doorbell(&self, port: u16, event: &EventFd) -> Result<(), errno::Error> {
        let address = IoEventAddress::Pio(port.into());
        self.fd.register_ioevent(event, &address, NoDatamatch)
    }

    /// They go when the memory that they are in does.
    fn forget_tables(&self) -> Result<(), KvmError> {
        for &region in &self.regions {
            let gone = kvm_userspace_memory_region {
                memory_size: 0,
                ..region
            };
            for region in [gone, region] {
                // SAFETY: as in `Machine::new`.
                let set = unsafe { self.fd.set_user_memory_region(region) };
                set.map_err(|source| KvmError::Memory {
                    len: region.memory_size,
                    source,
                })?;
            }
        }
        Ok(())
    }
}

impl Machine {
    /// A machine that is to have `vcpus` vCPUs, run by `backend`, and has no thread yet.
    ///
    /// # Errors
    /// If there are to be none, or more than [`MAX_VCPUS`].
    pub(crate) fn without_threads(
        backend: Box<dyn Backend>,
        translation: Translation,
        ram: Arc<dyn GuestRam>,
        vcpus: usize,
    ) -> Result<Self, KvmError> {
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(KvmError::VcpuCount { vcpus });
        }
        Ok(Self {
            backend,
            control: Arc::new(Control::new(vcpus)),
            counters: Arc::new(Counters::new(vcpus)),
            threads: Arc::default(),
            watch: None,
            is_stuck: AtomicBool::new(false),
            ram,
            translation,
            started: Mutex::new(false),
            tsc_khz: 0,
            left_out: Vec::new(),
        })
    }

    /// Starts the thread of the next vCPU, whose whole life is `run`: it returns how it ended, if it did by
    /// itself.
    ///
    /// # Errors
    /// If the host has no more threads.
    pub(crate) fn add_thread(
        &mut self,
        on_stop: &Arc<OnStop>,
        run: impl FnOnce() -> Option<Outcome> + Send + 'static,
    ) -> Result<(), KvmError> {
        let index = self.threads.len();
        let on_stop = Arc::clone(on_stop);
        let control = Arc::clone(&self.control);
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                control.is_on_this_thread(index);
                if let Some(outcome) = run() {
                    on_stop(index, outcome);
                }
            })
            .map_err(|source| KvmError::Thread {
                vcpu: index,
                source,
            })?;
        // Nobody else has them before the machine is there.
        if let Some(threads) = Arc::get_mut(&mut self.threads) {
            threads.push(thread);
        }
        Ok(())
    }

    /// What its vCPUs' threads share with it.
    pub(crate) fn shared(&self) -> (&Arc<Control>, &Arc<Counters>) {
        (&self.control, &self.counters)
    }

    /// Says what the frequency of the guest's time-stamp counter is.
    pub(crate) fn set_tsc_khz(&mut self, khz: u32) {
        self.tsc_khz = khz;
    }

    /// A machine of KVM's with `vcpus` vCPUs and all of `slot` as its memory. It does not run before it is
    /// started.
    ///
    /// # Errors
    /// If there are no vCPUs or more than [`MAX_VCPUS`], or more of them or of memory than KVM can have here,
    /// KVM refuses, or the host has no more threads.
    pub fn new(
        kvm: &Kvm,
        slot: Arc<dyn Memslot>,
        ram: Arc<dyn GuestRam>,
        vcpus: usize,
        handler: Arc<dyn PortHandler>,
        on_stop: OnStop,
    ) -> Result<Self, KvmError> {
        if vcpus > MAX_VCPUS {
            return Err(KvmError::VcpuCount { vcpus });
        }
        let translation = Translation::of(kvm.platform());
        limits::check_vcpus(&kvm.fd, vcpus)?;
        limits::check_memory(&kvm.cpuid, translation, slot.len())?;
        let vm = create_vm(kvm)?;
        // Before the memslot: the kernel waits for readers of the filter, and for 13 ms rather than none if
        // it has just waited for readers of memslots (`srcu_should_expedite` in `kernel/rcu/srcutree.c`).
        paravirt::guard(&vm).map_err(|source| KvmError::Msrs { source })?;
        let base = slot.host_address().as_ptr().expose_provenance() as u64;
        let mut regions = Vec::new();
        for (number, range) in (0..).zip(limits::slots(slot.len())) {
            let region = kvm_userspace_memory_region {
                slot: number,
                flags: 0,
                guest_phys_addr: range.start,
                memory_size: range.end - range.start,
                userspace_addr: base + range.start,
            };
            // SAFETY: the range is the guest's, as a `Memslot` promises, which is kept as long as somebody
            // may go there.
            unsafe { vm.set_user_memory_region(region) }.map_err(|source| KvmError::Memory {
                len: region.memory_size,
                source,
            })?;
            regions.push(region);
        }
        if translation == Translation::ShadowOnSvm {
            exit_on_emulation_failure(&vm).map_err(|source| KvmError::Emulation { source })?;
        }
        let xsave2 = vm.check_extension_int(Cap::Xsave2);
        let xsave_fits = XsaveFits::check(xsave2).ok_or(KvmError::XsaveSize { bytes: xsave2 })?;
        const ALL_SYNC_REGS: i32 = 0b111;
        let sync_regs = if vm.check_extension_int(Cap::SyncRegs) & ALL_SYNC_REGS == ALL_SYNC_REGS {
            SyncRegs::Stale
        } else {
            SyncRegs::Absent
        };

        let on_stop = Arc::new(on_stop);
        kick::install().map_err(|source| KvmError::Thread { vcpu: 0, source })?;
        let mut made = Vec::with_capacity(vcpus);
        for index in 0..vcpus {
            let cpuid = registers::vcpu_cpuid(&kvm.cpuid, index as u8);
            let fd = create_vcpu(&vm, index, &cpuid)?;
            let msrs = msr_set(kvm, &fd, index)?;
            made.push((cpuid, fd, msrs));
        }
        let backend = Box::new(KvmVm {
            fd: vm,
            _slot: Arc::clone(&slot),
            regions,
        });
        let mut machine = Self::without_threads(backend, translation, Arc::clone(&ram), vcpus)?;
        for (index, (cpuid, fd, msrs)) in made.into_iter().enumerate() {
            if index == 0 {
                machine.tsc_khz = fd.get_tsc_khz().unwrap_or(0);
                machine.left_out.clone_from(&msrs.left_out);
            }
            let vcpu = Vcpu {
                index,
                fd,
                cpuid,
                capturer: Capturer::new(msrs),
                xsave_fits,
                sync_regs,
                ram: Arc::clone(&ram),
                _slot: Arc::clone(&slot),
                handler: Arc::clone(&handler),
                control: Arc::clone(&machine.control),
                counters: Arc::clone(&machine.counters),
                ladder: Ladder::new(),
                paravirt: Targets::default(),
                translation: machine.translation,
                lost_races: None,
                kicked: false,
                kicked_at: None,
            };
            machine.add_thread(&on_stop, move || vcpu.run())?;
        }
        let watch = Watch::start(
            Arc::clone(&machine.threads),
            Arc::clone(&machine.control),
            Arc::clone(&machine.counters),
        );
        machine.watch = Some(watch.map_err(|source| KvmError::Watch { source })?);
        Ok(machine)
    }

    /// Makes a 1-, 2- or 4-byte `out` to `port` signal `event` instead of exiting to the VMM.
    ///
    /// # Errors
    /// If the port has a doorbell already, or KVM refuses.
    pub fn register_doorbell(&self, port: u16, event: &EventFd) -> Result<(), KvmError> {
        let registered = self.backend.register_doorbell(port, event);
        registered.map_err(|source| KvmError::Doorbell { port, source })
    }
}

/// Has KVM come out where it cannot emulate an instruction, instead of giving the guest an exception: with a
/// locked one on a page table that is read-only it may, when that is writable (`handle_emulation_failure` in
/// `arch/x86/kvm/x86.c`). Before Linux 5.14 it does not know how to.
fn exit_on_emulation_failure(vm: &VmFd) -> Result<(), errno::Error> {
    let cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE;
    if vm.check_extension_raw(cap.into()) == 0 {
        return Ok(());
    }
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [1, 0, 0, 0],
        ..Default::default()
    })
}
