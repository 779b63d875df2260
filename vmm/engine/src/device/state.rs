//! What a snapshot keeps of a device: plain data, and not trusted when it comes back.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

use crate::host::RamError;

/// A device that was stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The queue. Its `next_avail` is beyond all chains that were taken, pending and in flight included.
    #[serde(with = "QueueStateFields")]
    pub queue: QueueState,
    /// First descriptors of the chains that were taken and not begun, in order.
    pub pending: Vec<u16>,
    /// First descriptor of the chain that was begun and not completed: the device did not reach a boundary in
    /// time. Its data may be in part what it was, in part what it will be; its status and used entry are not written.
    pub in_flight: Option<u16>,
    /// The registered buffers.
    pub registered: Vec<RegisteredState>,
}

impl DeviceState {
    /// Chains that were taken and not completed.
    pub(super) fn outstanding(&self) -> usize {
        self.pending.len() + usize::from(self.in_flight.is_some())
    }
}

/// A registered buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredState {
    /// Its index.
    pub index: u32,
    /// First byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// The device only reads it.
    #[serde(default)]
    pub for_reading: bool,
}

/// Why devices could not be restored. Unless said otherwise they are part old, part new, and must not run on.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A device is still transferring. Nothing has changed.
    #[error("device {device} has not stopped")]
    NotStopped {
        /// The device.
        device: usize,
    },
    /// The states are of another number of devices. Nothing has changed.
    #[error("the snapshot has {snapshot} devices, the guest {guest}")]
    Count {
        /// Devices of the snapshot.
        snapshot: usize,
        /// Devices there are.
        guest: usize,
    },
    /// The queue's state makes no sense.
    #[error("the saved queue makes no sense")]
    Queue(#[from] virtio_queue::Error),
    /// More chains are pending than a ring holds.
    #[error("the snapshot has {pending} pending requests, a queue holds {size}")]
    Pending {
        /// Chains taken and not completed.
        pending: usize,
        /// Size of the queue.
        size: u16,
    },
    /// A registered buffer makes no sense.
    #[error("registered buffer {index} of the snapshot makes no sense")]
    Registered {
        /// Its index.
        index: u32,
    },
    /// Guest memory could not be pinned again.
    #[error("cannot pin a device's memory again")]
    Pin(#[from] RamError),
}

/// The fields of a [`QueueState`], which has no serialization of its own.
#[derive(Serialize, Deserialize)]
#[serde(remote = "QueueState")]
struct QueueStateFields {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}
