//! The handshake between a machine and its vCPU threads.
//!
//! Each vCPU has an *order* (run, pause, stop), which its thread looks at before every entry to the guest,
//! and a *slot*, which says what the thread is doing and what work it has while parked. Registers are read
//! and written by the vCPU's own thread: it does so while the pauser goes on with its own work, and all vCPUs
//! do so at once.
//!
//! ```text
//!            order = Run                 order = Pause, kick
//!   Parked ─────────────▶ Running ─────────────▶ Parked ── work: Wanted ▶ Doing ▶ Captured | Done | Failed
//!      └──── order = Stop ───┴──── or a crash, or an exit ───▶ Ended
//! ```
//! Orders change with the slots locked, so that a parked thread cannot miss one; a running thread reads its
//! order without the lock (see [`kick`](super::kick) for why it cannot miss one either).

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::error::StateError;
use super::registers::Entry;
use super::state::{Clock, VcpuState};

/// What a vCPU's thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Order {
    Run,
    Pause,
    Stop,
}

/// What a vCPU's thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// In the guest, or on its way to it, or handling an exit.
    Running,
    /// Out of the guest with no instruction half done.
    Parked,
    /// It will never run again.
    Ended,
}

/// Something to do with the registers of a parked vCPU.
#[derive(Debug)]
pub(super) enum Job {
    /// Read them all.
    Capture,
    /// Set them all.
    Restore(Box<VcpuState>, Clock),
    /// Set them to the entry state.
    Enter(Entry),
}

/// What became of the work of a parked vCPU.
#[derive(Debug)]
pub(super) enum Work {
    None,
    Wanted(Job),
    Doing,
    Captured(Box<VcpuState>),
    Done,
    Failed(StateError),
}

impl Work {
    pub(super) fn is_pending(&self) -> bool {
        matches!(self, Self::Wanted(_) | Self::Doing)
    }
}

/// One vCPU, as its thread and the machine see it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) phase: Phase,
    /// When `phase` began.
    pub(super) since: Instant,
    pub(super) work: Work,
}

/// What a machine shares with its vCPU threads.
#[derive(Debug)]
pub(super) struct Control {
    orders: Vec<AtomicU8>,
    slots: Mutex<Vec<Slot>>,
    /// An order or work is there for a parked vCPU.
    to_vcpus: Condvar,
    /// A phase or work changed.
    to_machine: Condvar,
}

/// A vCPU did not do in time what it was told.
pub(super) struct TimedOut;

impl Control {
    /// For `vcpus` vCPUs, all parked.
    pub(super) fn new(vcpus: usize) -> Self {
        let slot = || Slot {
            phase: Phase::Parked,
            since: Instant::now(),
            work: Work::None,
        };
        Self {
            orders: (0..vcpus)
                .map(|_| AtomicU8::new(Order::Pause as u8))
                .collect(),
            slots: Mutex::new((0..vcpus).map(|_| slot()).collect()),
            to_vcpus: Condvar::new(),
            to_machine: Condvar::new(),
        }
    }

    /// The slots. A thread that panicked holding them left them whole: every change is one assignment.
    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The order of vCPU `vcpu`. SeqCst: the other half of [`KickFlag::clear`](super::kick::KickFlag::clear).
    pub(super) fn order(&self, vcpu: usize) -> Order {
        match self.orders[vcpu].load(Ordering::SeqCst) {
            0 => Order::Run,
            1 => Order::Pause,
            _ => Order::Stop,
        }
    }

    /// Gives all vCPUs an order, and wakes those that are parked. An order to stop is never taken back.
    ///
    /// The slots are handed over to show that they are locked.
    pub(super) fn give(&self, _slots: &mut MutexGuard<'_, Vec<Slot>>, order: Order) {
        for slot in &self.orders {
            if slot.load(Ordering::SeqCst) != Order::Stop as u8 {
                slot.store(order as u8, Ordering::SeqCst);
            }
        }
        self.to_vcpus.notify_all();
    }

    /// Wakes parked vCPUs to look at their work.
    pub(super) fn work_given(&self) {
        self.to_vcpus.notify_all();
    }

    /// Waits until `ready` holds, at most `limit`.
    pub(super) fn wait<'a>(
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
    pub(super) fn enter_phase(&self, vcpu: usize, phase: Phase) {
        let mut slots = self.lock();
        set_phase(&mut slots[vcpu], phase);
        drop(slots);
        self.to_machine.notify_all();
    }

    /// Waits, parked, for work. `None` once the order is no longer to pause; the vCPU then counts as running.
    pub(super) fn next_job(&self, vcpu: usize) -> Option<Job> {
        let mut slots = self.lock();
        loop {
            let slot = &mut slots[vcpu];
            if matches!(slot.work, Work::Wanted(_))
                && let Work::Wanted(job) = std::mem::replace(&mut slot.work, Work::Doing)
            {
                return Some(job);
            }
            if self.order(vcpu) != Order::Pause {
                set_phase(slot, Phase::Running);
                drop(slots);
                self.to_machine.notify_all();
                return None;
            }
            slots = self.to_vcpus.wait(slots).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// The work that [`Control::next_job`] gave is finished.
    pub(super) fn finish(&self, vcpu: usize, work: Work) {
        self.lock()[vcpu].work = work;
        self.to_machine.notify_all();
    }
}

fn set_phase(slot: &mut Slot, phase: Phase) {
    if slot.phase != phase {
        slot.phase = phase;
        slot.since = Instant::now();
    }
}
