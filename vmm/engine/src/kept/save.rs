//! A snapshot into a store, beside the guest that runs on.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::store::{
    CHUNK_BYTES, ChunkIndex, Compression, Facts, Kept, Parent, Part, SaveOptions, Saved, Saving,
    SnapshotName, Store, StoreError,
};
use crate::aside::Aside;
use crate::memory::Frames;
use crate::mm::{Frozen, FrozenError, Gfn, PAGE_SIZE};
use crate::saved;
use crate::snapshot::Snapshot;
use crate::timeline::span;

/// How often who waits looks whether it is called off.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes that are copied out of a snapshot before whoever does it looks whether to step aside.
const PIECE: u64 = 64 << 10;

/// Why a snapshot could not be saved. It is as it was, the guest runs on, and the store has none of that name.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The store could not take it.
    #[error("cannot save the snapshot")]
    Store(#[from] StoreError),
    /// Its memory cannot be read: what it was loaded from does not give it.
    #[error("cannot read the snapshot's memory")]
    Memory(#[from] FrozenError),
}

/// A snapshot whose memory is in a store and here: what another has in common with it need not be read again.
#[derive(Clone, Debug)]
pub struct Base {
    parent: Parent,
    memory: Arc<Frozen>,
    index: ChunkIndex,
}

impl Base {
    /// `kept`, whose memory `memory` has been filled with and not written since: frozen before any vCPU ran, or
    /// what was saved under that name.
    pub fn new(kept: &Kept, memory: Arc<Frozen>) -> Self {
        Self {
            parent: kept.as_parent(),
            memory,
            index: kept.index().clone(),
        }
    }

    /// Its name in the store when it was loaded or saved.
    pub fn name(&self) -> &SnapshotName {
        &self.parent.name
    }
}

/// How far a save is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Bytes of memory that are done, of all there are, zeros included.
    pub done: u64,
    /// All there are.
    pub bytes: u64,
    /// Since it began.
    pub elapsed: Duration,
    /// What was written so far.
    pub saved: Saved,
}

impl Progress {
    /// Bytes of memory a second.
    pub fn rate(&self) -> f64 {
        self.done as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// How long the rest will take, if it goes on so.
    pub fn left(&self) -> Option<Duration> {
        let left = self.bytes.saturating_sub(self.done) as f64 / self.rate().max(1.0);
        (self.done > 0).then(|| Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX))
    }
}

/// What is to be saved, and how.
#[derive(Debug)]
pub struct Saver<'a> {
    /// Where to.
    pub store: &'a Store,
    /// Under which name.
    pub name: SnapshotName,
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// The frames its memory is in.
    pub frames: &'a Frames,
    /// What it may have in common with.
    pub base: Option<&'a Base>,
    /// The snapshot that it is called an increment of, if that is not `base`. Neither need be in the store any more.
    pub parent: Option<Parent>,
    /// How chunks are kept.
    pub compression: Compression,
    /// Who steps aside for the guest while its vCPUs are stopped and started.
    pub aside: Option<&'a Aside>,
    /// The most bytes of memory, or of the chunks it is in, a second that are read, hashed and written: less of the host's time is taken from
    /// the guest then. Nothing: as many as go.
    pub most_a_second: Option<NonZeroU64>,
    /// What else is to be known of it.
    pub facts: Facts,
    /// Parts beside those of the machine, whose names are neither `vcpu/...` nor `device/...`.
    pub parts: Vec<Part>,
}

impl Saver<'_> {
    /// Saves it. `watch` is told how far it is, once a region of 2 MiB, and says whether to go on. When this
    /// returns all of it is durable.
    ///
    /// # Errors
    /// See [`SaveError`].
    pub fn save(self, watch: &mut dyn FnMut(&Progress) -> bool) -> Result<Saved, SaveError> {
        let _span = span!("save snapshot");
        let memory = self.snapshot.memory();
        let began = Instant::now();
        let bytes = memory.pages() * PAGE_SIZE;
        let base = self
            .base
            .filter(|base| base.memory.pages() == memory.pages());
        let options = SaveOptions {
            compression: self.compression,
            parent: self.parent.clone().or_else(|| Some(base?.parent.clone())),
        };
        let mut saving = Saving::begin(self.store, &self.name, bytes, options)?;
        let mut read = 0;
        for region in 0..bytes.div_ceil(CHUNK_BYTES) {
            let progress = Progress {
                done: region * CHUNK_BYTES,
                bytes,
                elapsed: began.elapsed(),
                saved: saving.so_far(),
            };
            if !watch(&progress) {
                return Err(StoreError::CalledOff.into());
            }
            let first = Gfn(region * CHUNK_BYTES / PAGE_SIZE);
            if memory.is_untouched(first).map_err(FrozenError::from)? {
                continue;
            }
            let mut is_same = false;
            if let Some(base) = base
                && memory
                    .has_in_common(&base.memory, first)
                    .map_err(FrozenError::from)?
            {
                let Some(hash) = base.index.get(region) else {
                    continue;
                };
                self.aside.into_iter().for_each(Aside::pass);
                is_same = saving.same(region, hash)?;
                // If not it is gone, or damaged: what is in it is here.
            }
            if !is_same {
                let mut content = saving.room(region);
                let gpas = (region * CHUNK_BYTES..).step_by(PIECE as usize);
                for (gpa, piece) in gpas.zip(content.chunks_mut(PIECE as usize)) {
                    self.aside.into_iter().for_each(Aside::pass);
                    self.frames.read(memory, gpa, piece)?;
                }
                saving.region_of(region, content)?;
            }
            // Its chunk may have been, if it is the same.
            read += saving.region_bytes(region);
            let progress = Progress {
                done: (region + 1) * CHUNK_BYTES,
                saved: saving.so_far(),
                ..progress
            };
            if !self.keep_pace(began, read, &progress, watch) {
                return Err(StoreError::CalledOff.into());
            }
        }
        let states = |what, states: &[saved::Saved]| {
            let parts = states.iter().enumerate().map(|(number, state)| Part {
                name: part_name(what, number),
                version: state.version(),
                bytes: state.to_bytes(),
            });
            Vec::from_iter(parts)
        };
        let mut parts = states(VCPU, self.snapshot.vcpus());
        parts.extend(states(DEVICE, self.snapshot.devices()));
        parts.extend(self.parts);
        let saved = saving.finish(self.facts, &parts)?;
        watch(&Progress {
            done: bytes,
            bytes,
            elapsed: began.elapsed(),
            saved,
        });
        Ok(saved)
    }
}

impl Saver<'_> {
    /// Waits until as much time has passed as `read` bytes are to take at least. No lock is held meanwhile. Says whether
    /// to go on.
    fn keep_pace(
        &self,
        began: Instant,
        read: u64,
        progress: &Progress,
        watch: &mut dyn FnMut(&Progress) -> bool,
    ) -> bool {
        let Some(most) = self.most_a_second else {
            return true;
        };
        let least = Duration::try_from_secs_f64(read as f64 / most.get() as f64);
        let least = least.unwrap_or(Duration::MAX);
        loop {
            let elapsed = began.elapsed();
            let Some(left) = least.checked_sub(elapsed).filter(|left| !left.is_zero()) else {
                return true;
            };
            let now = Progress {
                elapsed,
                ..*progress
            };
            if !watch(&now) {
                return false;
            }
            thread::sleep(left.min(LOOK));
        }
    }
}

/// What parts of vCPUs and devices are called.
pub(super) const VCPU: &str = "vcpu";
pub(super) const DEVICE: &str = "device";

pub(super) fn part_name(what: &str, number: usize) -> String {
    format!("{what}/{number}")
}
