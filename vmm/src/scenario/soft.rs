//! A stage without a machine: the software MMU, and frames of one word.

use std::sync::Arc;

use super::performer::{Memory, PAGES};
use super::stage::{Actor, Stage, StageError, Wrap};
use palimpsest::mm::soft::{SoftMemory, SoftMmu, SoftVm};
use palimpsest::mm::{AddressSpace, AnyPolicy, FrameMemory, FramePool, Frozen, Gfn, Order, Pfn};

/// Frames that may have memory: few, so that they are soon exhausted.
const FRAME_LIMIT: u64 = 128;
/// Frame numbers: enough for all homes.
const FRAMES: u64 = 16 * FRAME_LIMIT;
/// A huge folio is all of an address space.
const FOLIO: Order = Order::new(PAGES.trailing_zeros() as u8);
const _: () = assert!(FOLIO.pages() == PAGES);

/// A model of a machine.
#[derive(Debug)]
pub struct SoftStage {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
}

impl Stage for SoftStage {
    const NAME: &'static str = "the software MMU";
    type Actor = SoftVm<AnyPolicy>;

    fn new(memory: Memory) -> Result<Self, StageError> {
        let order = match memory {
            // Far too large for any of its address spaces.
            Memory::Base => Order::HUGE,
            Memory::Huge => FOLIO,
        };
        let memory = SoftMemory::new(FRAMES);
        let frames = Arc::clone(&memory) as Arc<dyn FrameMemory>;
        let pool = FramePool::with_folios_of(order, frames, FRAMES, FRAME_LIMIT)?;
        Ok(Self { pool, memory })
    }

    fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    fn parent(&self, policy: AnyPolicy, wrap: Wrap<'_>) -> Result<SoftVm<AnyPolicy>, StageError> {
        let mmu = SoftMmu::new(PAGES);
        let wrapped = wrap(Box::new(Arc::clone(&mmu)));
        let space = AddressSpace::new(Arc::clone(&self.pool), policy, wrapped, PAGES)?;
        Ok(SoftVm::over(space, mmu, &self.memory))
    }

    fn child(
        &self,
        frozen: &Frozen,
        policy: AnyPolicy,
        wrap: Wrap<'_>,
    ) -> Result<SoftVm<AnyPolicy>, StageError> {
        let mmu = SoftMmu::new(frozen.pages());
        let wrapped = wrap(Box::new(Arc::clone(&mmu)));
        let space = AddressSpace::from_frozen(frozen, policy, wrapped)?;
        Ok(SoftVm::over(space, mmu, &self.memory))
    }

    fn gfn(&self, page: u64) -> Gfn {
        Gfn(page)
    }

    fn load(&self, frame: Pfn) -> u64 {
        self.memory.load(frame)
    }

    fn store(&self, frame: Pfn, value: u64) {
        self.memory.store(frame, value);
    }
}

impl Actor for SoftVm<AnyPolicy> {
    fn space(&self) -> &AddressSpace<AnyPolicy> {
        &self.space
    }

    fn cpu_write(&self, page: u64, value: u64) -> Result<(), StageError> {
        Ok(SoftVm::cpu_write(self, Gfn(page), value)?)
    }

    fn cpu_read(&self, page: u64) -> Result<u64, StageError> {
        Ok(SoftVm::cpu_read(self, Gfn(page)))
    }
}
