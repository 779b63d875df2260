//! Why a vCPU could not go on.

use std::io;

use vmm_sys_util::errno;

use super::WriteFaultError;
use crate::causes::Cause;

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
    /// The thread could not be made one that guest code runs on.
    #[error("cannot {what}")]
    Prepare {
        /// What could not be done.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host refused to enter the guest.
    #[error("the host refuses the vcpu's registers (signal {signal}, code {code})")]
    Entry {
        /// The signal it sent.
        signal: i32,
        /// And its code.
        code: i32,
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
