//! Why a vCPU could not go on.

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
