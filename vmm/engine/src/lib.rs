//! Palimpsest forks running virtual machines.
//!
//! A snapshot stops the guest for as long as it takes to share its memory copy-on-write, and stays right
//! while devices do DMA into the guest: pages that a device holds are copied at once, all others are shared,
//! and which is which is decided by the Linux kernel's exclusive-bit protocol (`PageAnonExclusive`), carried
//! over to a VMM.
//!
//! ```text
//!   vm ──> snapshot ──> vcpus, device, saved
//!   │ └──> kvm ────────┘     │
//!   └────> memory ──> host <─┘ ──> mm
//! ```
//!
//! | module | concept |
//! |---|---|
//! | [`vm`] | one builder: memory, vCPUs and devices, and the order in which they go |
//! | [`snapshot`] | taking and restoring snapshots of all of it at one instant |
//! | [`vcpus`] | what a snapshot needs of vCPUs, whoever runs them |
//! | [`kvm`] | KVM runs them: vCPU threads, exits, write faults, register state |
//! | [`device`] | what a snapshot needs of devices; virtqueues |
//! | [`saved`] | what a snapshot keeps of either |
//! | [`memory`] | frames that VMs share, and the memory of one of them |
//! | [`host`] | the physmap and the window: where frames are, and what vCPUs see; pins |
//! | [`mm`] | the protocol: frames, shadow page tables, faults, pins, forks. No system calls |

pub use palimpsest_mm as mm;

pub mod causes;
pub mod device;
pub mod host;
pub mod kvm;
pub mod memory;
pub mod saved;
pub mod snapshot;
pub mod vcpus;
pub mod vm;
