//! All devices of a VM: what happens to them happens to them together.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use guest::abi::Layout;

use super::engine::{Device, DeviceError};
use super::state::{DeviceState, RestoreError};
use super::stats::{DeviceStats, Mismatch};
use crate::host::Ram;
use crate::mm::CowPolicy;

/// The devices of a VM, each with its thread. Dropping it ends the threads and releases all pins, whoever has a
/// [`Device`] still. Such a device does nothing any more, but holds the address space.
///
/// # Restoring
/// Memory is rewound between two halves, since it should not be held by requests it knows nothing of:
/// ```text
///   stop
///   release_streaming      all requests go back to the ring, their pins are dropped
///   (restore memory)       registered buffers are pinned still: memory is written in place
///   restore                rings and registered buffers as saved; requests taken again
///   resume
/// ```
pub struct DeviceSet<P: CowPolicy> {
    devices: Vec<Arc<Device<P>>>,
    threads: Vec<JoinHandle<()>>,
}

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

impl<P: CowPolicy> DeviceSet<P> {
    /// Starts the devices of a guest that is laid out as `layout` says, with nothing available.
    ///
    /// # Errors
    /// If `layout` puts a queue where there is no memory, or the host gives no eventfd or thread.
    pub fn start(ram: &Ram<P>, layout: &Layout, seed: u64) -> Result<Self, StartError> {
        let mut set = Self {
            devices: Vec::new(),
            threads: Vec::new(),
        };
        for index in 0..layout.devices {
            let device = Arc::new(Device::new(ram, index, layout.device_area(index), seed)?);
            set.devices.push(Arc::clone(&device));
            let thread = thread::Builder::new()
                .name(format!("dma{index}"))
                .spawn(move || device.run())
                .map_err(StartError::Thread)?;
            set.threads.push(thread);
        }
        Ok(set)
    }

    /// The devices, in order.
    pub fn devices(&self) -> &[Arc<Device<P>>] {
        &self.devices
    }

    /// Stops all devices at their next boundary, and waits for them until `deadline`. They run on when the
    /// result is dropped.
    ///
    /// A device without work is stopped at once, without its thread. While devices are stopped an ioeventfd may
    /// be signalled; it is answered after.
    pub fn stop(&self, deadline: Instant) -> Stopped<'_, P> {
        self.devices.iter().for_each(|d| d.begin_stop());
        let reached = self.devices.iter().map(|d| d.finish_stop(deadline));
        Stopped {
            reached: reached.collect(),
            set: self,
        }
    }

    /// What a snapshot keeps, device by device. It belongs to the guest's memory only if the devices are stopped.
    pub fn capture(&self) -> Vec<DeviceState> {
        self.devices.iter().map(|d| d.capture()).collect()
    }

    /// Gives every request that was taken and not completed back to its ring, and drops its pins: the first half of a
    /// restore. Devices that run on after this take them anew.
    ///
    /// # Errors
    /// If a device is not stopped, or transfers still; nothing has changed then.
    pub fn release_streaming(&self) -> Result<(), RestoreError> {
        self.all_stopped()?;
        self.devices.iter().for_each(|d| d.release_streaming());
        Ok(())
    }

    /// Makes the devices what `states` says, in memory as it is now: the second half of a restore. Requests that were
    /// pending, or in flight, are taken again, from the start.
    ///
    /// # Errors
    /// If a device is not stopped, or transfers still, a state makes no sense, or memory can't be pinned.
    pub fn restore(&self, states: &[DeviceState]) -> Result<(), RestoreError> {
        self.all_stopped()?;
        if states.len() != self.devices.len() {
            return Err(RestoreError::Count {
                snapshot: states.len(),
                guest: self.devices.len(),
            });
        }
        self.devices
            .iter()
            .zip(states)
            .try_for_each(|(device, state)| device.restore(state))
    }

    /// Counters of all devices together.
    pub fn stats(&self) -> DeviceStats {
        self.devices.iter().map(|d| d.stats()).sum()
    }

    /// Mismatches since the last call. Of each device the first few are kept; [`DeviceStats`] counts all.
    pub fn take_mismatches(&self) -> Vec<Mismatch> {
        self.devices
            .iter()
            .flat_map(|d| d.take_mismatches())
            .collect()
    }

    /// The first error of a device since the last call. The run makes no sense after one: a request of
    /// the guest stays unanswered.
    pub fn take_error(&self) -> Option<DeviceError> {
        self.devices.iter().find_map(|d| d.take_error())
    }

    fn all_stopped(&self) -> Result<(), RestoreError> {
        match self.devices.iter().position(|d| !d.is_quiet()) {
            Some(device) => Err(RestoreError::NotStopped { device }),
            None => Ok(()),
        }
    }
}

impl<P: CowPolicy> Drop for DeviceSet<P> {
    fn drop(&mut self) {
        self.devices.iter().for_each(|d| d.quit());
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a device's thread panicked");
            }
        }
        self.devices.iter().for_each(|d| d.release_all());
    }
}

impl<P: CowPolicy> fmt::Debug for DeviceSet<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.devices).finish()
    }
}

/// Devices that are stopped for as long as this lives.
#[must_use = "the devices run on when this is dropped"]
pub struct Stopped<'a, P: CowPolicy> {
    set: &'a DeviceSet<P>,
    reached: Vec<bool>,
}

impl<P: CowPolicy> Stopped<'_, P> {
    /// Which devices reached a boundary in time, in order. The others have a request in flight, and maybe
    /// write to memory still.
    pub fn reached(&self) -> &[bool] {
        &self.reached
    }

    /// Whether all devices reached a boundary in time.
    pub fn all_reached(&self) -> bool {
        self.reached.iter().all(|&reached| reached)
    }

    /// Lets the devices run on, as dropping does.
    pub fn resume(self) {}
}

impl<P: CowPolicy> Drop for Stopped<'_, P> {
    fn drop(&mut self) {
        self.set.devices.iter().for_each(|d| d.resume());
    }
}

impl<P: CowPolicy> fmt::Debug for Stopped<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopped")
            .field("reached", &self.reached)
            .finish()
    }
}
