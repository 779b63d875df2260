//! Why a machine could not be made or driven.

use std::io;
use std::time::Duration;

use vmm_sys_util::errno;

use super::StateError;
use crate::causes::Cause;
use crate::kvm::extended::XSAVE_BYTES;

/// How long a vCPU may take to do what it is told. It is in the guest, where a kick reaches it in
/// microseconds, or in a handler that should not block; the rest is the host being busy.
pub(in crate::kvm) const PATIENCE: Duration = Duration::from_secs(5);

/// The most vCPUs of a machine: their numbers are APIC ids of 8 bits. There is no interrupt controller to
/// which the last of them means all.
pub const MAX_VCPUS: usize = 256;

/// Why a machine could not be made or driven.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No VM.
    #[error("cannot create a virtual machine")]
    CreateVm {
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// No memory for the guest.
    #[error("cannot give {len} bytes of memory to the virtual machine")]
    Memory {
        /// Bytes of the window.
        len: u64,
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// The window is somewhere else than guest code needs it, or KVM.
    #[error(
        "the window must be at guest addresses, or executable elsewhere, to run guest code as code of this \
         process, and must be neither for kvm"
    )]
    Placement,
    /// No vCPUs, or too many.
    #[error("{vcpus} vcpus: a machine has 1 to {MAX_VCPUS}")]
    VcpuCount {
        /// How many were asked for.
        vcpus: usize,
    },
    /// More vCPUs than KVM runs here.
    #[error(
        "{vcpus} vcpus: kvm on this host runs at most {most} in a machine (KVM_CAP_MAX_VCPUS); ask for fewer"
    )]
    HostVcpus {
        /// How many were asked for.
        vcpus: usize,
        /// How many it runs.
        most: usize,
    },
    /// More memory than the host's CPU has physical addresses for.
    #[error(
        "{bytes:#x} bytes of guest memory: physical addresses of this host have {bits} bits (cpuid \
         0x80000008), which is {:#x} bytes at most; give the guest less memory",
        1u64 << bits
    )]
    PhysicalAddresses {
        /// Bytes of guest memory.
        bytes: u64,
        /// Bits of an address.
        bits: u32,
    },
    /// KVM would take much of the host's memory for tables of the guest's, however little of it is used.
    #[error(
        "{bytes:#x} bytes of guest memory: kvm on this host (a shadow mmu) would take {} MiB for tables of all \
         pages at once, and {} MiB are left; give the guest less memory, or run it without kvm",
        tables >> 20,
        left >> 20
    )]
    SlotTables {
        /// Bytes of guest memory.
        bytes: u64,
        /// Bytes of the tables.
        tables: u64,
        /// Bytes that the host, or a control group, leaves.
        left: u64,
    },
    /// No vCPU.
    #[error("cannot create vcpu {vcpu}")]
    CreateVcpu {
        /// Which.
        vcpu: usize,
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// More extended state than is saved here.
    #[error("this host's xsave area has {bytes} bytes, more than {XSAVE_BYTES}")]
    XsaveSize {
        /// Its size.
        bytes: i32,
    },
    /// MSRs could not be guarded.
    #[error("cannot guard the msrs by which kvm writes to guest memory")]
    Msrs {
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// KVM would give a guest an exception for what it cannot emulate.
    #[error("cannot have kvm say what it cannot emulate")]
    Emulation {
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// No thread that watches the vCPUs.
    #[error("cannot start the thread that watches the vcpus")]
    Watch {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No thread for a vCPU, or no signal to stop it with.
    #[error("cannot start the thread of vcpu {vcpu}")]
    Thread {
        /// Which.
        vcpu: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Registers could not be captured or set.
    #[error("registers of vcpu {vcpu}")]
    State {
        /// Which vCPU.
        vcpu: usize,
        /// What went wrong.
        #[source]
        source: StateError,
    },
    /// Not as many states as vCPUs.
    #[error("{states} states for {vcpus} vcpus")]
    StateCount {
        /// States given.
        states: usize,
        /// vCPUs there are.
        vcpus: usize,
    },
    /// The machine was not started yet.
    #[error("the machine was not started")]
    NotStarted,
    /// The machine was started before.
    #[error("the machine was started before")]
    AlreadyStarted,
    /// A vCPU has ended, so the machine cannot be paused. Its outcome says why.
    #[error("vcpu {vcpu} has stopped")]
    Stopped {
        /// Which.
        vcpu: usize,
    },
    /// A vCPU did not come out of a handler.
    #[error("vcpu {vcpu} did not answer within {} s: it is stuck in a handler", PATIENCE.as_secs())]
    Stuck {
        /// Which.
        vcpu: usize,
    },
    /// A vCPU could not be sent the signal that gets it out of the guest.
    #[error("cannot kick vcpu {vcpu} out of the guest")]
    Kick {
        /// Which.
        vcpu: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The guest's page tables could not be read, or kept writable.
    #[error("cannot get at the guest's page tables")]
    Tables {
        /// Why.
        #[source]
        source: Cause,
    },
    /// A doorbell could not be set up.
    #[error("cannot register port {port:#x} as a doorbell")]
    Doorbell {
        /// The port.
        port: u16,
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
}
