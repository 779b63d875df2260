//! What a snapshot keeps of a device: plain data, and not trusted when it comes back.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

use palimpsest::host::RamError;
use palimpsest::saved::{Saved, State};

/// A device that was stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The queue. Its `next_avail` is beyond all chains that were taken, pending and in flight included.
    #[serde(with = "QueueStateFields")]
    pub queue: QueueState,
    /// First descriptors of the chains that were taken and not begun, in order.
    pub pending: Vec<u16>,
    /// First descriptor of the chain that was begun and not completed: the device did not reach a boundary in
    /// time. Its data may be in part what it was, in part what it will be; its status and used entry are not
    /// written.
    pub in_flight: Option<u16>,
    /// The registered buffers.
    pub registered: Vec<RegisteredState>,
}

/// The form that [`DeviceState::to_bytes`] has.
const VERSION: u32 = 1;

impl State for DeviceState {
    fn version(&self) -> u32 {
        VERSION
    }

    fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data always has a form")
    }
}

impl DeviceState {
    /// The state that was saved.
    ///
    /// # Errors
    /// If it was stored, and its bytes make no sense.
    pub fn of_saved(saved: &Saved) -> Result<Self, DeviceRestoreError> {
        if let Some(state) = saved.get::<Self>() {
            return Ok(state.clone());
        }
        let version = saved.version();
        let stored = |source| DeviceRestoreError::Stored { version, source };
        if version != VERSION {
            return Err(stored(None));
        }
        serde_json::from_slice(&saved.to_bytes()).map_err(|error| stored(Some(error)))
    }

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
pub enum DeviceRestoreError {
    /// A device is still transferring. Nothing has changed.
    #[error("device {device} has not stopped")]
    NotStopped {
        /// The device.
        device: u64,
    },
    /// A stored state that is none of ours, or of a later version. Nothing has changed.
    #[error("a stored device of version {version} makes no sense here")]
    Stored {
        /// The version it has.
        version: u32,
        /// What is wrong with its bytes, if the version is known.
        #[source]
        source: Option<serde_json::Error>,
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
