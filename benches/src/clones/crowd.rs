//! Many clones of one parent, which runs meanwhile: what each takes, and what the parent still does.

use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use palimpsest::kvm::Kvm;
use palimpsest::vm::Shells;
use serde::{Deserialize, Serialize};

use super::parent::{Entries, Parent, ParentConfig};
use super::program::{Begins, Program, beginning};
use super::{MeasureError, check};
use crate::summary::{Summary, Times};

/// How long the parent is watched before.
const BEFORE: Duration = Duration::from_secs(1);

/// What a crowd costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Crowd {
    /// Bytes of memory of each.
    pub memory: u64,
    /// Clones.
    pub clones: u64,
    /// From the snapshot to the first instruction of the last, by clones.
    pub each_us: f64,
    /// From the wish for a clone to its first instruction.
    pub clone_us: Summary,
    /// What the parent counted in a second before.
    pub parent_before: f64,
    /// And while clones were made.
    pub parent_meanwhile: f64,
}

/// Measures it.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    memory: u64,
    clones: u64,
    stop: &AtomicBool,
) -> Result<Crowd, MeasureError> {
    let parent = Parent::boot(
        kvm,
        &ParentConfig {
            memory,
            entries: Entries::Huge,
            program: Program::Count,
            clones,
            copies: memory / 4,
        },
    )?;
    let (frames, wanted) = (parent.frames().clone(), clones as usize);
    let shells = Shells::start(Kvm::open()?, frames, memory, 1, wanted);
    let shells = shells.map_err(|source| MeasureError::Host {
        what: "start the thread that makes shells",
        source,
    })?;
    shells.wait_until_ready();
    // None is made while clones are: a shell takes as long as a bare VM.
    shells.want(0);

    let (since, counted) = (Instant::now(), parent.word(0)?);
    thread::sleep(BEFORE);
    let before = (parent.word(0)? - counted) as f64 / since.elapsed().as_secs_f64();

    let (began, counted) = (Instant::now(), parent.word(0)?);
    let (taken, _) = parent.vm().snapshot()?;
    let snapshot = beginning(&taken, Begins::Announcing)?;
    let mut made = Vec::with_capacity(wanted);
    for _ in 0..clones {
        check(stop)?;
        let wish = Instant::now();
        let shell = shells.take()?;
        made.push((wish, parent.start_clone(kvm, &snapshot, Some(shell))?));
    }
    let mut times = Times::new();
    let mut last = Duration::ZERO;
    for (wish, clone) in &made {
        times.record(clone.first_instruction(*wish)?);
        last = last.max(clone.first_instruction(began)?);
    }
    let meanwhile = (parent.word(0)? - counted) as f64 / began.elapsed().as_secs_f64();
    Ok(Crowd {
        memory,
        clones,
        each_us: last.as_secs_f64() * 1e6 / clones as f64,
        clone_us: times.summary().unwrap_or_default(),
        parent_before: before,
        parent_meanwhile: meanwhile,
    })
}
