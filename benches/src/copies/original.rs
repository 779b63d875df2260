//! The VM that is copied by any way but ours: on memory as most VMMs have it, its vCPU run by the engine, so
//! that it is paused as ours is.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::PAGE_SIZE;
use palimpsest::kvm::{GuestRam, Kvm, Machine, VcpuState};
use palimpsest::vcpus::Capture;

use super::Way;
use super::child::{ChildVm, monotonic};
use crate::clones::MeasureError;
use crate::clones::bare::{Bare, BareMachine, Registers, memory_with_code};
use crate::clones::gate::{Gate, PATIENCE};
use crate::clones::program::{Begins, DATA_GPA, Program, state_beginning};
use crate::technique::{Anonymous, PageSize, copy_all};

/// A VM that runs, with all of its memory resident.
pub struct Original {
    machine: Machine,
    gate: Arc<Gate>,
    memory: Arc<Anonymous>,
    pages: PageSize,
    /// Bytes that it writes.
    written: u64,
}

/// A copy that runs, or is held where it was seen to.
pub struct Copied {
    /// How long the original stood still.
    pub pause: Duration,
    /// From the wish to the copy's first instruction.
    pub first_instruction: Duration,
    /// The original's registers at that instant.
    pub state: VcpuState,
    copy: RunningCopy,
}

enum RunningCopy {
    Child(ChildVm),
    Machine(BareMachine),
}

impl Copied {
    /// Copies memory of the copy out.
    ///
    /// # Errors
    /// If it has no such bytes.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MeasureError> {
        match &self.copy {
            RunningCopy::Child(child) => child.read(gpa, buf),
            RunningCopy::Machine(machine) => machine.read(gpa, buf),
        }
    }
}

impl Original {
    /// Boots one of `memory` bytes that [stamps](Program::Stamp) `written` bytes.
    ///
    /// # Errors
    /// If there is no memory for it, or KVM refuses.
    pub fn boot(
        kvm: &Kvm,
        memory: u64,
        pages: PageSize,
        written: u64,
    ) -> Result<Self, MeasureError> {
        let memory = memory_with_code(memory, pages)?;
        memory.populate(0..memory.bytes())?;
        let gate = Gate::new();
        let told = Arc::clone(&gate);
        let machine = Machine::new(
            kvm,
            Arc::clone(&memory) as _,
            Arc::clone(&memory) as _,
            1,
            Arc::clone(&gate) as _,
            Box::new(move |_, outcome| told.has_ended(outcome.to_string())),
        )?;
        machine.start(|_| Program::Stamp(written).entry())?;
        let original = Self {
            machine,
            gate,
            memory,
            pages,
            written,
        };
        original.wait_for_round()?;
        Ok(original)
    }

    /// Waits until it has written once more all that it writes.
    ///
    /// # Errors
    /// If it has ended, or takes too long.
    pub fn wait_for_round(&self) -> Result<(), MeasureError> {
        const LOOK: Duration = Duration::from_micros(100);
        let enough = self.word()? + 2 * self.written / PAGE_SIZE;
        let deadline = Instant::now() + PATIENCE;
        while self.word()? < enough {
            self.gate.check()?;
            if Instant::now() > deadline {
                return Err(MeasureError::Silent);
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    fn word(&self) -> Result<u64, MeasureError> {
        let mut word = [0; 8];
        self.read(DATA_GPA, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Copies memory out.
    ///
    /// # Errors
    /// If it has no such bytes.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MeasureError> {
        GuestRam::read(&*self.memory, gpa, buf).map_err(MeasureError::Reach)
    }

    /// Makes a copy, by any way but ours, and waits until it has run.
    ///
    /// # Errors
    /// If it cannot be made, or does not run.
    pub fn copy(&self, bare: &Bare, way: Way) -> Result<Copied, MeasureError> {
        self.copy_and(bare, way, || ())
    }

    /// The same, and calls `look` while the original stands still.
    ///
    /// # Errors
    /// As [`Original::copy`].
    pub fn copy_and(
        &self,
        bare: &Bare,
        way: Way,
        look: impl FnOnce(),
    ) -> Result<Copied, MeasureError> {
        let bytes = self.memory.bytes();
        let into = match way {
            // Better than theirs: its memory is there before it is wished for.
            Way::Copy => {
                let memory = Anonymous::new(bytes, PageSize::Huge)?;
                memory.populate(0..bytes)?;
                Some(memory)
            }
            _ => None,
        };
        let file = tempfile::tempfile().map_err(|source| MeasureError::Host {
            what: "make a file for a guest's memory",
            source,
        })?;
        let (wish, wish_ns) = (Instant::now(), monotonic());
        let paused = self.machine.pause(Capture::Registers)?;
        let state = paused.states()?.remove(0);
        look();
        let begins = state_beginning(state.clone(), Begins::Announcing);
        let child = match (way, &into) {
            (Way::Fork | Way::ForkThp, _) => Some(ChildVm::fork(bare, &self.memory, &begins)?),
            (_, Some(into)) => {
                let threads = thread::available_parallelism().map_or(1, |n| n.get() as u64);
                copy_all(&self.memory, into, threads);
                None
            }
            _ => {
                self.memory.write_to(&file)?;
                None
            }
        };
        let kicked = paused.kicked();
        let pause = paused.resume().saturating_duration_since(kicked);
        let (copy, first_instruction) = match child {
            Some(child) => {
                let ran = child.first_instruction()?;
                let since = Duration::from_nanos(ran.saturating_sub(wish_ns).max(0) as u64);
                (RunningCopy::Child(child), since)
            }
            None => {
                let memory = match into {
                    Some(memory) => memory,
                    None => Anonymous::of_file(&file, bytes)?,
                };
                let machine = BareMachine::start(bare, &memory, Registers::from(&begins))?;
                let first = machine.first_instruction(wish)?;
                (RunningCopy::Machine(machine), first)
            }
        };
        Ok(Copied {
            pause,
            first_instruction,
            state,
            copy,
        })
    }

    /// Makes memory after a copy what it was before: in huge pages, if it is to be.
    ///
    /// # Errors
    /// The host's.
    pub fn settle(&self) -> Result<(), MeasureError> {
        match self.pages {
            PageSize::Small => Ok(()),
            PageSize::Huge => Ok(self.memory.collapse()?),
        }
    }
}

impl Drop for Original {
    fn drop(&mut self) {
        self.gate.end();
    }
}
