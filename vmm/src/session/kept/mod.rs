//! Runs that are saved to a store, and runs that begin with what is in one.
//!
//! What a snapshot of the engine's has is enough for a machine to run on. The oracles need more: what the guest was
//! asked to do, what only booting sets, and which incarnation it is in. That is saved beside it, so that what holds
//! in one process is still checked in the next.
//!
//! | file | concept |
//! |---|---|
//! | `facts` | what the oracles need, as it is saved |
//! | `source` | a snapshot in a store, to begin with |
//! | `lazily` | when its memory is read, and what of it before somebody wants it |
//! | `loading` | a VM made of one |
//! | `saving` | a snapshot of a run into a store, while the run goes on |
//! | `checkpoints` | one every so often |
//! | `reading` | whether this program and host can make something of one |
//! | `checking` | a snapshot loaded and looked at, and no more |

mod checking;
mod checkpoints;
mod facts;
mod lazily;
mod loading;
mod reading;
mod saving;
mod source;

pub use self::checking::{CheckedKept, check};
pub(super) use self::checkpoints::Checkpoints;
pub use self::checkpoints::{Every, checkpoint_name, next_number};
pub(super) use self::lazily::Going as LoadGoing;
pub use self::lazily::{Lazy, Loading, Prefetch};
pub use self::loading::LoadError;
pub(super) use self::loading::{Loaded, Purpose, load};
pub use self::reading::obstacles;
pub use self::saving::Keep;
pub(super) use self::saving::{Going, Keeping, Of, Then};
pub use self::source::{Source, SourceError};
