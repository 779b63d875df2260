//! What a clone takes that does nothing: private memory of this process, the kernel's page tables of it, and
//! frames. What KVM keeps of a VM is the kernel's and not seen; a bare VM has the same.

use std::sync::atomic::AtomicBool;

use guest::abi::PAGE_SIZE;
use palimpsest::kvm::{Kvm, VcpuState};
use palimpsest::vcpus::Capture;
use serde::{Deserialize, Serialize};

use super::bare::{Bare, BareMachine, Registers, memory_with_code};
use super::parent::{Entries, Parent, ParentConfig};
use super::program::{Begins, Program, beginning};
use super::{MeasureError, check};
use crate::footprint;
use crate::technique::PageSize;
use std::time::Instant;

/// What idle clones take. Bytes are of one of them, on average.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Idle {
    /// Bytes of memory of each.
    pub memory: u64,
    /// In which pieces the parent's is mapped.
    pub entries: String,
    /// Clones it was measured over.
    pub clones: u64,
    /// Private memory and page tables of this process.
    pub private: f64,
    /// Frames in use, or with memory: whichever grew more.
    pub frames: f64,
    /// Private memory and page tables of a bare VM with a memslot of the same size.
    pub bare_private: f64,
}

impl Idle {
    /// All that a clone takes.
    pub fn total(&self) -> f64 {
        self.private + self.frames
    }
}

/// Measures it over `clones` clones.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    memory: u64,
    entries: Entries,
    clones: u64,
    stop: &AtomicBool,
) -> Result<Idle, MeasureError> {
    let parent = Parent::boot(
        kvm,
        &ParentConfig {
            memory,
            entries,
            program: Program::Count,
            clones: clones + 1,
            copies: entries.copies(memory),
        },
    )?;
    let (taken, _) = parent.vm().snapshot()?;
    let snapshot = beginning(&taken, Begins::Announcing)?;
    // It writes nothing of its own meanwhile.
    let paused = parent.vm().machine().pause(Capture::Nothing)?;
    let frames = || {
        let usage = parent.frames().pool().usage();
        (usage.in_use * PAGE_SIZE, usage.committed * PAGE_SIZE)
    };
    let clone = || {
        check(stop)?;
        let began = Instant::now();
        let clone = parent.start_clone(kvm, &snapshot, None)?;
        clone.first_instruction(began)?;
        Ok::<_, MeasureError>(clone)
    };
    // What is only paid for once is paid for by the first.
    let first = clone()?;
    let before = (private()?, frames());
    let made = (0..clones)
        .map(|_| clone())
        .collect::<Result<Vec<_>, _>>()?;
    let after = (private()?, frames());
    drop((made, first));

    let bare = Bare::open()?;
    let registers = Registers::from(&VcpuState::of_saved(&snapshot.vcpus()[0])?);
    let bare_memory = memory_with_code(memory, PageSize::Huge)?;
    let start = || {
        check(stop)?;
        let began = Instant::now();
        let made = BareMachine::start(&bare, &bare_memory, registers)?;
        made.first_instruction(began)?;
        Ok::<_, MeasureError>(made)
    };
    let first = start()?;
    let bare_before = private()?;
    let made = (0..clones)
        .map(|_| start())
        .collect::<Result<Vec<_>, _>>()?;
    let bare_after = private()?;
    drop((made, first));
    paused.resume();

    let each = |before: u64, after: u64| after.saturating_sub(before) as f64 / clones as f64;
    let (in_use, committed) = (each(before.1.0, after.1.0), each(before.1.1, after.1.1));
    Ok(Idle {
        memory,
        entries: entries.name().to_owned(),
        clones,
        private: each(before.0, after.0),
        frames: in_use.max(committed),
        bare_private: each(bare_before, bare_after),
    })
}

fn private() -> Result<u64, MeasureError> {
    footprint::private().map_err(|source| MeasureError::Host {
        what: "tell how much memory this process has",
        source,
    })
}
