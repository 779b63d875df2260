//! What the guest says: its console, the failures it has seen, and its end.

use std::time::{Duration, Instant};

use guest::abi::{Failure, FailureKind};

use super::Drive;
use super::end::End;
use crate::check::{Oracle, Violation};
use crate::dma::Mismatch;
use crate::session::ports::Event;
use palimpsest::vcpus::VcpusError;

/// What devices read and should not have, kept until the guest reports it. Others are of requests that a
/// restore undid.
const MOST_MISMATCHES: usize = 512;
/// How long an ended vCPU's reason may take to arrive.
const LAST_WORDS: Duration = Duration::from_secs(5);

impl Drive<'_> {
    pub(super) fn handle(&mut self, event: Event) -> Option<End> {
        match event {
            Event::Console(text) => self.observer.console(&format!("{text}\n")),
            Event::Failure(failure) => {
                let violation = self.failure(&failure);
                self.violation(&violation);
            }
            Event::UnreadableFailure(why) => {
                let what = format!("the guest reports a failure that cannot be read, {why}");
                self.violation(&Violation::new(Oracle::Life, what));
            }
            Event::Ended(vcpu, outcome) => return Some(End::of_vcpu(vcpu, &outcome)),
        }
        None
    }

    /// A vCPU has ended by itself, or can't be stopped: its own words are better than the pauser's.
    pub(super) fn why_vcpus_ended(&mut self, error: VcpusError) -> End {
        let deadline = Instant::now() + LAST_WORDS;
        if matches!(error, VcpusError::Stopped { .. }) {
            while let Some(event) = self
                .inbox
                .wait(deadline.saturating_duration_since(Instant::now()))
            {
                if let Some(end) = self.handle(event) {
                    return end;
                }
            }
        }
        End::error(&error)
    }

    fn failure(&mut self, failure: &Failure) -> Violation {
        let kind = FailureKind::from_raw(failure.kind);
        let (oracle, what) = match kind {
            Some(FailureKind::Page) => (Oracle::Life, "a page is not what the guest left there"),
            Some(FailureKind::DmaToGuest) => (
                Oracle::Coherence,
                "the guest does not see what a device wrote",
            ),
            Some(FailureKind::DmaFromGuest) => (
                Oracle::Coherence,
                "a device does not see what the guest wrote",
            ),
            Some(FailureKind::Margin) => (
                Oracle::Coherence,
                "the guest's own bytes beside a DMA buffer are lost",
            ),
            Some(FailureKind::Ring) => (
                Oracle::Coherence,
                "a completion makes no sense to the guest",
            ),
            Some(FailureKind::Register) => {
                (Oracle::Life, "a register is not what the vcpu left there")
            }
            None => (Oracle::Life, "the guest reports a failure of unknown kind"),
        };
        let mut v = Violation::new(
            oracle,
            format!("{what} (vcpu {}, operation {})", failure.vcpu, failure.op),
        );
        v.expected = format!("{:#018x}", failure.expected);
        v.found = match kind {
            Some(FailureKind::DmaFromGuest) => self.seen_by_device(failure),
            _ => format!("{:#018x}", failure.found),
        };
        if kind == Some(FailureKind::Register) {
            return v;
        }
        v.gpa = Some(failure.gpa);
        if failure.seq != 0 || failure.device != 0 {
            v.last_writer = format!("device {}, request {}", failure.device, failure.seq);
        }
        if let Ok(entry) = self
            .vm
            .space()
            .entry(palimpsest::mm::Gfn::of_gpa(failure.gpa))
        {
            v.frame = format!("{entry:?} {:?}", self.vm.frames().pool().state(entry.pfn()));
        }
        v
    }

    /// What the device saw of the request that `failure` is about. The guest can't know: it sees what it
    /// wrote itself.
    fn seen_by_device(&mut self, failure: &Failure) -> String {
        self.collect_mismatches();
        let of_request = |m: &&Mismatch| (m.device, m.seq) == (failure.device, failure.seq);
        match self.mismatches.iter().rev().find(of_request) {
            Some(mismatch) => format!("{:#018x}", mismatch.found),
            None => format!("{:#018x} by the guest, else by the device", failure.found),
        }
    }

    pub(super) fn collect_mismatches(&mut self) {
        for mismatch in self.vm.devices.take_mismatches() {
            tracing::debug!(?mismatch, "a device read something unexpected");
            self.mismatches.push_back(mismatch);
        }
        let old = self.mismatches.len().saturating_sub(MOST_MISMATCHES);
        self.mismatches.drain(..old);
    }

    pub(super) fn violation(&mut self, violation: &Violation) {
        self.violations.add(violation.oracle);
        self.observer.violation(violation);
    }
}
