//! A virtual machine: memory, vCPUs and devices, put together and taken apart in the right order.
//!
//! | file | concept |
//! |---|---|
//! | `clones` | starting one as a snapshot says |
//! | `fork` | that and all before it in one call |
//! | `shell` | what of a clone can be made before it is known whose |

mod clones;
mod fork;
mod shell;

use std::sync::Arc;
use std::{fmt, io, mem};

use vmm_sys_util::eventfd::EventFd;

use crate::aside::Aside;
use crate::device::Quiesce;
use crate::host::{Ahead, Placement, Ram};
use crate::kvm::{
    EntryState, GuestRam, Kvm, KvmError, Machine, OnStop, Outcome, Platform, PortAction,
    PortHandler,
};
use crate::memory::Memory;
use crate::mm::{CowPolicy, Exclusive};
use crate::snapshot::{Parts, RewindError, Snapshot, TakeError, Timing};
use crate::user::User;

pub use self::clones::CloneError;
pub use self::fork::{Fork, ForkError, Place};
pub use self::shell::{Shell, ShellError, Shells};

/// What runs the vCPUs of VMs.
#[derive(Debug)]
pub enum Accelerator {
    /// KVM.
    Kvm(Kvm),
    /// Threads of this process: see [`user`](crate::user).
    User(User),
}

impl Accelerator {
    /// Where this runs.
    pub fn platform(&self) -> &Platform {
        match self {
            Self::Kvm(kvm) => kvm.platform(),
            Self::User(user) => user.platform(),
        }
    }

    /// Where a VM's window must be.
    pub fn placement(&self) -> Placement {
        match self {
            Self::Kvm(_) => Placement::Anywhere,
            Self::User(_) => Placement::AtGuestAddresses,
        }
    }
}

/// An [`Accelerator`] that somebody else has.
#[derive(Clone, Copy, Debug)]
pub enum By<'a> {
    /// KVM.
    Kvm(&'a Kvm),
    /// Threads of this process.
    User(&'a User),
}

impl<'a> From<&'a Kvm> for By<'a> {
    fn from(kvm: &'a Kvm) -> Self {
        Self::Kvm(kvm)
    }
}

impl<'a> From<&'a User> for By<'a> {
    fn from(user: &'a User) -> Self {
        Self::User(user)
    }
}

impl<'a> From<&'a Accelerator> for By<'a> {
    fn from(accelerator: &'a Accelerator) -> Self {
        match accelerator {
            Accelerator::Kvm(kvm) => Self::Kvm(kvm),
            Accelerator::User(user) => Self::User(user),
        }
    }
}

/// Why a VM could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused.
    #[error("cannot make the virtual machine")]
    Kvm(#[from] KvmError),
    /// The host has no more threads.
    #[error("cannot start the threads that copy ahead, and keep memory for it")]
    Ahead(#[source] io::Error),
    /// The memory is behind another window than the shell's.
    #[error("the memory is not behind the shell's window")]
    OtherWindow,
}

/// What a VM is made of. [`Vm::builder`] makes one.
///
/// Whoever wants to talk to a device or to the handler of ports keeps a share of it.
pub struct Builder<'a, P: CowPolicy = Exclusive> {
    memory: Memory<P>,
    guest_ram: Arc<dyn GuestRam>,
    devices: Vec<Arc<dyn Quiesce>>,
    doorbells: Vec<(u16, &'a EventFd)>,
    ports: Arc<dyn PortHandler>,
    on_stop: OnStop,
    copies_ahead: bool,
    aside: Option<Arc<Aside>>,
}

/// Ports without a handler.
struct NoPorts;

impl PortHandler for NoPorts {
    fn out(&self, _vcpu: usize, _port: u16, _value: u32) -> PortAction {
        PortAction::Unknown
    }
}

impl<'a, P: CowPolicy> Builder<'a, P> {
    /// The memory that the VM is built around: what its devices reach.
    pub fn ram(&self) -> &Ram {
        self.memory.ram()
    }

    /// Adds a device. Devices are stopped after the vCPUs, and captured and restored in the order in which
    /// they were added.
    #[must_use]
    pub fn device(mut self, device: Arc<dyn Quiesce>) -> Self {
        self.devices.push(device);
        self
    }

    /// Has a 1-, 2- or 4-byte `out` to `port` signal `event` instead of coming out of the guest: the handler
    /// of ports does not see it. A port has one doorbell at most.
    #[must_use]
    pub fn doorbell(mut self, port: u16, event: &'a EventFd) -> Self {
        self.doorbells.push((port, event));
        self
    }

    /// Has `handler` called for an `out` to any port that is no doorbell. Without it such an `out` is a crash
    /// of the guest.
    #[must_use]
    pub fn ports(mut self, handler: Arc<dyn PortHandler>) -> Self {
        self.ports = handler;
        self
    }

    /// Has `ram` asked when a vCPU faults, and what there is at an address: for a window that shows more than
    /// the address space ([`Memory::over`]), in another place. Without it that is the memory the VM is built
    /// around, from guest-physical address 0 on.
    #[must_use]
    pub fn guest_ram(mut self, ram: Arc<dyn GuestRam>) -> Self {
        self.guest_ram = ram;
        self
    }

    /// Calls `on_stop` on a vCPU's thread when that vCPU has ended by itself, with its number and the reason.
    /// Without it the reason is logged.
    #[must_use]
    pub fn on_stop(mut self, on_stop: impl Fn(usize, Outcome) + Send + Sync + 'static) -> Self {
        self.on_stop = Box::new(on_stop);
        self
    }

    /// Whether a thread of its own copies, after each snapshot, what the guest has written before all of the
    /// last ones; and whether memory is kept ready for copies: before the first snapshot a quarter of what is
    /// in use, 256 MiB at most in the process, then as much as was copied between the last two. It is so unless
    /// this says otherwise.
    #[must_use]
    pub fn copy_ahead(mut self, copies_ahead: bool) -> Self {
        self.copies_ahead = copies_ahead;
        self
    }

    /// Has threads that pass `aside` wait while a snapshot or a restore stops and starts the vCPUs.
    #[must_use]
    pub fn aside(mut self, aside: Arc<Aside>) -> Self {
        self.aside = Some(aside);
        self
    }

    /// The VM, with `vcpus` vCPUs, 1 to 255, that are run by `by`. It does not run before it is started.
    ///
    /// # Errors
    /// If there are no vCPUs or too many, the memory's window is not where they need it
    /// ([`Accelerator::placement`]), a port has two doorbells, KVM refuses, or the host has no more threads
    /// or file descriptors.
    pub fn build<'b>(mut self, by: impl Into<By<'b>>, vcpus: usize) -> Result<Vm<P>, BuildError> {
        let window = Arc::clone(self.memory.window());
        let ram = Arc::clone(&self.guest_ram);
        let ports = Arc::clone(&self.ports);
        let on_stop = mem::replace(&mut self.on_stop, Box::new(|_, _| ()));
        let machine = match by.into() {
            By::Kvm(_) if window.placement() != Placement::Anywhere => {
                return Err(KvmError::Placement.into());
            }
            By::Kvm(kvm) => Machine::new(kvm, window, ram, vcpus, ports, on_stop)?,
            By::User(user) => user.machine(window, ram, vcpus, ports, on_stop)?,
        };
        self.around(machine)
    }

    /// The VM, with the vCPUs that `shell` has. Its memory must be behind the shell's window
    /// ([`Shell::window`]).
    ///
    /// # Errors
    /// If it is not, a port has two doorbells, KVM refuses, or the host has no more threads or file
    /// descriptors.
    pub fn build_in(mut self, shell: Shell) -> Result<Vm<P>, BuildError> {
        let ram = Arc::clone(&self.guest_ram);
        let ports = Arc::clone(&self.ports);
        let on_stop = mem::replace(&mut self.on_stop, Box::new(|_, _| ()));
        let machine = shell.fill(self.memory.window(), ram, ports, on_stop)?;
        self.around(machine)
    }

    fn around(self, machine: Machine) -> Result<Vm<P>, BuildError> {
        for (port, event) in self.doorbells {
            machine.register_doorbell(port, event)?;
        }
        if self.copies_ahead {
            self.memory
                .frames()
                .keep_stock()
                .map_err(BuildError::Ahead)?;
        }
        let ahead = self
            .copies_ahead
            .then(|| Ahead::start(Arc::clone(self.memory.space())))
            .transpose()
            .map_err(BuildError::Ahead)?;
        Ok(Vm {
            machine,
            devices: self.devices,
            ahead,
            aside: self.aside,
            memory: self.memory,
        })
    }
}

impl<P: CowPolicy> fmt::Debug for Builder<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("memory", &self.memory)
            .field("devices", &self.devices.len())
            .finish_non_exhaustive()
    }
}

/// A virtual machine.
///
/// Dropping it stops its vCPUs and waits for their threads; then its devices go, and memory last. A vCPU that
/// is stuck in a handler of ports is given up after 5 s, and keeps the memory until it comes out.
// Fields are dropped in the order in which they are declared.
pub struct Vm<P: CowPolicy = Exclusive> {
    machine: Machine,
    devices: Vec<Arc<dyn Quiesce>>,
    ahead: Option<Ahead>,
    aside: Option<Arc<Aside>>,
    memory: Memory<P>,
}

impl<P: CowPolicy> Vm<P> {
    /// Begins to put a VM together around `memory`, with what the guest finds there at first in it.
    pub fn builder<'a>(memory: Memory<P>) -> Builder<'a, P> {
        Builder {
            guest_ram: Arc::new(memory.ram().clone()),
            memory,
            devices: Vec::new(),
            doorbells: Vec::new(),
            ports: Arc::new(NoPorts),
            on_stop: Box::new(|vcpu, outcome| tracing::info!("vcpu {vcpu} has ended: {outcome}")),
            copies_ahead: true,
            aside: None,
        }
    }

    /// Starts all vCPUs, each where `entry` of its number says.
    ///
    /// # Errors
    /// If the VM was started before, or KVM refuses the registers.
    pub fn start(&self, entry: impl Fn(usize) -> EntryState) -> Result<(), KvmError> {
        self.machine.start(entry)
    }

    /// Takes a snapshot. The guest runs meanwhile, but for a pause.
    ///
    /// # Errors
    /// As [`Parts::take`].
    pub fn snapshot(&self) -> Result<(Snapshot, Timing), TakeError> {
        self.parts().take()
    }

    /// Rewinds the guest to a snapshot of this VM, and lets it run on from there. Its clock is not rewound.
    ///
    /// # Errors
    /// As [`Parts::restore`].
    pub fn restore(&self, snapshot: &Snapshot) -> Result<Timing, RewindError> {
        self.parts().restore(snapshot, || Ok(()))
    }

    /// Its parts, for whoever wants a say in how a snapshot is taken.
    pub fn parts(&self) -> Parts<'_, P> {
        Parts {
            vcpus: &self.machine,
            devices: self.devices.iter().map(|device| &**device).collect(),
            space: self.memory.space(),
            ahead: self.ahead.as_ref(),
            aside: self.aside.as_deref(),
            precedence: Some(self.ram().precedence()),
        }
    }

    /// Its vCPUs.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Its memory.
    pub fn memory(&self) -> &Memory<P> {
        &self.memory
    }

    /// Its memory by guest-physical address: what host code reads, writes and pins.
    pub fn ram(&self) -> &Ram {
        self.memory.ram()
    }
}

impl<P: CowPolicy> fmt::Debug for Vm<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("machine", &self.machine)
            .field("devices", &self.devices.len())
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
