//! The rungs of the ladder, and how often each was taken.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A kind of answer to where a vCPU wanted to write. See the [module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rung {
    /// KVM named the pages.
    Kvm,
    /// The instruction's own operands.
    Operand,
    /// The page tables walked for it.
    Walk,
    /// What the delivery of an event needs.
    Event,
    /// The regions around it.
    Region,
    /// All of memory.
    All,
}

impl Rung {
    /// From the first to the last.
    pub const ALL: [Self; 6] = [
        Self::Kvm,
        Self::Operand,
        Self::Walk,
        Self::Event,
        Self::Region,
        Self::All,
    ];

    /// The rung above; the last one's is itself.
    pub(super) fn next(self) -> Self {
        let above = Self::ALL.into_iter().find(|rung| *rung > self);
        above.unwrap_or(Self::All)
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm's word",
            Self::Operand => "operands",
            Self::Walk => "page tables",
            Self::Event => "event delivery",
            Self::Region => "regions",
            Self::All => "all of memory",
        })
    }
}

/// How many faults each rung has resolved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RungCounts([u64; Rung::ALL.len()]);

impl RungCounts {
    /// Faults that `rung` has resolved.
    pub fn of(&self, rung: Rung) -> u64 {
        self.0[rung as usize]
    }

    pub(in crate::kvm) fn plus(self, others: Self) -> Self {
        Self(std::array::from_fn(|rung| self.0[rung] + others.0[rung]))
    }
}

/// The same, while vCPUs count.
#[derive(Debug, Default)]
pub(crate) struct RungCounters([AtomicU64; Rung::ALL.len()]);

impl RungCounters {
    pub(in crate::kvm) fn count(&self, rung: Rung) {
        self.0[rung as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(in crate::kvm) fn now(&self) -> RungCounts {
        RungCounts(std::array::from_fn(|rung| {
            self.0[rung].load(Ordering::Relaxed)
        }))
    }
}
