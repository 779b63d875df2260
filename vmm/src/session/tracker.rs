//! Dirty tracking of a run: asks again and again which pages were written, beside the running guest, as a
//! live migration does.
//!
//! Each round write-protects what is writable without intent to copy: pages that devices hold, too. What the
//! rounds between two snapshots reported is checked against what changed between them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::abi::{Layout, PAGE_SIZE};

use super::config::{Config, Injection};
use super::report::DirtyCounts;
use crate::check::{ReportedDirty, Tracked};
use crate::run_snapshot::RunSnapshot;
use palimpsest::mm::{AddressSpace, AnyPolicy, Gfn, MmuError};

/// Asks which pages were written.
#[derive(Debug)]
pub(super) struct Tracker {
    every: Duration,
    next: Instant,
    /// A page that is kept back from every answer: an injected fault.
    forgotten: Option<Gfn>,
    pages: u64,
    /// Since the last snapshot.
    reported: ReportedDirty,
    last: Option<Arc<RunSnapshot>>,
    counts: DirtyCounts,
}

impl Tracker {
    /// A tracker for a guest of this layout that has just been started, if it is to be tracked.
    pub(super) fn new(config: &Config, layout: &Layout) -> Option<Self> {
        let every = config.track_dirty?;
        let pages = layout.memory / PAGE_SIZE;
        // A page that changes with each operation: whatever else is in an answer, this one differs from
        // snapshot to snapshot.
        let counter = Gfn::of_gpa(layout.vcpu_page(0));
        Some(Self {
            every,
            next: Instant::now() + every,
            forgotten: (config.inject == Some(Injection::ForgetDirty)).then_some(counter),
            pages,
            reported: ReportedDirty::nothing(pages),
            last: None,
            counts: DirtyCounts::default(),
        })
    }

    /// When the next round is due.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Asks.
    pub(super) fn round(&mut self, space: &AddressSpace<AnyPolicy>) -> Result<(), MmuError> {
        let answer = space.take_dirty()?;
        self.counts.rounds += 1;
        self.counts.pages += answer.len();
        match self.forgotten {
            Some(page) => self.reported.add_all_but(&answer, page),
            None => self.reported.add(&answer),
        }
        // A round that took long is not made up for by a burst.
        self.next = Instant::now() + self.every;
        Ok(())
    }

    /// A snapshot was taken, and a round at its very instant: what was reported since the
    /// snapshot before, to be checked.
    pub(super) fn at(&mut self, snapshot: &Arc<RunSnapshot>) -> Option<Tracked> {
        let reported = std::mem::replace(&mut self.reported, ReportedDirty::nothing(self.pages));
        let since = self.last.replace(Arc::clone(snapshot))?;
        Some(Tracked { since, reported })
    }

    /// Lets go of the snapshot that it holds. What is reported until the next one is not checked.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    pub(super) fn counts(&self) -> DirtyCounts {
        self.counts
    }
}
