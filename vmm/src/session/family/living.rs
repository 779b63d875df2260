//! All run, and are looked at in turn; then some go, and the rest runs on.

use std::thread;
use std::time::{Duration, Instant};

use super::progress::Phase;
use super::{Family, TICK};
use crate::session::end::End;
use crate::session::report::EndedBy;

/// The part of the time for which only those run that were not dropped.
const SHRUNK: u32 = 4;

impl Family<'_> {
    /// Lets all run for as long as they are to.
    pub(super) fn live(&mut self) -> Result<EndedBy, End> {
        self.phase = Phase::Running;
        let shrunk = self.config.duration / SHRUNK;
        self.live_for(self.config.duration - shrunk)?;
        self.phase = Phase::Shrinking;
        // What the root has shared with all others is theirs now.
        for of in (0..self.members.len()).step_by(3) {
            if self.members.iter().flatten().count() > 1 {
                self.drop_member(of);
                self.tick()?;
            }
        }
        self.live_for(shrunk)?;
        Ok(EndedBy::Duration)
    }

    fn live_for(&mut self, time: Duration) -> Result<(), End> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.tick()?;
            let now = Instant::now();
            if now >= self.next_snapshot && self.makes_room_for_snapshot() {
                self.next_snapshot = now + self.config.guest.snapshot_every;
                self.snapshot_of_next()?;
            }
            let wake = self.next_snapshot.min(until);
            let wait = wake.saturating_duration_since(Instant::now());
            thread::sleep(wait.clamp(Duration::from_millis(1), TICK / 4));
        }
        Ok(())
    }

    /// Takes a snapshot of the machine whose turn it is.
    fn snapshot_of_next(&mut self) -> Result<(), End> {
        let all = self.members.len();
        let mut next = (0..all).map(|n| (self.turn + n) % all);
        let Some(of) = next.find(|&of| self.members[of].is_some()) else {
            return Ok(());
        };
        self.turn = of + 1;
        if let Some(snapshot) = self.snapshot(of)? {
            self.kept.push_back(snapshot);
        }
        Ok(())
    }

    /// Has the oldest snapshots looked at for the last time that would be too many. Says whether there is room
    /// for another now; if not, the checker is behind.
    pub(super) fn makes_room_for_snapshot(&mut self) -> bool {
        while self.kept.len() >= self.config.guest.keep
            || (!self.kept.is_empty()
                && self.worker.backlog() == 0
                && !self.has_room_for_snapshot())
        {
            self.retire_oldest();
        }
        self.has_room_for_snapshot()
    }

    /// Hands the oldest snapshot that is kept to the checker for the last time.
    pub(super) fn retire_oldest(&mut self) {
        self.worker.retire_oldest(&mut self.kept);
    }
}
