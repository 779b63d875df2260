//! A VM of which clones are made, and its clones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::abi::{IMAGE_GPA, PAGE_SIZE, REGION_SIZE};
use palimpsest::host::{Dumps, Prices};
use palimpsest::kvm::Kvm;
use palimpsest::memory::{Frames, Memory, MemoryOptions};
use palimpsest::mm::{Exclusive, Frozen, Gfn};
use palimpsest::snapshot::Snapshot;
use palimpsest::vm::{Place, Shell, Vm};
use vmm::boot;

use super::MeasureError;
use super::gate::Gate;
use super::program::{DATA_GPA, Program, code};

const REGION_PAGES: u64 = REGION_SIZE / PAGE_SIZE;
/// Frames beyond those of guests and copies: folios that are used in part.
const SPARE: u64 = 64 << 20;
/// In a region that is written sparsely: one page of so many, and how often a snapshot is taken between.
const SPARSE_STEP: u64 = 16;
const SPARSE_ROUNDS: u64 = 4;

/// In which pieces a parent's memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entries {
    /// All regions by one huge entry each.
    Huge,
    /// Every second one by a small entry for each page: it was written sparsely between snapshots.
    HalfSmall,
}

impl Entries {
    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Huge => "huge",
            Self::HalfSmall => "half-small",
        }
    }

    /// Bytes of copies that a parent of `memory` bytes needs room for, of which a few clones are made. Where
    /// mappings run short while regions are split by the page, they are copied whole.
    pub const fn copies(self, memory: u64) -> u64 {
        match self {
            Self::Huge => memory / 4,
            Self::HalfSmall => memory,
        }
    }
}

/// What a parent is.
#[derive(Clone, Copy, Debug)]
pub struct ParentConfig {
    /// Bytes of memory, all of them resident.
    pub memory: u64,
    /// In which pieces.
    pub entries: Entries,
    /// What it does.
    pub program: Program,
    /// Clones of it that live at once. Each has a home of as many frames, whether they have memory or not.
    pub clones: u64,
    /// Bytes that it, its snapshots and its clones may take beyond its memory.
    pub copies: u64,
}

/// A VM that runs, with all of its memory resident.
pub struct Parent {
    vm: Vm,
    gate: Arc<Gate>,
    /// The snapshots since which every second region was written.
    _kept: Vec<Arc<Frozen>>,
}

impl Parent {
    /// Boots one.
    ///
    /// # Errors
    /// If there is no memory for it, or KVM refuses.
    pub fn boot(kvm: &Kvm, config: &ParentConfig) -> Result<Self, MeasureError> {
        let most = (config.memory + config.copies + SPARE) / PAGE_SIZE;
        let homes = config.clones * (config.memory / PAGE_SIZE);
        let frames = Frames::with_limit(most + homes, most, Dumps::WithoutGuest)?;
        let options = MemoryOptions {
            // Regions stay in pieces that are written in pieces.
            prices: (config.entries == Entries::HalfSmall).then(|| Prices::fixed(u32::MAX)),
            ..MemoryOptions::default()
        };
        let plain = |window| Box::new(window) as _;
        let memory = Memory::with(&frames, config.memory, Exclusive, options, plain)?;
        boot::write_page_tables(memory.ram(), config.memory)?;
        let code = memory.ram().write(IMAGE_GPA, &code());
        code.map_err(|error| MeasureError::Reach(error.into()))?;
        let pages = config.memory / PAGE_SIZE;
        write(&memory, 0..pages)?;
        let kept = match config.entries {
            Entries::Huge => Vec::new(),
            Entries::HalfSmall => split_half(&memory)?,
        };
        let gate = Gate::new();
        let (vm, told) = (Vm::builder(memory), Arc::clone(&gate));
        let vm = vm
            .ports(Arc::clone(&gate) as _)
            .on_stop(move |_, outcome| told.has_ended(outcome.to_string()))
            .copy_ahead(false)
            .build(kvm, 1)?;
        vm.start(|_| config.program.entry())?;
        let parent = Self {
            vm,
            gate,
            _kept: kept,
        };
        // Whoever is waited for at the gate says so there; others show it in memory.
        match config.program {
            Program::Sweep(_) => drop(parent.gate.wait(1)?),
            Program::Count | Program::Stamp(_) => parent.wait_for_word(0, 1)?,
        }
        Ok(parent)
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Where it waits.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Its frames.
    pub fn frames(&self) -> &Frames {
        self.vm.memory().frames()
    }

    /// The first word of page `page` of those that it writes.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn word(&self, page: u64) -> Result<u64, MeasureError> {
        word(&self.vm, page)
    }

    /// Waits until that word is `least` or more.
    ///
    /// # Errors
    /// If the guest has ended, or takes too long.
    pub fn wait_for_word(&self, page: u64, least: u64) -> Result<(), MeasureError> {
        wait_for_word(&self.vm, &self.gate, page, least)
    }

    /// Regions that are not mapped by one huge entry, and all.
    ///
    /// # Errors
    /// None: all of them are there.
    pub fn small_regions(&self) -> Result<(u64, u64), MeasureError> {
        let space = self.vm.memory().space();
        let regions = space.pages() / REGION_PAGES;
        let mut small = 0;
        for region in 0..regions {
            let entry = space.entry(Gfn(region * REGION_PAGES));
            let entry = entry.map_err(|error| MeasureError::Reach(error.into()))?;
            small += u64::from(!entry.is_huge());
        }
        Ok((small, regions))
    }

    /// A clone that runs: a VM that begins where `snapshot` says, in `shell` if there is one.
    ///
    /// # Errors
    /// If it cannot be made or started.
    pub fn start_clone(
        &self,
        kvm: &Kvm,
        snapshot: &Snapshot,
        shell: Option<Shell>,
    ) -> Result<RunningClone, MeasureError> {
        let gate = Gate::new();
        let told = Arc::clone(&gate);
        let place = shell.map_or(Place::New(kvm), Place::In);
        let made = self.vm.start_clone(
            snapshot,
            place,
            MemoryOptions::default(),
            |builder| {
                builder
                    .ports(Arc::clone(&gate) as _)
                    .on_stop(move |_, outcome| told.has_ended(outcome.to_string()))
                    .copy_ahead(false)
            },
            |_| Ok(()),
        );
        let (vm, _) = made?;
        Ok(RunningClone { vm, gate })
    }

    /// A shell for a clone of it.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn shell(&self, kvm: &Kvm) -> Result<Shell, MeasureError> {
        Ok(Shell::new(kvm, self.frames(), self.vm.ram().size(), 1)?)
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        self.gate.end();
    }
}

/// A clone that runs, or is held at its gate.
pub struct RunningClone {
    vm: Vm,
    gate: Arc<Gate>,
}

impl RunningClone {
    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Where it says that it runs.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Waits for its first instruction. How long after `began` that was.
    ///
    /// # Errors
    /// If its vCPU has ended, or it takes too long.
    pub fn first_instruction(&self, began: Instant) -> Result<Duration, MeasureError> {
        Ok(self.gate.wait(1)?.saturating_duration_since(began))
    }

    /// The first word of page `page` of those that it writes.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn word(&self, page: u64) -> Result<u64, MeasureError> {
        word(&self.vm, page)
    }
}

impl Drop for RunningClone {
    fn drop(&mut self) {
        self.gate.end();
    }
}

/// Makes pages writable, as a guest that writes them does, but faster.
fn write(memory: &Memory, gfns: impl IntoIterator<Item = u64>) -> Result<(), MeasureError> {
    for gfn in gfns {
        let written = memory.space().write_fault(Gfn(gfn));
        written.map_err(|error| MeasureError::Reach(error.into()))?;
    }
    Ok(())
}

/// Has every second region be written sparsely between snapshots. The last of those is kept, as the
/// snapshots of somebody who takes some all the time.
fn split_half(memory: &Memory) -> Result<Vec<Arc<Frozen>>, MeasureError> {
    memory.space().set_whole_price(u32::MAX);
    let regions = memory.space().pages() / REGION_PAGES;
    let mut kept = Vec::new();
    for round in 0..SPARSE_ROUNDS {
        let frozen = memory.space().fork()?;
        for region in (1..regions).step_by(2) {
            let first = region * REGION_PAGES + round;
            write(memory, (first..).step_by(SPARSE_STEP as usize).take(32))?;
        }
        kept = vec![frozen];
    }
    Ok(kept)
}
const _: () = assert!(SPARSE_STEP * 32 == REGION_PAGES && SPARSE_ROUNDS <= SPARSE_STEP);

fn word(vm: &Vm, page: u64) -> Result<u64, MeasureError> {
    let mut word = [0; 8];
    let read = vm.ram().read(DATA_GPA + page * PAGE_SIZE, &mut word);
    read.map_err(|error| MeasureError::Reach(error.into()))?;
    Ok(u64::from_le_bytes(word))
}

fn wait_for_word(vm: &Vm, gate: &Gate, page: u64, least: u64) -> Result<(), MeasureError> {
    const LOOK: Duration = Duration::from_micros(100);
    let deadline = Instant::now() + super::gate::PATIENCE;
    while word(vm, page)? < least {
        gate.check()?;
        if Instant::now() > deadline {
            return Err(MeasureError::Silent);
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
