//! A virtual machine: threads that run its vCPUs, and what drives them. KVM runs the vCPUs, or the threads do
//! themselves ([`user`](crate::user)): pausing, capturing, restoring and ending are the same for both.
//!
//! | file | concept |
//! |---|---|
//! | `backend` | what it asks of who runs its vCPUs |
//! | `build` | making it: the threads; KVM's memslot and vCPUs |
//! | `drive` | starting vCPUs, and giving them tasks |
//! | `paused` | all of them between two instructions |
//! | `end` | stopping them for good |
//!
//! ```no_run
//! # use palimpsest::kvm::*;
//! # use palimpsest::vcpus::Capture;
//! # use std::sync::Arc;
//! # fn example(kvm: &Kvm, window: Arc<palimpsest::host::Window>, ram: Arc<dyn GuestRam>,
//! #            handler: Arc<dyn PortHandler>, entry: EntryState) -> Result<(), KvmError> {
//! let machine = Machine::new(kvm, window, ram, 2, handler, Box::new(|vcpu, outcome| {
//!     eprintln!("vcpu {vcpu}: {outcome}");
//! }))?;
//! machine.start(|_| entry)?;
//! let paused = machine.pause(Capture::Registers)?;
//! // Fork memory here: registers are read meanwhile.
//! let states = paused.states()?;
//! let running = paused.resume();
//! # Ok(())
//! # }
//! ```

mod backend;
mod build;
mod drive;
mod end;
mod paused;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

pub(crate) use self::backend::Backend;
pub use self::paused::PausedMachine;
use super::control::Control;
use super::counters::Counters;
use super::fault::RungCounts;
use super::memory::GuestRam;
use super::outcome::Outcome;
use super::tables::Translation;
use super::watch::Watch;

/// Is told on a vCPU's thread that the vCPU has ended by itself, and why. Not called for vCPUs that the
/// machine stops.
pub type OnStop = Box<dyn Fn(usize, Outcome) + Send + Sync>;

/// What the vCPUs of a machine have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineStats {
    /// Write faults: exits because a page was not writable.
    pub write_faults: u64,
    /// Exits because a port was written.
    pub port_exits: u64,
    /// Write faults that each rung of the [ladder](super::fault) has resolved.
    pub rungs: RungCounts,
    /// Stores that KVM emulated and gave to the VMM to carry out.
    pub emulated_stores: u64,
    /// Write faults whose page a signal named ([`user`](crate::user)): they need no ladder.
    pub signals: u64,
    /// Kicks: one a running vCPU and pause.
    pub kicks: u64,
}

/// A virtual machine. Dropping it stops its vCPUs and waits for their threads.
pub struct Machine {
    backend: Box<dyn Backend>,
    control: Arc<Control>,
    counters: Arc<Counters>,
    threads: Arc<Vec<JoinHandle<()>>>,
    /// Ended before the threads are.
    watch: Option<Watch>,
    ram: Arc<dyn GuestRam>,
    translation: Translation,
    /// Whether the machine was started. Locked while somebody drives it: pauses exclude each other.
    started: Mutex<bool>,
    /// Whether a vCPU did not end when it was told to.
    is_stuck: AtomicBool,
    tsc_khz: u32,
    left_out: Vec<u32>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.threads.len())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Frequency of the guest's time-stamp counter in kHz; 0 if the host does not know it.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// MSRs that this host cannot save or set back, and that states therefore lack.
    pub fn left_out(&self) -> &[u32] {
        &self.left_out
    }

    /// Whether memory may become read-only while vCPUs run.
    ///
    /// Not on SVM without nested paging: nothing is left there of a vCPU in whose page tables KVM has a bit
    /// to set and finds them read-only. It may while all stand still, if
    /// [`PausedMachine::keep_tables_writable`] is called before they run on.
    pub fn may_lose_write_access(&self) -> bool {
        self.translation != Translation::ShadowOnSvm
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.threads.len()
    }

    /// What the vCPUs have done so far.
    pub fn stats(&self) -> MachineStats {
        let counters = &self.counters;
        MachineStats {
            rungs: counters.rungs(),
            emulated_stores: counters.sum(|vcpu| &vcpu.emulated_stores),
            signals: counters.sum(|vcpu| &vcpu.signals),
            write_faults: counters.sum(|vcpu| &vcpu.write_faults),
            port_exits: counters.sum(|vcpu| &vcpu.port_exits),
            kicks: counters.kicks.load(Ordering::Relaxed),
        }
    }
}
