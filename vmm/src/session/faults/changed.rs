//! vCPUs that stand still, and of which something is changed on its way.

use std::time::Instant;

use palimpsest::saved::Saved;
use palimpsest::vcpus::{Paused, VcpusError};

/// What a fault changes of what passes between a snapshot and paused vCPUs. All else goes through as it is.
pub(super) trait Change {
    /// What a snapshot is given for `states`.
    fn states(&self, states: Vec<Saved>) -> Result<Vec<Saved>, VcpusError> {
        Ok(states)
    }

    /// Whether the vCPUs are told that page `gfn` has become read-only.
    fn is_told(&self, _gfn: u64) -> bool {
        true
    }
}

/// Paused vCPUs with a [`Change`].
pub(super) struct Changed<'a, C> {
    pub(super) change: &'a C,
    pub(super) paused: Box<dyn Paused + 'a>,
}

impl<C: Change> Paused for Changed<'_, C> {
    fn kicked(&self) -> Instant {
        self.paused.kicked()
    }

    fn states(&mut self) -> Result<Vec<Saved>, VcpusError> {
        self.change.states(self.paused.states()?)
    }

    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError> {
        let mut told = gfns.filter(|gfn| self.change.is_told(*gfn));
        self.paused.has_protected(&mut told)
    }

    fn before_restore(&mut self) -> Result<(), VcpusError> {
        self.paused.before_restore()
    }

    fn restore(&mut self, states: &[Saved]) -> Result<(), VcpusError> {
        self.paused.restore(states)
    }

    fn stop(self: Box<Self>) {
        self.paused.stop();
    }

    fn resume(self: Box<Self>, then: Box<dyn FnOnce() + '_>) -> Instant {
        self.paused.resume(then)
    }
}
