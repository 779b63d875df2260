//! Devices that are not stopped.

use std::time::Instant;

use palimpsest::causes::Cause;
use palimpsest::device::Quiesce;
use palimpsest::saved::Saved;

/// A device that is not stopped, with its state from some time before. It says that it has stopped.
pub(in crate::session) struct AtLarge<'a> {
    device: &'a dyn Quiesce,
    state: Saved,
}

impl<'a> AtLarge<'a> {
    /// Each of `devices`, which then run on in `go_on`.
    pub(in crate::session) fn of(devices: &[&'a dyn Quiesce], go_on: impl FnOnce()) -> Vec<Self> {
        let captured = devices.iter().map(|&device| Self {
            device,
            state: device.capture(),
        });
        let captured = captured.collect();
        go_on();
        captured
    }
}

impl Quiesce for AtLarge<'_> {
    fn begin_stop(&self) {}

    fn finish_stop(&self, _deadline: Instant) -> bool {
        true
    }

    fn resume(&self) {}

    fn capture(&self) -> Saved {
        self.state.clone()
    }

    fn release(&self) -> Result<(), Cause> {
        self.device.release()
    }

    fn restore(&self, state: &Saved) -> Result<(), Cause> {
        self.device.restore(state)
    }
}
