//! Rewinding a VM to a snapshot of it.

use std::time::{Duration, Instant};

use super::resting::Resting;
use super::{Parts, Snapshot, Timing};
use crate::aside::Aside;
use crate::causes::Cause;
use crate::device::Stopped;
use crate::host::Precedence;
use crate::mm::{self, CowPolicy, FaultError};
use crate::timeline::span;
use crate::vcpus::{Capture, Paused, VcpusError};

/// How long devices may take to reach a boundary for a restore, which cannot go on without.
const RESTORE_WAIT: Duration = Duration::from_secs(5);

/// Why a VM could not be rewound. If anything of it was, it is stopped for good.
#[derive(Debug, thiserror::Error)]
pub enum RewindError {
    /// vCPUs could not be stopped or restored.
    #[error("cannot stop and restore the vcpus")]
    Vcpus(#[from] VcpusError),
    /// Memory could not be restored.
    #[error("cannot restore guest memory")]
    Memory(#[from] mm::RestoreError),
    /// Devices could not be restored.
    #[error("cannot restore the devices")]
    Devices(#[source] Cause),
    /// What was to be done once memory was back could not be.
    #[error("cannot make the restored memory ready")]
    AfterMemory(#[source] Cause),
    /// The snapshot is of a VM with other devices. Nothing has changed.
    #[error("the snapshot has {snapshot} devices, the guest {guest}")]
    DeviceCount {
        /// Devices of the snapshot.
        snapshot: usize,
        /// Devices there are.
        guest: usize,
    },
}

impl<P: CowPolicy> Parts<'_, P> {
    /// Rewinds the VM to `snapshot`, and lets it run on from there. The guest's clock is not rewound.
    ///
    /// `after_memory` is called when memory is back and nothing runs yet: to look at it, or to write what the
    /// rewound guest is to find there, such as a new generation.
    ///
    /// # Errors
    /// If the snapshot has another number of devices, or the vCPUs cannot be stopped: the VM is as it was,
    /// and runs on. If anything fails later it is part old, part new, and its vCPUs are stopped for good: a
    /// device that does not reach a boundary within 5 s, memory of another size or pool, an `after_memory`
    /// that says so, a state that is refused.
    pub fn restore(
        &self,
        snapshot: &Snapshot,
        after_memory: impl FnOnce() -> Result<(), Cause>,
    ) -> Result<Timing, RewindError> {
        let (there, here) = (snapshot.devices.len(), self.devices.len());
        if there != here {
            return Err(RewindError::DeviceCount {
                snapshot: there,
                guest: here,
            });
        }
        let _span = span!("restore");
        let began = Instant::now();
        let _ahead = Resting::of(self.ahead);
        let step = span!("prepare");
        self.space.prepare_restore(&snapshot.memory);
        drop(step);
        self.note_protected();
        let _first = self.precedence.map(Precedence::take);
        let aside = self.aside.map(Aside::hold);
        let step = span!("park");
        let mut paused = self.vcpus.pause(Capture::Nothing)?;
        let parked = Instant::now();
        drop(step);
        let kicked = paused.kicked();
        let step = span!("devices");
        let stopped = Stopped::stop(self.devices.clone(), kicked + RESTORE_WAIT);
        let quiesced = Instant::now();
        drop(step);
        let step = span!("memory");
        let memory = match self.rewind(&mut *paused, snapshot, after_memory) {
            Ok(memory) => memory,
            Err(error) => {
                // Before the devices go on, which may complete what no vCPU is to see.
                paused.stop();
                return Err(error);
            }
        };
        let registers = Instant::now();
        drop(step);
        let step = span!("resume");
        // Devices after the vCPUs, which they would keep from a CPU.
        let running = paused.resume(Box::new(|| drop((stopped, aside))));
        drop(step);
        Ok(Timing {
            began,
            kicked,
            parked,
            quiesced,
            memory,
            registers,
            running,
        })
    }

    /// Sets devices, memory and registers back, while nothing runs. Says when memory was back.
    fn rewind(
        &self,
        paused: &mut dyn Paused,
        snapshot: &Snapshot,
        after_memory: impl FnOnce() -> Result<(), Cause>,
    ) -> Result<Instant, RewindError> {
        let mut devices = self.devices.iter();
        let released = devices.try_for_each(|device| device.release());
        released.map_err(RewindError::Devices)?;
        paused.before_restore()?;
        self.space.restore(&snapshot.memory)?;
        after_memory().map_err(RewindError::AfterMemory)?;
        let memory = Instant::now();
        for (device, state) in self.devices.iter().zip(&snapshot.devices) {
            device.restore(state).map_err(RewindError::Devices)?;
        }
        paused.restore(&snapshot.vcpus)?;
        // To pin what devices had in flight may have broken it.
        let is_whole = self.space.check().map_err(FaultError::from);
        is_whole.map_err(mm::RestoreError::from)?;
        self.keep_tables_writable(paused)?;
        Ok(memory)
    }
}
