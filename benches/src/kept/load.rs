//! From the wish for a VM to its first instruction, and its first pass over some of its memory: of a snapshot
//! in a store, and of a file with all of memory that is mapped privately, as Firecracker does.
//!
//! | | ours | mapped |
//! |---|---|---|
//! | read | manifest, index, state, and memory as the engine loads it | nothing: registers are at hand |
//! | memory | as it is touched, checked chunk by chunk; or all of it before | as it is touched, not checked |
//! | VM | the engine's | KVM's, its memslot the mapping, CPUID and registers set |
//! | ends | the first `out` has come out of KVM | the same |

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use guest::abi::PAGE_SIZE;
use palimpsest::host::{Dumps, Placement};
use palimpsest::kept::store::Store;
use palimpsest::kept::{self, LazyOptions};
use palimpsest::kvm::{Kvm, VcpuState};
use palimpsest::memory::{Frames, Memory, MemoryOptions};
use palimpsest::mm::Exclusive;
use palimpsest::vm::Vm;
use serde::{Deserialize, Serialize};

use super::store::{has_room, name, save};
use super::{KeptError, content, host};
use crate::clones::bare::{Bare, BareMachine, Registers};
use crate::clones::gate::Gate;
use crate::clones::parent::{Entries, Parent, ParentConfig};
use crate::clones::program::{Begins, DATA_GPA, Program, beginning};
use crate::clones::{MeasureError, check};
use crate::footprint;
use crate::summary::{Summary, Times};
use crate::technique::Anonymous;

/// What a guest passes over first.
pub const PASS: u64 = 128 << 20;
/// Frames beyond those of the guest: copies of what it writes, and folios that are used in part.
const SPARE: u64 = 64 << 20;

/// What loading costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadCost {
    /// Bytes of memory, all of it in chunks.
    pub memory: u64,
    /// Bytes of the passes.
    pub pass: u64,
    /// Ours, as it is touched.
    pub ours: Loading,
    /// Ours, all of it before the first vCPU runs.
    pub whole: Loading,
    /// A file that is mapped privately.
    pub mapped: Loading,
}

/// What loading costs in one way. Of as many loads, the first left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loading {
    /// From the wish to the first instruction.
    pub first_instruction_us: Summary,
    /// Until the guest has read a word in each page of the pass.
    pub read_pass_us: Summary,
    /// Until another guest has written one.
    pub write_pass_us: Summary,
}

#[derive(Default)]
struct Measured {
    first: Times,
    reads: Times,
    writes: Times,
}

impl Measured {
    fn record(&mut self, begins: Begins, (first, pass): (Duration, Duration)) {
        self.first.record(first);
        match begins {
            Begins::Reading(_) => self.reads.record(pass),
            _ => self.writes.record(pass),
        }
    }

    fn loading(&self) -> Loading {
        Loading {
            first_instruction_us: self.first.summary().unwrap_or_default(),
            read_pass_us: self.reads.summary().unwrap_or_default(),
            write_pass_us: self.writes.summary().unwrap_or_default(),
        }
    }
}

/// Measures it over `rounds` loads of each, half of which read and half of which write first.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    dir: &Path,
    memory: u64,
    rounds: u64,
    stop: &AtomicBool,
) -> Result<LoadCost, KeptError> {
    let pass = PASS.min(memory - DATA_GPA);
    let needed = 2 * memory + (1 << 30);
    has_room(dir, needed)?;
    let available = footprint::available().map_err(host("tell how much memory there is"))?;
    if available < needed {
        return Err(MeasureError::NoMemory { needed, available }.into());
    }
    let scratch = tempfile::tempdir_in(dir).map_err(host("make a directory"))?;
    let begins = [Begins::Reading(pass), Begins::Sweeping(pass)];
    let names = ["reading", "sweeping"];
    let (path, file_path) = (scratch.path().join("store"), scratch.path().join("memory"));
    let states = {
        let parent = Parent::boot(
            kvm,
            &ParentConfig {
                memory,
                entries: Entries::Huge,
                program: Program::Count,
                clones: 1,
                copies: SPARE,
            },
        )?;
        // It counts in the first page.
        let first = DATA_GPA + PAGE_SIZE;
        content::fill(1, first, memory, |gpa, bytes| {
            parent.vm().ram().write(gpa, bytes)
        })
        .map_err(|error| MeasureError::Reach(error.into()))?;
        let (taken, _) = parent.vm().snapshot()?;
        let store = Store::open_or_create(&path)?;
        let mut states = Vec::new();
        for (begins, as_name) in begins.into_iter().zip(names) {
            check(stop)?;
            let snapshot = beginning(&taken, begins)?;
            let machine = kept::machine(kvm, &snapshot, parent.vm().machine().tsc_khz())?;
            save(&store, as_name, &snapshot, parent.frames(), None, machine)?;
            states.push(VcpuState::of_saved(&snapshot.vcpus()[0])?);
        }
        let file = File::create(&file_path).map_err(host("make a file"))?;
        let mut region = vec![0; 2 << 20];
        for gpa in (0..memory).step_by(region.len()) {
            check(stop)?;
            let part = &mut region[..(memory - gpa).min(2 << 20) as usize];
            let read = parent.frames().read(taken.memory(), gpa, part);
            read.map_err(|error| KeptError::Wrong(error.to_string()))?;
            let written = std::os::unix::fs::FileExt::write_all_at(&file, part, gpa);
            written.map_err(host("write a guest's memory to a file"))?;
        }
        // Nobody's writes go on meanwhile.
        file.sync_data().map_err(host("make a file durable"))?;
        states
    };
    let bare = Bare::open()?;
    let [mut ours, mut whole, mut mapped]: [Measured; 3] = Default::default();
    for round in 0..=rounds {
        for ((begins, as_name), state) in begins.into_iter().zip(names).zip(&states) {
            check(stop)?;
            let of_ours = load(kvm, How::Lazily, &path, as_name, memory)?;
            let of_whole = load(kvm, How::Whole, &path, as_name, memory)?;
            let of_mapped = map(&bare, &file_path, memory, state)?;
            if round > 0 {
                ours.record(begins, of_ours);
                whole.record(begins, of_whole);
                mapped.record(begins, of_mapped);
            }
        }
    }
    Ok(LoadCost {
        memory,
        pass,
        ours: ours.loading(),
        whole: whole.loading(),
        mapped: mapped.loading(),
    })
}

/// How memory is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// As it is touched.
    Lazily,
    /// All of it, before the first vCPU runs.
    Whole,
}

/// Loads `STORE/NAME` into a VM that runs: until its first instruction, and its first pass.
fn load(
    kvm: &Kvm,
    how: How,
    store: &Path,
    as_name: &str,
    memory: u64,
) -> Result<(Duration, Duration), KeptError> {
    let wish = Instant::now();
    let kept = Arc::new(Store::open(store)?.read(&name(as_name))?);
    kept::check(kvm, &kept.manifest().machine, 0)?;
    let frames = (2 * memory + SPARE) / PAGE_SIZE;
    let frames = Frames::with_limit(frames, frames, Dumps::WithoutGuest)?;
    let (memory, frozen) = match how {
        How::Whole => {
            let memory = Memory::new(&frames, memory)?;
            kept::fill(&kept, memory.ram(), &mut |_| true)?;
            let frozen = memory.space().fork()?;
            (memory, frozen)
        }
        How::Lazily => {
            let (frozen, _) = kept::lazily(&kept, &frames, LazyOptions::default())?;
            let window = Arc::new(frames.window(memory, Placement::Anywhere)?);
            let (options, plain) = (MemoryOptions::default(), |window| Box::new(window) as _);
            let memory = Memory::clone_of(&frames, &frozen, Exclusive, options, window, plain)?;
            (memory, frozen)
        }
    };
    let snapshot = kept::snapshot_of(&kept, frozen)?;
    let gate = Gate::new();
    let told = Arc::clone(&gate);
    let vm = Vm::builder(memory)
        .ports(Arc::clone(&gate) as _)
        .on_stop(move |_, outcome| told.has_ended(outcome.to_string()))
        .copy_ahead(false)
        .build(kvm, 1)?;
    let vm = Ending { vm, gate };
    vm.vm.start_from(&snapshot, || Ok(()))?;
    let first = vm.gate.wait(1)?.saturating_duration_since(wish);
    let pass = vm.gate.pass()?;
    Ok((first, pass))
}

/// A VM that ends, and is not waited for at its gate, when it is dropped.
struct Ending {
    vm: Vm,
    gate: Arc<Gate>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.gate.end();
    }
}

/// The same of a file with all of memory.
fn map(
    bare: &Bare,
    file: &Path,
    memory: u64,
    state: &VcpuState,
) -> Result<(Duration, Duration), KeptError> {
    let wish = Instant::now();
    let file = File::open(file).map_err(host("open a file"))?;
    let memory = Anonymous::of_file(&file, memory).map_err(MeasureError::from)?;
    let machine = BareMachine::start(bare, &memory, Registers::from(state))?;
    let first = machine.first_instruction(wish)?;
    let pass = machine.gate().pass()?;
    Ok((first, pass))
}
