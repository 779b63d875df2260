//! Registers that are captured too late.

use std::time::Instant;

use palimpsest::saved::Saved;
use palimpsest::vcpus::{Capture, Paused, Vcpus, VcpusError};

/// vCPUs whose registers are captured after they ran on.
pub(in crate::session) struct Late<'a> {
    /// The real ones.
    pub(in crate::session) vcpus: &'a dyn Vcpus,
    /// Returns when they have run on enough.
    pub(in crate::session) run_on: &'a dyn Fn(),
}

impl Vcpus for Late<'_> {
    fn pause(&self, _capture: Capture) -> Result<Box<dyn Paused + '_>, VcpusError> {
        let paused = self.vcpus.pause(Capture::Nothing)?;
        Ok(Box::new(PausedLate {
            late: self,
            kicked: paused.kicked(),
            running: None,
            paused: Some(paused),
        }))
    }

    fn may_lose_write_access(&self) -> bool {
        self.vcpus.may_lose_write_access()
    }
}

struct PausedLate<'a> {
    late: &'a Late<'a>,
    /// When they were told to stop first.
    kicked: Instant,
    /// When they ran on first.
    running: Option<Instant>,
    /// None after an error: they run.
    paused: Option<Box<dyn Paused + 'a>>,
}

impl<'a> PausedLate<'a> {
    /// The vCPUs, which stand still.
    ///
    /// # Errors
    /// If they run: nothing can be asked of them then, and nothing set.
    fn paused(&mut self) -> Result<&mut (dyn Paused + 'a), VcpusError> {
        match &mut self.paused {
            Some(paused) => Ok(&mut **paused),
            None => Err(VcpusError::Failed("the vcpus run on".into())),
        }
    }
}

impl Paused for PausedLate<'_> {
    fn kicked(&self) -> Instant {
        self.kicked
    }

    fn states(&mut self) -> Result<Vec<Saved>, VcpusError> {
        self.running = self
            .paused
            .take()
            .map(|paused| paused.resume(Box::new(|| ())));
        (self.late.run_on)();
        let mut paused = self.late.vcpus.pause(Capture::Registers)?;
        let states = paused.states();
        self.paused = Some(paused);
        states
    }

    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError> {
        self.paused()?.has_protected(gfns)
    }

    fn before_restore(&mut self) -> Result<(), VcpusError> {
        self.paused()?.before_restore()
    }

    fn restore(&mut self, states: &[Saved]) -> Result<(), VcpusError> {
        self.paused()?.restore(states)
    }

    fn stop(self: Box<Self>) {
        self.paused.into_iter().for_each(|paused| paused.stop());
    }

    fn resume(self: Box<Self>, then: Box<dyn FnOnce() + '_>) -> Instant {
        let resumed = self.paused.map(|paused| paused.resume(then));
        self.running.or(resumed).unwrap_or(self.kicked)
    }
}
