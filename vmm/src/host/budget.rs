//! How many memory mappings the windows of this process may use.
//!
//! Linux gives a process `vm.max_map_count` of them (65,530 by default), and a window uses one for each
//! stretch of pages that are alike. Running into the limit would leave a window half changed, so the windows count, and stop before.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

/// Left for everything in the process that is not a window: code, heap, stacks, libraries.
const RESERVE: u64 = 2_000;
/// What `vm.max_map_count` is where it can't be read.
const DEFAULT_LIMIT: u64 = 65_530;

/// The process's account of window mappings.
#[derive(Debug)]
pub struct MappingBudget {
    limit: u64,
    used: AtomicU64,
    peak: AtomicU64,
}

impl MappingBudget {
    /// A budget from `vm.max_map_count`.
    pub fn of_this_process() -> Self {
        let max = fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_LIMIT);
        Self::with_limit(max - RESERVE.min(max / 2))
    }

    /// A budget of `limit` mappings.
    pub fn with_limit(limit: u64) -> Self {
        Self {
            limit,
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        }
    }

    /// The most mappings windows may use.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Mappings in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Mappings in use at the worst moment.
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Whether more than three quarters are used: time to spend copies to save mappings.
    pub fn is_crowded(&self) -> bool {
        self.used() > self.limit / 4 * 3
    }

    /// Books a change from `before` to `after` mappings. Refused if that is beyond the limit.
    pub(super) fn change(&self, before: u64, after: u64) -> Result<(), u64> {
        let booked = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                let used = used + after - before;
                (after <= before || used <= self.limit).then_some(used)
            });
        match booked {
            Ok(used) => {
                self.peak
                    .fetch_max(used + after - before, Ordering::Relaxed);
                Ok(())
            }
            Err(_) => Err(self.limit),
        }
    }
}
