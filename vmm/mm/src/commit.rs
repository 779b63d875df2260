//! Memory for frames: what the allocator has to ask the host for, and what goes back.
//!
//! To give memory to 2 MiB takes the host a millisecond, and to take it back nearly as long. It is **never
//! asked with the allocator's lock held**: frames are claimed, the lock is let go, the host is asked, and
//! then the frames are their owner's, or free again. Whoever needs other frames goes on meanwhile; who needs
//! just these, or the last there are, waits until that is decided.
//!
//! # At the limit
//! Memory that is free outside homes is used first. If there is none, what homes have and nobody uses goes
//! back to the host, to make room: an allocation fails only if every frame for which there may be memory is
//! in use, or the host refuses.
//!
//! # What is in stock
//! Memory for copies is there before they are made, as far as somebody has the time to see to it
//! ([`Supply::stock_up`]); how much, `stock.rs` says. [`Supply::give_back_surplus`], which is called before
//! each snapshot, gives back runs that nobody has needed for many snapshots, a few at a time. So memory that
//! snapshots use now and then stays, and what one of them has needed once goes.

use std::io;
use std::sync::Arc;

use super::addr::{PAGE_SIZE, Pfn};
use super::allocator::{Allocator, Claim, Surplus, Unavailable};
use super::mmu::{FrameMemory, MOST_FOLIOS_AT_ONCE};
use super::sync::{Condvar, Mutex, MutexGuard, lock, wait};

/// Why there was no frame.
#[derive(Debug, thiserror::Error)]
pub enum AllocError {
    /// The pool's own limit.
    #[error("out of memory: all {} MiB of the frame pool are in use", (limit * PAGE_SIZE) >> 20)]
    Limit {
        /// Frames the pool may commit.
        limit: u64,
    },
    /// What the caller's account may have, which is in use. Others are not concerned.
    #[error("out of quota: all {limit} frames that the account may have are in use")]
    Quota {
        /// Frames the account may be charged with.
        limit: u64,
    },
    /// The pool has no run of frame numbers that long.
    #[error("the frame pool has no room for a home of {pages} pages")]
    Home {
        /// Pages asked for.
        pages: u64,
    },
    /// The host has no memory left.
    #[error("out of memory: the host gave no memory for {count} more frames")]
    Host {
        /// Frames asked for.
        count: u64,
        /// The host's reason.
        source: io::Error,
    },
}

/// The allocator, and the host's memory.
pub(super) struct Supply {
    allocator: Mutex<Allocator>,
    /// Something that was in transit no longer is.
    settled: Condvar,
    memory: Arc<dyn FrameMemory>,
}

/// Frames that somebody has now.
pub(super) struct Taken {
    pub(super) first: Pfn,
    /// Whether they are known to be all zeros: their memory is new.
    pub(super) is_blank: bool,
}

impl Supply {
    pub(super) fn new(allocator: Allocator, memory: Arc<dyn FrameMemory>) -> Self {
        Self {
            allocator: Mutex::new(allocator),
            settled: Condvar::new(),
            memory,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Allocator> {
        lock(&self.allocator)
    }

    pub(super) fn memory(&self) -> &dyn FrameMemory {
        &*self.memory
    }

    /// Frames that `claim` finds, with memory. Makes room for them if it must.
    pub(super) fn take(
        &self,
        claim: impl Fn(&mut Allocator) -> Result<Claim, Unavailable>,
    ) -> Result<Taken, AllocError> {
        loop {
            match self.claim(&claim)? {
                Ok(taken) => return Ok(taken),
                Err(Unavailable::Quota { limit }) => return Err(AllocError::Quota { limit }),
                Err(Unavailable::Taken | Unavailable::InTransit | Unavailable::Limit) => {}
            }
            let mut allocator = self.lock();
            let Some(unused) = allocator.take_unused_of_homes() else {
                let limit = allocator.usage().limit;
                return Err(AllocError::Limit { limit });
            };
            drop(allocator);
            self.return_to_host(unused)?;
        }
    }

    /// As [`Supply::take`], but makes no room: `None` if somebody has one of the frames, or there is no
    /// memory for all of them, or the account may not have as many.
    pub(super) fn try_take(
        &self,
        claim: impl Fn(&mut Allocator) -> Result<Claim, Unavailable>,
    ) -> Result<Option<Taken>, AllocError> {
        Ok(self.claim(claim)?.ok())
    }

    /// One try. Waits for what is in transit.
    fn claim(
        &self,
        claim: impl Fn(&mut Allocator) -> Result<Claim, Unavailable>,
    ) -> Result<Result<Taken, Unavailable>, AllocError> {
        let mut allocator = self.lock();
        let claim = loop {
            match claim(&mut allocator) {
                Ok(claim) => break claim,
                Err(Unavailable::InTransit) => allocator = wait(&self.settled, allocator),
                Err(unavailable) => return Ok(Err(unavailable)),
            }
        };
        let taken = Taken {
            first: claim.first(),
            is_blank: claim.is_blank(),
        };
        if claim.needs_memory() {
            drop(allocator);
            self.commit(claim)?;
        } else {
            allocator.finish(&claim);
            let is_short = allocator.stock_mut().is_awaited && allocator.wanted() > 0;
            drop(allocator);
            if is_short {
                self.settled.notify_all();
            }
        }
        Ok(Ok(taken))
    }

    /// Makes a home of `pages` frames, if need be when the host has answered about those that are in the way.
    pub(super) fn make_home(&self, pages: u64) -> Result<Pfn, AllocError> {
        let mut allocator = self.lock();
        loop {
            if let Some(home) = allocator.make_home(pages) {
                return Ok(home);
            }
            if !allocator.is_asking() {
                return Err(AllocError::Home { pages });
            }
            allocator = wait(&self.settled, allocator);
        }
    }

    /// How many folios the host is asked for at a time, where somebody needs one.
    pub(super) fn folios_at_once(&self) -> u64 {
        self.memory.folios_at_once().clamp(1, MOST_FOLIOS_AT_ONCE)
    }

    /// Has memory ready for whoever needs a frame or a folio next, and may be in a hurry. What there is no
    /// memory for is left to them.
    pub(super) fn provide(&self) {
        let single = self.lock().prepare_single();
        self.commit_if_needed(single);
        let folios = self.lock().prepare_folios(self.folios_at_once());
        self.commit_if_needed(folios);
    }

    fn commit_if_needed(&self, claim: Option<Claim>) {
        if let Some(claim) = claim.filter(Claim::needs_memory) {
            let _ = self.commit(claim);
        }
    }

    /// Waits until something should be put in stock. `false` if nothing should be any more
    /// ([`Supply::close_stock`]).
    pub(super) fn wait_for_want(&self) -> bool {
        let mut allocator = self.lock();
        loop {
            if allocator.stock_mut().is_closed {
                return false;
            }
            if allocator.wanted() > 0 {
                return true;
            }
            allocator.stock_mut().is_awaited = true;
            allocator = wait(&self.settled, allocator);
            allocator.stock_mut().is_awaited = false;
        }
    }

    /// Puts some memory in stock, if that is wanted and the host has it. Says whether more is wanted.
    pub(super) fn stock_up(&self) -> bool {
        let mut allocator = self.lock();
        let Some(claim) = allocator.prepare_stock() else {
            allocator.stock_mut().note_refused();
            return false;
        };
        drop(allocator);
        self.commit(claim).is_ok() && self.lock().wanted() > 0
    }

    /// Nobody will put anything in stock any more.
    pub(super) fn close_stock(&self) {
        self.lock().stock_mut().is_closed = true;
        self.settled.notify_all();
    }

    /// Asks the host for what a claim needs: if it refuses, for what the caller needs of it.
    fn commit(&self, mut claim: Claim) -> Result<(), AllocError> {
        loop {
            let (first, count) = (claim.first(), claim.total());
            let committed = if claim.is_huge() {
                self.memory.commit(first, count)
            } else {
                self.memory.commit_base_pages(first, count)
            };
            let mut allocator = self.lock();
            let result = match committed {
                Ok(()) => {
                    allocator.finish(&claim);
                    Ok(())
                }
                Err(_) if claim.has_ahead() => {
                    claim = allocator.without_ahead(claim);
                    continue;
                }
                // It has memory, if not in one piece.
                Err(_) if claim.is_optional() => {
                    allocator.finish(&claim);
                    Ok(())
                }
                Err(source) => {
                    allocator.refuse(claim);
                    Err(AllocError::Host { count, source })
                }
            };
            drop(allocator);
            self.settled.notify_all();
            return result;
        }
    }

    /// Gives memory that nobody has used for a while back to the host.
    pub(super) fn give_back_surplus(&self) {
        let surplus = self.lock().take_surplus();
        for surplus in surplus {
            // What the host will not have is used when there is a use for it.
            let _ = self.return_to_host(surplus);
        }
    }

    fn return_to_host(&self, surplus: Surplus) -> Result<(), AllocError> {
        let Surplus { first, count } = surplus;
        let returned = self.memory.uncommit(first, count);
        let mut allocator = self.lock();
        match returned {
            Ok(()) => allocator.give_back(surplus),
            Err(_) => allocator.keep(surplus),
        }
        drop(allocator);
        self.settled.notify_all();
        returned.map_err(|source| AllocError::Host { count, source })
    }

    /// Takes the memory of allocated frames away, if the host will have it.
    pub(super) fn uncommit(&self, first: Pfn, count: u64) {
        if self.memory.uncommit(first, count).is_ok() {
            self.lock().uncommitted(first, count);
        }
    }

    /// Frees `count` frames from `first` on.
    pub(super) fn free(&self, first: Pfn, count: u64) {
        self.lock().release(first, count);
    }
}
