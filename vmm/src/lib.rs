//! The program `vmm`: runs guests on the engine, [`palimpsest`], and checks all that it does.
//!
//! ```text
//!   cli ──> session ──> check ──> palimpsest
//!      └──> scenario ─────────────┘
//! ```
//!
//! | module | concept |
//! |---|---|
//! | [`accel`] | what runs vCPUs: KVM, or threads of this process |
//! | [`policy`] | which copy-on-write policy, chosen by name |
//! | [`boot`] | what a guest finds before it runs |
//! | [`incarnation`] | which copy of a guest a machine is, and the generation it is given |
//! | [`check`] | the oracles: is every snapshot right? |
//! | [`dma`] | the payload's DMA engines |
//! | [`run_snapshot`] | a snapshot of a run: which one, and what is in it |
//! | [`session`] | a whole run |
//! | [`scenario`] | the scenarios of the protocol, under every policy and on the living kernel |
//! | [`doctor`] | what this machine can and cannot do for a run |
//! | [`cli`] | the program: arguments, display, reports |

pub mod accel;
pub mod boot;
pub mod check;
pub mod cli;
pub mod dma;
pub mod doctor;
pub mod incarnation;
pub mod policy;
pub mod run_snapshot;
pub mod scenario;
pub mod session;
