//! All devices of a VM: what happens to them happens to them together.

use std::fmt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use guest::abi::Layout;

use super::engine::Device;
use super::error::{DmaError, StartError};
use super::stats::{DeviceStats, Mismatch};
use palimpsest::device::Quiesce;
use palimpsest::host::Ram;

/// The devices of a VM, each with its thread. Dropping it ends the threads and releases all pins, whoever has
/// a [`Device`] still. Such a device does nothing any more, but holds the address space.
pub struct DeviceSet {
    devices: Vec<Arc<Device>>,
    threads: Vec<JoinHandle<()>>,
}

impl DeviceSet {
    /// Starts the devices of a guest that is laid out as `layout` says, with nothing available.
    ///
    /// # Errors
    /// If `layout` puts a queue where there is no memory, or the host gives no eventfd or thread.
    pub fn start(ram: &Ram, layout: &Layout, seed: u64) -> Result<Self, StartError> {
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
    pub fn devices(&self) -> &[Arc<Device>] {
        &self.devices
    }

    /// The devices as a snapshot sees them, in order.
    pub fn quiesced(&self) -> Vec<Arc<dyn Quiesce>> {
        let devices = self.devices.iter();
        devices.map(|device| Arc::clone(device) as _).collect()
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
    pub fn take_error(&self) -> Option<DmaError> {
        self.devices.iter().find_map(|d| d.take_error())
    }
}

impl Drop for DeviceSet {
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

impl fmt::Debug for DeviceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.devices).finish()
    }
}
