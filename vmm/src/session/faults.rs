//! vCPUs and devices that do wrong on purpose, so that an oracle can be seen to notice. A snapshot is given
//! these, and they pass on what it asks of them to the real ones.
//!
//! Each captures too early or too late. What happens in between is up to a call (`run_on`, `go_on`) that
//! returns when enough has happened: no time is waited for.

use std::cell::OnceCell;
use std::time::Instant;

use palimpsest::device::{DeviceError, Quiesce};
use palimpsest::kvm::VcpuState;
use palimpsest::saved::Saved;
use palimpsest::vcpus::{Capture, Paused, Vcpus, VcpusError};

/// vCPUs whose registers are captured after they ran on, as they do in `run_on`.
pub(super) struct Late<'a> {
    pub(super) vcpus: &'a dyn Vcpus,
    pub(super) run_on: &'a dyn Fn(),
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
    kicked: Instant,
    /// When they ran on first.
    running: Option<Instant>,
    /// None after an error: they run.
    paused: Option<Box<dyn Paused + 'a>>,
}

impl Paused for PausedLate<'_> {
    fn kicked(&self) -> Instant {
        self.kicked
    }

    fn states(&mut self) -> Result<Vec<Saved>, VcpusError> {
        self.running = self.paused.take().map(|paused| paused.resume());
        (self.late.run_on)();
        let mut paused = self.late.vcpus.pause(Capture::Registers)?;
        let states = paused.states();
        self.paused = Some(paused);
        states
    }

    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError> {
        self.paused
            .as_mut()
            .map_or(Ok(()), |paused| paused.has_protected(gfns))
    }

    fn before_restore(&mut self) -> Result<(), VcpusError> {
        self.paused
            .as_mut()
            .map_or(Ok(()), |paused| paused.before_restore())
    }

    fn restore(&mut self, states: &[Saved]) -> Result<(), VcpusError> {
        self.paused
            .as_mut()
            .map_or(Ok(()), |paused| paused.restore(states))
    }

    fn stop(self: Box<Self>) {
        self.paused.into_iter().for_each(|paused| paused.stop());
    }

    fn resume(self: Box<Self>) -> Instant {
        let resumed = self.paused.map(|paused| paused.resume());
        self.running.or(resumed).unwrap_or(self.kicked)
    }
}

/// What is too old of vCPU 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Old {
    /// Its extended registers, but for its counter.
    Extended,
    /// All its registers.
    All,
}

/// vCPUs of whose first the registers are from before they ran on, as they do in `run_on`.
pub(super) struct Stale<'a> {
    pub(super) vcpus: &'a dyn Vcpus,
    pub(super) run_on: &'a dyn Fn(),
    pub(super) old: Old,
    /// The registers, from the pause on.
    pub(super) older: OnceCell<VcpuState>,
}

impl Vcpus for Stale<'_> {
    fn pause(&self, capture: Capture) -> Result<Box<dyn Paused + '_>, VcpusError> {
        let mut before = self.vcpus.pause(Capture::Registers)?;
        if let Some(saved) = before.states()?.first() {
            let state = VcpuState::of_saved(saved);
            let state = state.map_err(|error| VcpusError::Failed(error.into()))?;
            let _ = self.older.set(state);
        }
        before.resume();
        (self.run_on)();
        Ok(Box::new(PausedStale {
            stale: self,
            paused: self.vcpus.pause(capture)?,
        }))
    }

    fn may_lose_write_access(&self) -> bool {
        self.vcpus.may_lose_write_access()
    }
}

struct PausedStale<'a> {
    stale: &'a Stale<'a>,
    paused: Box<dyn Paused + 'a>,
}

impl Paused for PausedStale<'_> {
    fn kicked(&self) -> Instant {
        self.paused.kicked()
    }

    fn states(&mut self) -> Result<Vec<Saved>, VcpusError> {
        let mut states = self.paused.states()?;
        if let (Some(saved), Some(older)) = (states.first_mut(), self.stale.older.get()) {
            let state = VcpuState::of_saved(saved);
            let state = state.map_err(|error| VcpusError::Failed(error.into()))?;
            *saved = Saved::new(match self.stale.old {
                Old::Extended => with_extended_of(state, older),
                Old::All => older.clone(),
            });
        }
        Ok(states)
    }

    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError> {
        self.paused.has_protected(gfns)
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

    fn resume(self: Box<Self>) -> Instant {
        self.paused.resume()
    }
}

/// `state` with the extended registers of `older`, but for the counter.
fn with_extended_of(state: VcpuState, older: &VcpuState) -> VcpuState {
    /// 32-bit words of ST(7), which is MM7 as long as the top of the stack is 0.
    const ST7: std::ops::Range<usize> = (32 + 7 * 16) / 4..(32 + 7 * 16) / 4 + 4;
    let mut xsave = older.xsave().to_vec();
    if let (Some(to), Some(counter)) = (xsave.get_mut(ST7), state.xsave().get(ST7)) {
        to.copy_from_slice(counter);
    }
    state.with_xsave(xsave)
}

/// A device that is not stopped, with what its state was some time before.
pub(super) struct AtLarge<'a> {
    device: &'a dyn Quiesce,
    state: Saved,
}

impl<'a> AtLarge<'a> {
    /// Each of `devices`, which then run on in `go_on`.
    pub(super) fn of(devices: &[&'a dyn Quiesce], go_on: impl FnOnce()) -> Vec<Self> {
        let captured = devices.iter().map(|&device| Self {
            device,
            state: device.capture(),
        });
        let captured = captured.collect();
        go_on();
        captured
    }
}

impl Quiesce for AtLarge<'_> {
    fn begin_stop(&self) {}

    fn finish_stop(&self, _deadline: Instant) -> bool {
        true
    }

    fn resume(&self) {}

    fn capture(&self) -> Saved {
        self.state.clone()
    }

    fn release(&self) -> Result<(), DeviceError> {
        self.device.release()
    }

    fn restore(&self, state: &Saved) -> Result<(), DeviceError> {
        self.device.restore(state)
    }
}
