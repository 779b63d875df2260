//! Where an emulated scenario is played: what stands in for the machine around `mm`.

use std::sync::Arc;

use super::performer::Memory;
use palimpsest::mm::{AddressSpace, AnyPolicy, FramePool, Frozen, Gfn, Mmu, Pfn};

/// Why the stage could not do its part.
pub type StageError = Box<dyn std::error::Error + Send + Sync>;

/// Puts itself between an address space and its MMU.
pub type Wrap<'a> = &'a dyn Fn(Box<dyn Mmu>) -> Box<dyn Mmu>;

/// A machine for scenarios: frames, and actors that run in address spaces. [`super::soft::SoftStage`] is a
/// model of one, [`super::real::RealStage`] has vCPUs.
pub trait Stage: Sized {
    /// Its name in reports.
    const NAME: &'static str;
    /// A running address space.
    type Actor: Actor;

    /// A stage with its own frames, on which the pages of an actor are in `memory`. With [`Memory::Huge`]
    /// they are all in one folio, and an address space is of one folio.
    ///
    /// # Errors
    /// If this machine has not what it needs.
    fn new(memory: Memory) -> Result<Self, StageError>;

    /// The frames of everybody.
    fn pool(&self) -> &Arc<FramePool>;

    /// An actor with untouched memory. Its MMU is what `wrap` makes of the stage's own.
    fn parent(&self, policy: AnyPolicy, wrap: Wrap<'_>) -> Result<Self::Actor, StageError>;

    /// An actor that starts with the memory of `frozen`, shared. There may be several of one snapshot, and of
    /// snapshots of each other.
    fn child(
        &self,
        frozen: &Frozen,
        policy: AnyPolicy,
        wrap: Wrap<'_>,
    ) -> Result<Self::Actor, StageError>;

    /// Guest page number of page `page` of the scenario, in every address space.
    fn gfn(&self, page: u64) -> Gfn;

    /// The first word of a frame, as a device or a reader sees it.
    fn load(&self, frame: Pfn) -> u64;

    /// Writes the first word of a frame, as a device does.
    fn store(&self, frame: Pfn, value: u64);
}

/// A running address space and its CPU. Dropping it ends both; pins and holds taken
/// through the space live on.
pub trait Actor {
    /// The address space.
    fn space(&self) -> &AddressSpace<AnyPolicy>;

    /// The CPU writes the first word of a page.
    fn cpu_write(&self, page: u64, value: u64) -> Result<(), StageError>;

    /// The CPU reads the first word of a page.
    fn cpu_read(&self, page: u64) -> Result<u64, StageError>;
}
