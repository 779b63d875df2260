//! The end: every machine is looked at once more, and all is taken apart.

use std::thread;
use std::time::Duration;

use super::Family;
use super::progress::Phase;
use super::report::{FamilyReport, SharesReport};
use crate::check::account;
use crate::session::report::{EndedBy, Quantiles, Verdict};
use palimpsest::kvm::Platform;
use palimpsest::mm::PAGE_SIZE;

impl Family<'_> {
    pub(super) fn finish(mut self, ended_by: EndedBy, platform: &Platform) -> FamilyReport {
        let duration = self.started.elapsed();
        self.phase = Phase::Ending;
        self.look_at_all_once_more(ended_by);
        let shares = self.shares();
        for of in 0..self.members.len() {
            self.drop_member(of);
        }
        while !self.kept.is_empty() {
            self.retire_oldest();
        }
        for origin in std::mem::take(&mut self.origins) {
            self.worker.last_look(origin, None);
        }
        let (violations, finished) = self.worker.finish();
        for violation in violations {
            self.violation(None, &violation);
        }
        if let Err(error) = finished {
            self.errors.push(error.to_string());
        }
        let checks = self.worker.progress();
        if checks.checked == 0 {
            self.unchecked.push("no snapshot was taken".to_owned());
        }
        let Self {
            config,
            shells,
            mut gone,
            mut violations,
            ..
        } = self;
        let frames = shells.frames().clone();
        drop(shells);
        let usage = frames.pool().usage();
        for violation in account(frames.pool(), frames.budget()) {
            violations.add(violation.oracle);
            self.observer.violation(None, &violation);
        }
        gone.sort_by_key(|member| member.id);
        let error = match self.errors.as_slice() {
            [] => None,
            errors => Some(errors.join("\n")),
        };
        FamilyReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            platform: platform.into(),
            config: config.clone(),
            verdict: Verdict::of(&violations, error.as_deref(), &self.unchecked),
            error,
            unchecked: self.unchecked,
            ended_by,
            duration_s: duration.as_secs_f64(),
            refused: self.refused,
            forking: self.forking,
            first_instruction_us: Quantiles::of(&self.first_instruction),
            fork_pause_us: Quantiles::of(&self.fork_pauses),
            pause_us: Quantiles::of(&self.pauses),
            snapshots: self.taken,
            checked: checks.checked,
            checked_pages: checks.pages,
            checked_draws: checks.draws,
            shares,
            machines: gone,
            violations,
            bytes_peak: usage.peak * PAGE_SIZE,
            bytes_limit: usage.limit * PAGE_SIZE,
            mappings_peak: frames.budget().peak(),
            mappings_limit: frames.budget().limit(),
        }
    }

    /// Waits until every machine has run, and takes a snapshot of each: it is checked like all others.
    fn look_at_all_once_more(&mut self, ended_by: EndedBy) {
        if !ended_by.leaves_the_guest_running() {
            return;
        }
        let waits = |family: &Self| family.members.iter().flatten().any(|m| m.has_yet_to_live());
        // It ends: a machine that does nothing for too long is reported, and waited for no more.
        while waits(self) && self.tick().is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
        for of in 0..self.members.len() {
            match self.snapshot(of) {
                Ok(Some(snapshot)) => self.kept.push_back(snapshot),
                Ok(None) => {}
                Err(end) => self.errors.extend(end.error),
            }
            while self.kept.len() > self.config.guest.keep {
                self.retire_oldest();
            }
        }
        let _ = self.tick();
    }

    /// What the machines have alone and share, once nothing runs.
    fn shares(&mut self) -> Option<SharesReport> {
        None
    }
}
