//! The oracles: is every snapshot right, and does the VM run on as it should?
//!
//! | oracle | what it says | who looks |
//! |---|---|---|
//! | cut | a snapshot is of one instant: registers, memory, rings, devices agree | [`Examiner::first_look`] |
//! | isolation | nothing written after a snapshot ever shows in it | both looks of [`Examiner`] |
//! | coherence | guest and devices see what others write through a pin | the guest (`guest::abi::Failure`) |
//! | life | a rewound guest runs on and its own checks hold | the guest, [`restored()`], [`crate::session`] |
//! | tracking | dirty tracking tells of every page that changes | [`Examiner::first_look`] |
//! | identity | no two copies of a guest draw the same random number | [`Identities`] |
//! | accounting | at the end every frame is free, no reference or pin is left | [`account()`] |
//!
//! What memory must hold is a closed formula of the seed and of how many operations each vCPU has done
//! (`guest::formula`), and that number is in the captured registers. So nothing is replayed or recorded, and
//! an oracle knows nothing of how a snapshot was made.
//!
//! The first two run on a thread of their own ([`Worker`]), beside the guest. Every oracle has a fault that
//! trips it ([`Injection`](crate::session::config::Injection)): [`inject`] has those of memory,
//! [`crate::session`] those of the steps, [`crate::dma`] that of a pin.

mod account;
mod boot;
mod examiner;
mod hammer;
mod hashes;
mod identity;
pub mod inject;
mod registers;
mod restored;
mod rings;
#[cfg(test)]
mod tests;
mod tracking;
mod view;
pub mod violation;
mod worker;
mod written;

pub use account::account;
pub use boot::{Boot, Reference};
pub use examiner::{Examiner, Findings, Look};
pub use identity::{Found, Identities, Observation};
pub use restored::restored;
pub use tracking::{ReportedDirty, Tracked};
pub use violation::{Oracle, Violation, ViolationCounts};
pub use worker::{CheckCounts, Unfinished, Worker};
