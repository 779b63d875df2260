//! Palimpsest forks running virtual machines.
//!
//! A snapshot stops the guest for as long as it takes to share its memory copy-on-write, and stays right
//! while devices do DMA into the guest: pages that a device holds are copied at once, all others are shared,
//! and which is which is decided by the Linux kernel's exclusive-bit protocol (`PageAnonExclusive`), carried
//! over to a VMM.
//!
//! A guest that spins, forked and rewound:
//! ```no_run
//! use palimpsest::kvm::{EntryState, Kvm, write_page_tables};
//! use palimpsest::memory::{Frames, Memory};
//! use palimpsest::vm::Vm;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let frames = Frames::new(1 << 30)?; // for the guest, and for what snapshots need copies of
//! let memory = Memory::new(&frames, 256 << 20)?;
//! write_page_tables(memory.ram(), 0x1_0000, 256 << 20)?;
//! memory.ram().write(0x20_0000, &[0xeb, 0xfe])?; // jmp $
//! let vm = Vm::builder(memory).build(&Kvm::open()?, 1)?;
//! let (rip, rsp, page_tables, task) = (0x20_0000, 0x9000, 0x1_0000, 0x2000);
//! vm.start(|_vcpu| EntryState { rip, rsp, arguments: [0; 2], page_tables, task })?;
//! let (snapshot, timing) = vm.snapshot()?; // while it runs
//! println!("the guest stood still for {:?}", timing.pause());
//! vm.restore(&snapshot)?; // back, and on from there
//! # Ok(())
//! # }
//! ```
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
//! | [`kept`] | snapshots as files: saved beside the running guest, loaded in another process |
//! | [`vcpus`] | what a snapshot needs of vCPUs, whoever runs them |
//! | [`kvm`] | KVM runs them: vCPU threads, exits, write faults, register state |
//! | [`user`] | threads of this process run them, where there is no KVM |
//! | [`device`] | what a snapshot needs of devices; virtqueues |
//! | [`saved`] | what a snapshot keeps of either |
//! | [`memory`] | frames that VMs share, and the memory of one of them |
//! | [`host`] | the physmap and the window: where frames are, and what vCPUs see; pins |
//! | [`timeline`] | what happens when, for whoever draws it |
//! | [`causes`] | what caused an error, and the chain in words |
//! | [`mm`] | the protocol: frames, shadow page tables, faults, pins, forks. No system calls |

pub use palimpsest_mm as mm;

pub mod aside;
pub mod causes;
pub mod device;
pub mod host;
pub mod kept;
pub mod kvm;
pub mod memory;
pub mod saved;
pub mod snapshot;
pub mod timeline;
pub mod user;
pub mod vcpus;
pub mod vm;

/// The example of the README, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
