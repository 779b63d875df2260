//! Rewinding the guest to a snapshot that is kept.

use std::sync::Arc;

use guest::abi::PAGE_SIZE;
use guest::formula::Schedule;

use super::Drive;
use crate::check;
use crate::run_snapshot::RunSnapshot;
use crate::session::config::Injection;
use crate::session::end::End;
use crate::session::life::{self, DeviceWatch, LifeWatch};
use palimpsest::snapshot::RewindError;

impl Drive<'_> {
    /// Rewinds the guest to one of the snapshots that are kept, and begins to watch whether it runs on.
    pub(super) fn restore(&mut self) -> Result<(), End> {
        self.restore_is_due = false;
        let chosen = match self.config.inject {
            // The one that the guest has run on from.
            Some(Injection::StalePage) => self.kept.len().saturating_sub(1),
            _ => self.random.below(self.kept.len()),
        };
        let Some(snapshot) = self.kept.get(chosen).map(Arc::clone) else {
            return Ok(());
        };
        self.look_at_draws_to_be_undone()?;
        self.stall.before_restore(self.vm.ram());
        let ops_before = self.counters().ops();
        let before: u64 = ops_before.iter().sum();
        let patience = life::patience(self.stall.longest());
        if let Some(violation) = self.life.look(&ops_before, patience) {
            self.violation(&violation);
        }
        let stale = (self.config.inject == Some(Injection::StalePage))
            .then(|| self.page_to_come(&snapshot))
            .flatten();
        let (ram, layout) = (self.vm.ram().clone(), self.vm.layout);
        let pool = Arc::clone(self.vm.frames().pool());
        let original = snapshot.incarnation().unwrap_or(&self.vm.incarnation);
        let stall = &mut self.stall;
        let (mut wrong, mut begun) = (None, None);
        let restored = self.vm.parts().restore(snapshot.taken(), || {
            // Before anything is written: it is all the snapshot's.
            wrong = check::restored(&ram, &snapshot, &layout, &pool);
            if let Some((gpa, page)) = stale
                && let Err(error) = ram.write(gpa, &page)
            {
                tracing::warn!(%error, "cannot inject a stale page");
            }
            stall.rewound(&ram);
            begun = Some(self.vm.begin_copy(original, self.config)?);
            Ok(())
        });
        if let Err(error) = restored {
            // Nothing runs on that could be watched.
            (self.life, self.device_life) = (LifeWatch::default(), DeviceWatch::default());
            return Err(match error {
                RewindError::Vcpus(error) => self.why_vcpus_ended(error),
                error => End::error(&error),
            });
        }
        if let Some(incarnation) = begun {
            self.vm.incarnation = Arc::new(incarnation);
        }
        if let Some(violation) = wrong {
            self.violation(&violation);
        }
        self.restored += 1;
        if snapshot.number() < self.first_of_boot {
            self.boot = None;
        }
        let ops: Vec<u64> = snapshot.vcpus().iter().map(|v| v.mm7()).collect();
        self.ops_undone += before.saturating_sub(ops.iter().sum());
        // Not by the registers: memory may be an operation behind them.
        let now = self.counters().ops();
        self.occasion.restore(now.clone());
        if self.boot.is_some() {
            self.life.rewound(snapshot.number(), now);
            let requests = self.vm.requests_by_device();
            self.device_life
                .rewound(snapshot.number(), &ops_before, ops, requests);
        } else {
            (self.life, self.device_life) = (LifeWatch::default(), DeviceWatch::default());
        }
        self.parent = Some(snapshot);
        Ok(())
    }

    /// The page that vCPU 0 wrote with the second operation after `snapshot`, and what is in it now: a guest
    /// that is rewound looks at that page before anything else that it does anew.
    fn page_to_come(&self, snapshot: &RunSnapshot) -> Option<(u64, Vec<u8>)> {
        let op = snapshot.vcpus().first()?.mm7() + 1;
        let (pattern, layout) = (self.config.pattern, &self.vm.layout);
        let schedule = Schedule::new(pattern, layout.slots(pattern, 0), self.config.seed, 0);
        let gpa = layout.slot_gpa(pattern, 0, schedule.slot_of(op));
        let mut page = vec![0; PAGE_SIZE as usize];
        self.vm.ram().read(gpa, &mut page).ok()?;
        Some((gpa, page))
    }
}
