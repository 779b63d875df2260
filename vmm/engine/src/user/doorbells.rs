//! Ports that signal an event instead of being handled.

use std::sync::{PoisonError, RwLock};

use rustix::io::Errno;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

/// The doorbells of a machine.
#[derive(Debug, Default)]
pub(super) struct Doorbells(RwLock<Vec<(u16, EventFd)>>);

impl Doorbells {
    /// Has an `out` to `port` signal `event`.
    ///
    /// # Errors
    /// `EEXIST` if the port has a doorbell already, as KVM says it; or the host's.
    pub(super) fn register(&self, port: u16, event: &EventFd) -> Result<(), errno::Error> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if all.iter().any(|(other, _)| *other == port) {
            return Err(errno::Error::new(Errno::EXIST.raw_os_error()));
        }
        all.push((port, event.try_clone().map_err(errno::Error::from)?));
        Ok(())
    }

    /// Rings the doorbell of `port`, if it has one.
    pub(super) fn ring(&self, port: u16) -> bool {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some((_, event)) = all.iter().find(|(other, _)| *other == port) else {
            return false;
        };
        // One whose count is full has been rung.
        let _ = event.write(1);
        true
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn a_port_has_one_doorbell() {
        let doorbells = Doorbells::default();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        doorbells.register(7, &event).unwrap();
        let error = doorbells.register(7, &event).unwrap_err();
        assert_eq!(error.errno(), Errno::EXIST.raw_os_error());
        assert!(doorbells.ring(7) && !doorbells.ring(8));
        assert_eq!(event.read().unwrap(), 1);
    }
}
