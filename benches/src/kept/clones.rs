//! Memory of clones of a snapshot that was loaded once: what they have beyond what each has written.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use guest::abi::PAGE_SIZE;
use palimpsest::host::{Dumps, Placement};
use palimpsest::kept;
use palimpsest::kept::store::Store;
use palimpsest::kvm::Kvm;
use palimpsest::memory::{Frames, Memory, MemoryOptions};
use palimpsest::mm::Exclusive;
use palimpsest::vm::Vm;
use serde::{Deserialize, Serialize};

use super::store::{has_room, read, save};
use super::{KeptError, content, host};
use crate::clones::gate::Gate;
use crate::clones::parent::{Entries, Parent, ParentConfig};
use crate::clones::program::{Begins, DATA_GPA, Program, beginning};
use crate::clones::{MeasureError, check};
use crate::footprint;

/// Frames for what is neither in the copy nor written.
const SPARE: u64 = 256 << 20;

/// What clones take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClonesCost {
    /// Bytes of memory of each, all of it in chunks.
    pub memory: u64,
    /// Clones.
    pub clones: u64,
    /// Bytes of pages that each has written.
    pub written: u64,
    /// Bytes of frames in use when it was loaded.
    pub copy: u64,
    /// And when all clones had written.
    pub in_use: u64,
    /// Private memory of the process and page tables, of each clone.
    pub private: u64,
    /// From the load to the last clone's first instruction.
    pub us: f64,
}

impl ClonesCost {
    /// What is in use beyond what clones have written, in copies.
    pub fn copies(&self) -> f64 {
        let own = self.clones * self.written;
        self.in_use.saturating_sub(own) as f64 / self.copy.max(1) as f64
    }
}

/// A clone, which is held at its gate.
struct Clone {
    vm: Vm,
    gate: Arc<Gate>,
}

impl Drop for Clone {
    fn drop(&mut self) {
        self.gate.end();
    }
}

/// Measures it with `count` clones of `bytes` bytes, each of which writes `written`.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    dir: &Path,
    bytes: u64,
    count: u64,
    written: u64,
    stop: &AtomicBool,
) -> Result<ClonesCost, KeptError> {
    has_room(dir, bytes + (1 << 30))?;
    // The page cache has it once more.
    let needed = 2 * bytes + count * written + SPARE;
    let available = footprint::available().map_err(host("tell how much memory there is"))?;
    if available < needed {
        return Err(MeasureError::NoMemory { needed, available }.into());
    }
    let scratch = tempfile::tempdir_in(dir).map_err(host("make a directory"))?;
    let path = scratch.path().join("store");
    template(kvm, &path, bytes, written)?;
    let (began, kept) = (Instant::now(), read(&Store::open(&path)?, "template")?);
    let most = (bytes + count * written + SPARE) / PAGE_SIZE;
    let homes = (count + 1) * (bytes / PAGE_SIZE);
    let frames = Frames::with_limit(most + homes, most, Dumps::WithoutGuest)?;
    let memory = Memory::new(&frames, bytes)?;
    kept::fill(&kept, memory.ram(), &mut |_| true)?;
    let snapshot = kept::snapshot_of(&kept, memory.space().fork()?)?;
    let in_use = || frames.pool().usage().in_use * PAGE_SIZE;
    let private = || footprint::private().map_err(host("tell how much memory this process has"));
    let (copy, private_before) = (in_use(), private()?);
    let mut clones = Vec::new();
    for _ in 0..count {
        check(stop)?;
        let window = Arc::new(frames.window(bytes, Placement::Anywhere)?);
        let (options, plain) = (MemoryOptions::default(), |window| Box::new(window) as _);
        let its = Memory::clone_of(
            &frames,
            snapshot.memory(),
            Exclusive,
            options,
            window,
            plain,
        )?;
        let gate = Gate::new();
        let told = Arc::clone(&gate);
        let vm = Vm::builder(its)
            .ports(Arc::clone(&gate) as _)
            .on_stop(move |_, outcome| told.has_ended(outcome.to_string()))
            .copy_ahead(false)
            .build(kvm, 1)?;
        let clone = Clone { vm, gate };
        clone.vm.start_from(&snapshot, || Ok(()))?;
        clones.push(clone);
    }
    for clone in &clones {
        clone.gate.wait(1)?;
    }
    let us = began.elapsed().as_secs_f64() * 1e6;
    for clone in &clones {
        check(stop)?;
        clone.gate.pass()?;
    }
    Ok(ClonesCost {
        memory: bytes,
        clones: count,
        written,
        copy,
        in_use: in_use(),
        private: (private()?.saturating_sub(private_before)) / count.max(1),
        us,
    })
}

/// Saves what clones are made of.
fn template(kvm: &Kvm, path: &Path, memory: u64, written: u64) -> Result<(), KeptError> {
    let parent = Parent::boot(
        kvm,
        &ParentConfig {
            memory,
            entries: Entries::Huge,
            program: Program::Count,
            clones: 1,
            copies: 64 << 20,
        },
    )?;
    let first = DATA_GPA + PAGE_SIZE;
    content::fill(1, first, memory, |gpa, bytes| {
        parent.vm().ram().write(gpa, bytes)
    })
    .map_err(|error| MeasureError::Reach(error.into()))?;
    let (taken, _) = parent.vm().snapshot()?;
    let snapshot = beginning(&taken, Begins::Sweeping(written))?;
    let machine = kept::machine(kvm, &snapshot, 0)?;
    let store = Store::open_or_create(path)?;
    save(
        &store,
        "template",
        &snapshot,
        parent.frames(),
        None,
        machine,
    )?;
    Ok(())
}
