//! Taking write access from pages of a VM that runs.

use super::Parts;
use crate::mm::{CowPolicy, PageSet};
use crate::vcpus::{Capture, Paused, VcpusError};

impl<P: CowPolicy> Parts<'_, P> {
    /// Has `protect` take write access from pages of the running VM: while its vCPUs stand still, where it
    /// must not be taken from vCPUs that run.
    ///
    /// # Errors
    /// If the vCPUs cannot be stopped. If they cannot run on, they are stopped for good.
    pub fn while_protecting<R>(&self, protect: impl FnOnce() -> R) -> Result<R, VcpusError> {
        if self.vcpus.may_lose_write_access() {
            return Ok(protect());
        }
        self.note_protected();
        let mut paused = self.vcpus.pause(Capture::Nothing)?;
        let done = protect();
        if let Err(error) = self.keep_tables_writable(&mut *paused) {
            paused.stop();
            return Err(error);
        }
        Ok(done)
    }

    /// Has what becomes read-only noted for [`Parts::keep_tables_writable`], where that needs it.
    pub(super) fn note_protected(&self) {
        if !self.vcpus.may_lose_write_access() {
            self.space.note_protected();
        }
    }

    /// To be called before the vCPUs run on, when memory has become read-only.
    pub(super) fn keep_tables_writable(&self, paused: &mut dyn Paused) -> Result<(), VcpusError> {
        let protected = self.space.take_protected();
        let gfns = protected.iter().flat_map(PageSet::iter);
        paused.has_protected(&mut gfns.map(|gfn| gfn.0))
    }
}
