//! The protocol: frames, shadow page tables, faults, pins, forks.
//!
//! **Guarantee.** After [`AddressSpace::fork`] nothing that the parent, its devices or another fork writes is
//! ever seen in the child (isolation), and a page that a device holds pinned stays the page the guest sees
//! (coherence). Both rest on one bit a frame, *exclusive*, and four rules:
//!
//! 1. A writable entry implies an exclusive frame. The reverse does not hold: read-only and exclusive is
//!    normal.
//! 2. A write to an exclusive frame never copies. A write to any other copies, unless the writer is provably
//!    the last holder.
//! 3. A pin is only granted on an exclusive frame.
//! 4. A frame stops being exclusive only when it is shared, and a pinned frame is not shared: fork copies it
//!    at once instead.
//!
//! They are the Linux kernel's since v5.19 (`PageAnonExclusive`; David Hildenbrand, 6c287605fd56 and
//! a7f226604170).
//!
//! From the ground up, each file uses those above it in this table and none below:
//!
//! | file | concept |
//! |---|---|
//! | `addr` | page and frame numbers; sizes |
//! | `sync`, `stripe`, `bits` | atomics and locks; counts that threads do not meet on; sets of numbers |
//! | `mmu` | what is asked of the outside: two small traits |
//! | `safeguard` | the orderings and re-checks all of this rests on, by name |
//! | `entry`, `page_set`, `stats` | what a table says of a page; sets of pages; what was done so far |
//! | `frame_state` | the packed word of a frame, and its states |
//! | `policy` | the rules: may share, may write in place, may pin |
//! | `predictor` | what the guest will write: how much is copied at once, and what beforehand |
//! | `ledger` | who pays for which frame |
//! | `stock` | how much memory is ready before anybody needs it |
//! | `allocator` | who has which frame, and which frames have memory |
//! | `commit` | asking the host for memory and giving it back, with no lock held |
//! | `account`, `promise` | what one machine may take; memory that is spoken for |
//! | `home` | the frames each region of an address space has for its own |
//! | `frame` | the words of all frames, and their atomic transitions |
//! | `folio` | frames that are mapped, shared and written as one; holds on their pages |
//! | `pool_ref` | how what somebody has of a pool outlives it |
//! | `hold`, `fresh` | the handles: what devices and readers have of frames; frames between two owners |
//! | `pool` | all frames of a process, and the limit of their memory |
//! | `lent` | what of a snapshot clones show without counting it as theirs |
//! | `backed` | memory that is somewhere else still, and is brought when somebody wants it |
//! | `frozen` | snapshots, and what they share with each other |
//! | `mapped/table` | the entries of a space, and the locks of its regions |
//! | `mapped` | the table and the MMU, changed as one; what becomes of a change that is refused |
//! | `lineage` | what the next fork takes over from the last one |
//! | `space` | live address spaces; lock order |
//! | `adopt` | how what a clone has borrowed becomes its own |
//! | `open` | what comes before every change of a page |
//! | `house` | where pages get their frames, and when a region moves to another home |
//! | `fault` | write fault and unshare: how a page becomes exclusive, and who gets the copy |
//! | `dirty` | which pages were written since? Write-protection without intent to copy |
//! | `fork` | share everything, copy what is pinned |
//! | `clone` | a running space made of a snapshot |
//! | `rearrange` | how a page is taken out of its frame while devices may hold it |
//! | `discard`, `migrate`, `merge` | a balloon, compaction, deduplication |
//! | `whole` | a fault that takes all of a region at once |
//! | `ahead` | breaks before the guest asks for them |
//! | `pin`, `get` | pins, without a lock and with one; transient holds, the weaker kind |
//! | `restore`, `force` | back to a snapshot, in place; a debugger's write |
//! | `census` | what each machine and snapshot costs alone and what it shares; why a frame is alive |
//! | [`soft`] | a software MMU, for tests and model checkers |
//!
//! There are no system calls in here, no KVM and no threads: the window of a running VM, a software model and
//! a model checker are interchangeable under it.

#![forbid(unsafe_code)]

mod account;
mod addr;
mod adopt;
mod ahead;
mod allocator;
mod backed;
mod bits;
mod census;
mod clone;
mod commit;
mod differ;
mod dirty;
mod discard;
mod entry;
mod fault;
mod folio;
mod force;
mod fork;
mod frame;
mod frame_state;
mod fresh;
mod frozen;
mod gather;
mod get;
mod hold;
mod home;
mod house;
mod ledger;
mod lent;
mod lineage;
mod mapped;
mod merge;
mod migrate;
mod mmu;
mod open;
mod page_set;
mod pin;
mod policy;
mod pool;
mod pool_ref;
mod predictor;
mod promise;
mod rearrange;
mod restore;
mod safeguard;
pub mod soft;
mod space;
mod stats;
mod stock;
mod stripe;
mod sync;
mod whole;

#[cfg(all(test, not(any(loom, shuttle))))]
mod model;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
/// The example of the README, compiled and run.
#[cfg(all(doctest, not(any(loom, shuttle))))]
#[doc = include_str!("../README.md")]
mod readme {}

pub use account::Account;
pub use addr::{Access, Gfn, Order, OutOfRange, PAGE_SIZE, Pfn, Protection, REGION_PAGES};
pub use adopt::{AdoptError, TooManyMappings, Touch};
pub use allocator::PoolUsage;
pub use backed::{Backing, BackingError, BringError, Toucher};
pub use census::{Census, Counts, Holding, How, MappedBy, OtherPool, Sharing, Why};
pub use commit::AllocError;
pub use entry::Entry;
pub use fault::{FaultError, FaultOutcome, Resolution};
pub use fork::ForkError;
pub use frame_state::FrameState;
pub use frozen::{BackedRegions, Frozen, FrozenError};
pub use hold::{Get, Pin, PinnedRun};
pub use ledger::{AccountUsage, Charges};
pub use mmu::{FrameMemory, MOST_FOLIOS_AT_ONCE, Mmu, MmuError};
pub use page_set::PageSet;
pub use pin::PinError;
pub use policy::{
    AnyPolicy, Biased, CowPolicy, Exclusive, Mapcount, MapcountForcedBreak, Refcount, Seed,
    SeedRecompute,
};
pub use pool::FramePool;
pub use promise::{Promise, PromiseError};
pub use rearrange::RearrangeError;
pub use restore::RestoreError;
pub use safeguard::Safeguard;
pub use space::AddressSpace;
pub use stats::MmStats;
