//! The end: every machine is looked at once more, and all is taken apart.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Family;
use super::progress::Phase;
use super::report::{FamilyReport, Shares, SharesReport};
use crate::check::{Oracle, Violation, account};
use crate::session::report::{EndedBy, Quantiles, Verdict};
use palimpsest::kvm::Platform;
use palimpsest::mm::{Census, PAGE_SIZE};

/// From so many machines on it is said that there is a last snapshot of each: it takes a while.
const MANY: usize = 16;

impl Family<'_> {
    pub(super) fn finish(mut self, ended_by: EndedBy, platform: &Platform) -> FamilyReport {
        let duration = self.started.elapsed();
        self.phase = Phase::Ending;
        self.look_at_all_once_more(ended_by);
        let shares = self.census();
        for of in 0..self.members.len() {
            self.drop_member(of);
        }
        while !self.kept.is_empty() {
            self.retire_oldest();
        }
        for (origin, _promise) in std::mem::take(&mut self.origins) {
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
        if let (Some(loading), Some(loaded)) = (self.loading.take(), &mut self.loaded) {
            loading.finish(loaded);
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
            loaded: self.loaded,
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
        let living = self.members.iter().flatten().count();
        if living > MANY {
            self.observer.note(&format!(
                "ending: a last snapshot of each of {living} machines"
            ));
        }
        let waits = |family: &Self| family.members.iter().flatten().any(|m| m.has_yet_to_live());
        // It ends: a machine that does nothing for too long is reported, and waited for no more.
        while waits(self) && self.tick().is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
        for of in 0..self.members.len() {
            while !self.makes_room_for_snapshot() && !self.worker.is_dead() {
                thread::sleep(Duration::from_millis(1));
            }
            match self.snapshot(of) {
                Ok(Some(snapshot)) => self.kept.push_back(snapshot),
                Ok(None) => {}
                Err(end) => self.errors.extend(end.error),
            }
        }
        let _ = self.tick();
    }

    /// What machines and snapshots have alone and share, when nothing runs any more. Frames that nobody of
    /// them has are a violation.
    fn census(&mut self) -> Option<SharesReport> {
        // The checker holds snapshots until it is through with them.
        while self.worker.backlog() > 0 && !self.worker.is_dead() {
            thread::sleep(Duration::from_millis(1));
        }
        for member in self.members.iter().flatten() {
            member.vm.machine().stop();
        }
        let all_stand_still = self
            .members
            .iter()
            .flatten()
            .all(|member| member.vm.machine().wait_until_stopped().is_ok());
        if !all_stand_still {
            return None;
        }
        let pool = Arc::clone(self.shells.frames().pool());
        let mut census = Census::new(&pool);
        let mut holders = Vec::new();
        let members = self.members.iter().enumerate();
        for (machine, member) in members.filter_map(|(id, member)| Some((id, member.as_ref()?))) {
            census.add_space(machine as u64, member.vm.space()).ok()?;
            holders.push((machine, false));
        }
        let snapshots = self.origins.iter().map(|(origin, _)| origin);
        for snapshot in snapshots.chain(&self.kept) {
            census
                .add_snapshot(snapshot.number(), snapshot.memory())
                .ok()?;
            holders.push((
                self.owners.get(&snapshot.number()).copied().unwrap_or(0),
                true,
            ));
        }
        let counts = census.count();
        let holders = holders.into_iter().zip(&counts.holders);
        let report = SharesReport {
            holders: holders
                .map(|((machine, is_snapshot), holding)| Shares {
                    machine,
                    is_snapshot,
                    alone_bytes: holding.alone() * PAGE_SIZE,
                    shared_bytes: holding.shared() * PAGE_SIZE,
                })
                .collect(),
            shared_bytes: counts.shared() * PAGE_SIZE,
            held_bytes: counts.held * PAGE_SIZE,
            unexplained_bytes: counts.unexplained * PAGE_SIZE,
        };
        let (adds_up, unexplained) = (counts.adds_up(), counts.unexplained);
        let first = counts.unexplained_frames.first().copied();
        drop((counts, census));
        if !adds_up {
            let mut v = Violation::new(
                Oracle::Accounting,
                "frames are in use that no machine and no snapshot accounts for",
            );
            v.expected = "0".to_owned();
            v.found = unexplained.to_string();
            v.frame = first.map_or_else(String::new, |(pfn, state)| format!("{pfn:?} {state:?}"));
            self.violation(None, &v);
        }
        Some(report)
    }
}
