//! One device: its doorbells, its thread, its lock.
//!
//! # Waking
//! The thread sleeps in a read of one eventfd. The guest's ioeventfd adds 1 to it, everybody here adds
//! [`WORK`], so that the value read says whether the guest rang. Before it sleeps the thread says so under
//! the lock: who finds it awake need not wake it. A busy device costs no system calls, an idle one no time.
//!
//! # Stopping
//! ```text
//!              begin_stop             nothing is being transferred, or out of time
//!   Running  ------------>  Stopping  -------------------------------------------->  Stopped
//!      ^       begins nothing more,                  publishes nothing more               |
//!      '-------------------------------- resume ------------------------------------------'
//! ```
//! A device between requests is stopped by the change of state alone: its thread is not woken, nor waited
//! for. One in the middle of a transfer publishes it while `Stopping`; if it comes too late for that, it
//! keeps the completion to itself until it is resumed, and the request is *in flight*.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use guest::abi::{AREA_AVAIL, AREA_DESC, AREA_USED, QUEUE_SIZE};
use vmm_sys_util::eventfd::EventFd;

use super::error::{DmaError, StartError};
use super::locked::{Current, DevicePhase, LockedState, Transferred};
use super::registered::Registered;
use super::request::{Data, Request, RequestAction, RequestOutcome};
use super::state::{DeviceRestoreError, DeviceState};
use super::stats::{DeviceStats, Mismatch, Mismatches};
use super::transfer::{Buffer, Words};
use palimpsest::causes::Cause;
use palimpsest::device::{Quiesce, Ring, RingError, RingLayout};
use palimpsest::host::Ram;
use palimpsest::saved::Saved;

/// What is added to the eventfd to wake the thread, and is no doorbell. Doorbells are the bits below it.
const WORK: u64 = 1 << 32;

/// The most chains taken and not completed. A guest that makes more available has overrun its ring;
/// they wait there.
const MAX_OUTSTANDING: usize = QUEUE_SIZE as usize;

/// A DMA engine behind a virtqueue.
pub struct Device {
    index: u64,
    seed: u64,
    ram: Ram,
    wake: EventFd,
    state: Mutex<LockedState>,
    /// Signalled when a transfer ends while somebody stops the device.
    boundary: Condvar,
    /// Every transfer takes it before it touches data: a test that holds it keeps the device in a transfer.
    #[cfg(test)]
    gate: Mutex<()>,
}

/// A request and the registered buffer it is about, if it is.
struct BegunRequest {
    request: Request,
    registered: Option<Arc<Buffer>>,
}

impl Device {
    pub(super) fn new(ram: &Ram, index: u64, area: u64, seed: u64) -> Result<Self, StartError> {
        let layout = RingLayout {
            size: QUEUE_SIZE,
            descriptors: area + AREA_DESC,
            available: area + AREA_AVAIL,
            used: area + AREA_USED,
        };
        let ring = Ring::new(ram, layout).map_err(|source| StartError::Area { area, source })?;
        Ok(Self {
            index,
            seed,
            ram: ram.clone(),
            wake: EventFd::new(libc::EFD_CLOEXEC).map_err(StartError::EventFd)?,
            state: Mutex::new(LockedState {
                ring,
                registered: Registered::default(),
                pending: VecDeque::new(),
                current: Current::None,
                interrupted: None,
                phase: DevicePhase::Running,
                stops: 0,
                rung: false,
                asleep: false,
                quit: false,
                stats: DeviceStats::default(),
                mismatches: Mismatches::default(),
                error: None,
            }),
            boundary: Condvar::new(),
            #[cfg(test)]
            gate: Mutex::new(()),
        })
    }

    /// Number of the device.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// What to signal when the guest rings by an ioeventfd. The device's own thread takes the requests then.
    pub fn doorbell(&self) -> &EventFd {
        &self.wake
    }

    /// The guest rang by an exit: takes the requests and pins their buffers on this thread, which is the
    /// vCPU's. The device's thread transfers them. If the device is stopped, all of that is left for later.
    pub fn ring_from_vcpu(&self) {
        let mut state = self.lock();
        if state.quit {
            return;
        }
        state.rung = true;
        if state.phase == DevicePhase::Running {
            self.take(&mut state);
            if state.has_work() {
                self.wake_if_asleep(&mut state);
            }
        }
    }

    /// Counters.
    pub fn stats(&self) -> DeviceStats {
        let state = self.lock();
        DeviceStats {
            registered: state.registered.len(),
            ..state.stats
        }
    }

    pub(super) fn take_mismatches(&self) -> Vec<Mismatch> {
        self.lock().mismatches.drain()
    }

    pub(super) fn take_error(&self) -> Option<DmaError> {
        self.lock().error.take()
    }

    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// A critical section leaves a legal state at each step: one that has panicked is no reason to stop.
    fn lock(&self) -> MutexGuard<'_, LockedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: works until there is no more to do, then sleeps.
    pub(super) fn run(&self) {
        let mut state = self.lock();
        while !state.quit {
            if let Some(begun) = self.next(&mut state) {
                drop(state);
                let transferred = self.transfer(begun);
                state = self.lock();
                self.finish(&mut state, transferred);
                continue;
            }
            state.asleep = true;
            drop(state);
            let woken = self.sleep();
            state = self.lock();
            state.asleep = false;
            match woken {
                Ok(value) => state.rung |= value % WORK != 0,
                Err(source) => {
                    let device = self.index;
                    state.fail(DmaError::Doorbell { device, source });
                    return;
                }
            }
        }
    }

    fn sleep(&self) -> io::Result<u64> {
        loop {
            match self.wake.read() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn wake_if_asleep(&self, state: &mut LockedState) {
        if std::mem::take(&mut state.asleep)
            && let Err(source) = self.wake.write(WORK)
        {
            let device = self.index;
            state.fail(DmaError::Doorbell { device, source });
        }
    }

    /// Publishes what is late, takes what is available, and begins the next request.
    fn next(&self, state: &mut LockedState) -> Option<BegunRequest> {
        if state.phase != DevicePhase::Running {
            return None;
        }
        // The thread is here, so it is not transferring.
        if let Current::Transferred(late) = std::mem::replace(&mut state.current, Current::None) {
            self.publish(state, late);
        }
        if state.rung {
            self.take(state);
        }
        let request = state.pending.pop_front()?;
        state.interrupted = None;
        state.current = Current::Transferring(request.head);
        let registered = match request.action {
            RequestAction::Transfer {
                data: Data::Registered(index),
                ..
            } => state.registered.get(index),
            _ => None,
        };
        Some(BegunRequest {
            request,
            registered,
        })
    }

    /// Takes what is available, as far as there is room. The guest rang.
    fn take(&self, state: &mut LockedState) {
        let room = MAX_OUTSTANDING - state.outstanding();
        if room == 0 {
            return;
        }
        state.rung = false;
        match self.take_at_most(state, room) {
            // There may be more: the thread looks again when there is room.
            Ok(taken) => state.rung = taken == room,
            Err(RingError::Nonsense) => state.stats.bad_doorbells += 1,
            Err(RingError::Pin(source)) => {
                let device = self.index;
                state.fail(DmaError::Ring { device, source });
            }
        }
    }

    fn take_at_most(&self, state: &mut LockedState, most: usize) -> Result<usize, RingError> {
        let mut failed = None;
        let taken = state.ring.take(&self.ram, most, |chain| {
            let (request, error) = Request::parse(&self.ram, chain);
            state.pending.push_back(request);
            failed = failed.take().or(error);
        });
        if let Some(source) = failed {
            let device = self.index;
            state.fail(DmaError::Request { device, source });
        }
        taken
    }

    /// Deals with the data of a request. No lock is held.
    fn transfer(&self, begun: BegunRequest) -> Transferred {
        #[cfg(test)]
        drop(self.hold_transfers());
        let BegunRequest {
            request,
            registered,
        } = begun;
        let outcome = match &request.action {
            RequestAction::Transfer { direction, data } => {
                let buffers = match data {
                    Data::Streamed(buffers) => Some(buffers.as_slice()),
                    Data::Registered(_) => registered
                        .as_deref()
                        .filter(|buffer| direction.may_use(buffer))
                        .map(std::slice::from_ref),
                };
                let words = Words::new(self.seed, self.index, request.seq);
                buffers.map_or(RequestOutcome::BadRequest, |b| direction.transfer(words, b))
            }
            RequestAction::Register { .. } | RequestAction::Unregister { .. } => {
                RequestOutcome::Done { bytes: 0 }
            }
            RequestAction::Bad | RequestAction::Unanswerable => RequestOutcome::BadRequest,
        };
        Transferred { request, outcome }
    }

    /// Keeps the next transfer from beginning with its data, until the result is dropped.
    #[cfg(test)]
    pub(super) fn hold_transfers(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread is back from a transfer.
    fn finish(&self, state: &mut LockedState, transferred: Transferred) {
        if state.phase == DevicePhase::Stopped {
            state.current = Current::Transferred(transferred);
        } else {
            self.publish(state, transferred);
            state.current = Current::None;
        }
        if state.phase != DevicePhase::Running {
            self.boundary.notify_all();
        }
    }

    /// Answers a request: status, then used entry. Its pins go after that.
    fn publish(&self, state: &mut LockedState, transferred: Transferred) {
        let Transferred { request, outcome } = transferred;
        if matches!(request.action, RequestAction::Unanswerable) {
            return;
        }
        let used = match state.ring.pin_used(&self.ram) {
            Ok(used) => used,
            Err(source) => {
                let device = self.index;
                state.fail(DmaError::Ring { device, source });
                return;
            }
        };
        let outcome = match &request.action {
            RequestAction::Register { index, buffer } if !state.registered.add(*index, buffer) => {
                RequestOutcome::BadRequest
            }
            RequestAction::Unregister { index } if !state.registered.remove(*index) => {
                RequestOutcome::BadRequest
            }
            _ => outcome,
        };
        state.account(self.index, &request, outcome);
        let written = request.answer(outcome);
        state.ring.complete(&self.ram, &used, request.head, written);
    }

    /// What a snapshot keeps of it.
    pub fn state(&self) -> DeviceState {
        let state = self.lock();
        // One that was in flight is so until it is begun again.
        let begun = usize::from(state.interrupted.is_some());
        DeviceState {
            queue: state.ring.state(),
            pending: state.pending.iter().skip(begun).map(|r| r.head).collect(),
            in_flight: match &state.current {
                Current::None => state.interrupted,
                Current::Transferring(head) => Some(*head),
                Current::Transferred(transferred) => Some(transferred.request.head),
            },
            registered: state.registered.state(),
        }
    }

    /// Makes this the device that `saved` describes, in memory as it is now.
    fn become_again(&self, saved: &DeviceState) -> Result<(), DeviceRestoreError> {
        let mut state = self.lock();
        self.check_quiet(&state)?;
        state.give_back();
        let outstanding = saved.outstanding();
        if outstanding > MAX_OUTSTANDING {
            return Err(DeviceRestoreError::Pending {
                pending: outstanding,
                size: QUEUE_SIZE,
            });
        }
        state.ring = Ring::from_state(&self.ram, saved.queue)?;
        state.registered.restore(&self.ram, &saved.registered)?;
        state.ring.give_back(outstanding);
        let taken = self.take_at_most(&mut state, outstanding);
        if let Err(RingError::Pin(error)) = taken {
            return Err(error.into());
        }
        let again = state.pending.iter().map(|r| r.head);
        if !again.eq(saved.in_flight.iter().chain(&saved.pending).copied()) {
            // Only a guest that writes over chains it has not got back can bring this about.
            tracing::warn!(
                device = self.index,
                ?taken,
                "the available ring is not what it was"
            );
            state.stats.bad_requests += 1;
        }
        let first = state.pending.front().map(|r| r.head);
        state.interrupted = saved.in_flight.filter(|head| first == Some(*head));
        state.ring.go_on_at(saved.queue.next_avail);
        Ok(())
    }

    /// Whether it is stopped, and nothing is being transferred: it touches no memory.
    fn check_quiet(&self, state: &LockedState) -> Result<(), DeviceRestoreError> {
        if state.phase == DevicePhase::Stopped && !state.is_transferring() {
            return Ok(());
        }
        let device = self.index;
        Err(DeviceRestoreError::NotStopped { device })
    }

    #[cfg(test)]
    pub(super) fn is_quiet(&self) -> bool {
        self.check_quiet(&self.lock()).is_ok()
    }

    /// Tells the thread to go, once it is through with its transfer. Doorbells do nothing from now on.
    pub(super) fn quit(&self) {
        let mut state = self.lock();
        state.quit = true;
        self.wake_if_asleep(&mut state);
    }

    /// Drops all pins. The thread has gone.
    pub(super) fn release_all(&self) {
        let mut state = self.lock();
        state.pending.clear();
        state.current = Current::None;
        state.interrupted = None;
        state.registered.clear();
    }

    /// An address that the device holds, or will.
    pub(super) fn some_gpa(&self) -> u64 {
        let state = self.lock();
        let registered = state.registered.state();
        registered
            .first()
            .map_or(state.ring.state().used_ring, |buffer| buffer.gpa)
    }
}

impl Quiesce for Device {
    /// A device that is between requests is stopped at once, without its thread. While devices are stopped an
    /// ioeventfd may be signalled; it is answered after.
    fn begin_stop(&self) {
        let mut state = self.lock();
        state.stops += 1;
        if state.phase == DevicePhase::Running {
            state.phase = DevicePhase::Stopping;
        }
    }

    fn finish_stop(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        while state.is_transferring() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .boundary
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.phase = DevicePhase::Stopped;
        matches!(state.current, Current::None)
    }

    fn resume(&self) {
        let mut state = self.lock();
        state.stops -= 1;
        if state.stops == 0 {
            state.phase = DevicePhase::Running;
            if state.has_work() {
                self.wake_if_asleep(&mut state);
            }
        }
    }

    fn capture(&self) -> Saved {
        Saved::new(self.state())
    }

    /// All chains that were not completed go back to the ring.
    fn release(&self) -> Result<(), Cause> {
        let mut state = self.lock();
        self.check_quiet(&state)?;
        state.give_back();
        Ok(())
    }

    fn restore(&self, state: &Saved) -> Result<(), Cause> {
        Ok(self.become_again(&DeviceState::of_saved(state)?)?)
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}
