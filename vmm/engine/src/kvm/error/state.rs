//! Why registers could not be captured or set.

use vmm_sys_util::errno;

use crate::causes::Cause;
use crate::kvm::extended::XSAVE_WORDS;
use crate::kvm::state::StateKind;

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
    /// A state that is another accelerator's.
    #[error(
        "the vcpu was run by {found}, and this one is run by {wanted}: they have not the same registers"
    )]
    Kind {
        /// Who ran the vCPU.
        found: StateKind,
        /// Who is to run it now.
        wanted: StateKind,
    },
    /// A base that is no address.
    #[error("the base of {what} is {base:#x}, which is no address")]
    Base {
        /// Of what.
        what: &'static str,
        /// What it would be.
        base: u64,
    },
    /// An XSAVE area that this CPU or kernel has not.
    #[error("the xsave area makes no sense here: {why}")]
    Xsave {
        /// What is wrong with it.
        why: &'static str,
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
    pub(in crate::kvm) fn of(what: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }
}
