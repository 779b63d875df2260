//! Registered buffers: pinned once, and held until the guest releases them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use guest::abi::MAX_REGISTERED;

use super::state::{DeviceRestoreError, RegisteredState};
use super::transfer::Buffer;
use super::transfer::MAX_DATA;
use palimpsest::host::Ram;
use palimpsest::mm::Access;

/// The registered buffers of a device, by their index.
#[derive(Default)]
pub(super) struct Registered(BTreeMap<u32, Arc<Buffer>>);

/// Whether a buffer of `len` bytes may be registered under `index`.
pub(super) fn is_sound(index: u32, len: u64) -> bool {
    u64::from(index) < MAX_REGISTERED && (1..=MAX_DATA).contains(&len)
}

impl Registered {
    pub(super) fn get(&self, index: u32) -> Option<Arc<Buffer>> {
        self.0.get(&index).cloned()
    }

    /// Holds `buffer` from now on. Says whether `index` was free: a buffer is never replaced.
    pub(super) fn add(&mut self, index: u32, buffer: &Arc<Buffer>) -> bool {
        match self.0.entry(index) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(Arc::clone(buffer));
                true
            }
        }
    }

    /// Releases the buffer. Says whether there was one.
    pub(super) fn remove(&mut self, index: u32) -> bool {
        self.0.remove(&index).is_some()
    }

    pub(super) fn len(&self) -> u64 {
        self.0.len() as u64
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn state(&self) -> Vec<RegisteredState> {
        self.0
            .iter()
            .map(|(&index, buffer)| RegisteredState {
                index,
                gpa: buffer.gpa,
                len: buffer.len(),
                for_reading: buffer.access == Access::Read,
            })
            .collect()
    }

    /// Makes these the registered buffers. Those that are held already stay pinned: a restore in place wrote
    /// into their frames. The rest is released, or pinned in memory as it is now.
    pub(super) fn restore(
        &mut self,
        ram: &Ram,
        states: &[RegisteredState],
    ) -> Result<(), DeviceRestoreError> {
        let mut held = std::mem::take(&mut self.0);
        for &RegisteredState {
            index,
            gpa,
            len,
            for_reading,
        } in states
        {
            let access = if for_reading {
                Access::Read
            } else {
                Access::Write
            };
            let is_it = |b: &Buffer| (b.gpa, b.len(), b.access) == (gpa, len, access);
            let buffer = match held.remove(&index) {
                Some(buffer) if is_it(&buffer) => buffer,
                _ => Arc::new(Buffer::pin(ram, gpa, len, access)?),
            };
            if !is_sound(index, len) || !self.add(index, &buffer) {
                return Err(DeviceRestoreError::Registered { index });
            }
        }
        Ok(())
    }
}
