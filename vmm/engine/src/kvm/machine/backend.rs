//! Who runs the vCPUs of a machine, as far as the machine has to ask it.

use std::io;
use std::thread::JoinHandle;

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::error::KvmError;

/// KVM, or the threads of the vCPUs themselves.
pub(crate) trait Backend: Send + Sync {
    /// Gets a vCPU's thread out of the guest. One that has ended needs no kick.
    ///
    /// # Errors
    /// If the kernel refuses. It has no reason to, and whoever waits for the vCPU would wait in vain.
    fn kick(&self, thread: &JoinHandle<()>) -> io::Result<()>;

    /// Has an `out` to `port` signal `event`.
    ///
    /// # Errors
    /// If the port has a doorbell already, or the host refuses.
    fn register_doorbell(&self, port: u16, event: &EventFd) -> Result<(), errno::Error>;

    /// Forgets what it keeps of the guest's page tables, if it keeps anything.
    ///
    /// # Errors
    /// If it cannot.
    fn forget_tables(&self) -> Result<(), KvmError>;
}
