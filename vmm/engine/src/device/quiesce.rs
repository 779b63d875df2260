//! Devices that stand still for a snapshot.

use std::fmt;
use std::time::Instant;

use crate::causes::Cause;
use crate::saved::Saved;

/// A device that can be stopped between two requests.
///
/// **What it promises.** While it is stopped every request is all done (its data, its status and its
/// completion are in guest memory) or none of it is, except one that it was in the middle of when the wait
/// ran out: that one is in its state, and of its data alone may be a part in memory. Every byte that it
/// writes, or reads for longer than a moment, is pinned meanwhile.
///
/// # Restoring
/// Memory is rewound between two halves, since it should not be held by requests it knows nothing of:
/// ```text
///   stop
///   release                requests on their way are given up, their pins dropped
///   (restore memory)       what is held for good is pinned still: memory is written in place
///   restore                as saved; requests that were on their way are taken again, from this memory
///   resume
/// ```
pub trait Quiesce: Send + Sync {
    /// Begins nothing more from now on. Does not wait.
    fn begin_stop(&self);

    /// Waits for the end of what was begun, until `deadline` at most. Returns whether the device has reached
    /// a boundary. If not, it still completes nothing before it is resumed. Follows [`Quiesce::begin_stop`].
    fn finish_stop(&self, deadline: Instant) -> bool;

    /// Undoes one [`Quiesce::begin_stop`]. The device goes on when all of them are undone; but not after a
    /// [`Quiesce::restore`] that has failed.
    fn resume(&self);

    /// What a snapshot keeps of it. It belongs to memory as it is only while the device is stopped.
    fn capture(&self) -> Saved;

    /// Gives up every request that is on its way, with its pins: the first half of a restore.
    ///
    /// # Errors
    /// If the device has not reached a boundary. It has changed nothing then. The VM is stopped for good,
    /// since devices before this one may have given up theirs.
    fn release(&self) -> Result<(), Cause>;

    /// Becomes what was saved, in memory as it is now: the second half of a restore.
    ///
    /// # Errors
    /// If the state makes no sense, or memory cannot be pinned. The VM is stopped for good, and the device
    /// must not go on when it is resumed.
    fn restore(&self, state: &Saved) -> Result<(), Cause>;
}

/// Devices that are stopped for as long as this lives.
#[must_use = "the devices go on when this is dropped"]
pub struct Stopped<'a> {
    devices: Vec<&'a dyn Quiesce>,
    reached: Vec<bool>,
}

impl<'a> Stopped<'a> {
    /// Stops `devices`, all at once, and waits for them until `deadline` at most.
    pub fn stop(devices: Vec<&'a dyn Quiesce>, deadline: Instant) -> Self {
        devices.iter().for_each(|device| device.begin_stop());
        let reached = devices.iter().map(|device| device.finish_stop(deadline));
        Self {
            reached: reached.collect(),
            devices,
        }
    }

    /// Which have reached a boundary in time, in order. The others have a request in flight, and may write to
    /// memory still.
    pub fn reached(&self) -> &[bool] {
        &self.reached
    }

    /// Whether all have.
    pub fn all_reached(&self) -> bool {
        self.reached.iter().all(|&reached| reached)
    }

    /// Lets them go on, as dropping does.
    pub fn resume(self) {}
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.devices.iter().for_each(|device| device.resume());
    }
}

impl fmt::Debug for Stopped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopped")
            .field("reached", &self.reached)
            .finish()
    }
}
