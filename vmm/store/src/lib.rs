//! Kept snapshots as files: a *store* is a directory, in which each snapshot is a directory, and memory is in
//! *chunks* that are named by what is in them.
//!
//! This crate owns what is on disk, and nothing else: the format (`docs/format.md` is its specification), how
//! it is written so that nothing is visible under its final name before it is whole and durable, and how it is
//! read so that no byte is used that was not checked. It knows neither guests nor vCPUs: memory is bytes by
//! region, and a part of a machine a name, a version and bytes.
//!
//! ```text
//!   STORE/store.json                  which format this is
//!   STORE/chunks/ab/abcd....          2 MiB of memory, named by its BLAKE3 hash; .zst if it is compressed
//!   STORE/NAME/snapshot.json          what the snapshot NAME is, with the hashes of the two below
//!   STORE/NAME/memory                 which region is in which chunk
//!   STORE/NAME/state                  registers and devices
//!   STORE/tmp/...                     what is being written
//! ```
//! ```
//! use palimpsest_store::{Buffer, Hold, Saving, SaveOptions, SnapshotName, Store};
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("store");
//! let store = Store::open_or_create(&path)?;
//! let name: SnapshotName = "warm".parse()?;
//!
//! let memory = 4 << 20;
//! let mut saving = Saving::begin(&store, &name, memory, SaveOptions::default())?;
//! saving.region(1, &vec![7; 2 << 20])?;
//! saving.finish(Default::default(), &[])?;
//!
//! let kept = store.read(&name)?;
//! let mut region = Buffer::new(2 << 20);
//! kept.region(1, &mut region)?;
//! assert_eq!(region[..], vec![7; 2 << 20]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | file | concept |
//! |---|---|
//! | `store` | a store: where things are in it, and who may use it meanwhile |
//! | `name` | names of snapshots |
//! | `hash` | hashes, and how they are written |
//! | `manifest` | `snapshot.json` |
//! | `index` | `memory`: which region is in which chunk |
//! | `parts` | `state` |
//! | `chunk` | a chunk's file |
//! | `buffer` | room for what is in one |
//! | `save` | writing a snapshot |
//! | `writers` | writing its chunks meanwhile, and giving them their names |
//! | `right` | chunks that need not be read again to be named |
//! | `read` | reading one |
//! | `touched` | what of one was wanted first when it was loaded |
//! | `verify`, `list`, `diff`, `prune` | what is done with those that are there |
//! | `objects` | stores that are in no directory: objects by key, as an object store has them |
//! | `copy` | copying a snapshot from one store to another: a push, a pull |
//! | `cache` | chunks of stores elsewhere, kept on this host |
//! | `disk` | all operations on files, so that each can be refused |
//!
//! Not covered: whoever can write to the store can put another snapshot there, hashes and all. Hashes find what
//! went wrong, not who did it.

#![forbid(unsafe_code)]

mod buffer;
mod cache;
mod chunk;
mod copy;
mod diff;
mod disk;
mod error;
mod hash;
mod index;
mod list;
mod manifest;
mod name;
mod objects;
mod parts;
mod prune;
mod read;
mod right;
mod save;
mod store;
#[cfg(test)]
mod tests;
mod touched;
mod verify;
mod writers;

pub use self::buffer::Buffer;
pub use self::cache::{Cache, CacheCounts};
pub use self::chunk::{CHUNK_BYTES, data_runs};
pub use self::copy::{Copied, CopyOptions, copy};
pub use self::diff::{Difference, diff};
pub use self::error::StoreError;
pub use self::hash::Hash;
pub use self::index::{ChunkIndex, IndexError, MAX_MEMORY_BYTES};
pub use self::list::{Entry, Usage, list};
pub use self::manifest::{
    Cpu, FileFacts, Machine, Manifest, ManifestError, MemoryFacts, Parent, VERSION,
};
pub use self::name::{NameError, SnapshotName};
pub use self::objects::{CalledOff, Listing, Objects, Piece};
pub use self::parts::{Part, PartsError, decode_parts, encode_parts};
pub use self::prune::{Pruned, prune};
pub use self::read::Kept;
pub use self::save::{Compression, Facts, SaveOptions, Saved, Saving};
pub use self::store::{Hold, Store, locate};
pub use self::verify::{Verified, verify};
