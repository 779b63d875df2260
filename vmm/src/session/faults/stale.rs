//! Registers of one vCPU that are captured too early.

use std::cell::OnceCell;

use palimpsest::kvm::VcpuState;
use palimpsest::saved::Saved;
use palimpsest::vcpus::{Capture, Paused, Vcpus, VcpusError};

use super::changed::{Change, Changed};

/// What of vCPU 0 is too old.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::session) enum Old {
    /// Its extended registers, but for MM7, in which it counts its operations.
    Extended,
    /// All its registers.
    All,
}

/// vCPUs that run on once more when they are paused. The registers of the first are from before that.
pub(in crate::session) struct Stale<'a> {
    /// The real ones.
    pub(in crate::session) vcpus: &'a dyn Vcpus,
    /// Returns when they have run on enough.
    pub(in crate::session) run_on: &'a dyn Fn(),
    /// What of the first is from before.
    pub(in crate::session) old: Old,
    /// All registers that the first had before: there from the first pause on, and not replaced by a later
    /// one.
    pub(in crate::session) older: OnceCell<VcpuState>,
}

impl Vcpus for Stale<'_> {
    fn pause(&self, capture: Capture) -> Result<Box<dyn Paused + '_>, VcpusError> {
        let mut before = self.vcpus.pause(Capture::Registers)?;
        if let Some(saved) = before.states()?.first() {
            let state = VcpuState::of_saved(saved);
            let state = state.map_err(|error| VcpusError::Failed(error.into()))?;
            let _ = self.older.set(state);
        }
        before.resume(Box::new(|| ()));
        (self.run_on)();
        Ok(Box::new(Changed {
            change: self,
            paused: self.vcpus.pause(capture)?,
        }))
    }

    fn may_lose_write_access(&self) -> bool {
        self.vcpus.may_lose_write_access()
    }
}

impl Change for Stale<'_> {
    fn states(&self, mut states: Vec<Saved>) -> Result<Vec<Saved>, VcpusError> {
        if let (Some(saved), Some(older)) = (states.first_mut(), self.older.get()) {
            let state = VcpuState::of_saved(saved);
            let state = state.map_err(|error| VcpusError::Failed(error.into()))?;
            *saved = Saved::new(match self.old {
                Old::Extended => with_extended_of(state, older),
                Old::All => older.clone(),
            });
        }
        Ok(states)
    }
}

/// `state` with the extended registers of `older`, but for MM7. Both have the x87 state in use, and the top
/// of its stack is 0: a guest that counts in MM7 leaves it so.
fn with_extended_of(state: VcpuState, older: &VcpuState) -> VcpuState {
    /// 32-bit words of ST(7), which is MM7 then.
    const ST7: std::ops::Range<usize> = (32 + 7 * 16) / 4..(32 + 7 * 16) / 4 + 4;
    let mut xsave = older.xsave().to_vec();
    if let (Some(to), Some(counter)) = (xsave.get_mut(ST7), state.xsave().get(ST7)) {
        to.copy_from_slice(counter);
    }
    state.with_xsave(xsave)
}
