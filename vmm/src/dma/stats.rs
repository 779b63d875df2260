//! What devices have done, and what they found wrong.

use std::iter::Sum;

/// Counters of a device, or of several together. They are not rewound by a restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Requests done that wrote to guest memory.
    pub to_guest: u64,
    /// Requests done that read guest memory, mismatches included.
    pub from_guest: u64,
    /// Bytes of data transferred by both.
    pub bytes: u64,
    /// Registered buffers held now.
    pub registered: u64,
    /// Requests whose data was not what the guest should have written.
    pub mismatches: u64,
    /// Chains that made no sense.
    pub bad_requests: u64,
    /// Doorbells that found a ring that makes no sense.
    pub bad_doorbells: u64,
}

impl Sum for DeviceStats {
    fn sum<I: Iterator<Item = Self>>(stats: I) -> Self {
        stats.fold(Self::default(), |a, b| Self {
            to_guest: a.to_guest + b.to_guest,
            from_guest: a.from_guest + b.from_guest,
            bytes: a.bytes + b.bytes,
            registered: a.registered + b.registered,
            mismatches: a.mismatches + b.mismatches,
            bad_requests: a.bad_requests + b.bad_requests,
            bad_doorbells: a.bad_doorbells + b.bad_doorbells,
        })
    }
}

/// A device read something else than the guest should have written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The device.
    pub device: u64,
    /// Sequence number of the request.
    pub seq: u64,
    /// Byte offset in the request's data of the first wrong word.
    pub offset: u64,
    /// Guest-physical address of that word, or of its part on the page that is wrong.
    pub gpa: u64,
    /// What the word should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
}

/// Mismatches a device keeps until they are asked for. The first ones tell the story.
const KEPT: usize = 64;

/// The mismatches of a device.
#[derive(Default)]
pub(super) struct Mismatches(Vec<Mismatch>);

impl Mismatches {
    pub(super) fn push(&mut self, mismatch: Mismatch) {
        if self.0.len() < KEPT {
            self.0.push(mismatch);
        }
    }

    pub(super) fn drain(&mut self) -> Vec<Mismatch> {
        std::mem::take(&mut self.0)
    }
}
