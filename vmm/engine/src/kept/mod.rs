//! Kept snapshots: a [`Snapshot`] as files, and a VM made of such files, in another process or on another host.
//!
//! ```text
//!   VM ── snapshot ──> Snapshot ── save ──> STORE/NAME        beside the running guest: what it writes
//!                                                             meanwhile goes elsewhere, as under any snapshot
//!   STORE/NAME ── lazily ──> Frozen ── Memory::clone_of ──> Memory     nothing was read yet
//!              or fill ──> Memory ── fork ──> Frozen                   all was
//!              ── snapshot_of ──> Snapshot ──> Vm::start_from
//! ```
//! How it is written and read is the store's ([`palimpsest_store`]): nothing is there under its name before it is
//! whole and durable, and nothing is used that was not checked. Here is what a snapshot is to a machine: parts
//! by name, and what a host must have for them ([`check`]).
//!
//! Memory is loaded **lazily** ([`lazily`]): a chunk is read, and checked where it is then, when somebody first touches
//! what is in it, and what nobody touches is never read. Or all of it is read and checked before the first vCPU runs
//! ([`fill`]), which is right everywhere; where the other is not, [`may_be_lazy`] says so. Pages of zeros take no frames.
//! The memory of a VM that was loaded, frozen before it runs, is a [`Base`]: what is not written after that is not read
//! again by the next save, which is an increment.
//!
//! | file | concept |
//! |---|---|
//! | `cpu` | which features a guest has seen, and which of them are not here |
//! | `facts` | what a machine needs of a host |
//! | `save` | a snapshot into a store |
//! | `load` | out of it |
//! | `chunks` | memory out of it as it is used: what backs it |
//! | `prefetch` | and before it is |
//!
//! Everything that comes from a store is untrusted: what is no state of a vCPU or a device is refused by these, and
//! KVM refuses registers that no CPU has. What a store cannot know is whether the memory in it is that of a guest
//! that does no harm: without KVM ([`user`](crate::user)) load nothing that you would not run as a program.
//!
//! [`Snapshot`]: crate::snapshot::Snapshot

mod chunks;
mod cpu;
mod facts;
mod load;
mod prefetch;
mod save;
#[cfg(test)]
mod tests;

pub use palimpsest_store as store;

pub use self::chunks::{BroughtCounts, ChunkError, Chunks, LazyOptions, lazily, may_be_lazy};
pub use self::facts::{Refusal, check, machine};
pub use self::load::{LoadError, fill, snapshot_of};
pub use self::prefetch::Prefetcher;
pub use self::save::{Base, Progress, SaveError, Saver};
