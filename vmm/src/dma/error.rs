//! Why devices could not be started, or not go on.

use std::io;

use palimpsest::host::RamError;
use palimpsest::mm::PinError;

/// Why devices could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The device area is no place for a queue.
    #[error("there is no room for a device's queue at {area:#x}")]
    Area {
        /// Where it should have been.
        area: u64,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// No eventfd.
    #[error("cannot create a device's doorbell")]
    EventFd(#[source] io::Error),
    /// No thread.
    #[error("cannot start a device's thread")]
    Thread(#[source] io::Error),
}

/// A device could not go on with a request, and not by the guest's fault. The request stays unanswered.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// No memory for the pins of a request.
    #[error("device {device} cannot pin a request's memory")]
    Request {
        /// The device.
        device: u64,
        /// Why.
        source: PinError,
    },
    /// No memory for the pins of the ring.
    #[error("device {device} cannot pin its ring")]
    Ring {
        /// The device.
        device: u64,
        /// Why.
        source: RamError,
    },
    /// The device's eventfd does not work. The device is dead.
    #[error("device {device} cannot wait for its doorbell")]
    Doorbell {
        /// The device.
        device: u64,
        /// Why.
        source: io::Error,
    },
}
