//! Pages that a fork leaves writable, and that nothing makes writable again as they should be.

use std::ops::Range;

use palimpsest::vcpus::{Capture, Paused, Vcpus, VcpusError};

use super::changed::{Change, Changed};

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
        Ok(Box::new(Changed {
            change: self,
            paused: self.vcpus.pause(capture)?,
        }))
    }

    fn may_lose_write_access(&self) -> bool {
        self.vcpus.may_lose_write_access()
    }
}

impl Change for Leaky<'_> {
    fn is_told(&self, gfn: u64) -> bool {
        !self.writable.contains(&gfn)
    }
}
