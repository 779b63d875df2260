//! A machine of KVM's as the vCPUs of a VM.

use std::time::Instant;

use super::error::KvmError;
use super::machine::{Machine, PausedMachine};
use super::state::{Clock, VcpuState};
use super::tables::PageTables;
use crate::saved::Saved;
use crate::vcpus::{self, Capture, Vcpus, VcpusError};

impl From<KvmError> for VcpusError {
    fn from(error: KvmError) -> Self {
        match error {
            KvmError::Stopped { vcpu } => Self::Stopped { vcpu },
            other => Self::Failed(other.into()),
        }
    }
}

impl Vcpus for Machine {
    fn pause(&self, capture: Capture) -> Result<Box<dyn vcpus::Paused + '_>, VcpusError> {
        Ok(Box::new(Still {
            paused: self.pause(capture)?,
            tables: PageTables::default(),
        }))
    }

    fn may_lose_write_access(&self) -> bool {
        self.may_lose_write_access()
    }
}

/// A machine that stands still.
struct Still<'a> {
    paused: PausedMachine<'a>,
    /// The guest's page tables before memory was set back.
    tables: PageTables,
}

impl vcpus::Paused for Still<'_> {
    fn kicked(&self) -> Instant {
        self.paused.kicked()
    }

    fn states(&mut self) -> Result<Vec<Saved>, VcpusError> {
        Ok(self.paused.states()?.into_iter().map(Saved::new).collect())
    }

    fn has_protected(&mut self, gfns: &mut dyn Iterator<Item = u64>) -> Result<(), VcpusError> {
        Ok(self.paused.keep_tables_writable(gfns)?)
    }

    fn before_restore(&mut self) -> Result<(), VcpusError> {
        self.tables = self.paused.page_tables()?;
        Ok(())
    }

    fn restore(&mut self, states: &[Saved]) -> Result<(), VcpusError> {
        let states = states.iter().enumerate().map(|(vcpu, saved)| {
            let state = VcpuState::of_saved(saved);
            state.map_err(|source| KvmError::State { vcpu, source })
        });
        let states = states.collect::<Result<Vec<_>, _>>()?;
        Ok(self.paused.restore(&states, Clock::Keep, &self.tables)?)
    }

    fn stop(self: Box<Self>) {
        self.paused.stop();
    }

    fn resume(self: Box<Self>, then: Box<dyn FnOnce() + '_>) -> Instant {
        self.paused.resume_then(then)
    }
}
