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
//! page's, exclusive again, between the first two lines. Both are model-checked in `tests/loom`, with and without.

use super::addr::{Access, Gfn};
use super::fault::Intent;
use super::policy::{CowPolicy, without};
use super::pool::Pin;
use super::safeguard::Safeguard;
use super::space::{AddressSpace, Counters, FaultError, in_range};
use super::sync::read;

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
        in_range(&self.table, gfn).map_err(FaultError::from)?;
        let access = self.policy.lookup(access);
        match self.pin_fast(gfn, access) {
            Some(pin) => {
                Counters::add(&self.counters.pins_fast);
                Ok(pin)
            }
            None => self.pin_slow(gfn, access),
        }
    }

    /// Pins `count` pages from `first` on, or none of them.
    ///
    /// # Errors
    /// As [`AddressSpace::pin`].
    pub fn pin_range(&self, first: Gfn, count: u64, access: Access) -> Result<Vec<Pin>, PinError> {
        (0..count)
            .map(|n| self.pin(Gfn(first.0.saturating_add(n)), access))
            .collect()
    }

    fn pin_fast(&self, gfn: Gfn, access: Access) -> Option<Pin> {
        let entry = self.table.peek(gfn);
        if !entry.is_present() || (access == Access::Write && !entry.is_writable()) {
            return None;
        }
        let pin = self.pool.try_pin(entry, access, &self.policy).ok()?;
        // Dropping the pin is the undo: it may even free the frame.
        let unchanged = self.table.peek(gfn) == entry || without::<P>(Safeguard::PinRereadsEntry);
        unchanged.then_some(pin)
    }

    fn pin_slow(&self, gfn: Gfn, access: Access) -> Result<Pin, PinError> {
        let intent = match access {
            Access::Read => Intent::Unshare,
            Access::Write => Intent::Write,
        };
        let _no_fork = read(&self.fork_lock);
        let mut region = self.table.lock_of(gfn);
        let mut entry = region.get(gfn);
        let ready = access == Access::Read || entry.is_writable();
        if !ready || !self.policy.may_pin(self.pool.state(entry.pfn()), access) {
            let resolution = self.resolve(&mut region, gfn, intent)?;
            self.count(intent, resolution);
            entry = region.get(gfn);
        }
        // Under both locks nothing takes the bit away again.
        let pin = self
            .pool
            .try_pin(entry, access, &self.policy)
            .map_err(|_| PinError::TooMany { gfn })?;
        Counters::add(&self.counters.pins_slow);
        Ok(pin)
    }
}
