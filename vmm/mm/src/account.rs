//! Accounts: what one machine may take of a pool that many share.
//!
//! Every frame that an address space allocates, for itself or for its snapshots (copies for sharers that
//! move, eager copies of a fork), is charged to the space's account, and refunded when the frame is free
//! again, whoever frees it. Several spaces may have one account; a snapshot has that of the space it was
//! taken of. What is given memory by the way, for nobody yet, is charged to nobody.
//!
//! At its limit an account gets no more: [`AllocError::Quota`](super::AllocError::Quota), where there would
//! be [`AllocError::Limit`](super::AllocError::Limit) if the pool were full. It is the error of whoever has
//! that account, and nobody else notices. A huge folio for which there is no room in an account is done
//! without, as one for which there is no memory; and what nobody asked for (the rest of a region, copies
//! ahead) is left undone where an account has room for less than a region.
//!
//! A frame stays charged to who allocated it, whoever shares it later
//! (`docs/decisions/0013-who-pays-for-a-frame.md`). What is shared by whom is what `census.rs` says.

use std::fmt;
use std::sync::Arc;

use super::commit::Supply;
use super::ledger::{AccountNumber, AccountUsage};

/// An account of a pool. A clone of it is the same account; it is closed when the last one is dropped.
#[derive(Clone)]
pub struct Account(Arc<Opened>);

struct Opened {
    supply: Arc<Supply>,
    number: AccountNumber,
}

impl Account {
    /// An account of the pool that has `supply`, charged with nothing.
    pub(super) fn open(supply: &Arc<Supply>, limit: Option<u64>) -> Self {
        Self(Arc::new(Opened {
            number: supply.lock().ledger_mut().open(limit),
            supply: Arc::clone(supply),
        }))
    }

    /// What it is charged with.
    pub fn usage(&self) -> AccountUsage {
        self.0.supply.lock().ledger().usage(self.0.number)
    }

    /// Sets the most it may be charged with, in frames; `None` for no limit. What it has it keeps, even if
    /// that is more.
    pub fn set_limit(&self, limit: Option<u64>) {
        let mut allocator = self.0.supply.lock();
        allocator.ledger_mut().set_limit(self.0.number, limit);
    }

    /// Whether `count` frames more are within its limit, just now.
    pub(super) fn has_room(&self, count: u64) -> bool {
        let allocator = self.0.supply.lock();
        allocator.ledger().may_take(self.0.number, count).is_ok()
    }

    pub(super) fn number(&self) -> AccountNumber {
        self.0.number
    }

    /// Whether it is an account of the pool that has `supply`.
    pub(super) fn is_of(&self, supply: &Arc<Supply>) -> bool {
        Arc::ptr_eq(&self.0.supply, supply)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.supply.lock().ledger_mut().close(self.number);
    }
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Account").field(&self.0.number).finish()
    }
}
