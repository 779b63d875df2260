//! What a run begins with, if that is not a guest that boots: one that was loaded, and runs on where it was saved.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::Drive;
use crate::check::{Boot, Look};
use crate::run_snapshot::RunSnapshot;
use crate::session::RunError;
use crate::session::config::Config;
use crate::session::kept::{Keep, Keeping, LoadGoing, Loaded};
use crate::session::progress::Observer;
use crate::session::report::LoadCounts;
use crate::session::vm::PayloadVm;
use palimpsest::kept::Base;
use palimpsest::vm::Accelerator;

/// What a run is to do.
pub(in crate::session) struct Job<'a> {
    pub(in crate::session) config: &'a Config,
    pub(in crate::session) accelerator: &'a Accelerator,
    pub(in crate::session) keep: Option<Keep>,
    pub(in crate::session) stop: &'a AtomicBool,
}

/// What is known of a guest that was loaded and does not run yet.
#[derive(Debug)]
pub(in crate::session) struct Begun {
    snapshot: Arc<RunSnapshot>,
    boot: Option<Boot>,
    base: Base,
    counts: LoadCounts,
    going: Option<LoadGoing>,
    began: Instant,
}

impl Begun {
    /// What was loaded, taken apart. What is not as it was is told.
    pub(in crate::session) fn of(loaded: Loaded, observer: &mut dyn Observer) -> (PayloadVm, Self) {
        loaded.notes.iter().for_each(|note| observer.note(note));
        let begun = Self {
            snapshot: loaded.snapshot,
            boot: loaded.boot,
            base: loaded.base,
            counts: loaded.counts,
            going: loaded.going,
            began: loaded.began,
        };
        (loaded.vm, begun)
    }
}

impl Drive<'_> {
    /// Has the guest run on where it was saved, as an incarnation of its own. What was loaded is looked at as every
    /// snapshot is, and is the first of this run.
    pub(super) fn begin_with(&mut self, begun: Begun) -> Result<(), RunError> {
        let snapshot = begun.snapshot;
        self.boot = begun.boot.map(Arc::new);
        let look = Look {
            boot: self.boot.clone(),
            ..Look::default()
        };
        let ops: Vec<u64> = snapshot.vcpus().iter().map(|v| v.mm7()).collect();
        let counted = self.counters().ops();
        (self.taken, self.taken_before, self.first_of_boot) = (1, 1, 1);
        self.ops_before = counted.iter().sum();
        self.recent_ops.1 = 0;
        self.stall.rewound(self.vm.ram());
        let running = self.vm.start_from(&snapshot, self.config)?;
        let mut counts = begun.counts;
        counts.first_instruction_s = running.duration_since(begun.began).as_secs_f64();
        if let Some(mut going) = begun.going {
            if let Err(why) = going.prefetch(self.vm.frames()) {
                self.observer.note(&why);
            }
            self.loading = Some(going);
        }
        self.worker.first_look(&snapshot, look);
        if self.boot.is_some() {
            self.life.rewound(snapshot.number(), counted);
            let requests = self.vm.requests_by_device();
            self.device_life
                .rewound(snapshot.number(), &ops, ops.clone(), requests);
        }
        self.parent = Some(Arc::clone(&snapshot));
        self.kept.push_back(snapshot);
        // Only a save has a use for it.
        match &mut self.keeping {
            None => {}
            Some(Keeping::Checkpoints(checkpoints, _)) => checkpoints.begin_with(begun.base),
            Some(_) => self.base = Some(begun.base),
        }
        self.loaded = Some(counts);
        Ok(())
    }
}
