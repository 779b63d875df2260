//! Breaks ahead of the writes: what the guest writes between all forks is copied while it does something
//! else.
//!
//! A break on a vCPU costs the guest an exit and a fault more than the copy does. Who has a CPU to spare
//! breaks beforehand what will be written anyway: [`AddressSpace::break_ahead`], called again and again after
//! a fork by a thread of its own.
//!
//! What that is, is the predictor's to say (`predictor/working_set.rs`).

use std::sync::atomic::Ordering;

use super::fault::Intent;
use super::policy::CowPolicy;
use super::predictor::Leaf;
use super::space::AddressSpace;
use super::stats::Counters;

impl<P: CowPolicy> AddressSpace<P> {
    /// Has forks note what [`AddressSpace::break_ahead`] needs to know.
    pub fn notes_writes(&self) {
        self.predictor.note_writes();
    }

    /// Makes a page or a region that was written before each of the last two forks writable again, at the
    /// cost of a copy: 4 KiB or 2 MiB. Says whether there may be more. A fork waits for it, and a fault in
    /// the same region does: not for a thread at a low priority to call.
    ///
    /// Never needed: what cannot be broken here is left to the fault.
    pub fn break_ahead(&self) -> bool {
        if self.tracks_dirty.load(Ordering::Relaxed) {
            // Pages would count as written that were not.
            return false;
        }
        let Ok(_no_fork) = self.mapped.enter() else {
            return false;
        };
        let Some(Leaf { first, is_huge }) = self.predictor.next_ahead() else {
            return false;
        };
        // What is left of a quota is for pages that somebody asks for.
        if !self.account.has_room(self.pool.huge().pages()) {
            return false;
        }
        let mut region = self.mapped.table.lock_of(first);
        let entry = region.get(first);
        if entry.is_writable() || !entry.is_present() || entry.is_huge() != is_huge {
            return true;
        }
        let broken = if is_huge {
            self.open(&mut region, first);
            self.resolve_huge(&mut region, Intent::Write, true)
        } else {
            self.resolve(&mut region, first, Intent::Write).map(Some)
        };
        if let Ok(Some(_)) = broken {
            Counters::add(&self.counters.mine().ahead);
        }
        true
    }
}
