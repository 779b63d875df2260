//! Saving a last snapshot, while the run goes on.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Drive;
use crate::session::end::End;
use crate::session::kept::{Going, Keeping, Of};
use crate::session::report::SaveCounts;

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
                    base: self.base.take(),
                };
                let going = Going::start(keep, Arc::clone(&snapshot), of);
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
                saved.map(|()| true).map_err(End::failed)
            }
            done @ Some(Keeping::Done(_)) => {
                self.keeping = done;
                Ok(true)
            }
        }
    }

    /// A snapshot is to be saved, and there is none: one is taken for that, whatever the run's length.
    pub(super) fn lacks_what_to_save(&self) -> bool {
        matches!(self.keeping, Some(Keeping::Wanted(_))) && self.kept.is_empty()
    }

    /// The run ends, whether all was saved or not. What goes on is given up.
    pub(super) fn end_keeping(&mut self, end: &mut End) {
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
                if self.stop.load(Ordering::Relaxed) || end.error.is_some() {
                    going.call_off();
                }
                let (counts, saved) = going.finish();
                self.keeping = Some(Keeping::Done(counts));
                if let Err(why) = saved {
                    end.error.get_or_insert(why);
                }
            }
            done => self.keeping = done,
        }
    }
}
