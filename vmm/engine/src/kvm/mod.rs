//! Owns KVM: the VM, its memslot, its vCPU threads and their registers.
//!
//! What it guarantees
//! - A vCPU runs on one thread of its own from first to last; every KVM call for it is made there.
//! - [`Machine::pause`] returns when no vCPU is in guest mode and none has an instruction half done: an `out`
//!   that the guest has begun is complete, so that captured registers are those of an instruction boundary.
//! - A write to a page that the guest may not write yet is handed to [`GuestRam::write_fault`] on the vCPU's
//!   own thread, and the instruction is tried again. A fault that no page explains is an error, not a loop:
//!   see [`fault`].
//! - What KVM itself writes to guest memory follows the same rules: stores that it emulates are carried out
//!   by [`GuestRam::write`], and pages that it writes behind everybody's back are pinned (`paravirt`).
//! - Nothing a guest does panics the VMM: what a guest must not do ends its vCPU with an [`Outcome`].
//!
//! How: [`platform`] says which KVM this host has, `open` and `create` make the file descriptors, [`boot`]
//! (with `paging`) fills guest memory, [`registers`] holds the entry state, [`machine`] and `control` drive
//! the vCPU threads of `vcpu`, `kick` gets them out of the guest, [`fault`] finds the pages of a write fault,
//! `watch` kicks vCPUs that do not come out by themselves, `trial` tries registers without running, [`state`] and `msr` capture and restore registers.
//! Memory is reached only through [`GuestRam`], ports only through [`PortHandler`].
//!
//! Not covered: interrupts (there is no interrupt controller), guests that leave 64-bit mode, `in` and MMIO
//! (both end the vCPU as a crash), nested virtualisation.

pub mod boot;
pub(crate) mod control;
pub(crate) mod counters;
mod create;
mod error;
mod extended;
pub mod fault;
mod kick;
mod limits;
pub mod machine;
pub mod memory;
mod msr;
mod open;
pub mod outcome;
mod paging;
mod paravirt;
mod placement;
pub mod platform;
pub mod port;
pub mod registers;
pub mod state;
mod table_bits;
pub(crate) mod tables;
#[cfg(test)]
pub(crate) mod tests;
mod trial;
pub(crate) mod urgent;
mod vcpu;
mod vcpus;
mod watch;

pub use boot::{BootError, Image, write_page_tables};
pub use error::{KvmError, MAX_VCPUS, StateError, VcpuRunError, WriteFaultError};
pub use extended::Extended;
pub use fault::{Rung, RungCounts};
pub use machine::{Machine, MachineStats, OnStop, PausedMachine};
pub use memory::{GuestRam, Memslot};
pub use open::{Kvm, PlatformError};
pub use outcome::{CrashReason, CrashReport, Outcome};
pub use platform::{Paging, Platform};
pub use port::{PortAction, PortHandler, StopReason};
pub use registers::EntryState;
pub use state::{Clock, StateKind, VcpuState};
pub use tables::PageTables;
