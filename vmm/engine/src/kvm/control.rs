//! The handshake between a machine and its vCPU threads.
//!
//! Each vCPU has a *command* (run, pause, stop), which its thread looks at before every entry to the guest,
//! and a *slot*, which says what the thread is doing and what task it has while parked. Registers are read
//! and written by the vCPU's own thread: it does so while the pauser goes on with its own work, and all vCPUs
//! do so at once.
//!
//! ```text
//!           command = Run              command = Pause, kick
//!   Parked ─────────────▶ Running ─────────────▶ Parked ── task: Queued ▶ Running ▶ Captured | Done | Failed
//!      └─── command = Stop ──┴──── or a crash, or an exit ───▶ Ended
//! ```
//! Commands change with the slots locked, so that a parked thread cannot miss one; a running thread reads its
//! own without the lock (see [`kick`](super::kick) for why it cannot miss one either).

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::error::StateError;
use super::registers::EntryState;
use super::state::{Clock, VcpuState};

/// What a vCPU's thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum VcpuCommand {
    Run,
    Pause,
    Stop,
}

/// What a vCPU's thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// In the guest, or on its way to it, or handling an exit.
    Running,
    /// Out of the guest with no instruction half done.
    Parked,
    /// It will never run again.
    Ended,
}

/// Something to do with the registers of a parked vCPU.
#[derive(Debug)]
pub(crate) enum RegisterTask {
    /// Read them all.
    Capture,
    /// Set them all.
    Restore(Box<VcpuState>, Clock),
    /// Set them to the entry state.
    Enter(EntryState),
}

/// What became of the task of a parked vCPU.
#[derive(Debug)]
pub(crate) enum TaskState {
    Idle,
    Queued(RegisterTask),
    Running,
    Captured(Box<VcpuState>),
    Done,
    Failed(StateError),
}

impl TaskState {
    pub(crate) fn is_pending(&self) -> bool {
        matches!(self, Self::Queued(_) | Self::Running)
    }
}

/// One vCPU, as its thread and the machine see it.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) phase: Phase,
    /// When `phase` began.
    pub(crate) since: Instant,
    pub(crate) task: TaskState,
}

/// What a machine shares with its vCPU threads.
#[derive(Debug)]
pub(crate) struct Control {
    commands: Vec<AtomicU8>,
    slots: Mutex<Vec<Slot>>,
    /// A command or a task is there for a parked vCPU.
    to_vcpus: Condvar,
    /// A phase or the state of a task changed.
    to_machine: Condvar,
}

/// A vCPU did not do in time what it was told.
pub(crate) struct TimedOut;

impl Control {
    /// For `vcpus` vCPUs, all parked.
    pub(crate) fn new(vcpus: usize) -> Self {
        let slot = || Slot {
            phase: Phase::Parked,
            since: Instant::now(),
            task: TaskState::Idle,
        };
        Self {
            commands: (0..vcpus)
                .map(|_| AtomicU8::new(VcpuCommand::Pause as u8))
                .collect(),
            slots: Mutex::new((0..vcpus).map(|_| slot()).collect()),
            to_vcpus: Condvar::new(),
            to_machine: Condvar::new(),
        }
    }

    /// The slots. A thread that panicked holding them left them whole: every change is one assignment.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The command of vCPU `vcpu`. SeqCst: the other half of
    /// [`KickFlag::clear`](super::kick::KickFlag::clear).
    pub(crate) fn command(&self, vcpu: usize) -> VcpuCommand {
        match self.commands[vcpu].load(Ordering::SeqCst) {
            0 => VcpuCommand::Run,
            1 => VcpuCommand::Pause,
            _ => VcpuCommand::Stop,
        }
    }

    /// Gives all vCPUs a command, and wakes those that are parked. The command to stop is never taken back.
    ///
    /// The slots are handed over to show that they are locked.
    pub(crate) fn give(&self, _slots: &mut MutexGuard<'_, Vec<Slot>>, command: VcpuCommand) {
        for current in &self.commands {
            if current.load(Ordering::SeqCst) != VcpuCommand::Stop as u8 {
                current.store(command as u8, Ordering::SeqCst);
            }
        }
        self.to_vcpus.notify_all();
    }

    /// Wakes parked vCPUs to look at their tasks.
    pub(crate) fn task_given(&self) {
        self.to_vcpus.notify_all();
    }

    /// Waits until `ready` holds, at most `limit`.
    pub(crate) fn wait<'a>(
        &self,
        slots: MutexGuard<'a, Vec<Slot>>,
        limit: Duration,
        mut ready: impl FnMut(&[Slot]) -> bool,
    ) -> (MutexGuard<'a, Vec<Slot>>, Result<(), TimedOut>) {
        let (slots, timeout) = self
            .to_machine
            .wait_timeout_while(slots, limit, |slots| !ready(slots))
            .unwrap_or_else(|e| e.into_inner());
        let result = if timeout.timed_out() {
            Err(TimedOut)
        } else {
            Ok(())
        };
        (slots, result)
    }

    /// The thread of vCPU `vcpu` is now doing something else.
    pub(crate) fn enter_phase(&self, vcpu: usize, phase: Phase) {
        let mut slots = self.lock();
        set_phase(&mut slots[vcpu], phase);
        drop(slots);
        self.to_machine.notify_all();
    }

    /// Waits, parked, for a task. `None` once the command is no longer to pause; the vCPU then counts as
    /// running.
    pub(crate) fn next_task(&self, vcpu: usize) -> Option<RegisterTask> {
        let mut slots = self.lock();
        loop {
            let slot = &mut slots[vcpu];
            if matches!(slot.task, TaskState::Queued(_))
                && let TaskState::Queued(task) =
                    std::mem::replace(&mut slot.task, TaskState::Running)
            {
                return Some(task);
            }
            if self.command(vcpu) != VcpuCommand::Pause {
                set_phase(slot, Phase::Running);
                drop(slots);
                self.to_machine.notify_all();
                return None;
            }
            slots = self.to_vcpus.wait(slots).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// The task that [`Control::next_task`] gave is finished.
    pub(crate) fn finish(&self, vcpu: usize, task: TaskState) {
        self.lock()[vcpu].task = task;
        self.to_machine.notify_all();
    }
}

fn set_phase(slot: &mut Slot, phase: Phase) {
    if slot.phase != phase {
        slot.phase = phase;
        slot.since = Instant::now();
    }
}
