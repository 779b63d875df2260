//! What the guest has drawn that is in no snapshot.

use std::sync::Arc;

use super::Drive;
use crate::check::Observation;
use crate::session::end::End;
use palimpsest::vcpus::Capture;

impl Drive<'_> {
    /// Hands over what the guest has drawn that is about to be rewound: nobody is to draw it again. What it
    /// draws from here to the restore is not looked at.
    pub(super) fn look_at_draws_to_be_undone(&mut self) -> Result<(), End> {
        if self.boot.is_none() {
            return Ok(());
        }
        let looked = self.vm.machine().pause(Capture::Nothing).map(|paused| {
            let now = self.draws_at_rest();
            paused.resume();
            now
        });
        let now = looked.map_err(|error| self.why_vcpus_ended(error.into()))?;
        self.hand_over(now);
        Ok(())
    }

    /// Hands over what the guest, which stands still for good, has drawn since the last snapshot.
    pub(super) fn look_at_last_draws(&mut self) {
        let now = self.draws_at_rest();
        self.hand_over(now);
    }

    /// What the guest has drawn, which stands still, if it follows the formula.
    fn draws_at_rest(&self) -> Option<Observation> {
        Some(self.vm.draws_at_rest(self.boot.as_ref()?))
    }

    fn hand_over(&mut self, now: Option<Observation>) {
        if let Some(now) = now {
            let incarnation = Arc::clone(&self.vm.incarnation);
            self.worker.look_at_draws(incarnation, now);
        }
    }
}
