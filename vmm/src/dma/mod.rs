//! DMA engines: devices that read and write guest memory beside the vCPUs.
//!
//! **Guarantee.** While devices are stopped ([`Quiesce`](palimpsest::device::Quiesce)), every request is all
//! done (its data, its status and its used entry are in guest memory) or none of it is, except the one that a
//! device was in the middle of when the wait ran out: that one is named in the device's state, and its data
//! alone may be in part. Every byte a device touches is pinned while it may be touched, so that a fork never
//! tears a device from its guest.
//!
//! A device is a split virtqueue in guest memory, laid out as `guest::abi` says, and a thread that transfers.
//! A request goes through four hands:
//!
//! ```text
//!   guest                take                       transfer            publish
//!   posts a chain,  ->   parse it, pin what    ->   data words in  ->   status, then used entry;
//!   rings                it names; pending          or out              unpin
//!                        ^ vCPU thread (exit)       ^ device thread     ^ device thread,
//!                          or device thread           no lock held        under the lock
//!                          (ioeventfd),
//!                          under the lock
//! ```
//!
//! A device that is stopped takes, begins and publishes nothing. That makes *publish* the boundary.
//!
//! | file | concept |
//! |---|---|
//! | `set` | all devices of a VM: stop, capture, restore, the end |
//! | `engine` | one device: its doorbells, its thread, its lock |
//! | `locked` | what of a device changes, under its lock |
//! | `error` | why devices could not be started, or not go on |
//! | `request` | what a chain asks for, and the pins it needs |
//! | `registered` | the buffers held from one request to another |
//! | `transfer` | data words to and from pinned memory |
//! | `state` | what a snapshot keeps of a device |
//! | `stats` | counters, and what was found wrong |
//! | `inject` | faults put in on purpose |
//!
//! # Requests are in order
//! A device takes chains in the order of the available ring, transfers them in that order and publishes them
//! in that order. So those that are taken and not published are always the *last* entries of the available
//! ring before `next_avail`, and giving them back is moving `next_avail` back by their number. A restore does
//! just that, and takes them again from the memory it has restored: nothing of a chain is saved but its
//! place. For this to hold, a chain that makes no sense keeps its place too, up to its completion.
//!
//! # Pins
//! Streaming buffers and statuses are pinned from take to publish, registered buffers from their registration
//! until they are released, the ring while it is looked at. Across a restore in place, registered buffers
//! that the snapshot has too stay pinned: the restore writes into their frames. Streaming pins are dropped
//! before memory goes back and taken anew after.
//!
//! # Not here
//! Interrupts (the guest polls), notification suppression, feature negotiation, reset, several queues.

mod engine;
mod error;
mod inject;
mod locked;
mod registered;
mod request;
mod set;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod transfer;

pub use engine::Device;
pub use error::{DmaError, StartError};
pub use set::DeviceSet;
pub use state::{DeviceRestoreError, DeviceState, RegisteredState};
pub use stats::{DeviceStats, Mismatch};
