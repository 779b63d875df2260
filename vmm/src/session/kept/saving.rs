//! A snapshot of a run into a store, by a thread of its own, while the run goes on.

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::abi::ABI_VERSION;
use palimpsest::aside::Aside;
use palimpsest::causes::chain;
use palimpsest::kept::store::{self, Compression, Parent, Saved, SnapshotName, Store, StoreError};
use palimpsest::kept::{self, Base, Progress, SaveError, Saver};
use palimpsest::memory::Frames;
use palimpsest::vm::Accelerator;

use super::checkpoints::{Checkpointed, Checkpoints, Every};
use super::facts::{Facts, parts};
use crate::check::{Boot, Reference};
use crate::incarnation::Incarnation;
use crate::run_snapshot::RunSnapshot;
use crate::session::config::Config;
use crate::session::report::SaveCounts;

/// What is to be saved at the end of a run, and where.
#[derive(Clone, Debug)]
pub struct Keep {
    /// Where to.
    pub store: Store,
    /// Under which name.
    pub name: SnapshotName,
    /// What it is called an increment of, if that is not what the run began with.
    pub parent: Option<Parent>,
    /// How chunks are kept.
    pub compression: Compression,
    /// The most bytes of memory a second; nothing: as many as go.
    pub most_a_second: Option<NonZeroU64>,
    /// One every so often, whose names begin with this one; nothing: one at the end of the run.
    pub every: Option<Every>,
}

/// The state of a run's wish to be saved.
#[derive(Debug)]
pub(in crate::session) enum Keeping {
    /// When it is over.
    Wanted(Keep),
    /// A thread does.
    Going(Going),
    /// It is done, well or not.
    Done(SaveCounts),
    /// Every so often; and the one that a thread saves now.
    Checkpoints(Box<Checkpoints>, Option<Going>),
}

/// What is done with a snapshot that was saved.
#[derive(Debug)]
pub(in crate::session) enum Then {
    /// Nothing.
    End,
    /// The next is one of its increments, and these are dropped.
    Drop(Vec<SnapshotName>),
}

/// How long is waited for who uses the store before older checkpoints are dropped another time.
const PATIENCE: Duration = Duration::from_millis(500);

impl Then {
    /// Does it.
    fn go(self, keep: &Keep, snapshot: &RunSnapshot) -> Checkpointed {
        let Self::Drop(drops) = self else {
            return Checkpointed::default();
        };
        // It was just saved. If it cannot be read all the same, the next has nothing in common with it.
        let kept = keep.store.read(&keep.name).ok();
        let memory = Arc::clone(snapshot.taken().memory());
        let mut done = Checkpointed {
            base: kept.map(|kept| Base::new(&kept, memory)),
            ..Checkpointed::default()
        };
        if !drops.is_empty() {
            match store::prune(&keep.store, &drops, PATIENCE) {
                Ok(pruned) => done.dropped = pruned.dropped,
                // Somebody else has dropped one.
                Err(StoreError::NoSnapshot { name, .. }) => done.dropped.push(name),
                Err(error) => done.not_dropped = Some(chain(&error)),
            }
        }
        done
    }
}

/// A save that goes on.
#[derive(Debug)]
pub(in crate::session) struct Going {
    thread: Option<JoinHandle<Result<(Saved, Checkpointed), SaveError>>>,
    shared: Arc<Shared>,
    keep: Keep,
    began: Instant,
    bytes: u64,
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    is_called_off: AtomicBool,
}

/// What is known of the run that a snapshot is of.
pub(in crate::session) struct Of<'a> {
    pub(in crate::session) accelerator: &'a Accelerator,
    pub(in crate::session) tsc_khz: u32,
    pub(in crate::session) config: &'a Config,
    pub(in crate::session) image_end: u64,
    pub(in crate::session) boot: Option<&'a Boot>,
    pub(in crate::session) reference: &'a Reference,
    pub(in crate::session) incarnation: &'a Incarnation,
    pub(in crate::session) frames: &'a Frames,
    pub(in crate::session) aside: &'a Arc<Aside>,
    pub(in crate::session) base: Option<Base>,
}

impl Going {
    /// Begins to save `snapshot`.
    ///
    /// # Errors
    /// In words, if there is no thread for it or what is to be known of it cannot be written.
    pub(in crate::session) fn start(
        keep: Keep,
        snapshot: Arc<RunSnapshot>,
        of: Of<'_>,
        then: Then,
    ) -> Result<Self, String> {
        let machine = kept::machine(of.accelerator, snapshot.taken(), of.tsc_khz);
        let facts = Facts {
            abi: ABI_VERSION,
            config: of.config.clone(),
            image_end: of.image_end,
            follows_formula: of.boot.is_some(),
            incarnation: of.incarnation.into(),
        };
        let facts = store::Facts {
            creator: format!("vmm {}", env!("CARGO_PKG_VERSION")),
            machine: machine.map_err(|error| chain(&error))?,
            program: facts.to_json().map_err(|error| chain(&error))?,
        };
        let parts = parts(of.boot, of.reference);
        let bytes = of.config.memory;
        let shared = Arc::<Shared>::default();
        let (frames, aside) = (of.frames.clone(), Arc::clone(of.aside));
        let thread = thread::Builder::new().name("save".to_owned()).spawn({
            let (keep, shared, base) = (keep.clone(), Arc::clone(&shared), of.base);
            move || {
                let saver = Saver {
                    store: &keep.store,
                    name: keep.name.clone(),
                    snapshot: snapshot.taken(),
                    frames: &frames,
                    base: base.as_ref(),
                    parent: keep.parent.clone(),
                    compression: keep.compression,
                    aside: Some(&aside),
                    most_a_second: keep.most_a_second,
                    facts,
                    parts,
                };
                let saved = saver.save(&mut |progress| {
                    *shared.progress.lock().unwrap_or_else(|e| e.into_inner()) = *progress;
                    // Only that it is seen some time matters.
                    !shared.is_called_off.load(Ordering::Relaxed)
                })?;
                Ok((saved, then.go(&keep, &snapshot)))
            }
        });
        let thread = thread
            .map_err(|error: io::Error| format!("cannot start the thread that saves: {error}"))?;
        Ok(Self {
            thread: Some(thread),
            shared,
            keep,
            began: Instant::now(),
            bytes,
        })
    }

    /// How far it is.
    pub(in crate::session) fn progress(&self) -> Progress {
        *self
            .shared
            .progress
            .lock()
            .unwrap_or_else(|e| e.into_inner())
    }

    /// Whether there is nothing more to wait for.
    pub(in crate::session) fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Gives it up. It still takes a moment.
    pub(in crate::session) fn call_off(&self) {
        self.shared.is_called_off.store(true, Ordering::Relaxed);
    }

    /// What it is to be called.
    pub(in crate::session) fn name(&self) -> &SnapshotName {
        &self.keep.name
    }

    /// Waits for its end. Says what came of it, in words if nothing did.
    pub(in crate::session) fn finish(mut self) -> (SaveCounts, Result<Checkpointed, String>) {
        let done = self.thread.take().map(JoinHandle::join);
        let mut name_is_taken = false;
        let done = match done {
            Some(Ok(Ok(saved))) => Ok(saved),
            Some(Ok(Err(SaveError::Store(StoreError::CalledOff)))) => {
                Err(format!("saving `{}` was called off", self.keep.name))
            }
            Some(Ok(Err(error))) => {
                use StoreError::{Exists, InTheWay};
                let taken = matches!(&error, SaveError::Store(Exists { .. } | InTheWay { .. }));
                name_is_taken = taken;
                Err(chain(&error))
            }
            Some(Err(_)) | None => Err("the thread that saves has panicked".to_owned()),
        };
        let saved = match &done {
            Ok((saved, _)) => *saved,
            Err(_) => self.progress().saved,
        };
        let counts = SaveCounts {
            store: self.keep.store.path().display().to_string(),
            name: self.keep.name.to_string(),
            is_saved: done.is_ok(),
            memory_bytes: self.bytes,
            bytes_written: saved.bytes_written,
            written: saved.written,
            found: saved.found,
            same: saved.same,
            seconds: self.began.elapsed().as_secs_f64(),
            name_is_taken,
        };
        (counts, done.map(|(_, then)| then))
    }
}

impl Drop for Going {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.call_off();
            // What it has to say is nobody's any more.
            let _ = thread.join();
        }
    }
}
