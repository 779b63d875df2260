//! Why a machine could not be made or driven, its registers not be captured or set, or a vCPU not go on.

use crate::causes::Cause;
use std::io;
use std::time::Duration;

use vmm_sys_util::errno;

/// How long a vCPU may take to do what it is told. It is in the guest, where a kick reaches it in
/// microseconds, or in a handler that should not block; the rest is the host being busy.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// The most vCPUs of a machine: their numbers are APIC ids of 8 bits.
pub const MAX_VCPUS: usize = 255;

/// 32-bit words of the area that `KVM_GET_XSAVE` transfers.
pub(super) const XSAVE_WORDS: usize = 1024;
/// Bytes of that area.
pub(super) const XSAVE_BYTES: usize = XSAVE_WORDS * 4;

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
    /// No vCPUs, or too many.
    #[error("{vcpus} vcpus: a machine has 1 to {MAX_VCPUS}")]
    VcpuCount {
        /// How many were asked for.
        vcpus: usize,
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

/// Why registers could not be captured or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A KVM call failed.
    #[error("kvm refused the vcpu's {what}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// One MSR failed.
    #[error("kvm refused msr {index:#x}")]
    Msr {
        /// Which.
        index: u32,
    },
    /// More MSRs than KVM takes in one call.
    #[error("{count} msrs are more than kvm takes at a time")]
    TooManyMsrs {
        /// How many.
        count: usize,
    },
    /// A page that KVM writes for the guest could not be pinned.
    #[error("cannot pin what kvm writes for the guest")]
    Paravirt {
        /// Why.
        #[source]
        source: Cause,
    },
    /// A stored state that is none of ours, or of a later version.
    #[error("a stored vcpu of version {version} makes no sense here")]
    Stored {
        /// The version it has.
        version: u32,
        /// What is wrong with its bytes, if the version is known.
        #[source]
        source: Option<postcard::Error>,
    },
    /// A state that was not captured: its XSAVE area has the wrong size.
    #[error("the xsave area has {words} words, not {XSAVE_WORDS}")]
    XsaveSize {
        /// 32-bit words found.
        words: usize,
    },
}

impl StateError {
    /// Wraps an error number of the call about `what`.
    pub(super) fn of(what: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }
}

/// Why the VMM could not go on with a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum VcpuRunError {
    /// `KVM_RUN` failed.
    #[error("cannot run the vcpu")]
    Run {
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// The pages of a write fault are unknown.
    #[error("cannot resolve a write fault")]
    Fault {
        /// Why.
        #[source]
        source: WriteFaultError,
    },
    /// A page could not be made writable.
    #[error("cannot make frame {gfn:#x} writable for the guest")]
    Memory {
        /// The guest frame.
        gfn: u64,
        /// Why.
        #[source]
        source: Cause,
    },
    /// Registers were out of reach.
    #[error("cannot read the vcpu's {what}")]
    Registers {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// A thread of the VMM panicked. The panic itself has been printed.
    #[error("the vcpu's thread panicked")]
    Panicked,
}

/// Why the pages of a write fault could not be found.
#[derive(Debug, thiserror::Error)]
pub enum WriteFaultError {
    /// The fault comes back although everything it could be about is writable.
    #[error(
        "write fault at rip {rip:#x} ({instruction}) came back {times} times although all it could be \
         about is writable; tried: {tried}"
    )]
    Stuck {
        /// Where.
        rip: u64,
        /// The instruction, or why there is none.
        instruction: String,
        /// How many times in a row nothing was found to do.
        times: u32,
        /// Rungs, and how many pages each was about.
        tried: String,
    },
    /// Guest memory could not be read.
    #[error("cannot read guest memory for the write fault at rip {rip:#x}")]
    Memory {
        /// Where the instruction is.
        rip: u64,
        /// What went wrong.
        #[source]
        source: Cause,
    },
}
