//! A vCPU, on the thread of its own.
//!
//! | file | concept |
//! |---|---|
//! | `run` | the thread's life |
//! | `exit` | entering the guest, and why it came out |
//! | `faults` | what the guest could not write, and is given |
//! | `registers` | tasks about registers while it is parked |

mod exit;
mod faults;
mod registers;
mod run;

use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_regs};
use kvm_ioctls::VcpuFd;

use super::control::Control;
use super::counters::{Counters, VcpuCounters};
use super::fault::Ladder;
use super::memory::{GuestRam, Memslot};
use super::paravirt::Targets;
use super::port::PortHandler;
use super::state::{Capturer, XsaveFits};
use super::tables::Translation;

/// A vCPU and what its thread needs.
pub(super) struct Vcpu {
    pub(super) index: usize,
    pub(super) fd: VcpuFd,
    pub(super) cpuid: CpuId,
    pub(super) capturer: Capturer,
    pub(super) xsave_fits: XsaveFits,
    pub(super) sync_regs: SyncRegs,
    pub(super) ram: Arc<dyn GuestRam>,
    /// Kept for as long as the vCPU may go there.
    pub(super) _slot: Arc<dyn Memslot>,
    pub(super) handler: Arc<dyn PortHandler>,
    pub(super) control: Arc<Control>,
    pub(super) counters: Arc<Counters>,
    pub(super) ladder: Ladder,
    /// What KVM writes to memory for this vCPU.
    pub(super) paravirt: Targets,
    pub(super) translation: Translation,
    /// Registers at the last failure that may have been about a page that somebody else made writable
    /// meanwhile, and how often in a row it was the same.
    pub(super) lost_races: Option<(kvm_regs, u32)>,
    /// It came out by a kick, and has not been looked at since.
    pub(super) kicked: bool,
    /// Registers when it was last looked at after a kick.
    pub(super) kicked_at: Option<kvm_regs>,
}

impl Vcpu {
    /// What it counts.
    fn counters(&self) -> &VcpuCounters {
        self.counters.of(self.index)
    }
}

/// Whether registers come with every exit at no cost (`KVM_CAP_SYNC_REGS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncRegs {
    /// They do not: they have to be asked for.
    Absent,
    /// They do, but there was no exit since they were set.
    Stale,
    /// They are those of the last exit.
    Fresh,
}
