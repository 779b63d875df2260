//! The part of the life oracle that the guest can't see to itself: does it run on after a restore?

use std::time::{Duration, Instant};

use crate::check::{Oracle, Violation};

/// How long each vCPU may take for its first operation after a restore. It takes microseconds; the rest is for a
/// host that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(10);

/// Watches a guest that was rewound.
#[derive(Debug, Default)]
pub(super) struct LifeWatch {
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    snapshot: u64,
    since: Instant,
    ops: Vec<u64>,
}

impl LifeWatch {
    /// The guest was rewound to `snapshot`, where its vCPUs had done `ops` operations.
    pub(super) fn rewound(&mut self, snapshot: u64, ops: Vec<u64>) {
        self.waiting = Some(Waiting {
            snapshot,
            since: Instant::now(),
            ops,
        });
    }

    /// The vCPUs have done `ops` operations now.
    pub(super) fn look(&mut self, ops: &[u64]) -> Option<Violation> {
        let waiting = self.waiting.as_ref()?;
        let stuck = ops
            .iter()
            .zip(&waiting.ops)
            .position(|(now, then)| now <= then);
        let violation = match stuck {
            None => None,
            Some(_) if waiting.since.elapsed() < PATIENCE => return None,
            Some(vcpu) => {
                let mut v = Violation::new(
                    Oracle::Life,
                    format!("vcpu {vcpu} does not run on after the restore"),
                );
                v.snapshot = Some(waiting.snapshot);
                v.expected = format!("more than {} operations", waiting.ops[vcpu]);
                v.found = format!("{} after {:?}", ops[vcpu], PATIENCE);
                Some(v)
            }
        };
        self.waiting = None;
        violation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_that_stands_still_is_seen_after_a_while() {
        let mut watch = LifeWatch::default();
        assert_eq!(watch.look(&[1]), None);
        watch.rewound(3, vec![10, 20]);
        assert_eq!(watch.look(&[11, 20]), None, "not yet");
        watch.waiting.as_mut().unwrap().since -= PATIENCE;
        let violation = watch.look(&[11, 20]).unwrap();
        assert_eq!(
            (violation.oracle, violation.snapshot),
            (Oracle::Life, Some(3))
        );
        assert_eq!(watch.look(&[11, 20]), None, "said once");
    }

    #[test]
    fn a_guest_that_runs_on_is_fine() {
        let mut watch = LifeWatch::default();
        watch.rewound(3, vec![10, 20]);
        watch.waiting.as_mut().unwrap().since -= PATIENCE;
        assert_eq!(watch.look(&[11, 21]), None);
        assert_eq!(watch.look(&[10, 20]), None);
    }
}
