//! The live race under each policy, one after the other, with the same seed.
//!
//! The payload and the devices are those of any run. What brings each policy's bug up (PROTOCOL.md 6.3):
//! * devices hold registered buffers over every snapshot: mapcount shares them with it, and the devices write
//!   into it (D2);
//! * dirty tracking write-protects what devices hold, and the guest writes beside it: refcount takes
//!   the page from under the device (C1, C5);
//! * buffers are registered for reading while snapshots share their pages, and the guest writes them again:
//!   pins that do not look at the bit lose the page (E1).

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use guest::abi::Pattern;
use serde::Serialize;

use super::config::{Config, GuestSource, PageSize, RunLength};
use super::progress::Observer;
use super::report::{Report, Verdict};
use super::{RunError, run};
use crate::accel::Accel;
use crate::check::Oracle;
use crate::policy::Policy;

/// The race that is run under every policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Race {
    /// How long, under each.
    pub duration: Duration,
    /// Seed of everything that is chosen.
    pub seed: u64,
    /// Bytes of guest memory.
    pub memory: u64,
    /// vCPUs of the guest.
    pub vcpus: u64,
    /// What runs them.
    pub accel: Accel,
}

/// How the race went under one policy.
#[derive(Clone, Debug, Serialize)]
pub struct Raced {
    /// The policy.
    pub policy: Policy,
    /// Oracles that must see something.
    pub must_show: &'static [Oracle],
    /// What was seen.
    pub report: Report,
}

/// What the policy must be caught at. Only `exclusive` must not be caught at anything.
pub const fn must_show(policy: Policy) -> &'static [Oracle] {
    match policy {
        // Devices write into snapshots: fork shares what they hold.
        Policy::Mapcount | Policy::MapcountForcedBreak => &[Oracle::Isolation],
        // Guest and device part: the first write after a write-protection copies, whatever devices hold.
        Policy::Refcount => &[Oracle::Coherence],
        // The same for devices that read, if they were given a page that a snapshot shared.
        Policy::Seed | Policy::SeedRecompute => &[Oracle::Coherence],
        Policy::Exclusive => &[],
    }
}

impl Race {
    /// What is run under `policy`.
    pub fn config(&self, policy: Policy) -> Config {
        Config {
            guest: GuestSource::Payload,
            accel: self.accel,
            trust_guest: false,
            memory: self.memory,
            vcpus: self.vcpus,
            length: RunLength::Duration(self.duration),
            snapshot_every: Duration::from_millis(20),
            keep: 4,
            restore_every: 10,
            dma_devices: 2,
            registered_buffers: 4,
            pattern: Pattern::Hot,
            seed: self.seed,
            policy,
            page_size: PageSize::Huge,
            // Who copies first is not to be a matter of chance.
            copy_ahead: false,
            dump_guest_memory: false,
            track_dirty: Some(Duration::from_millis(5)),
            inject: None,
        }
    }

    /// Runs it.
    ///
    /// # Errors
    /// If the guest could not be started. That it crashed, under a wrong policy, is no error.
    pub fn run(
        &self,
        policy: Policy,
        stop: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Result<Raced, RunError> {
        let report = run(
            &self.config(policy),
            guest::PAYLOAD.to_vec(),
            stop,
            observer,
        )?;
        Ok(Raced {
            policy,
            must_show: must_show(policy),
            report,
        })
    }
}

/// Snapshots in which a wrong policy must have shown: two or three seconds, where the guest is not slow.
const ENOUGH_SNAPSHOTS: u64 = 20;

impl Raced {
    /// Whether the policy was caught at what it must be caught at, or at nothing if it is right.
    pub fn is_as_expected(&self) -> bool {
        if self.must_show.is_empty() {
            self.report.verdict == Verdict::Ok
        } else {
            let seen = |oracle: &Oracle| self.report.violations.of(*oracle) > 0;
            self.must_show.iter().all(seen)
        }
    }

    /// Whether the policy was not caught, and there were too few snapshots for that.
    pub fn was_too_short(&self) -> bool {
        self.report.verdict == Verdict::Ok
            && !self.is_as_expected()
            && self.report.snapshots.checked < ENOUGH_SNAPSHOTS
    }

    /// Whether it went otherwise although the host let it run to its end.
    pub fn misbehaved(&self) -> bool {
        let finished = match self.report.verdict {
            Verdict::Ok | Verdict::Violated => !self.was_too_short(),
            Verdict::Error | Verdict::NothingChecked => false,
        };
        finished && !self.is_as_expected()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::report::tests::example;

    fn raced(policy: Policy, verdict: Verdict, seen: &[Oracle]) -> Raced {
        let mut report = example();
        report.verdict = verdict;
        report.violations = Default::default();
        seen.iter()
            .for_each(|&oracle| report.violations.add(oracle));
        Raced {
            policy,
            must_show: must_show(policy),
            report,
        }
    }

    #[test]
    fn a_policy_must_show_its_bug_and_exclusive_none() {
        use Oracle::{Coherence, Isolation, Life};
        let as_expected =
            |policy, verdict, seen: &[Oracle]| raced(policy, verdict, seen).is_as_expected();
        assert!(as_expected(Policy::Exclusive, Verdict::Ok, &[]));
        assert!(!as_expected(Policy::Exclusive, Verdict::Violated, &[Life]));
        assert!(!as_expected(Policy::Exclusive, Verdict::Error, &[]));
        assert!(as_expected(
            Policy::Mapcount,
            Verdict::Violated,
            &[Isolation, Life]
        ));
        assert!(!as_expected(
            Policy::Mapcount,
            Verdict::Violated,
            &[Coherence]
        ));
        assert!(as_expected(
            Policy::Refcount,
            Verdict::Violated,
            &[Coherence]
        ));
        assert!(!as_expected(Policy::Refcount, Verdict::Ok, &[]));
    }

    #[test]
    fn a_race_that_could_not_be_run_is_no_misbehaviour() {
        let misbehaved =
            |policy, verdict, seen: &[Oracle]| raced(policy, verdict, seen).misbehaved();
        assert!(!misbehaved(Policy::Exclusive, Verdict::Ok, &[]));
        assert!(!misbehaved(Policy::Exclusive, Verdict::Error, &[]));
        assert!(!misbehaved(Policy::Mapcount, Verdict::NothingChecked, &[]));
        let mut short = raced(Policy::Mapcount, Verdict::Ok, &[]);
        short.report.snapshots.checked = ENOUGH_SNAPSHOTS - 1;
        assert!(short.was_too_short() && !short.misbehaved());
        // A violation is one in whatever snapshot.
        let mut wrong = raced(Policy::Exclusive, Verdict::Violated, &[Oracle::Life]);
        wrong.report.snapshots.checked = 1;
        assert!(wrong.misbehaved());
        assert!(misbehaved(Policy::Mapcount, Verdict::Ok, &[]));
        assert!(misbehaved(
            Policy::Exclusive,
            Verdict::Violated,
            &[Oracle::Life]
        ));
    }
}
