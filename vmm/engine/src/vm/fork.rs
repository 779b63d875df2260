//! Forking a running VM: a snapshot of it, and a clone that runs on from there, in one call.
//!
//! What there is beside memory, devices and whoever handles ports, only its maker can make anew: he is asked
//! to complete the clone.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::{BuildError, Builder, CloneError, Shell, Vm};
use crate::causes::Cause;
use crate::host::Placement;
use crate::kvm::Kvm;
use crate::memory::{Memory, MemoryError, MemoryOptions};
use crate::mm::{CowPolicy, Exclusive};
use crate::snapshot::{Snapshot, TakeError, Timing};
use crate::timeline::span;

/// Where a clone has its window and its vCPUs from.
#[derive(Debug)]
pub enum Place<'a> {
    /// They are made for it, by KVM.
    New(&'a Kvm),
    /// They are there.
    In(Shell),
}

impl<'a> From<&'a Kvm> for Place<'a> {
    fn from(kvm: &'a Kvm) -> Self {
        Self::New(kvm)
    }
}

impl From<Shell> for Place<'_> {
    fn from(shell: Shell) -> Self {
        Self::In(shell)
    }
}

/// Why a VM could not be forked. It runs on, unless [`Vm::snapshot`] says otherwise, and nothing of the clone
/// is left.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// No snapshot.
    #[error("cannot take a snapshot to make a clone of")]
    Take(#[from] TakeError),
    /// No memory for the clone.
    #[error("cannot make the memory of the clone")]
    Memory(#[from] MemoryError),
    /// No vCPUs.
    #[error("cannot put the clone together")]
    Build(#[from] BuildError),
    /// It could not be started.
    #[error("cannot start the clone")]
    Start(#[from] CloneError),
}

/// What comes of forking a VM.
pub struct Fork<P: CowPolicy = Exclusive> {
    /// The clone, which runs.
    pub vm: Vm<P>,
    /// What it runs on from. More clones can be made of it ([`Vm::start_clone`]).
    pub snapshot: Snapshot,
    /// How long the VM stood still for that.
    pub timing: Timing,
    /// When the clone's last vCPU was about to run.
    pub running: Instant,
}

impl<P: CowPolicy> fmt::Debug for Fork<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fork")
            .field("timing", &self.timing)
            .finish_non_exhaustive()
    }
}

impl<P: CowPolicy + Clone> Vm<P> {
    /// Forks the running VM: [`Vm::snapshot`], and [`Vm::start_clone`] of that.
    ///
    /// # Errors
    /// See [`ForkError`].
    pub fn fork<'a>(
        &self,
        place: impl Into<Place<'a>>,
        options: MemoryOptions,
        complete: impl FnOnce(Builder<'a, P>) -> Builder<'a, P>,
        identity: impl FnOnce(&Vm<P>) -> Result<(), Cause>,
    ) -> Result<Fork<P>, ForkError> {
        let _span = span!("fork vm");
        let place = place.into();
        let (snapshot, timing) = self.snapshot()?;
        let (vm, running) = self.start_clone(&snapshot, place, options, complete, identity)?;
        Ok(Fork {
            vm,
            snapshot,
            timing,
            running,
        })
    }

    /// A clone of this VM that runs on from `snapshot`, which is one of this VM or of another in the same
    /// frames: it shares all memory that nobody has written since, and has as many vCPUs. Says when the last of
    /// them was about to run.
    ///
    /// `options` are those of its memory: an account, if what it may have for itself is limited, and base pages, if
    /// this VM has them. Prices that it does not say are what this VM has learnt.
    ///
    /// `complete` adds what the snapshot's VM had beside memory: as many devices, made for the clone's own memory
    /// ([`Builder::ram`]), and the handler of ports. `identity` is [`Vm::start_from`]'s.
    ///
    /// # Errors
    /// See [`ForkError`].
    pub fn start_clone<'a>(
        &self,
        snapshot: &Snapshot,
        place: impl Into<Place<'a>>,
        mut options: MemoryOptions,
        complete: impl FnOnce(Builder<'a, P>) -> Builder<'a, P>,
        identity: impl FnOnce(&Vm<P>) -> Result<(), Cause>,
    ) -> Result<(Vm<P>, Instant), ForkError> {
        let frames = self.memory.frames();
        let (place, bytes) = (place.into(), self.ram().size());
        let window = match &place {
            Place::In(shell) => Arc::clone(shell.window()),
            Place::New(_) => Arc::new(frames.window(bytes, Placement::Anywhere)?),
        };
        let learnt = || self.ram().prices().as_learnt();
        options.prices.get_or_insert_with(learnt);
        let policy = self.memory.space().policy().clone();
        let plain = |window| Box::new(window) as _;
        let memory = Memory::clone_of(frames, snapshot.memory(), policy, options, window, plain)?;
        let builder = complete(Vm::builder(memory));
        let vm = match place {
            Place::In(shell) => builder.build_in(shell)?,
            Place::New(kvm) => builder.build(kvm, snapshot.vcpus().len())?,
        };
        let running = vm.start_from(snapshot, || identity(&vm))?;
        Ok((vm, running))
    }
}
