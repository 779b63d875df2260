//! What operations have in common that take a page out of its frame: discard, migrate, merge.
//!
//! None of them may touch a frame that a device holds. Each *isolates* the frame first: in one
//! compare-and-swap the page's mapping becomes a hold, if nobody else is in the way. A frame that nothing
//! maps can be neither pinned nor held, so whoever comes later waits for the region's lock; whoever came
//! before is counted, and the operation is refused with everything as it was (I10). It is what the kernel
//! does with a cleared entry and a frozen reference count (PROTOCOL.md 5.2, 4.11).

use super::addr::{Gfn, OutOfRange};
use super::adopt::{AdoptError, TooManyMappings};
use super::backed::BringError;
use super::commit::AllocError;
use super::frame_state::FrameState;
use super::mmu::MmuError;

/// Why pages were left where they are. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum RearrangeError {
    /// No such page.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// A device or a reader holds the frame, or another address space shares it.
    #[error("{gfn:?} is busy: its frame is {state:?}")]
    Busy {
        /// The page.
        gfn: Gfn,
        /// Who is in the way.
        state: FrameState,
    },
    /// The region is borrowed, and cannot be made the space's own.
    #[error(transparent)]
    TooManyMappings(#[from] TooManyMappings),
    /// The bytes of the region are somewhere else still, and cannot be had.
    #[error(transparent)]
    Bring(#[from] BringError),
    /// Merge only: the page was never touched, so there is no frame to save.
    #[error("{gfn:?} was never touched")]
    Untouched {
        /// The page.
        gfn: Gfn,
    },
    /// Merge only: the pages do not hold the same bytes.
    #[error("{one:?} and {other:?} differ")]
    Different {
        /// A page.
        one: Gfn,
        /// The other.
        other: Gfn,
    },
    /// Merge only: the frames are of two pools.
    #[error("the address spaces take their frames from different pools")]
    OtherPool,
    /// Migrate only: no frame to go to.
    #[error(transparent)]
    Alloc(#[from] AllocError),
    /// The MMU could not be changed.
    #[error(transparent)]
    Mmu(#[from] MmuError),
}

impl From<AdoptError> for RearrangeError {
    fn from(error: AdoptError) -> Self {
        match error {
            AdoptError::TooManyMappings(error) => error.into(),
            AdoptError::Bring(error) => error.into(),
            AdoptError::Mmu(error) => error.into(),
        }
    }
}
