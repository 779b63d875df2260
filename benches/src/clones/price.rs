//! From the wish for a clone to its first instruction, beside a bare VM of the same size.
//!
//! In each round all are made once, one after the other, so that what the machine does beside meets them all.
//! But for a snapshot and its clone, the parent stands still meanwhile.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use palimpsest::kvm::Kvm;
use palimpsest::vcpus::Capture;
use serde::{Deserialize, Serialize};

use super::bare::{Bare, BareMachine, Registers, memory_with_code};
use super::parent::{Entries, Parent, ParentConfig};
use super::program::{Begins, Program, beginning};
use super::{MeasureError, check};
use crate::summary::{Summary, Times};
use crate::technique::PageSize;
use palimpsest::kvm::VcpuState;

/// What clones of one parent cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Price {
    /// Bytes of memory, all resident.
    pub memory: u64,
    /// In which pieces it is mapped.
    pub entries: String,
    /// Regions that are mapped by small entries.
    pub small_regions: u64,
    /// Regions.
    pub regions: u64,
    /// A bare VM with a memslot of the same size.
    pub bare_us: Summary,
    /// A clone of a snapshot that is there.
    pub clone_us: Summary,
    /// The same, in a shell that is ready.
    pub pool_us: Summary,
    /// A snapshot of the parent, which runs, and a clone of it, in a shell that is ready.
    pub snapshot_and_clone_us: Summary,
}

/// Measures it in `rounds` rounds, after one that does not count.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    memory: u64,
    entries: Entries,
    rounds: u64,
    stop: &AtomicBool,
) -> Result<Price, MeasureError> {
    let parent = Parent::boot(
        kvm,
        &ParentConfig {
            memory,
            entries,
            program: Program::Count,
            clones: 1,
            copies: entries.copies(memory),
        },
    )?;
    let bare = Bare::open()?;
    let bare_memory = memory_with_code(memory, PageSize::Huge)?;
    let (small_regions, regions) = parent.small_regions()?;
    let [mut bares, mut clones, mut pool, mut forks] = [const { Times::new() }; 4];
    let (taken, _) = parent.vm().snapshot()?;
    let snapshot = beginning(&taken, Begins::Announcing)?;
    let registers = Registers::from(&VcpuState::of_saved(&snapshot.vcpus()[0])?);
    for round in 0..=rounds {
        check(stop)?;
        let record = |times: &mut Times, time| {
            if round > 0 {
                times.record(time);
            }
        };
        let paused = parent.vm().machine().pause(Capture::Nothing)?;
        {
            let began = Instant::now();
            let made = BareMachine::start(&bare, &bare_memory, registers)?;
            record(&mut bares, made.first_instruction(began)?);
        }
        {
            let began = Instant::now();
            let made = parent.start_clone(kvm, &snapshot, None)?;
            record(&mut clones, made.first_instruction(began)?);
        }
        {
            let shell = parent.shell(kvm)?;
            let began = Instant::now();
            let made = parent.start_clone(kvm, &snapshot, Some(shell))?;
            record(&mut pool, made.first_instruction(began)?);
        }
        paused.resume();
        let counted = parent.word(0)?;
        parent.wait_for_word(0, counted + 1000)?;
        let shell = parent.shell(kvm)?;
        let began = Instant::now();
        let (taken, _) = parent.vm().snapshot()?;
        let of = beginning(&taken, Begins::Announcing)?;
        let made = parent.start_clone(kvm, &of, Some(shell))?;
        record(&mut forks, made.first_instruction(began)?);
    }
    Ok(Price {
        memory,
        entries: entries.name().to_owned(),
        small_regions,
        regions,
        bare_us: bares.summary().unwrap_or_default(),
        clone_us: clones.summary().unwrap_or_default(),
        pool_us: pool.summary().unwrap_or_default(),
        snapshot_and_clone_us: forks.summary().unwrap_or_default(),
    })
}
