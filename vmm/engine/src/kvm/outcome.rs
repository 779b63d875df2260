//! How a vCPU ended.

use std::fmt;

use super::error::VcpuRunError;
use super::port::StopReason;
use super::state::VcpuState;
use crate::causes::chain;

/// Why a vCPU runs no more, when nobody told it to stop.
#[derive(Debug)]
pub enum Outcome {
    /// The port handler stopped it.
    Stopped(StopReason),
    /// The guest did what a guest must not do.
    Crashed {
        /// What it did.
        reason: CrashReason,
        /// Where it was.
        report: Box<CrashReport>,
    },
    /// The VMM could not go on. The guest is not to blame.
    Failed {
        /// What went wrong.
        error: VcpuRunError,
        /// Where the guest was.
        report: Box<CrashReport>,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped(reason) => reason.fmt(f),
            Self::Crashed { reason, report } => write!(f, "guest crashed: {reason}\n{report}"),
            Self::Failed { error, report } => {
                write!(f, "vcpu failed: {}\n{report}", chain(error))
            }
        }
    }
}

/// What a guest did that it must not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CrashReason {
    /// An exception: guests have no handlers, so any is a triple fault.
    #[error("an exception nobody handles (triple fault)")]
    Shutdown,
    /// The same, where the host says which ([`user`](crate::user)).
    #[error("an exception nobody handles ({what})")]
    Exception {
        /// Which, in words.
        what: &'static str,
    },
    /// A read or write of an address without memory.
    #[error("{} gpa {gpa:#x}, where there is no memory", if *.write { "wrote to" } else { "read from" })]
    Mmio {
        /// The address.
        gpa: u64,
        /// Whether it was a write.
        write: bool,
    },
    /// An `in`. There is nothing to read from ports.
    #[error("read from port {port:#x}")]
    PortRead {
        /// The port.
        port: u16,
    },
    /// An `out` to a port that nothing listens on.
    #[error("wrote {value:#x} to port {port:#x}, where nothing listens")]
    PortWrite {
        /// The port.
        port: u16,
        /// What was written.
        value: u32,
    },
    /// An `out` that is not 1, 2 or 4 bytes long: a string instruction.
    #[error("wrote {len} bytes at once to port {port:#x}")]
    PortString {
        /// The port.
        port: u16,
        /// How many bytes.
        len: usize,
    },
    /// `hlt`: there are no interrupts that could wake the vCPU.
    #[error("halted")]
    Halt,
    /// KVM could not emulate an instruction, or met another of its limits.
    #[error(
        "kvm internal error (suberror {suberror}{})",
        if *.suberror == 1 { ": emulation failed" } else { "" }
    )]
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
    },
    /// The CPU refused to enter the guest: its registers make no sense.
    #[error("the cpu refused to enter the guest (reason {reason:#x})")]
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// An exit that should not happen.
    #[error("unexpected exit from the guest (exit reason {reason})")]
    Unexpected {
        /// `KVM_EXIT_*`.
        reason: u32,
    },
}

/// Where a vCPU was when it ended.
#[derive(Debug, Default)]
pub struct CrashReport {
    /// Its registers, as far as they could be read.
    pub state: Option<VcpuState>,
    /// Up to 16 bytes at RIP, if they are mapped.
    pub code: Vec<u8>,
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            Some(state) if state.is_as_after_init() => {
                return write!(
                    f,
                    "where it was this host does not tell: after a triple fault the vcpu is as after \
                     a reset (SVM)"
                );
            }
            Some(state) => state.fmt(f)?,
            None => write!(f, "registers could not be read")?,
        }
        write!(f, "\ncode at rip:")?;
        if self.code.is_empty() {
            write!(f, " not mapped")?;
        }
        self.code
            .iter()
            .try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}
