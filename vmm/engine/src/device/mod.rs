//! What a device must do for snapshots, and what it does DMA with.
//!
//! A device is whatever reads or writes guest memory beside the vCPUs. It reaches memory by pins alone
//! ([`Ram::pin`](crate::host::Ram::pin) gives runs of host addresses, held until dropped), and a pinned page
//! stays the page that the guest sees, snapshots or not. What is left is a consistent cut: a completion and
//! its data are both in a snapshot or neither is. For that a device [stops at a boundary](Quiesce).
//!
//! | file | concept |
//! |---|---|
//! | `quiesce` | stop, capture, restore, go on |
//! | `ring` | a virtqueue, pinned while it is looked at |

mod quiesce;
mod ring;

pub use quiesce::{Quiesce, Stopped};
pub use ring::{Ring, RingError, RingLayout, UsedRing};
