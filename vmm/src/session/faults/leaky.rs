//! Pages that a fork leaves writable, and that nothing makes writable again as they should be.

use std::ops::Range;
use std::time::Instant;

use palimpsest::saved::Saved;
use palimpsest::vcpus::{Capture, Paused, Vcpus, VcpusError};

/// vCPUs that are not told that some pages have become read-only, which have not
/// ([`LeakyMmu`](crate::check::inject::LeakyMmu)). Where no page table may be read-only, whoever is told makes
/// a page that looks like one writable in the right way, and the fault that was put in is gone.
pub(in crate::session) struct Leaky<'a> {
    /// The real ones.
    pub(in crate::session) vcpus: &'a dyn Vcpus,
    /// Pages that stay writable.
    pub(in crate::session) writable: Range<u64>,
}

impl Vcpus for Leaky<'_> {
    fn pause(&self, capture: Capture) -> Result<Box<dyn Paused + '_>, VcpusError> {
        Ok(Box::new(PausedLeaky {
            leaky: self,
            paused: self.vcpus.pause(capture)?,
        }))
    }

    fn may_lose_write_access(&self) -> bool {
        self.vcpus.may_lose_write_access()
    }
}

struct PausedLeaky<'a> {
    leaky: &'a Leaky<'a>,
    paused: Box<dyn Paused + 'a>,
}

impl Paused for PausedLeaky<'_> {
    fn kicked(&self) -> Instant {
        self.paused.kicked()
    }

    fn states(&mut self) -> Result<Vec<Saved>, VcpusError> {
        self.paused.states()
    }

    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError> {
        let writable = &self.leaky.writable;
        let mut others = gfns.filter(|gfn| !writable.contains(gfn));
        self.paused.has_protected(&mut others)
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
