//! Breaks ahead of the writes: what the guest writes between all forks is copied while it does something else.
//!
//! A break on a vCPU costs the guest an exit and a fault more than the copy does. Who has a CPU to spare breaks beforehand what
//! will be written anyway: [`AddressSpace::break_ahead`], called again and again after a fork by a thread of its own.
//!
//! What that is, is known by the fork: pages that were writable at this one and at the last. What was broken ahead is writable at
//! the next fork whether the guest wrote it or not, so every few forks nothing is broken ahead, and what is not written any
//! more is found out: what the guest does not write is copied so many times at most.

use std::collections::VecDeque;
use std::mem;
use std::sync::atomic::Ordering;

use super::adapt::is_proof;
use super::addr::Gfn;
use super::fault::Intent;
use super::policy::CowPolicy;
use super::space::AddressSpace;
use super::stats::Counters;
use super::sync::lock;

/// A page, or a region that a huge entry maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Piece {
    /// The page, or the first one.
    pub(super) first: Gfn,
    pub(super) is_huge: bool,
}

/// What was written lately, as far as forks know.
#[derive(Default)]
pub(super) struct Written {
    /// Before the last fork, in order.
    last: Vec<Piece>,
    /// Before the next one, as far as it was prepared.
    prepared: Vec<Piece>,
    /// To be broken ahead.
    next: VecDeque<Piece>,
}

impl Written {
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn next(&self) -> Vec<Piece> {
        self.next.iter().copied().collect()
    }

    /// The next fork will not find `pieces` writable, because somebody prepared it.
    pub(super) fn note_prepared(&mut self, pieces: &[Piece]) {
        self.prepared.extend_from_slice(pieces);
    }

    /// Fork number `fork` found `pieces` writable, in order.
    pub(super) fn note(&mut self, fork: u64, mut pieces: Vec<Piece>) {
        pieces.append(&mut self.prepared);
        pieces.sort_unstable();
        pieces.dedup();
        let before = mem::replace(&mut self.last, pieces);
        self.next.clear();
        if !is_proof(fork) {
            let mut before = before.into_iter().peekable();
            let again = self.last.iter().copied().filter(|piece| {
                while before.next_if(|old| old < piece).is_some() {}
                before.peek() == Some(piece)
            });
            self.next.extend(again);
        }
    }
}

impl<P: CowPolicy> AddressSpace<P> {
    /// Has forks note what [`AddressSpace::break_ahead`] needs to know.
    pub fn notes_writes(&self) {
        self.notes_writes.store(true, Ordering::Relaxed);
    }

    /// Makes a piece of what was written before each of the last two forks writable again, at the cost of a copy: 4 KiB or 2 MiB. Says
    /// whether there may be more. A fork waits for it, and a fault in the same region does: not for a thread at a low priority to call.
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
        let Some(Piece { first, is_huge }) = lock(&self.written).next.pop_front() else {
            return false;
        };
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
            Counters::add(&self.counters.ahead);
        }
        true
    }
}
