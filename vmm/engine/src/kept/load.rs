//! A snapshot out of a store.

use std::sync::Arc;
use std::time::Instant;

use super::save::{DEVICE, Progress, VCPU, part_name};
use super::store::{Buffer, CHUNK_BYTES, Kept, Saved, StoreError, data_runs};
use crate::host::{Ram, RamError};
use crate::kvm::MAX_VCPUS;
use crate::mm::Frozen;
use crate::saved;
use crate::snapshot::Snapshot;
use crate::timeline::span;

/// Why a snapshot could not be loaded. What was made for it is only good to be dropped.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store could not give it.
    #[error("cannot load the snapshot")]
    Store(#[from] StoreError),
    /// The memory that it is to be in is of another size.
    #[error("the snapshot has {snapshot} bytes of memory, and there are {memory} for it")]
    Size {
        /// Bytes of the snapshot.
        snapshot: u64,
        /// Bytes there are.
        memory: u64,
    },
    /// Memory could not be written: there are no frames.
    #[error("cannot write the snapshot's memory at {gpa:#x}")]
    Memory {
        /// Where.
        gpa: u64,
        /// Why.
        source: RamError,
    },
    /// A part of the machine is not there.
    #[error("the snapshot has no part `{name}`")]
    NoPart {
        /// Its name.
        name: String,
    },
    /// It has no vCPUs, or more than a machine may have.
    #[error("the snapshot has {vcpus} vcpus: a machine has 1 to {MAX_VCPUS}")]
    Vcpus {
        /// How many.
        vcpus: u32,
    },
    /// It has more devices than parts can be.
    #[error("the snapshot has {devices} devices, more than there are parts of it")]
    Devices {
        /// How many.
        devices: u32,
    },
}

/// Fills `ram`, all of which is zeros, with the memory of `kept`. `watch` is told how far it is, and says whether to
/// go on.
///
/// # Errors
/// If it is of another size, a chunk is not there or damaged, or there are no frames.
pub fn fill(
    kept: &Kept,
    ram: &Ram,
    watch: &mut dyn FnMut(&Progress) -> bool,
) -> Result<(), LoadError> {
    let _span = span!("load memory");
    let (snapshot, memory) = (kept.index().memory_bytes(), ram.size());
    if snapshot != memory {
        return Err(LoadError::Size { snapshot, memory });
    }
    let began = Instant::now();
    let all = kept.index().len();
    let mut done = 0;
    let mut write = |region: u64, content: &[u8]| -> Result<(), LoadError> {
        let progress = Progress {
            done: done * CHUNK_BYTES,
            bytes: all * CHUNK_BYTES,
            elapsed: began.elapsed(),
            saved: Saved::default(),
        };
        if !watch(&progress) {
            return Err(StoreError::CalledOff.into());
        }
        // Zeros take no frames.
        for (offset, run) in data_runs(content) {
            let gpa = region * CHUNK_BYTES + offset as u64;
            let written = ram.write(gpa, run);
            written.map_err(|source| LoadError::Memory { gpa, source })?;
        }
        done += 1;
        Ok(())
    };
    if kept.store().is_remote() {
        kept.each_region(&mut write)?;
    } else {
        let mut content = Buffer::new(CHUNK_BYTES as usize);
        for (region, _) in kept.index().iter() {
            let content = &mut content[..kept.index().region_bytes(region) as usize];
            kept.region(region, content)?;
            write(region, content)?;
        }
    }
    watch(&Progress {
        done: all * CHUNK_BYTES,
        bytes: all * CHUNK_BYTES,
        elapsed: began.elapsed(),
        saved: Saved::default(),
    });
    Ok(())
}

/// What `kept` is a snapshot of, with memory that was filled with it: what a VM is started from. The states in it
/// are bytes that nobody has looked at.
///
/// # Errors
/// If a part is missing, or it says that there are more than can be.
pub fn snapshot_of(kept: &Kept, memory: Arc<Frozen>) -> Result<Snapshot, LoadError> {
    let machine = &kept.manifest().machine;
    let (vcpus, devices) = (machine.vcpus, machine.devices);
    if !(1..=MAX_VCPUS as u32).contains(&vcpus) {
        return Err(LoadError::Vcpus { vcpus });
    }
    if devices as usize > kept.parts().len() {
        return Err(LoadError::Devices { devices });
    }
    let states = |what, count: u32| {
        let states = (0..count as usize).map(|number| {
            let name = part_name(what, number);
            match kept.part(&name) {
                Some(part) => Ok(saved::Saved::stored(part.version, part.bytes.clone())),
                None => Err(LoadError::NoPart { name }),
            }
        });
        states.collect::<Result<Vec<_>, _>>()
    };
    Ok(Snapshot::new(
        memory,
        states(VCPU, vcpus)?,
        states(DEVICE, devices)?,
    ))
}
