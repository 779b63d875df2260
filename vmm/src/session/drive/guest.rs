//! What the guest says: its console, the failures it has seen, and its end.

use std::time::{Duration, Instant};

use guest::abi::Failure;

use super::Drive;
use crate::check::Violation;
use crate::session::end::End;
use crate::session::failure;
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
                self.violation(&failure::unreadable(&why));
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
        self.collect_mismatches();
        failure::violation(failure, &self.vm, self.mismatches.iter())
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
