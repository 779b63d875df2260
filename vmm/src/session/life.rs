//! The part of the life oracle that the guest can't see to itself: it must run on after a restore.
//!
//! How long it may take goes by the guest's own pace, since an emulated host may run it at a dozen operations
//! a second. The end of a run waits for vCPUs that have not run on yet.

use std::time::{Duration, Instant};

use crate::check::{Oracle, Violation};

/// How long each vCPU may take at least for its first operation after a restore. It takes microseconds; the
/// rest is for a host that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(10);
/// And how often as long as it ever stood still before.
const TIMES_THE_LONGEST: u32 = 10;

/// How long a guest may take whose longest gap between two operations was `longest` so far.
pub(super) fn patience(longest: Duration) -> Duration {
    PATIENCE.max(longest.saturating_mul(TIMES_THE_LONGEST))
}

/// Watches a guest that was rewound.
#[derive(Debug, Default)]
pub(super) struct LifeWatch {
    waiting: Vec<Option<Waiting>>,
}

/// A vCPU that has done nothing since a restore.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    snapshot: u64,
    since: Instant,
    ops: u64,
}

impl LifeWatch {
    /// The guest was rewound to `snapshot`, where its vCPUs had done `ops` operations. A vCPU that has done
    /// nothing since the restore before keeps waiting since then: frequent restores must not hide one that
    /// stands still.
    pub(super) fn rewound(&mut self, snapshot: u64, ops: Vec<u64>) {
        self.waiting.resize(ops.len(), None);
        for (waiting, ops) in self.waiting.iter_mut().zip(ops) {
            let since = waiting.map_or_else(Instant::now, |w| w.since);
            *waiting = Some(Waiting {
                snapshot,
                since,
                ops,
            });
        }
    }

    /// Whether there is a vCPU that has done nothing since.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.iter().any(Option::is_some)
    }

    /// The vCPUs have done `ops` operations now, and may take `patience` for the first.
    pub(super) fn look(&mut self, ops: &[u64], patience: Duration) -> Option<Violation> {
        for (waiting, &ops) in self.waiting.iter_mut().zip(ops) {
            // More than it had means that it runs, less that it was rewound and not watched.
            waiting.take_if(|w| ops != w.ops);
        }
        let (vcpu, stuck) = self.waiting.iter_mut().enumerate().find_map(|(vcpu, w)| {
            w.take_if(|w| w.since.elapsed() >= patience)
                .map(|w| (vcpu, w))
        })?;
        let mut v = Violation::new(
            Oracle::Life,
            format!("vcpu {vcpu} does not run on after the restore"),
        );
        v.snapshot = Some(stuck.snapshot);
        v.expected = format!("more than {} operations", stuck.ops);
        v.found = format!("no more after {:.0?}", stuck.since.elapsed());
        Some(v)
    }
}

/// Operations after which a device that is driven by a vCPU must have done a request: the driver polls it
/// many times in so many.
const ENOUGH_OPS: u64 = 1024;

/// Watches the devices of a guest that was rewound. How long one may take goes by what the vCPU has done that
/// drives it, too: a slow guest asks for little.
#[derive(Debug, Default)]
pub(super) struct DeviceWatch {
    waiting: Vec<Option<WaitingDevice>>,
    /// Operations the vCPUs had done at the last restore, in the course of events since.
    ops: Vec<u64>,
}

/// A device that has done no request since a restore.
#[derive(Clone, Copy, Debug)]
struct WaitingDevice {
    snapshot: u64,
    since: Instant,
    requests: u64,
    /// Operations of its vCPU between the restores since.
    ops: u64,
}

impl DeviceWatch {
    /// The guest, whose vCPUs had done `before` operations, was rewound to `snapshot`, where they had done
    /// `ops`. Devices have done `requests` requests. As with vCPUs, one that has done nothing since the
    /// restore before keeps waiting.
    pub(super) fn rewound(
        &mut self,
        snapshot: u64,
        before: &[u64],
        ops: Vec<u64>,
        requests: Vec<u64>,
    ) {
        self.take_those_that_live(&requests);
        let done = |device: usize| done(device, &self.ops, before);
        self.waiting.resize(requests.len(), None);
        for (device, (waiting, requests)) in self.waiting.iter_mut().zip(requests).enumerate() {
            let (since, ops) = match waiting {
                Some(before) => (before.since, before.ops + done(device)),
                None => (Instant::now(), 0),
            };
            *waiting = Some(WaitingDevice {
                snapshot,
                since,
                requests,
                ops,
            });
        }
        self.ops = ops;
    }

    /// The vCPUs have done `ops` operations now, and the devices `requests` requests.
    pub(super) fn look(
        &mut self,
        ops: &[u64],
        requests: &[u64],
        patience: Duration,
    ) -> Option<Violation> {
        self.take_those_that_live(requests);
        let base = &self.ops;
        let (device, stuck) =
            self.waiting
                .iter_mut()
                .enumerate()
                .find_map(|(device, waiting)| {
                    let is_stuck = |w: &mut WaitingDevice| {
                        w.since.elapsed() >= patience
                            && w.ops + done(device, base, ops) >= ENOUGH_OPS
                    };
                    waiting.take_if(is_stuck).map(|w| (device, w))
                })?;
        let mut v = Violation::new(
            Oracle::Life,
            format!("device {device} does nothing any more after the restore"),
        );
        v.snapshot = Some(stuck.snapshot);
        v.expected = format!("more than {} requests", stuck.requests);
        v.found = format!("no more after {:.0?}", stuck.since.elapsed());
        Some(v)
    }

    fn take_those_that_live(&mut self, requests: &[u64]) {
        for (waiting, &requests) in self.waiting.iter_mut().zip(requests) {
            waiting.take_if(|w| requests != w.requests);
        }
    }
}

/// Operations between two times of the vCPU that drives device `device`.
fn done(device: usize, from: &[u64], to: &[u64]) -> u64 {
    let vcpu = device % from.len().max(1);
    match (from.get(vcpu), to.get(vcpu)) {
        (Some(from), Some(to)) => to.saturating_sub(*from),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn let_pass(watch: &mut LifeWatch, time: Duration) {
        for waiting in watch.waiting.iter_mut().flatten() {
            waiting.since -= time;
        }
    }

    #[test]
    fn a_vcpu_that_stands_still_is_seen_after_a_while() {
        let mut watch = LifeWatch::default();
        assert_eq!(watch.look(&[1], PATIENCE), None);
        watch.rewound(3, vec![10, 20]);
        assert_eq!(watch.look(&[11, 20], Duration::MAX), None, "not yet");
        let_pass(&mut watch, PATIENCE);
        let violation = watch.look(&[11, 20], PATIENCE).unwrap();
        assert_eq!(
            (violation.oracle, violation.snapshot),
            (Oracle::Life, Some(3))
        );
        assert_eq!(watch.look(&[11, 20], PATIENCE), None, "said once");
    }

    #[test]
    fn frequent_restores_do_not_hide_it() {
        let mut watch = LifeWatch::default();
        let found = (0..100).find_map(|snapshot| {
            watch.rewound(snapshot, vec![10, 20]);
            let_pass(&mut watch, PATIENCE / 5);
            watch.look(&[15, 20], PATIENCE)
        });
        assert!(found.unwrap().detail.contains("vcpu 1"));
    }

    #[test]
    fn a_guest_that_was_slow_before_may_be_slow_after() {
        assert_eq!(patience(Duration::ZERO), PATIENCE);
        assert_eq!(patience(Duration::from_secs(1)), PATIENCE);
        assert_eq!(patience(Duration::from_secs(4)), Duration::from_secs(40));
        assert_eq!(patience(Duration::MAX), Duration::MAX);
    }

    #[test]
    fn it_waits_for_each_vcpu() {
        let mut watch = LifeWatch::default();
        assert!(!watch.is_waiting());
        watch.rewound(3, vec![10, 20]);
        assert_eq!(watch.look(&[11, 20], Duration::MAX), None);
        assert!(watch.is_waiting());
        assert_eq!(watch.look(&[11, 21], Duration::MAX), None);
        assert!(!watch.is_waiting());
    }

    #[test]
    fn a_guest_that_runs_on_is_fine() {
        let mut watch = LifeWatch::default();
        watch.rewound(3, vec![10, 20]);
        let_pass(&mut watch, PATIENCE);
        assert_eq!(watch.look(&[11, 21], PATIENCE), None);
        assert_eq!(watch.look(&[10, 20], PATIENCE), None);
    }

    fn let_pass_for_devices(watch: &mut DeviceWatch, time: Duration) {
        for waiting in watch.waiting.iter_mut().flatten() {
            waiting.since -= time;
        }
    }

    #[test]
    fn a_device_that_does_nothing_any_more_is_seen() {
        let mut watch = DeviceWatch::default();
        watch.rewound(3, &[500, 500], vec![10, 20], vec![7, 8]);
        let_pass_for_devices(&mut watch, PATIENCE);
        let ops = [10 + ENOUGH_OPS, 20 + ENOUGH_OPS];
        assert_eq!(
            watch.look(&[11, 21], &[7, 8], PATIENCE),
            None,
            "a slow guest"
        );
        let violation = watch.look(&ops, &[9, 8], PATIENCE).unwrap();
        assert!(violation.detail.contains("device 1"), "{violation}");
        assert_eq!(watch.look(&ops, &[9, 8], PATIENCE), None, "said once");
    }

    #[test]
    fn frequent_restores_do_not_hide_a_device() {
        let mut watch = DeviceWatch::default();
        let found = (0..100).find_map(|snapshot| {
            watch.rewound(snapshot, &[200], vec![100], vec![5]);
            let_pass_for_devices(&mut watch, PATIENCE / 5);
            watch.look(&[150], &[5], PATIENCE)
        });
        assert!(found.is_some());
    }
}
