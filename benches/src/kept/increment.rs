//! A save of what has changed since another, against that one: one stretch of memory, and as many pages
//! anywhere.
//!
//! Nobody runs: memory is written by the host, so that what has changed is known to the page.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use guest::abi::PAGE_SIZE;
use palimpsest::kept::Base;
use palimpsest::kept::store::{Machine, Store};
use palimpsest::kvm::VcpuState;
use palimpsest::memory::{Frames, Memory};
use palimpsest::saved::Saved;
use palimpsest::snapshot::Snapshot;
use serde::{Deserialize, Serialize};

use super::store::{has_room, read, save};
use super::{KeptError, content, host};
use crate::clones::{MeasureError, check};
use crate::footprint;
use crate::summary::{Summary, Times};

/// Of so many pages one has changed.
pub const ONE_OF: u64 = 100;

/// What increments cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IncrementCost {
    /// Bytes of memory, all of it in chunks.
    pub memory: u64,
    /// Bytes that have changed.
    pub changed: u64,
    /// The first save, of all of it.
    pub full: Written,
    /// Nothing has changed.
    pub nothing: Written,
    /// One stretch has.
    pub stretch: Written,
    /// As many pages anywhere.
    pub scattered: Written,
}

/// What a save has written, and how long it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// Bytes of chunks, index, state and manifest.
    pub bytes: u64,
    /// Until all was durable.
    pub us: Summary,
}

#[derive(Default)]
struct Measured {
    bytes: u64,
    times: Times,
}

impl Measured {
    fn written(&self) -> Written {
        Written {
            bytes: self.bytes,
            us: self.times.summary().unwrap_or_default(),
        }
    }
}

/// Measures it over `rounds` of each, in a store of its own each round.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    dir: &Path,
    bytes: u64,
    rounds: u64,
    stop: &AtomicBool,
) -> Result<IncrementCost, KeptError> {
    has_room(dir, 3 * bytes + (1 << 30))?;
    let available = footprint::available().map_err(host("tell how much memory there is"))?;
    let needed = 4 * bytes + (1 << 30);
    if available < needed {
        return Err(MeasureError::NoMemory { needed, available }.into());
    }
    let frames = Frames::new(3 * bytes)?;
    let memory = Memory::new(&frames, bytes)?;
    let write = |gpa: u64, bytes: &[u8]| {
        let written = memory.ram().write(gpa, bytes);
        written.map_err(|error| MeasureError::Reach(error.into()))
    };
    content::fill(1, 0, bytes, write)?;
    let pages = bytes / PAGE_SIZE;
    let changed = pages / ONE_OF;
    let mut measured: [Measured; 4] = Default::default();
    for round in 0..rounds {
        let scratch = tempfile::tempdir_in(dir).map_err(host("make a directory"))?;
        let store = Store::open_or_create(&scratch.path().join("store"))?;
        let mut base: Option<Base> = None;
        let mut page = [0; PAGE_SIZE as usize];
        for (what, measured) in ["full", "nothing", "stretch", "scattered"]
            .into_iter()
            .zip(&mut measured)
        {
            check(stop)?;
            let seed = 2 + round;
            // From the middle of a region on, which is the worse case.
            let stretch = |n: u64| pages / 3 + 200 + n;
            // By an odd number that shares no divisor with so many pages: another page each time.
            let anywhere = |n: u64| (n * 0x9e37_79b1 + 17 * seed) % pages;
            let written: &dyn Fn(u64) -> u64 = match what {
                "stretch" => &stretch,
                "scattered" => &anywhere,
                _ => &|_| pages,
            };
            for n in 0..changed {
                let gpa = written(n) * PAGE_SIZE;
                if gpa < bytes {
                    content::region(seed, gpa, &mut page);
                    write(gpa, &page)?;
                }
            }
            let snapshot = snapshot_of(&memory)?;
            let (saved, took) = save(
                &store,
                what,
                &snapshot,
                &frames,
                base.as_ref(),
                Machine::default(),
            )?;
            let kept = read(&store, what)?;
            let files = kept.manifest().memory.index.bytes + kept.manifest().state.bytes;
            measured.bytes = saved.bytes_written + files;
            measured.times.record(took);
            base = Some(Base::new(&kept, snapshot.memory().clone()));
        }
    }
    let [full, nothing, stretch, scattered] = measured.map(|measured| measured.written());
    Ok(IncrementCost {
        memory: bytes,
        changed: changed * PAGE_SIZE,
        full,
        nothing,
        stretch,
        scattered,
    })
}

/// A snapshot of memory that no vCPU writes.
pub fn snapshot_of(memory: &Memory) -> Result<Snapshot, KeptError> {
    let vcpu = VcpuState::of(Default::default(), Default::default(), Vec::new());
    Ok(Snapshot::new(
        memory.space().fork()?,
        vec![Saved::new(vcpu)],
        Vec::new(),
    ))
}
