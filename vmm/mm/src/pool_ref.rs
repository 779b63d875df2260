//! References to a frame pool, by which frames that somebody has outlive it.

use std::fmt;
use std::sync::Arc;

use crossbeam_utils::CachePadded;

use super::addr::Pfn;
use super::commit::Supply;
use super::frame::FrameTable;
use super::mmu::FrameMemory;
use super::stripe::Striped;

/// A counted reference to what a handle on a frame needs of the frame's pool.
///
/// Every handle takes one and gives it back. If all of them changed one count, two devices on different pages
/// would fight for its cache line. So a pool has a count for each stripe of threads, as the kernel's
/// `percpu_ref` has one for each CPU. A handle that is dropped on another thread gives back the reference it
/// was made with.
#[derive(Clone)]
pub(super) struct PoolRef(Arc<CachePadded<Parts>>);

struct Parts {
    frames: Arc<FrameTable>,
    supply: Arc<Supply>,
}

impl PoolRef {
    /// One reference for each stripe of threads, each with a count of its own.
    pub(super) fn striped(frames: &Arc<FrameTable>, supply: &Arc<Supply>) -> Striped<Self> {
        Striped::new(|| {
            Self(Arc::new(CachePadded::new(Parts {
                frames: Arc::clone(frames),
                supply: Arc::clone(supply),
            })))
        })
    }

    #[inline]
    pub(super) fn frames(&self) -> &FrameTable {
        &self.0.frames
    }

    pub(super) fn memory(&self) -> &dyn FrameMemory {
        self.0.supply.memory()
    }

    pub(super) fn free(&self, pfn: Pfn) {
        self.0.supply.free(pfn, 1);
    }

    pub(super) fn free_folio(&self, head: Pfn) {
        self.0.supply.free(head, self.frames().huge.pages());
    }
}

impl fmt::Debug for PoolRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolRef").finish_non_exhaustive()
    }
}
