//! The vCPUs of a VM, whoever runs them.
//!
//! A snapshot or a restore needs of them that they stand still, all between two instructions, and that their
//! registers can be captured and set. [`kvm::Machine`](crate::kvm::Machine) is one that can; somebody's own
//! `KVM_RUN` loop is another.

use std::time::Instant;

use crate::causes::Cause;
use crate::saved::Saved;

/// Why vCPUs could not be stopped, captured or set.
#[derive(Debug, thiserror::Error)]
pub enum VcpusError {
    /// A vCPU has ended, so the VM cannot be paused any more. The others run on.
    #[error("vcpu {vcpu} has stopped")]
    Stopped {
        /// Which.
        vcpu: usize,
    },
    /// Anything else.
    #[error(transparent)]
    Failed(Cause),
}

/// Whether a pause captures registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capture {
    /// Every vCPU captures its registers as soon as it stands still, beside whatever the pauser does.
    Registers,
    /// Only if [`Paused::states`] asks for it.
    Nothing,
}

/// The vCPUs of a VM.
pub trait Vcpus {
    /// Stops all of them between two instructions. They stand still until what is returned is dropped.
    ///
    /// # Errors
    /// If one has ended, or does not stop: the others run on.
    fn pause(&self, capture: Capture) -> Result<Box<dyn Paused + '_>, VcpusError>;

    /// Whether memory may become read-only while they run. Where it may not, it may while they are paused.
    fn may_lose_write_access(&self) -> bool {
        true
    }
}

/// vCPUs that stand still. Dropping it lets them run on.
#[must_use = "the vCPUs run on when this is dropped"]
pub trait Paused {
    /// When they were told to stop.
    fn kicked(&self) -> Instant;

    /// The registers of each; waits until they are captured.
    ///
    /// # Errors
    /// If those of one cannot be captured.
    fn states(&mut self) -> Result<Vec<Saved>, VcpusError>;

    /// Pages have become read-only since they stand still, or have changed and are read-only. Called before
    /// they run on, if they may not lose write access while they run ([`Vcpus::may_lose_write_access`]).
    ///
    /// # Errors
    /// If the guest must not run on.
    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError>;

    /// Memory is about to be set back by somebody else's hand.
    ///
    /// # Errors
    /// If what must be known of memory as it is cannot be found out.
    fn before_restore(&mut self) -> Result<(), VcpusError>;

    /// Sets the registers of each. Memory is what it was when they were captured, since
    /// [`Paused::before_restore`].
    ///
    /// # Errors
    /// If those of one cannot be set. None runs on then.
    fn restore(&mut self, states: &[Saved]) -> Result<(), VcpusError>;

    /// Stops all of them for good.
    fn stop(self: Box<Self>);

    /// Lets them run on. Returns the time when the last of them was about to enter the guest.
    fn resume(self: Box<Self>) -> Instant;
}
