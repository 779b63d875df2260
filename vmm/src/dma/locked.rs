//! What of a device changes, and how far it is with its requests. All of it is under the device's lock.

use std::collections::VecDeque;

use super::error::DmaError;
use super::registered::Registered;
use super::request::{Request, RequestAction, RequestOutcome, TransferDirection};
use super::stats::{DeviceStats, Mismatch, Mismatches};
use palimpsest::device::Ring;

/// All that changes in a device. Whoever holds the lock sees no request half published.
pub(super) struct LockedState {
    pub(super) ring: Ring,
    pub(super) registered: Registered,
    /// Taken, in order.
    pub(super) pending: VecDeque<Request>,
    /// The one before those.
    pub(super) current: Current,
    /// The first pending one was in flight in the snapshot that was restored, and has not been begun again:
    /// its data may be there in part.
    pub(super) interrupted: Option<u16>,
    pub(super) phase: DevicePhase,
    /// How many want it stopped.
    pub(super) stops: usize,
    /// The available ring is to be looked at.
    pub(super) rung: bool,
    /// The thread sleeps, or is about to: it must be woken to see anything.
    pub(super) asleep: bool,
    pub(super) quit: bool,
    pub(super) stats: DeviceStats,
    pub(super) mismatches: Mismatches,
    pub(super) error: Option<DmaError>,
}

/// The request that the thread has begun.
pub(super) enum Current {
    None,
    /// The thread has it: the chain that begins at this descriptor.
    Transferring(u16),
    /// Transferred too late to be published before the device was stopped.
    Transferred(Transferred),
}

/// Where it is between running and stopped: see the picture in `engine`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum DevicePhase {
    Running,
    Stopping,
    Stopped,
}

/// A request whose data has been dealt with.
pub(super) struct Transferred {
    pub(super) request: Request,
    pub(super) outcome: RequestOutcome,
}

impl LockedState {
    pub(super) fn is_transferring(&self) -> bool {
        matches!(self.current, Current::Transferring(_))
    }

    /// Whether the thread has something to do.
    pub(super) fn has_work(&self) -> bool {
        self.rung || !self.pending.is_empty() || matches!(self.current, Current::Transferred(_))
    }

    /// Chains taken and not completed.
    pub(super) fn outstanding(&self) -> usize {
        self.pending.len() + usize::from(!matches!(self.current, Current::None))
    }

    /// Gives all chains that were not completed back to the ring. They are to be taken again, though nobody
    /// rings for them; so is a chain whose doorbell was rung just before the snapshot that is restored.
    pub(super) fn give_back(&mut self) {
        self.ring.give_back(self.outstanding());
        self.pending.clear();
        self.current = Current::None;
        self.interrupted = None;
        self.rung = true;
    }

    /// Counts a request that ended with `outcome`.
    pub(super) fn account(&mut self, device: u64, request: &Request, outcome: RequestOutcome) {
        let stats = &mut self.stats;
        match outcome {
            RequestOutcome::Done { bytes } => stats.bytes += bytes,
            RequestOutcome::Mismatch(wrong) => {
                stats.mismatches += 1;
                stats.bytes += wrong.offset;
                self.mismatches.push(Mismatch {
                    device,
                    seq: request.seq,
                    offset: wrong.offset,
                    gpa: wrong.gpa,
                    expected: wrong.expected,
                    found: wrong.found,
                });
            }
            RequestOutcome::BadRequest => {
                stats.bad_requests += 1;
                return;
            }
        }
        match request.action {
            RequestAction::Transfer {
                direction: TransferDirection::ToGuest,
                ..
            } => stats.to_guest += 1,
            RequestAction::Transfer {
                direction: TransferDirection::FromGuest,
                ..
            } => stats.from_guest += 1,
            _ => {}
        }
    }

    /// Keeps the first error: the others follow from it.
    pub(super) fn fail(&mut self, error: DmaError) {
        self.error.get_or_insert(error);
    }
}
