//! The occasion of an injected fault: what guest and devices must have done before its oracle can see it.
//!
//! A fault shows only if somebody does something at the right moment: writes to the page that was left
//! writable, completes a request before the devices are stopped. How long that takes is the host's business:
//! emulated ones run a guest at a dozen operations a second. So a run with a fault in it goes by what was
//! done, not by the clock: the next step (a snapshot, a restore, the end) waits until the guest has gone on
//! since the last, and the run is not over before the fault has had its occasion. Without one nothing waits.
//!
//! Not covered: a guest that does not count its operations as the payload does. The run ends with an error
//! then, since the fault cannot show.

use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{DRAW_EVERY, Layout, STREAM_SLOTS, VcpuPage};

use super::config::Injection;
use super::vm::PayloadVm;
use palimpsest::host::Ram;

/// Operations of each vCPU from one step to the next. Two may have been under way at one step or the other.
const OPS: u64 = 3;
/// The same where a fault shows in what vCPUs draw: each has drawn at least once.
const OPS_TO_DRAW: u64 = DRAW_EVERY + OPS;
/// Operations of one vCPU in which another has done its few, if it does any.
const MANY_OPS: u64 = 100_000;
/// Requests of each device, by the number of its slots: each slot has had one that was posted after the first
/// snapshot, and checked.
const ROUNDS: u64 = 4;
/// How long guest or devices may take for that. It is for hosts that emulate a CPU.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// What the guest says of how far it is.
#[derive(Debug)]
pub(super) struct GuestCounters<'a> {
    ram: &'a Ram,
    layout: &'a Layout,
}

impl<'a> GuestCounters<'a> {
    /// Those of the guest in `vm`.
    pub(super) fn of(vm: &'a PayloadVm) -> Self {
        Self {
            ram: vm.ram(),
            layout: &vm.layout,
        }
    }

    /// Word `offset` of the [`VcpuPage`] of each vCPU. Zeros where it can't be read.
    pub(super) fn words(&self, offset: usize) -> Vec<u64> {
        (0..self.layout.vcpus)
            .map(|vcpu| {
                let mut word = [0; 8];
                let gpa = self.layout.vcpu_page(vcpu) + offset as u64;
                self.ram
                    .read(gpa, &mut word)
                    .map_or(0, |()| u64::from_le_bytes(word))
            })
            .collect()
    }

    /// Operations that each vCPU has done.
    pub(super) fn ops(&self) -> Vec<u64> {
        self.words(offset_of!(VcpuPage, ops))
    }

    /// Waits until each vCPU has gone on from where it is now, as [`wait_until`] does.
    pub(super) fn wait_for_ops(&self, stop: &AtomicBool) -> bool {
        let since = self.ops();
        wait_until(stop, || have_gone_on(&since, &self.ops(), OPS))
    }
}

/// Waits for `event`, up to [`PATIENCE`]. Says whether it has come, or the run is to stop.
pub(super) fn wait_until(stop: &AtomicBool, mut event: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !event() && !stop.load(Ordering::Relaxed) {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_micros(200));
    }
    true
}

/// Whether each vCPU has done `ops` operations.
fn have_gone_on(since: &[u64], now: &[u64], ops: u64) -> bool {
    since.iter().zip(now).all(|(&since, &now)| {
        // Less than it was: the guest has been rewound, and has written since.
        now.checked_sub(since).is_none_or(|done| done >= ops)
    })
}

/// What a fault needs before its oracle can see it.
#[derive(Debug)]
pub(super) struct Occasion {
    fault: Option<Injection>,
    /// The last step.
    last: LastStep,
    /// Requests each device had done at the first snapshot.
    first: Option<Vec<u64>>,
    snapshots: u64,
    restores: u64,
    /// The run goes on for the fault's sake, beyond its time.
    goes_on: bool,
}

/// When it was, and what each vCPU had done by then.
#[derive(Debug)]
struct LastStep {
    at: Instant,
    ops: Vec<u64>,
}

impl Occasion {
    /// The occasion of `fault` in a guest of `vcpus` vCPUs that has done nothing yet.
    pub(super) fn new(fault: Option<Injection>, vcpus: u64) -> Self {
        Self {
            // A pin that is never released is there to the end.
            fault: fault.filter(|&fault| fault != Injection::LeakPin),
            last: LastStep {
                at: Instant::now(),
                ops: vec![0; vcpus as usize],
            },
            first: None,
            snapshots: 0,
            restores: 0,
            goes_on: false,
        }
    }

    /// A snapshot was taken: vCPUs have done `ops` operations, and devices `requests` requests.
    pub(super) fn snapshot(&mut self, ops: Vec<u64>, requests: Vec<u64>) {
        self.first.get_or_insert(requests);
        self.snapshots += 1;
        self.step(ops);
    }

    /// The guest was rewound to where its vCPUs had done `ops` operations.
    pub(super) fn restore(&mut self, ops: Vec<u64>) {
        self.restores += 1;
        self.step(ops);
    }

    fn step(&mut self, ops: Vec<u64>) {
        let at = Instant::now();
        self.last = LastStep { at, ops };
    }

    /// Whether the next step may be done.
    pub(super) fn is_ripe(&self, ops: &[u64]) -> bool {
        let enough = match self.fault {
            None => return true,
            Some(Injection::SameGeneration) => OPS_TO_DRAW,
            Some(_) => OPS,
        };
        have_gone_on(&self.last.ops, ops, enough)
    }

    /// Whether there were steps enough for the fault to show.
    pub(super) fn has_steps(&self) -> bool {
        let (snapshots, restores) = self.needs();
        self.snapshots >= snapshots && self.restores >= restores
    }

    /// Whether it is a restore that it waits for. At the end of a run none comes by itself.
    pub(super) fn lacks_a_restore(&self) -> bool {
        let (snapshots, restores) = self.needs();
        self.snapshots >= snapshots && self.restores < restores
    }

    /// Snapshots and restores that there must be for the fault to show.
    fn needs(&self) -> (u64, u64) {
        match self.fault {
            None => (0, 0),
            // Two snapshots are compared.
            Some(Injection::SkipWriteProtect | Injection::ReuseShared | Injection::ForgetDirty) => {
                (2, 0)
            }
            Some(Injection::StalePage | Injection::SameGeneration) => (1, 1),
            Some(_) => (1, 0),
        }
    }

    /// Whether the run may end, when vCPUs have done `ops` operations and devices `requests` requests.
    pub(super) fn is_over(&self, ops: &[u64], requests: &[u64], layout: &Layout) -> bool {
        let slots = STREAM_SLOTS + layout.registered;
        let have_gone_round = |first: &Vec<u64>| {
            let done = |(now, first): (&u64, &u64)| now - first >= ROUNDS * slots;
            requests.iter().zip(first).all(done)
        };
        self.has_steps()
            && self.is_ripe(ops)
            && (self.fault != Some(Injection::SharePinned)
                || self.first.as_ref().is_some_and(have_gone_round))
    }

    /// The run goes on although it has been as long as it should. What to say of that, the first time.
    pub(super) fn go_on(&mut self) -> Option<String> {
        let fault = self.fault?;
        let said = std::mem::replace(&mut self.goes_on, true);
        (!said).then(|| {
            format!("the run is over, and goes on until the injected {fault} has had its occasion")
        })
    }

    /// A vCPU stands still for good, which an oracle has said: from here on nothing is waited for. A fault
    /// may have left the guest a stack on which it never comes out of a loop.
    pub(super) fn give_up(&mut self) {
        self.fault = None;
    }

    /// Gives up if a vCPU has not gone on for as long as `patience`, and another has done many operations:
    /// one that did some after a restore, and then stood still, is not for the oracle.
    pub(super) fn look(&mut self, ops: &[u64], patience: Duration) {
        let (since, is_late) = (&self.last.ops, self.last.at.elapsed() > patience);
        let done = since.iter().zip(ops);
        let most = done.map(|(since, now)| now.saturating_sub(*since)).max();
        if is_late && !self.is_ripe(ops) && most > Some(MANY_OPS) {
            self.give_up();
        }
    }

    /// Why the run cannot go on like this, if guest or devices have not done for long what the fault needs.
    pub(super) fn overdue(&self) -> Option<String> {
        let fault = self.fault?;
        (self.last.at.elapsed() > PATIENCE).then(|| overdue(fault))
    }
}

/// Says that guest or devices have not done in time what `fault` needs.
pub(super) fn overdue(fault: Injection) -> String {
    format!(
        "the injected fault {fault} cannot show: guest and devices have not done for {} s what it takes",
        PATIENCE.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use guest::abi::IMAGE_GPA;

    use super::*;

    fn layout() -> Layout {
        Layout::new(64 << 20, IMAGE_GPA, 2, 1, 2).unwrap()
    }

    #[test]
    fn a_run_without_a_fault_waits_for_nothing() {
        let occasion = Occasion::new(None, 2);
        assert!(occasion.is_ripe(&[0, 0]));
        assert!(occasion.is_over(&[0, 0], &[0], &layout()));
        assert_eq!(occasion.overdue(), None);
    }

    #[test]
    fn that_a_run_goes_on_is_said_once() {
        assert_eq!(Occasion::new(None, 2).go_on(), None);
        let mut occasion = Occasion::new(Some(Injection::StalePage), 2);
        assert!(occasion.go_on().unwrap().contains("stale-page"));
        assert_eq!(occasion.go_on(), None);
    }

    #[test]
    fn a_vcpu_that_stands_still_for_good_is_not_waited_for() {
        let mut occasion = Occasion::new(Some(Injection::ReuseShared), 2);
        occasion.snapshot(vec![3, 3], vec![0]);
        let (ops, layout) = ([3, 100], layout());
        assert!(!occasion.is_ripe(&ops) && !occasion.is_over(&ops, &[0], &layout));
        let mut late = Occasion::new(Some(Injection::ReuseShared), 2);
        late.last.at -= PATIENCE / 2;
        for (ops, patience, is_given_up) in [
            ([2, MANY_OPS], Duration::ZERO, false),
            ([2, MANY_OPS + 1], PATIENCE, false),
            ([2, MANY_OPS + 1], Duration::ZERO, true),
        ] {
            late.look(&ops, patience);
            assert_eq!(late.fault.is_none(), is_given_up, "{ops:?} {patience:?}");
        }
        occasion.give_up();
        assert!(occasion.is_ripe(&ops) && occasion.is_over(&ops, &[0], &layout));
        occasion.last.at -= PATIENCE * 2;
        assert_eq!(occasion.overdue(), None);
    }

    #[test]
    fn a_step_waits_for_every_vcpu() {
        let mut occasion = Occasion::new(Some(Injection::ReuseShared), 2);
        assert!(!occasion.is_ripe(&[2, 100]));
        assert!(occasion.is_ripe(&[3, 3]));
        occasion.snapshot(vec![3, 3], vec![0]);
        assert!(!occasion.is_ripe(&[5, 6]));
        assert!(occasion.is_ripe(&[6, 6]));
        occasion.restore(vec![1, 1]);
        assert!(!occasion.is_ripe(&[4, 3]));
        assert!(occasion.is_ripe(&[4, 4]));
        occasion.last.at -= PATIENCE * 2;
        let drawing = Occasion::new(Some(Injection::SameGeneration), 2);
        assert!(!drawing.is_ripe(&[18, 100]));
        assert!(drawing.is_ripe(&[19, 19]));
        assert!(occasion.overdue().unwrap().contains("reuse-shared"));
    }

    #[test]
    fn a_run_is_over_when_its_fault_has_had_its_occasion() {
        let over = |occasion: &Occasion| occasion.is_over(&[19, 19], &[1_000], &layout());
        for (fault, snapshots, restores) in [
            (Injection::SkipWriteProtect, 2, 0),
            (Injection::RunDevices, 1, 0),
            (Injection::StalePage, 1, 1),
            (Injection::SameGeneration, 1, 1),
        ] {
            let mut occasion = Occasion::new(Some(fault), 2);
            for _ in 0..snapshots {
                assert!(!over(&occasion), "{fault}");
                occasion.snapshot(vec![0, 0], vec![0]);
            }
            for _ in 0..restores {
                assert!(!over(&occasion), "{fault}");
                assert!(occasion.lacks_a_restore());
                occasion.restore(vec![0, 0]);
            }
            assert!(!occasion.lacks_a_restore());
            assert!(over(&occasion), "{fault}");
        }
    }

    #[test]
    fn buffers_that_were_shared_must_have_been_used() {
        let mut occasion = Occasion::new(Some(Injection::SharePinned), 2);
        occasion.snapshot(vec![0, 0], vec![100]);
        assert!(!occasion.is_over(&[9, 9], &[139], &layout()));
        assert!(occasion.is_over(&[9, 9], &[140], &layout()));
    }
}
