//! Snapshots of a running VM: memory, vCPUs and devices as they were at one instant.
//!
//! ```text
//!            kick                                                resume
//!   vCPUs   ──┤ park │ capture registers, each on its own thread ├── run, and fault
//!   devices ──────┤ stop at a descriptor boundary │ capture ├────── go on
//!   memory          ............... fork: write-protect, share, copy what is pinned
//!             |<------------------------- pause ----------------->|
//! ```
//! 1. vCPUs are kicked out of the guest and park; each captures its registers while the rest goes on.
//! 2. Devices stop between two requests: a completion and its data are both in the snapshot or neither is. A device that does
//!    not get there in time is recorded as in flight. Their states are captured.
//! 3. Memory is forked.
//! 4. The registers are collected; devices go on, then vCPUs.
//! 5. What the guest writes between all snapshots is copied ahead of it (`mm/ahead.rs`); before the kick that rests, and most of what
//!    has changed is forked already ([`AddressSpace::prepare_fork`]).
//! 6. Everything else (checking, hashing) happens later, beside the running guest.
//!
//! A **restore** rewinds the same VM: vCPUs park, devices stop, requests on their way are given up and their pins
//! dropped; memory goes back (see [`AddressSpace::restore`](crate::mm::AddressSpace::restore)); devices take
//! the requests that were on their way in the snapshot again, from the memory just restored. Registered buffers stay pinned
//! throughout: memory goes back *into* their frames, so the device and the guest see the same before and after.
//!
//! Snapshots live in memory only: there is no file format yet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::{self, DeviceSet, DeviceState};
use crate::host::Ahead;
use crate::kvm::{Capture, Clock, KvmError, Machine, Paused, VcpuState};
use crate::mm::{AddressSpace, CowPolicy, FaultError, ForkError, Frozen, PageSet};

/// How long devices may take to reach a descriptor boundary for a snapshot. A request is a few microseconds' work; the
/// rest is the host's scheduling.
const BOUNDARY_WAIT: Duration = Duration::from_millis(2);
/// The same for a restore, which cannot go on without.
const RESTORE_WAIT: Duration = Duration::from_secs(5);

/// One snapshot. Dropping it gives its memory back.
#[derive(Debug)]
pub struct Snapshot {
    number: u64,
    parent: Option<u64>,
    memory: Arc<Frozen>,
    vcpus: Vec<VcpuState>,
    devices: Vec<DeviceState>,
}

impl Snapshot {
    /// One of memory and registers, without devices.
    pub fn of(number: u64, memory: Arc<Frozen>, vcpus: Vec<VcpuState>) -> Self {
        Self {
            number,
            parent: None,
            memory,
            vcpus,
            devices: Vec::new(),
        }
    }

    /// Its number in the run, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }
    /// The snapshot the VM ran on from, last before this one: the one restored last, or else taken last.
    pub fn parent(&self) -> Option<u64> {
        self.parent
    }
    /// Memory.
    pub fn memory(&self) -> &Frozen {
        &self.memory
    }
    /// Registers, by vCPU.
    pub fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }
    /// Devices, by number.
    pub fn devices(&self) -> &[DeviceState] {
        &self.devices
    }
}

/// The parts of a VM that a snapshot is of.
#[derive(Debug)]
pub struct Parts<'a, P: CowPolicy> {
    /// Its vCPUs.
    pub machine: &'a Machine,
    /// Its devices.
    pub devices: &'a DeviceSet<P>,
    /// Its memory.
    pub space: &'a AddressSpace<P>,
    /// Who copies ahead of its writes, if anybody does.
    pub ahead: Option<&'a Ahead>,
}

/// Steps to leave out or to do wrong, so that an oracle can be seen to notice.
///
/// What is done too early or too late is so by what happens meanwhile, not by a time: each has a call that
/// returns when it has.
#[derive(Clone, Copy, Default)]
pub enum Fault<'a> {
    /// None: do it right.
    #[default]
    None,
    /// Do not stop the devices, whose states are captured before the call, in which one of them goes on.
    RunDevices(&'a dyn Fn()),
    /// Capture registers after the vCPUs ran on, as they do in the call.
    LateRegisters(&'a dyn Fn()),
    /// Take the extended registers of vCPU 0, but for its counter, from before the vCPUs ran on, as they do in the call.
    StaleRegisters(&'a dyn Fn()),
    /// Take the registers of vCPU 0 from before the vCPUs ran on, as they do in the first call. The second, with those registers, sets its pages
    /// back for the snapshot.
    SkewVcpus(&'a dyn Fn(), &'a dyn Fn(&VcpuState)),
}

impl Fault<'_> {
    /// Registers of vCPU 0 that are too old, if the fault is to have such.
    fn older_registers(self, machine: &Machine) -> Result<Option<VcpuState>, KvmError> {
        let (Self::StaleRegisters(run_on) | Self::SkewVcpus(run_on, _)) = self else {
            return Ok(None);
        };
        let paused = machine.pause(Capture::Registers)?;
        let older = paused.states()?.into_iter().next();
        paused.resume();
        run_on();
        Ok(older)
    }
}

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

/// When things happened.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The vCPUs were told to stop.
    pub kicked: Instant,
    /// The last of them was about to run again.
    pub running: Instant,
}

impl Timing {
    /// From the kick to the last vCPU running again.
    pub fn pause(&self) -> Duration {
        self.running - self.kicked
    }
}

/// Why a snapshot could not be taken. The VM runs on, unless its vCPUs have ended or its memory is broken.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// vCPUs could not be stopped or captured.
    #[error("cannot stop and capture the vcpus")]
    Vcpus(#[from] KvmError),
    /// Memory could not be forked.
    #[error("cannot fork guest memory")]
    Memory(#[from] ForkError),
    /// Whoever wanted the snapshot does not want it any more.
    #[error("the snapshot was called off")]
    CalledOff,
}

/// Why a VM could not be rewound. If anything of it was, it is stopped for good.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// vCPUs could not be stopped or restored.
    #[error("cannot stop and restore the vcpus")]
    Vcpus(#[from] KvmError),
    /// Memory could not be restored.
    #[error("cannot restore guest memory")]
    Memory(#[from] crate::mm::RestoreError),
    /// Devices could not be restored.
    #[error("cannot restore the devices")]
    Devices(#[from] device::RestoreError),
}

/// Keeps who copies ahead from working: a fork would wait for it.
struct Resting<'a>(Option<&'a Ahead>);

impl<'a> Resting<'a> {
    fn of(ahead: Option<&'a Ahead>) -> Self {
        ahead.into_iter().for_each(Ahead::rest);
        Self(ahead)
    }
}

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.into_iter().for_each(Ahead::work);
    }
}

impl<P: CowPolicy> Parts<'_, P> {
    /// Takes snapshot `number` of the running VM, which last ran on from `parent`.
    ///
    /// # Errors
    /// If a vCPU has ended, or there is no memory for the copy of a pinned page. The VM is as it was, and
    /// runs on; but if its memory is broken ([`AddressSpace::check`]) it is stopped for good.
    pub fn take(
        &self,
        number: u64,
        parent: Option<u64>,
        fault: Fault<'_>,
    ) -> Result<(Snapshot, Timing), TakeError> {
        let early = Preparation::Early;
        self.take_with(number, parent, early, fault, &|| true, || ())
    }

    /// [`Parts::take`], with two things to be done at the same instant: `may_fork` is asked when nothing runs any more, and can call it
    /// off; `after_memory` is called when memory was forked and nothing runs yet.
    ///
    /// # Errors
    /// As [`Parts::take`].
    pub fn take_with(
        &self,
        number: u64,
        parent: Option<u64>,
        preparation: Preparation,
        fault: Fault<'_>,
        may_fork: &dyn Fn() -> bool,
        after_memory: impl FnOnce(),
    ) -> Result<(Snapshot, Timing), TakeError> {
        let capture = match fault {
            Fault::LateRegisters(_) => Capture::Nothing,
            _ => Capture::Registers,
        };
        let older = fault.older_registers(self.machine)?;
        self.note_protected();
        // Nothing holds devices to the instant then: they are as they were some time before.
        let at_large = match fault {
            Fault::RunDevices(go_on) => {
                let states = self.devices.capture();
                go_on();
                Some(states)
            }
            _ => None,
        };
        let _ahead = Resting::of(self.ahead);
        if preparation == Preparation::Early && self.machine.may_lose_write_access() {
            self.space.prepare_fork();
        }
        let paused = self.machine.pause(capture)?;
        if !may_fork() {
            return Err(TakeError::CalledOff);
        }
        let kicked = paused.kicked();
        let stopped = at_large
            .is_none()
            .then(|| self.devices.stop(kicked + BOUNDARY_WAIT));
        let devices = at_large.unwrap_or_else(|| self.devices.capture());
        if let (Fault::SkewVcpus(_, set_back), Some(older)) = (fault, &older) {
            set_back(older);
        }
        let forked = self.space.fork().map_err(TakeError::from);
        let forked = forked.inspect(|_| after_memory());
        let kept = self.keep_tables_writable(&paused);
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
        let (vcpus, running) = if let Fault::LateRegisters(run_on) = fault {
            drop(stopped);
            let running = paused.resume();
            run_on();
            (self.machine.pause(Capture::Registers)?.states()?, running)
        } else {
            let mut vcpus = paused.states()?;
            drop(stopped);
            if let (Some(older), Some(vcpu)) = (older, vcpus.first_mut()) {
                *vcpu = match fault {
                    Fault::StaleRegisters(_) => vcpu.clone().with_extended_of(&older),
                    _ => older,
                };
            }
            (vcpus, paused.resume())
        };
        let snapshot = Snapshot {
            number,
            parent,
            memory,
            vcpus,
            devices,
        };
        Ok((snapshot, Timing { kicked, running }))
    }

    /// Rewinds the VM to `snapshot`, and lets it run on from there. The guest's clock is not rewound.
    ///
    /// `after_memory` is called when memory is back and nothing runs yet.
    ///
    /// # Errors
    /// If the vCPUs cannot be stopped: the VM is as it was. If any part of it cannot be rewound: it is part
    /// old, part new then, and its vCPUs are stopped for good.
    pub fn restore(
        &self,
        snapshot: &Snapshot,
        after_memory: impl FnOnce(),
    ) -> Result<Timing, RestoreError> {
        let _ahead = Resting::of(self.ahead);
        self.note_protected();
        let paused = self.machine.pause(Capture::Nothing)?;
        let kicked = paused.kicked();
        let stopped = self.devices.stop(kicked + RESTORE_WAIT);
        if let Err(error) = self.rewind(&paused, snapshot, after_memory) {
            // Before the devices go on, which may complete what no vCPU is to see.
            paused.stop();
            return Err(error);
        }
        drop(stopped);
        let running = paused.resume();
        Ok(Timing { kicked, running })
    }

    /// Makes everything that stands still what it was.
    fn rewind(
        &self,
        paused: &Paused<'_>,
        snapshot: &Snapshot,
        after_memory: impl FnOnce(),
    ) -> Result<(), RestoreError> {
        self.devices.release_streaming()?;
        let tables = paused.page_tables()?;
        self.space.restore(&snapshot.memory)?;
        after_memory();
        self.devices.restore(&snapshot.devices)?;
        paused.restore(&snapshot.vcpus, Clock::Keep, &tables)?;
        // To pin what devices had in flight may have broken it.
        let is_whole = self.space.check().map_err(FaultError::from);
        is_whole.map_err(crate::mm::RestoreError::from)?;
        self.keep_tables_writable(paused)?;
        Ok(())
    }

    /// Has `protect` take write access from pages of the running VM: while its vCPUs stand still, where it must not be taken from
    /// vCPUs that run.
    ///
    /// # Errors
    /// If the vCPUs cannot be stopped. If they cannot run on, they are stopped for good.
    pub fn while_protecting<R>(&self, protect: impl FnOnce() -> R) -> Result<R, KvmError> {
        if self.machine.may_lose_write_access() {
            return Ok(protect());
        }
        self.note_protected();
        let paused = self.machine.pause(Capture::Nothing)?;
        let done = protect();
        if let Err(error) = self.keep_tables_writable(&paused) {
            paused.stop();
            return Err(error);
        }
        Ok(done)
    }

    /// Has what becomes read-only noted for [`Parts::keep_tables_writable`], where that needs it.
    fn note_protected(&self) {
        if !self.machine.may_lose_write_access() {
            self.space.note_protected();
        }
    }

    /// To be called before the vCPUs run on, when memory has become read-only.
    fn keep_tables_writable(&self, paused: &Paused<'_>) -> Result<(), KvmError> {
        let protected = self.space.take_protected();
        let gfns = protected.iter().flat_map(PageSet::iter);
        paused.keep_tables_writable(gfns.map(|gfn| gfn.0))
    }
}
