//! How long a parent stands still for a snapshot: before clones are made of its snapshots, twice, while they
//! are, and after. The first two say how much the number varies by itself; the last, whether the parent's
//! memory is again what it was before.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use guest::abi::PAGE_SIZE;
use palimpsest::kvm::Kvm;
use serde::{Deserialize, Serialize};

use super::parent::{Entries, Parent, ParentConfig};
use super::program::{Begins, Program, beginning};
use super::{MeasureError, check};
use crate::summary::{Summary, Times};

/// What the parent writes between two snapshots, at least.
const WRITTEN: u64 = 16 << 20;

/// How long a parent stood still.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pause {
    /// Bytes of memory.
    pub memory: u64,
    /// Before there are clones.
    pub without_us: Summary,
    /// The same, once more.
    pub again_us: Summary,
    /// When a clone is made of each snapshot, and lives until there is one of the next.
    pub with_us: Summary,
    /// When no clones are made any more, and none is left.
    pub after_us: Summary,
}

impl Pause {
    /// What clones make of it while they are made, and after: ratios of medians to the longer of the two
    /// before.
    pub fn ratios(&self) -> (f64, f64) {
        let before = self.without_us.p50.max(self.again_us.p50);
        (self.with_us.p50 / before, self.after_us.p50 / before)
    }
}

/// Measures it over `rounds` snapshots each.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    memory: u64,
    rounds: u64,
    stop: &AtomicBool,
) -> Result<Pause, MeasureError> {
    let parent = Parent::boot(
        kvm,
        &ParentConfig {
            memory,
            entries: Entries::Huge,
            program: Program::Stamp(WRITTEN),
            clones: 3,
            copies: memory,
        },
    )?;
    let block = |with_clones: bool| {
        let mut times = Times::new();
        let mut kept = None;
        for round in 0..=rounds {
            check(stop)?;
            // It has been round once more: every page was written, by whoever's copy.
            let stamp = parent.word(0)?;
            parent.wait_for_word(0, stamp + 2 * WRITTEN / PAGE_SIZE)?;
            let (taken, timing) = parent.vm().snapshot()?;
            if round > 0 {
                times.record(timing.pause());
            }
            let mut clone = None;
            if with_clones {
                let snapshot = beginning(&taken, Begins::Announcing)?;
                let began = Instant::now();
                let made = parent.start_clone(kvm, &snapshot, None)?;
                made.first_instruction(began)?;
                clone = Some(made);
            }
            kept = Some((clone, taken));
        }
        drop(kept);
        Ok::<_, MeasureError>(times.summary().unwrap_or_default())
    };
    Ok(Pause {
        memory,
        without_us: block(false)?,
        again_us: block(false)?,
        with_us: block(true)?,
        after_us: block(false)?,
    })
}
