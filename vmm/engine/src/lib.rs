//! Palimpsest forks running virtual machines.
//!
//! A snapshot stops the guest for as long as it takes to share its memory copy-on-write, and stays right while devices do
//! DMA into the guest: pages that a device holds are copied at once, all others are shared, and which is which is
//! decided by the Linux kernel's exclusive-bit protocol (`PageAnonExclusive`), carried over to a VMM.
//!
//! ```text
//!   snapshot ──> device ──> kvm ──> host ──> mm
//! ```
//!
//! | module | concept |
//! |---|---|
//! | [`mm`] | the protocol: frames, shadow page tables, faults, pins, forks. No system calls |
//! | [`host`] | the physmap and the window: where frames are, and what vCPUs see |
//! | [`kvm`] | the virtual machine: boot, vCPU threads, exits, register state |
//! | [`device`] | DMA engines behind virtqueues |
//! | [`snapshot`] | taking and restoring snapshots of all of it at one instant |

pub use palimpsest_mm as mm;

pub mod causes;
pub mod device;
pub mod host;
pub mod kvm;
pub mod snapshot;
