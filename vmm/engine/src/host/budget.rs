//! How many memory mappings the windows of this process may use.
//!
//! Linux gives a **process** `vm.max_map_count` of them (65,530 by default), and a window uses one for each
//! stretch of pages that are alike. All windows draw on one account, whoever's they are, and stop before the
//! host does: at its limit a change may be refused half-way, and everything else in the process fails as
//! well.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// Left for everything in the process that is not a window: code, heap, stacks, libraries.
const RESERVE: u64 = 2_000;
/// What `vm.max_map_count` is where it can't be read.
const DEFAULT_LIMIT: u64 = 65_530;

/// The account that all windows of a process draw on.
#[derive(Debug)]
struct Account {
    limit: u64,
    used: AtomicU64,
}

/// That of this process.
static ACCOUNT: LazyLock<Arc<Account>> = LazyLock::new(|| {
    let max = fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT_LIMIT);
    Arc::new(Account {
        limit: max - RESERVE.min(max / 2),
        used: AtomicU64::new(0),
    })
});

/// What the windows of one virtual machine use of an account that all machines of the process share.
#[derive(Debug)]
pub struct MappingBudget {
    account: Arc<Account>,
    used: AtomicU64,
    peak: AtomicU64,
}

impl MappingBudget {
    /// A machine's part of what this process has, which is less than `vm.max_map_count`.
    pub fn of_this_process() -> Self {
        Self::of(Arc::clone(&ACCOUNT))
    }

    /// The only part of an account of `limit` mappings.
    pub fn with_limit(limit: u64) -> Self {
        Self::of(Arc::new(Account {
            limit,
            used: AtomicU64::new(0),
        }))
    }

    /// Mappings that all windows of the process have.
    pub fn used_by_all(&self) -> u64 {
        self.account.used.load(Ordering::Relaxed)
    }

    /// Another machine's part of the same account.
    pub fn beside(&self) -> Self {
        Self::of(Arc::clone(&self.account))
    }

    fn of(account: Arc<Account>) -> Self {
        Self {
            account,
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        }
    }

    /// The most mappings that all windows together may use.
    pub fn limit(&self) -> u64 {
        self.account.limit
    }

    /// Mappings in use by this machine.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Mappings in use by this machine at the worst moment.
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Whether more than three quarters are used, by all together: time to spend copies to save mappings.
    pub fn is_crowded(&self) -> bool {
        self.account.used.load(Ordering::Relaxed) > self.limit() / 4 * 3
    }

    /// Books a change from `before` to `after` mappings. Refused if that is beyond the limit.
    pub(super) fn change(&self, before: u64, after: u64) -> Result<(), u64> {
        if before == after {
            return Ok(());
        }
        let limit = self.limit();
        // Relaxed: these are counts, and order nothing.
        let booked = self
            .account
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                let used = used + after - before;
                (after <= before || used <= limit).then_some(used)
            });
        booked.map_err(|_| limit)?;
        let change = after.wrapping_sub(before);
        let used = self.used.fetch_add(change, Ordering::Relaxed);
        let used = used.wrapping_add(change);
        // Most changes make no peak, and then it is not written.
        if used > self.peak.load(Ordering::Relaxed) {
            self.peak.fetch_max(used, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_machines_share_what_the_process_has() {
        let one = MappingBudget::with_limit(100);
        let other = one.beside();
        one.change(0, 70).unwrap();
        assert!(!one.is_crowded() && !other.is_crowded());
        other.change(0, 10).unwrap();
        assert!(one.is_crowded() && other.is_crowded(), "together");
        assert_eq!(other.change(10, 31), Err(100), "one of them has the rest");
        other.change(10, 30).unwrap();
        one.change(70, 69).unwrap();
        assert_eq!((one.used(), one.peak()), (69, 70));
        assert_eq!((other.used(), other.peak()), (30, 30));
        one.change(69, 0).unwrap();
        other.change(30, 100).unwrap();
        other.change(100, 0).unwrap();
        assert_eq!((one.used(), other.used()), (0, 0));
        assert_eq!(one.account.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_account_of_the_process_is_one() {
        let (one, other) = (
            MappingBudget::of_this_process(),
            MappingBudget::of_this_process(),
        );
        assert!(Arc::ptr_eq(&one.account, &other.account));
        assert_eq!(one.limit(), other.limit());
    }
}
