//! Pins: a device's hold on a page (PROTOCOL.md 4.7, 4.8; `mm/gup.c`).
//!
//! A pin is granted only on an exclusive frame. From then on the frame stays this page of this address
//! space: fork copies it for the child instead of sharing it, a write fault finds the bit and copies
//! nothing, restore writes into it.
//!
//! # The fast path
//! ```text
//!   read entry ; absent, or read-only for a writer: slow path
//!   pin the frame if it is exclusive, in one compare-and-swap ; it is not: slow path
//!   re-read entry ; changed: the frame may be another's by now, unpin, slow path
//! ```
//! It takes no lock and needs no fence. What the kernel's sequence count does against fork, the
//! compare-and-swap does: fork clears the bit in the same word, so either fork comes first and there is no
//! bit, or the pin does and fork sees it. The re-read is for a frame that was freed and became another
//! page's, exclusive again, between the first two lines. Both are model-checked in `tests/loom`, with and
//! without.
//!
//! Neighbouring pages are pinned a *run* at a time: pages of one region that are in neighbouring frames, by
//! entries that are alike. Each line is done for all of them before the next is: what a pin does between two
//! lines, or how long it waits there, was free before. So a run is looked up once, counted in the statistics
//! once, and if a huge entry maps it there is one barrier for it (`folio.rs`).

use super::addr::{Access, Gfn};
use super::entry::Entry;
use super::fault::{FaultError, Intent};
use super::hold::{Pin, PinnedRun};
use super::policy::CowPolicy;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;
use super::stats::Counters;

/// Why a page could not be pinned. Nothing is held.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The page could not be made exclusive.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The frame's pin counter is full, or the policy does not let itself be satisfied.
    #[error("{gfn:?} cannot be pinned: it has too many pins")]
    TooMany {
        /// The page.
        gfn: Gfn,
    },
}

impl<P: CowPolicy> AddressSpace<P> {
    /// Pins page `gfn` for `access`, breaking COW first where that is needed.
    ///
    /// # Errors
    /// As [`AddressSpace::write_fault`], or if the frame has 2^20 - 1 pins.
    pub fn pin(&self, gfn: Gfn, access: Access) -> Result<Pin, PinError> {
        self.mapped.table.in_range(gfn).map_err(FaultError::from)?;
        let access = self.policy.lookup(access);
        if let Some(run) = self.pin_fast(gfn, 1, access) {
            return Ok(Pin::new(run));
        }
        self.pin_slow(gfn, access).map(Pin::new)
    }

    /// Pins `count` pages from `first` on, or none of them. The runs are in the order of the pages.
    ///
    /// # Errors
    /// As [`AddressSpace::pin`].
    pub fn pin_range(
        &self,
        first: Gfn,
        count: u64,
        access: Access,
    ) -> Result<Vec<PinnedRun>, PinError> {
        let Some(rest) = count.checked_sub(1) else {
            return Ok(Vec::new());
        };
        let last = Gfn(first.0.saturating_add(rest));
        self.mapped.table.in_range(last).map_err(FaultError::from)?;
        let access = self.policy.lookup(access);
        let mut runs: Vec<PinnedRun> = Vec::new();
        let mut at = first;
        while at <= last {
            let most = self.mapped.table.rest_of_region(at).min(last.0 - at.0 + 1);
            let run = match self.pin_fast(at, most, access) {
                Some(run) => run,
                None => self.pin_slow(at, access)?,
            };
            at.0 += run.count();
            let apart = match runs.last_mut() {
                Some(before) => before.try_append(run).err(),
                None => Some(run),
            };
            runs.extend(apart);
        }
        Ok(runs)
    }

    /// Pins a run of at most `most` pages from `gfn` on, all in its region. `None` if `gfn` itself can't be
    /// pinned so.
    #[inline]
    fn pin_fast(&self, gfn: Gfn, most: u64, access: Access) -> Option<PinnedRun> {
        let huge = self.mapped.table.peek_huge(gfn);
        let entry = huge.unwrap_or_else(|| self.mapped.table.peek_small(gfn));
        if !entry.is_present() || (access == Access::Write && !entry.is_writable()) {
            return None;
        }
        let count = if huge.is_some() { most } else { 1 };
        let pinned = self.pool.try_pin(entry, count, access, &self.policy);
        let mut run = pinned.ok()?;
        if huge.is_none() {
            for n in 1..most {
                let next = self.mapped.table.peek_small(Gfn(gfn.0 + n));
                if next != entry.page(n) || !run.try_push(next, access, &self.policy) {
                    break;
                }
            }
        }
        if !is_left_out(Safeguard::PinRereadsEntry) {
            // Letting go is the undo: it may even free a frame.
            run.truncate(self.still_so(gfn, entry, run.count()));
        }
        if run.count() == 0 {
            return None;
        }
        Counters::add_more(&self.counters.mine().pins_fast, run.count());
        Some(run)
    }

    /// How many of `count` pages from `gfn` on, the first of which had `entry`, are mapped as they were.
    #[inline]
    fn still_so(&self, gfn: Gfn, entry: Entry, count: u64) -> u64 {
        match self.mapped.table.peek_huge(gfn) {
            Some(huge) if huge == entry => count,
            Some(_) => 0,
            None => {
                let is_same =
                    |&n: &u64| self.mapped.table.peek_small(Gfn(gfn.0 + n)) == entry.page(n);
                (0..count).take_while(is_same).count() as u64
            }
        }
    }

    /// Not inlined: what the fast path hands on would be copied on its way.
    #[inline(never)]
    fn pin_slow(&self, gfn: Gfn, access: Access) -> Result<PinnedRun, PinError> {
        let intent = match access {
            Access::Read => Intent::Unshare,
            Access::Write => Intent::Write,
        };
        let _no_fork = self.mapped.enter().map_err(FaultError::from)?;
        let mut region = self.mapped.table.lock_of(gfn);
        self.adopt(&mut region).map_err(FaultError::from)?;
        let mut entry = region.get(gfn);
        let ready = access == Access::Read || entry.is_writable();
        if !ready || !self.policy.may_pin(self.pool.state(entry.pfn()), access) {
            let resolution = self.resolve(&mut region, gfn, intent)?;
            self.count(intent, resolution);
            entry = region.get(gfn);
        }
        // Under both locks nothing takes the bit away again.
        let run = self
            .pool
            .try_pin(entry, 1, access, &self.policy)
            .map_err(|_| PinError::TooMany { gfn })?;
        Counters::add(&self.counters.mine().pins_slow);
        Ok(run)
    }
}
