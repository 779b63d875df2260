//! Tests of the store as a whole, and the disks that they are on.
//!
//! | file | concept |
//! |---|---|
//! | `memory` | a disk in memory that can lose its power |
//! | `faulty` | a disk that refuses, is short, or dies at its k-th operation |
//! | `bucket` | objects in memory, whose k-th operation goes wrong, or is when somebody else does something |
//! | `saving` | what is saved is what is loaded |
//! | `right` | what was seen to be right is not read again |
//! | `strangers` | what is no store or no snapshot is left alone |
//! | `damage` | every byte of a small snapshot changed, and every file cut |
//! | `refused` | each operation refused in turn |
//! | `power` | the power lost at each operation in turn |
//! | `copying` | copies between directories and objects, refused, cut and raced at each operation in turn |
//! | `caching` | the cache of chunks |
//! | `mutated` | a short run of what `tests/fuzz` does for long |
//! | `golden` | snapshots of each version, as they were once written |

mod bucket;
mod caching;
mod copying;
mod damage;
mod faulty;
mod golden;
mod memory;
mod mutated;
mod power;
mod refused;
mod right;
mod saving;
mod strangers;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use crate::chunk::CHUNK_BYTES;
use crate::disk::Disk;
use crate::error::StoreError;
use crate::name::SnapshotName;
use crate::parts::tests::example as parts;
use crate::save::{Compression, Facts, SaveOptions, Saved, Saving};
use crate::store::Store;
use crate::verify::verify;

/// A region, and a little one.
const MEMORY: u64 = CHUNK_BYTES + 2 * 4096;

/// Memory by region.
type Memory = BTreeMap<u64, Vec<u8>>;

fn name(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

fn store_on(disk: &Arc<dyn Disk>) -> Result<Store, StoreError> {
    Store::open_or_create_on(Path::new("/store"), Arc::clone(disk))
}

/// Memory that has `first` in its first region, and `last` in its last.
fn memory(first: u8, last: u8) -> Memory {
    let mut region = vec![0; CHUNK_BYTES as usize];
    region[4096 * 3 + 5] = first;
    region[4096 * 9..4096 * 11].fill(first);
    BTreeMap::from([(0, region), (1, vec![last; 2 * 4096])])
}

fn save(store: &Store, as_name: &str, memory: &Memory) -> Result<Saved, StoreError> {
    save_with(store, as_name, memory, SaveOptions::default())
}

fn save_with(
    store: &Store,
    as_name: &str,
    memory: &Memory,
    options: SaveOptions,
) -> Result<Saved, StoreError> {
    let mut saving = Saving::begin(store, &name(as_name), MEMORY, options)?;
    for (region, content) in memory {
        saving.region(*region, content)?;
    }
    saving.finish(Facts::default(), &parts())
}

fn load(store: &Store, named: &str) -> Result<Memory, StoreError> {
    let kept = store.read(&name(named))?;
    assert_eq!(kept.parts(), parts());
    let mut memory = Memory::new();
    for region in 0..kept.index().regions() {
        let mut content = vec![0; kept.index().region_bytes(region) as usize];
        kept.region(region, &mut content)?;
        memory.insert(region, content);
    }
    Ok(memory)
}

/// What is wrong with a snapshot.
fn wrong(store: &Store, named: &str) -> Vec<StoreError> {
    let verified = verify(store, &name(named), &mut HashSet::new(), &mut |_, _| true);
    verified.unwrap().wrong
}

fn zstd() -> SaveOptions {
    SaveOptions {
        compression: Compression::Zstd { level: 3 },
        ..SaveOptions::default()
    }
}
