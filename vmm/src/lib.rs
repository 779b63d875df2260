//! Palimpsest forks running KVM virtual machines.
//!
//! A snapshot stops the guest for as long as it takes to share its memory copy-on-write, and stays right while devices do
//! DMA into the guest: pages that a device holds are copied at once, all others are shared, and which is which is
//! decided by the Linux kernel's exclusive-bit protocol (`PageAnonExclusive`), carried over to a VMM.
//!
//! ```text
//!   cli ──> session ──> snapshot, check ──> device ──> kvm ──> host ──> mm
//! ```
//!
//! | module | concept |
//! |---|---|
//! | [`mm`] | the protocol: frames, shadow page tables, faults, pins, forks. No system calls |
//! | [`policy`] | which copy-on-write policy, chosen by name |
//! | [`host`] | the physmap and the window: where frames are, and what vCPUs see |
//! | [`kvm`] | the virtual machine: boot, vCPU threads, exits, register state |
//! | [`device`] | DMA engines behind virtqueues |
//! | [`snapshot`] | taking and restoring snapshots of all of it at one instant |
//! | [`check`] | the oracles: is every snapshot right? |
//! | [`session`] | a whole run |
//! | [`doctor`] | what this machine can and cannot do for a run |
//! | [`cli`] | the `vmm` program |
//!
//! As a library: make a [`mm::FramePool`] over a [`host::PhysMap`], an [`mm::AddressSpace`] over a [`host::Window`], and
//! a [`kvm::Machine`] whose memslot is that window; [`snapshot::Parts`] then takes and restores snapshots.
//! `session/vm.rs` does just that.

pub use palimpsest_mm as mm;

mod causes;
pub mod check;
pub mod cli;
pub mod device;
pub mod doctor;
pub mod host;
pub mod kvm;
pub mod policy;
pub mod scenario;
pub mod session;
pub mod snapshot;
