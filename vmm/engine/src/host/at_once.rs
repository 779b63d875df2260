//! How much memory is asked for at a time by somebody who needs 2 MiB and waits for it.
//!
//! Where memory is cheap most of what a huge page costs is for the call, so it is good to ask for many. Where it is
//! dear it is not: on a virtual host whose own host has taken free pages back 2 MiB take 4.4 ms of this CPU, and a
//! vCPU that asked for sixteen stood still for 35.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::mm::MOST_FOLIOS_AT_ONCE;

/// A call that took a CPU longer was for too many.
const LONG: Duration = Duration::from_millis(3);
/// One that took it no longer could have been for twice as many.
const SHORT: Duration = Duration::from_micros(1200);

/// How many huge pages are asked for at a time, by what the last calls have taken. A hint: nothing is ordered by it.
#[derive(Debug)]
pub(in crate::host) struct AtOnce(AtomicU64);

impl Default for AtOnce {
    /// What is known before there was a call: two are worth while wherever one is.
    fn default() -> Self {
        Self(AtomicU64::new(2))
    }
}

impl AtOnce {
    pub(in crate::host) fn folios(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// A call for `folios` has taken a CPU `time`, not counting what it waited for one.
    pub(in crate::host) fn took(&self, folios: u64, time: Duration) {
        let next = if time > LONG {
            folios / 2
        } else if time <= SHORT {
            folios * 2
        } else {
            return;
        };
        let now = self.folios();
        // A call for fewer than it might have been says nothing of more, nor one for more of fewer.
        if (time > LONG && folios <= now) || (time <= SHORT && folios >= now) {
            self.0
                .store(next.clamp(1, MOST_FOLIOS_AT_ONCE), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn after(calls: &[(u64, Duration)]) -> u64 {
        let at_once = AtOnce::default();
        calls
            .iter()
            .for_each(|&(folios, time)| at_once.took(folios, time));
        at_once.folios()
    }

    #[test]
    fn as_many_are_asked_for_as_do_not_take_long() {
        assert_eq!(after(&[]), 2);
        assert_eq!(after(&[(2, MS), (4, MS), (8, MS), (8, MS)]), 8);
        assert_eq!(after(&[(2, MS), (4, 2 * MS)]), 4, "neither long nor short");
        assert_eq!(after(&[(2, 9 * MS), (1, 4 * MS)]), 1);
        assert_eq!(after(&[(2, MS), (4, 9 * MS)]), 2);
    }

    #[test]
    fn a_call_for_few_says_nothing_of_many() {
        let eight = [(2, MS), (4, MS)];
        assert_eq!(after(&[eight[0], eight[1], (1, MS)]), 8);
        assert_eq!(
            after(&[eight[0], eight[1], (1, 5 * MS)]),
            1,
            "but that all is dear"
        );
        assert_eq!(
            after(&[(2, 9 * MS), (8, 40 * MS)]),
            1,
            "nor the other way round"
        );
    }
}
