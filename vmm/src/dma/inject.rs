//! Faults put in on purpose, to see that an oracle catches them. Nothing else calls these.

use std::mem;

use super::set::DeviceSet;
use palimpsest::host::RamError;
use palimpsest::mm::Access;

impl DeviceSet {
    /// Pins a page that a device holds, and never releases it. Does nothing without devices.
    ///
    /// # Errors
    /// If the page could not be pinned.
    pub fn leak_one_pin(&self) -> Result<(), RamError> {
        let Some(device) = self.devices().first() else {
            return Ok(());
        };
        let page = device.ram().pin(device.some_gpa(), 1, Access::Write)?;
        page.into_pins().for_each(mem::forget);
        Ok(())
    }
}
