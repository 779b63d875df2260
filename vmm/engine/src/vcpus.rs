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
    /// Only one pause is there at a time: who comes second waits for the end of the first.
    ///
    /// # Errors
    /// If they were not started, or one has ended or does not stop. Those that have not ended run on.
    fn pause(&self, capture: Capture) -> Result<Box<dyn Paused + '_>, VcpusError>;

    /// Whether memory may become read-only while they run. Where it may not, it may while they are paused, if
    /// [`Paused::has_protected`] is called before they run on.
    fn may_lose_write_access(&self) -> bool {
        true
    }
}

/// vCPUs that stand still. Dropping it lets them run on.
#[must_use = "the vCPUs run on when this is dropped"]
pub trait Paused {
    /// When they were told to stop.
    fn kicked(&self) -> Instant;

    /// The registers of each, by its number. Waits until they are captured.
    ///
    /// # Errors
    /// If those of one cannot be captured. They can run on all the same.
    fn states(&mut self) -> Result<Vec<Saved>, VcpusError>;

    /// Called before they run on, after anything has changed protections: with the guest frames that are
    /// read-only and were not when they stopped, or whose content has changed. Where they may lose write
    /// access while they run ([`Vcpus::may_lose_write_access`]) there are none among them.
    ///
    /// # Errors
    /// If the guest must not run on.
    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError>;

    /// Called before memory is restored, which the vCPUs do not notice by themselves.
    ///
    /// # Errors
    /// If what must be known of memory as it is cannot be found out. Nothing has changed then.
    fn before_restore(&mut self) -> Result<(), VcpusError>;

    /// Sets the registers of each, by its number. Memory has been restored to when they were captured, and
    /// [`Paused::before_restore`] was called before that.
    ///
    /// # Errors
    /// If there are not as many states as vCPUs, a state makes no sense, or one cannot be set. The guest must
    /// not run on.
    fn restore(&mut self, states: &[Saved]) -> Result<(), VcpusError>;

    /// Stops all of them for good: none runs again.
    fn stop(self: Box<Self>);

    /// Lets them run on, and calls `then` when they do, or after a moment if one waits for a CPU so long:
    /// what else belongs to the VM goes on then. Returns the time when the last of them was about to enter the
    /// guest.
    fn resume(self: Box<Self>, then: Box<dyn FnOnce() + '_>) -> Instant;
}
