//! Taking a snapshot.

use std::time::{Duration, Instant};

use super::resting::Resting;
use super::{Parts, Snapshot, Timing};
use crate::aside::Aside;
use crate::device::Stopped;
use crate::host::Precedence;
use crate::mm::{CowPolicy, ForkError};
use crate::timeline::span;
use crate::vcpus::{Capture, VcpusError};

/// How long devices may take to reach a boundary for a snapshot. A request is a few microseconds' work; the
/// rest is the host's scheduling.
const BOUNDARY_WAIT: Duration = Duration::from_millis(2);

/// What is done before a snapshot's pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Preparation {
    /// Most of memory is forked while the guest runs, so that the pause is short. A page that the guest
    /// writes meanwhile is copied once more than without.
    #[default]
    Early,
    /// Nothing: for who has no memory for that.
    None,
}

/// Why a snapshot could not be taken. The VM runs on, unless its vCPUs have ended or its memory is broken.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// vCPUs could not be stopped or captured.
    #[error("cannot stop and capture the vcpus")]
    Vcpus(#[from] VcpusError),
    /// Memory could not be forked.
    #[error("cannot fork guest memory")]
    Memory(#[from] ForkError),
    /// Whoever wanted the snapshot does not want it any more.
    #[error("the snapshot was called off")]
    CalledOff,
}

impl<P: CowPolicy> Parts<'_, P> {
    /// Takes a snapshot of the running VM.
    ///
    /// A device that does not reach a boundary within 2 ms is captured as it is, with a request in flight.
    ///
    /// # Errors
    /// If the VM was not started, a vCPU has ended, or there is no memory for the copy of a pinned page. The
    /// VM is as it was, and runs on; but if its memory is broken
    /// ([`AddressSpace::check`](crate::mm::AddressSpace::check)) it is stopped for good.
    pub fn take(&self) -> Result<(Snapshot, Timing), TakeError> {
        self.take_with(Preparation::Early, &|| true, || ())
    }

    /// [`Parts::take`], with two things to be done at the same instant: `may_fork` is asked when no vCPU runs
    /// any more, and can call it off; `after_memory` is called when memory was forked and nothing runs yet.
    ///
    /// # Errors
    /// As [`Parts::take`].
    pub fn take_with(
        &self,
        preparation: Preparation,
        may_fork: &dyn Fn() -> bool,
        after_memory: impl FnOnce(),
    ) -> Result<(Snapshot, Timing), TakeError> {
        let _span = span!("snapshot");
        let began = Instant::now();
        let _first = self.precedence.map(Precedence::take);
        let step = span!("prepare");
        self.note_protected();
        let _ahead = Resting::of(self.ahead);
        if preparation == Preparation::Early && self.vcpus.may_lose_write_access() {
            self.space.prepare_fork();
        }
        drop(step);
        let aside = self.aside.map(Aside::hold);
        let step = span!("park");
        let mut paused = self.vcpus.pause(Capture::Registers)?;
        let parked = Instant::now();
        drop(step);
        if !may_fork() {
            return Err(TakeError::CalledOff);
        }
        let kicked = paused.kicked();
        let step = span!("devices");
        let stopped = Stopped::stop(self.devices.clone(), kicked + BOUNDARY_WAIT);
        let quiesced = Instant::now();
        drop(step);
        let step = span!("fork");
        let devices = self.devices.iter().map(|device| device.capture()).collect();
        let forked = self.space.fork().map_err(TakeError::from);
        let forked = forked.inspect(|_| after_memory());
        let kept = self.keep_tables_writable(&mut *paused);
        // A fork that fails leaves the guest as it was, unless its memory is not what it sees any more.
        let may_run_on = kept.is_ok() && self.space.check().is_ok();
        let memory = match forked.and_then(|memory| Ok(kept.map(|()| memory)?)) {
            Ok(memory) => memory,
            Err(error) => {
                if !may_run_on {
                    paused.stop();
                }
                return Err(error);
            }
        };
        let forked = Instant::now();
        drop(step);
        let step = span!("registers");
        let vcpus = paused.states()?;
        let collected = Instant::now();
        drop(step);
        let step = span!("resume");
        // Devices after the vCPUs, which they would keep from a CPU.
        let running = paused.resume(Box::new(|| drop((stopped, aside))));
        drop(step);
        let snapshot = Snapshot::new(memory, vcpus, devices);
        let timing = Timing {
            began,
            kicked,
            parked,
            quiesced,
            memory: forked,
            registers: collected,
            running,
        };
        Ok((snapshot, timing))
    }
}
