//! Saving snapshots while the run goes on: a last one, or one every so often.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Drive;
use crate::run_snapshot::RunSnapshot;
use crate::session::end::End;
use crate::session::kept::{Checkpoints, Going, Keep, Keeping, Of, Then};
use crate::session::report::SaveCounts;
use palimpsest::causes::chain;
use palimpsest::kept::Base;

impl Drive<'_> {
    /// The run is over: whether there is nothing to be saved any more. If there is, the last snapshot is, as soon as
    /// there is one that was taken since.
    pub(super) fn has_kept(&mut self) -> Result<bool, End> {
        match self.keeping.take() {
            None => Ok(true),
            Some(Keeping::Wanted(keep)) => {
                let Some(snapshot) = self.kept.back().map(Arc::clone) else {
                    self.keeping = Some(Keeping::Wanted(keep));
                    return Ok(false);
                };
                let base = self.base.take();
                let going = self.start_saving(keep, &snapshot, base, Then::End);
                self.keeping = Some(Keeping::Going(going.map_err(End::failed)?));
                Ok(false)
            }
            Some(Keeping::Going(going)) if !going.is_finished() => {
                self.keeping = Some(Keeping::Going(going));
                Ok(false)
            }
            Some(Keeping::Going(going)) => {
                self.observer.saving(&going.progress());
                let (counts, saved) = going.finish();
                self.keeping = Some(Keeping::Done(counts));
                saved.map(|_| true).map_err(End::failed)
            }
            done @ Some(Keeping::Done(_)) => {
                self.keeping = done;
                Ok(true)
            }
            Some(Keeping::Checkpoints(mut checkpoints, going)) => {
                let newest = self.kept.back().map(|snapshot| snapshot.number());
                let is_over = checkpoints.is_over(newest) && going.is_none();
                self.keeping = Some(Keeping::Checkpoints(checkpoints, going));
                Ok(is_over)
            }
        }
    }

    /// Begins and ends checkpoints, if any are to be saved.
    pub(super) fn checkpoint(&mut self, now: Instant) {
        let (mut checkpoints, mut going) = match self.keeping.take() {
            Some(Keeping::Checkpoints(checkpoints, going)) => (checkpoints, going),
            other => return self.keeping = other,
        };
        if let Some(done) = going.take_if(|going| going.is_finished()) {
            self.observer.saving(&done.progress());
            self.end_checkpoint(&mut checkpoints, done);
        }
        if going.is_none()
            && let Some(snapshot) = self.kept.back().map(Arc::clone)
            && checkpoints.is_due(now, snapshot.number())
        {
            let begun = checkpoints.begin(now, snapshot.number());
            let begun = begun.map_err(|error| chain(&error));
            let begun = begun.and_then(|(keep, base, drops)| {
                self.start_saving(keep, &snapshot, base, Then::Drop(drops))
            });
            match begun {
                Ok(begun) => going = Some(begun),
                Err(why) => {
                    let told = checkpoints.cannot_begin(why);
                    self.observer.note(&told);
                }
            }
        }
        self.keeping = Some(Keeping::Checkpoints(checkpoints, going));
    }

    fn end_checkpoint(&mut self, checkpoints: &mut Checkpoints, done: Going) {
        let name = done.name().clone();
        let (counts, outcome) = done.finish();
        let told = checkpoints.end(name, counts.bytes_written, outcome, counts.name_is_taken);
        if let Some(told) = told {
            self.observer.note(&told);
        }
    }

    /// Begins to save `snapshot`.
    fn start_saving(
        &self,
        keep: Keep,
        snapshot: &Arc<RunSnapshot>,
        base: Option<Base>,
        then: Then,
    ) -> Result<Going, String> {
        let of = Of {
            accelerator: self.accelerator,
            tsc_khz: self.vm.machine().tsc_khz(),
            config: self.config,
            image_end: self.vm.image_end,
            boot: self.boot.as_deref(),
            reference: &self.vm.reference,
            incarnation: snapshot.incarnation().unwrap_or(&self.vm.incarnation),
            frames: self.vm.frames(),
            aside: self.vm.aside(),
            base,
        };
        Going::start(keep, Arc::clone(snapshot), of, then)
    }

    /// A snapshot is to be saved, and there is none: one is taken for that, whatever the run's length.
    pub(super) fn lacks_what_to_save(&self) -> bool {
        let is_wanted = match &self.keeping {
            Some(Keeping::Wanted(_)) => true,
            Some(Keeping::Checkpoints(checkpoints, going)) => {
                going.is_none() && checkpoints.has_none()
            }
            _ => false,
        };
        is_wanted && self.kept.is_empty()
    }

    /// The run ends, whether all was saved or not. What goes on is given up.
    pub(super) fn end_keeping(&mut self, end: &mut End) {
        let is_given_up = self.stop.load(Ordering::Relaxed) || end.error.is_some();
        match mem::take(&mut self.keeping) {
            Some(Keeping::Wanted(keep)) => {
                let why = format!("`{}` was not saved: the run was ended before", keep.name);
                end.error.get_or_insert(why);
                self.keeping = Some(Keeping::Done(SaveCounts {
                    store: keep.store.path().display().to_string(),
                    name: keep.name.to_string(),
                    memory_bytes: self.config.memory,
                    ..SaveCounts::default()
                }));
            }
            Some(Keeping::Going(going)) => {
                if is_given_up {
                    going.call_off();
                }
                let (counts, saved) = going.finish();
                self.keeping = Some(Keeping::Done(counts));
                if let Err(why) = saved {
                    end.error.get_or_insert(why);
                }
            }
            Some(Keeping::Checkpoints(mut checkpoints, going)) => {
                // It would be the next; those before it are there.
                match going {
                    Some(going) if is_given_up && !going.is_finished() => {
                        going.call_off();
                        let _ = going.finish();
                    }
                    Some(going) => self.end_checkpoint(&mut checkpoints, going),
                    None => {}
                }
                let (counts, why) = checkpoints.finish();
                if let Some(why) = why {
                    end.error.get_or_insert(why);
                }
                self.checkpoints = Some(counts);
            }
            done => self.keeping = done,
        }
    }
}
