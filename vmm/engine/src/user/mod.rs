//! Guest code as code of this process: vCPUs without KVM.
//!
//! What it guarantees
//! - A vCPU is one thread, which runs the guest's instructions in ring 3 of the host, at the guest's own
//!   addresses: its window is there ([`AtGuestAddresses`](crate::host::Placement)), or, for code that may be
//!   anywhere, at addresses of the host's choice (`Executable`). The same programs run as under KVM, on
//!   the same memory, devices and snapshots.
//! - [`Machine::pause`] returns when no vCPU is in guest code, each between two instructions, with all its
//!   registers known. No kick is lost.
//! - A write to a page that the guest may not write yet is a SIGSEGV with its address, resolved by
//!   [`GuestRam::write_fault`] on the vCPU's own thread; then the instruction is done again.
//! - VMM code never runs on the guest's stack or with its FS base. A fault that is not the guest's crashes
//!   the process as it would without this.
//! - An exception, a system call or a privileged instruction of the guest's ends its vCPU with a report.
//!
//! How: `crossing` goes into guest code and out of it, by a signal frame (`frame`); `signals` says which
//! signals those are; `exit` what they mean; `registers` makes states of frames; `vcpu` is the thread's life;
//! `filter` keeps system calls away; `doorbells` are ports that signal an event. The machine that drives the
//! threads is the one that drives KVM's ([`Machine`]).
//!
//! **Not covered: isolation.** The guest can read and write all that this process has. Run no guest that you
//! would not run as a program of your own.
//!
//! One machine a process, of code that has fixed addresses: they are there once (docs/decisions/0011).

#![expect(unsafe_code, reason = "reads the time-stamp counter")]

mod addresses;
mod crossing;
mod doorbells;
mod exit;
mod filter;
mod frame;
mod registers;
mod signals;
#[cfg(test)]
mod tests;
mod vcpu;

use std::arch::x86_64::{__cpuid_count, _rdtsc};
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use self::addresses::Addresses;
use self::doorbells::Doorbells;
use self::vcpu::Vcpu;
use crate::host::Window;
use crate::kvm::machine::Backend;
use crate::kvm::memory::GuestRam;
use crate::kvm::tables::Translation;
use crate::kvm::{KvmError, Machine, OnStop, Paging, Platform, PortHandler};

/// How long the time-stamp counter is looked at to find its frequency.
const CALIBRATION: Duration = Duration::from_millis(10);

/// Why this host does not run guest code as code of a process.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Ring 3 may not set the bases of FS and GS.
    #[error(
        "ring 3 cannot set the base of FS here (FSGSBASE): that takes Linux 5.9, and a CPU of 2012 or later"
    )]
    FsGsBase,
    /// There is no XSAVE.
    #[error("this CPU or kernel has no XSAVE")]
    Xsave,
    /// The handler of signals could not be installed.
    #[error("cannot handle signals")]
    Signals(#[source] io::Error),
}

/// The threads of a machine's vCPUs, to that machine.
struct Threads {
    doorbells: Arc<Doorbells>,
}

impl Backend for Threads {
    fn kick(&self, thread: &JoinHandle<()>) -> io::Result<()> {
        signals::kick(thread)
    }

    fn register_doorbell(&self, port: u16, event: &EventFd) -> Result<(), errno::Error> {
        self.doorbells.register(port, event)
    }

    fn forget_tables(&self) -> Result<(), KvmError> {
        Ok(())
    }
}

/// A host that can run guest code as code of this process.
#[derive(Debug)]
pub struct User {
    platform: Platform,
    tsc_khz: u32,
}

impl User {
    /// Looks whether this host can, and has this process handle the signals that it takes.
    ///
    /// # Errors
    /// If it cannot: see [`UserError`].
    pub fn open() -> Result<Self, UserError> {
        /// Bit of AT_HWCAP2 (`arch/x86/include/uapi/asm/hwcap2.h`).
        const HWCAP2_FSGSBASE: usize = 1 << 1;
        let (_, hwcap2) = rustix::param::linux_hwcap();
        if hwcap2 & HWCAP2_FSGSBASE == 0 {
            return Err(UserError::FsGsBase);
        }
        if !is_x86_feature_detected!("xsave") {
            return Err(UserError::Xsave);
        }
        signals::install(crossing::handler()).map_err(UserError::Signals)?;
        Ok(Self {
            platform: Platform {
                kvm: "none",
                paging: Paging::Host,
                ..Platform::detect()
            },
            tsc_khz: tsc_khz(),
        })
    }

    /// Where this runs.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// A machine with `vcpus` vCPUs, which see memory through `window`. It does not run before it is started.
    ///
    /// Addresses are those of the window for its code, where it is started too: the guest's own, or, for code
    /// that may be anywhere ([`Placement::Executable`](crate::host::Placement::Executable)), those that the
    /// host gave.
    ///
    /// # Errors
    /// If there are no vCPUs or too many, nothing can be executed in the window, or the host has no more
    /// threads.
    pub fn machine(
        &self,
        window: Arc<Window>,
        ram: Arc<dyn GuestRam>,
        vcpus: usize,
        handler: Arc<dyn PortHandler>,
        on_stop: OnStop,
    ) -> Result<Machine, KvmError> {
        let addresses = Addresses::of(&window).ok_or(KvmError::Placement)?;
        let doorbells = Arc::<Doorbells>::default();
        // Nobody keeps anything of the guest's page tables: they mean nothing here.
        let translation = Translation::Nested;
        let backend = Box::new(Threads {
            doorbells: Arc::clone(&doorbells),
        });
        let mut machine = Machine::without_threads(backend, translation, Arc::clone(&ram), vcpus)?;
        machine.set_tsc_khz(self.tsc_khz);
        let on_stop = Arc::new(on_stop);
        for index in 0..vcpus {
            let (control, counters) = machine.shared();
            let vcpu = Vcpu {
                index,
                ram: Arc::clone(&ram),
                addresses: addresses.clone(),
                _window: Arc::clone(&window),
                handler: Arc::clone(&handler),
                doorbells: Arc::clone(&doorbells),
                control: Arc::clone(control),
                counters: Arc::clone(counters),
            };
            machine.add_thread(&on_stop, move || vcpu.run())?;
        }
        Ok(machine)
    }
}

/// Whether this CPU has protection keys, and the kernel uses them: a guest's threads could be kept from the
/// memory of the rest of the process by them. That is not done yet.
pub fn has_protection_keys() -> bool {
    const OSPKE: u32 = 1 << 4;
    __cpuid_count(7, 0).ecx & OSPKE != 0
}

/// Frequency of the time-stamp counter, measured.
fn tsc_khz() -> u32 {
    // SAFETY: it has no conditions.
    let ticks = || unsafe { _rdtsc() };
    let (then, start) = (ticks(), Instant::now());
    thread::sleep(CALIBRATION);
    let (passed, ticked) = (start.elapsed(), ticks().wrapping_sub(then));
    let khz = u128::from(ticked) * 1_000_000 / passed.as_nanos().max(1);
    khz.try_into().unwrap_or(0)
}
