//! A clone that writes all of its memory, a word a page, beside a VM that does so under a snapshot; and once
//! more when every page is its own, beside a VM that never shared any.
//!
//! KVM makes its tables for a page that it may write when that is first touched: each VM has a pass for that
//! before those in which no page is shared are measured. The caches and the CPU's tables warm up with the
//! first of these, in a VM that never shared as in a clone: as many are measured of both, after as many.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use guest::abi::PAGE_SIZE;
use palimpsest::kvm::Kvm;
use palimpsest::vcpus::Capture;
use serde::{Deserialize, Serialize};

use super::gate::Gate;
use super::parent::{Entries, Parent, ParentConfig};
use super::program::{Begins, DATA_GPA, Program, beginning};
use super::{MeasureError, check};
use crate::summary::median;

/// Passes of a VM that shares no page: those that are measured, and those before them.
const PASSES: usize = 8;
const WARM_UP: usize = 4;

/// Times a page, in microseconds: medians.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rewrite {
    /// Bytes of memory.
    pub memory: u64,
    /// Pages that are written.
    pub pages: u64,
    /// By a VM that shares with nobody and never has.
    pub unshared_us: f64,
    /// By the same under a snapshot.
    pub under_snapshot_us: f64,
    /// By a clone, the first time.
    pub clone_us: f64,
    /// By the same clone, the second time: no page is shared, and KVM may have no tables for them.
    pub second_us: f64,
    /// And when it has done so some times more.
    pub diverged_us: f64,
}

/// Measures it in `rounds` rounds of each.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    memory: u64,
    rounds: u64,
    stop: &AtomicBool,
) -> Result<Rewrite, MeasureError> {
    let bytes = memory - DATA_GPA;
    let pages = bytes / PAGE_SIZE;
    let boot = |program| {
        let config = ParentConfig {
            memory,
            entries: Entries::Huge,
            program,
            clones: 1,
            copies: memory,
        };
        Parent::boot(kvm, &config)
    };
    let [
        mut unshared,
        mut snapshot,
        mut clone,
        mut second,
        mut diverged,
    ] = [const { Vec::new() }; 5];
    let per_page = |time: Duration| time.as_secs_f64() * 1e6 / pages as f64;
    {
        let parent = boot(Program::Sweep(bytes))?;
        // KVM's tables are not there before.
        parent.gate().pass()?;
        for _ in 0..rounds {
            check(stop)?;
            unshared.extend(passes(parent.gate())?.map(per_page));
        }
        for _ in 0..rounds {
            check(stop)?;
            // It waits at the gate, and writes nothing meanwhile.
            let frozen = parent.vm().memory().space().fork()?;
            snapshot.push(per_page(parent.gate().pass()?));
            drop(frozen);
        }
    }
    let parent = boot(Program::Count)?;
    let (taken, _) = parent.vm().snapshot()?;
    let sweeping = beginning(&taken, Begins::Sweeping(bytes))?;
    for _ in 0..rounds {
        check(stop)?;
        let began = Instant::now();
        let made = parent.start_clone(kvm, &sweeping, None)?;
        made.first_instruction(began)?;
        let paused = parent.vm().machine().pause(Capture::Nothing)?;
        clone.push(per_page(made.gate().pass()?));
        second.push(per_page(made.gate().pass()?));
        diverged.extend(passes(made.gate())?.map(per_page));
        paused.resume();
    }
    Ok(Rewrite {
        memory,
        pages,
        unshared_us: median(unshared).unwrap_or_default(),
        under_snapshot_us: median(snapshot).unwrap_or_default(),
        clone_us: median(clone).unwrap_or_default(),
        second_us: median(second).unwrap_or_default(),
        diverged_us: median(diverged).unwrap_or_default(),
    })
}

/// How long passes take, after some that are not measured.
fn passes(gate: &Gate) -> Result<impl Iterator<Item = Duration>, MeasureError> {
    let all = (0..WARM_UP + PASSES).map(|_| gate.pass());
    let all: Vec<Duration> = all.collect::<Result<_, _>>()?;
    Ok(all.into_iter().skip(WARM_UP))
}
