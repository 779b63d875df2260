//! Stops vCPUs for good.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::Machine;
use crate::kvm::control::{Awaited, Phase, VcpuCommand};
use crate::kvm::error::{KvmError, PATIENCE};

impl Machine {
    /// Tells all vCPUs to stop for good, without waiting for them.
    pub fn stop(&self) {
        self.control.give(VcpuCommand::Stop);
        self.kick_all();
    }

    /// Waits until all vCPUs have stopped for good.
    ///
    /// # Errors
    /// If one does not: it goes on to hold what it uses, memory too.
    pub fn wait_until_stopped(&self) -> Result<(), KvmError> {
        match self.wait_for_ends().iter().position(|ended| !ended) {
            Some(vcpu) => Err(KvmError::Stuck { vcpu }),
            None => Ok(()),
        }
    }

    /// Waits until all vCPUs have ended that have a thread, and says which have. Who was waited for in vain
    /// is not waited for again.
    fn wait_for_ends(&self) -> Vec<bool> {
        let patience = if self.is_stuck.load(Ordering::Relaxed) {
            Duration::ZERO
        } else {
            PATIENCE
        };
        let threads = self.threads.len();
        let in_time = self.control.wait(threads, Awaited::Ended, patience);
        self.is_stuck.store(in_time.is_err(), Ordering::Relaxed);
        let mut ended = self.control.each(|slot| slot.phase == Phase::Ended);
        ended.truncate(threads);
        ended
    }

    /// Sends every vCPU the signal. What is refused is tried again: by the watch, or when the machine is
    /// dropped.
    fn kick_all(&self) {
        for (vcpu, thread) in self.threads.iter().enumerate() {
            if let Err(error) = self.backend.kick(thread) {
                tracing::warn!("cannot kick vcpu {vcpu} out of the guest: {error}");
            }
        }
    }

    /// Sends every vCPU the signal without a command.
    #[cfg(test)]
    pub(in crate::kvm) fn kick_for_nothing(&self) {
        self.kick_all();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        let ended = self.wait_for_ends();
        drop(self.watch.take());
        let threads = Arc::get_mut(&mut self.threads).map(std::mem::take);
        for (vcpu, thread) in threads.into_iter().flatten().enumerate() {
            if !ended[vcpu] {
                // It keeps what it uses: memory, its handler and its part of the machine.
                tracing::error!(
                    "vcpu {vcpu} did not end within {} s: it is stuck in a handler",
                    PATIENCE.as_secs()
                );
            // The last owner may be what `on_stop` holds: a thread cannot wait for itself.
            } else if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}
