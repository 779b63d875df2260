//! System calls that are refused: when tests say so, or at random in a whole run.
//!
//! `PALIMPSEST_REFUSE=N` has a program built with debug assertions refuse one call in `N`, some of them when
//! half of it is done;
//! `PALIMPSEST_REFUSE=N:SEED` repeats the choices, as far as threads let it. A release build knows nothing of
//! it.

use std::cell::RefCell;
use std::env;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::{Errno, Result};

use super::call::Call;
use crate::mm::PAGE_SIZE;

/// How much of it is done before a call is refused, if there is more than a page to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    Nothing,
    FirstPage,
    Half,
    AllButOnePage,
    All,
}

impl Done {
    const ALL: [Self; 5] = [
        Self::Nothing,
        Self::FirstPage,
        Self::Half,
        Self::AllButOnePage,
        Self::All,
    ];

    fn of(self, len: usize) -> usize {
        let page = PAGE_SIZE as usize;
        let done = match self {
            Self::Nothing => 0,
            Self::FirstPage => page,
            Self::Half => len / 2 / page * page,
            Self::AllButOnePage => len.saturating_sub(page),
            Self::All => len,
        };
        done.min(len)
    }
}

/// What a test wants refused, of the calls of its own thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct RefusalPlan {
    /// How many calls pass first.
    pub(super) after: u64,
    /// How many are refused then.
    pub(super) count: u64,
    pub(super) done: Done,
    /// Calls so far.
    pub(super) calls: u64,
}

thread_local! {
    static PLAN: RefCell<Option<RefusalPlan>> = const { RefCell::new(None) };
}

/// Runs `operation` by `plan`, and says how many calls it made.
#[cfg(test)]
pub(super) fn by_plan<T>(plan: RefusalPlan, operation: impl FnOnce() -> T) -> (T, u64) {
    PLAN.set(Some(plan));
    let result = operation();
    let calls = PLAN.take().map_or(0, |plan| plan.calls);
    (result, calls)
}

/// Choices of a whole run.
struct Random {
    one_in: u64,
    state: AtomicU64,
}

static RANDOM: LazyLock<Option<Random>> = LazyLock::new(|| {
    let text = env::var("PALIMPSEST_REFUSE").ok()?;
    let random = Random::parse(&text);
    if random.is_none() {
        tracing::warn!("PALIMPSEST_REFUSE={text} is not N or N:SEED: nothing is refused");
    }
    random
});

impl Random {
    fn parse(text: &str) -> Option<Self> {
        let (one_in, seed) = text.split_once(':').unwrap_or((text, "0"));
        Some(Self {
            one_in: one_in.parse().ok().filter(|&n| n > 0)?,
            state: AtomicU64::new(seed.parse().ok()?),
        })
    }

    /// splitmix64.
    fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self
            .state
            .fetch_add(STEP, Ordering::Relaxed)
            .wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn refuses(&self) -> Option<Done> {
        let chosen = self.next();
        chosen
            .is_multiple_of(self.one_in)
            .then(|| Done::ALL[(chosen / self.one_in % 5) as usize])
    }
}

fn refuses() -> Option<Done> {
    let planned = PLAN.with_borrow_mut(|plan| {
        plan.as_mut().map(|plan| {
            let nth = plan.calls;
            plan.calls += 1;
            (plan.after..plan.after.saturating_add(plan.count))
                .contains(&nth)
                .then_some(plan.done)
        })
    });
    planned.unwrap_or_else(|| RANDOM.as_ref().and_then(Random::refuses))
}

/// What `call` says of `len` bytes; or no, when it was made for all of them, for some, or not at all.
pub(super) fn refusable<T>(
    which: Call,
    len: usize,
    call: impl Fn(usize) -> Result<T>,
) -> Result<T> {
    let Some(done) = refuses() else {
        return call(len);
    };
    // Punched in part, the file is short of memory that is taken for there: the host does not do that.
    let done = match which {
        Call::PunchHole => 0,
        Call::Map | Call::Protect | Call::Allocate | Call::Collapse => done.of(len),
    };
    if done > 0 {
        call(done)?;
    }
    Err(match which {
        Call::Map | Call::Protect => Errno::NOMEM,
        // Said of a dozen reasons (`madvise_collapse_errno` in mm/khugepaged.c).
        Call::Collapse => Errno::INVAL,
        Call::Allocate | Call::PunchHole => Errno::NOSPC,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_in_so_many_is_refused_and_a_seed_repeats_which() {
        let which = |text| {
            let random = Random::parse(text).unwrap();
            (0..10_000).map(|_| random.refuses()).collect::<Vec<_>>()
        };
        let refused = which("100:7");
        assert_eq!(which("100:7"), refused);
        assert_ne!(which("100:8"), refused);
        let count = refused.iter().flatten().count();
        assert!((50..200).contains(&count), "{count}");
        for done in Done::ALL {
            assert!(refused.contains(&Some(done)), "{done:?}");
        }
    }

    #[test]
    fn what_is_no_number_refuses_nothing() {
        for text in ["", "0", "x", "5:", "5:y", "-1"] {
            assert!(Random::parse(text).is_none(), "{text}");
        }
    }
}
