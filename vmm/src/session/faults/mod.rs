//! vCPUs, devices and memory that do wrong on purpose, so that an oracle can be seen to notice. A snapshot or
//! a restore is given these, and they pass on what it asks of them to the real ones.
//!
//! Most capture too early or too late. What happens in between is up to a call (`run_on`, `go_on`) that
//! returns when enough has happened: no time is waited for.
//!
//! | file | concept |
//! |---|---|
//! | `changed` | what is changed between a snapshot and vCPUs, and what goes through |
//! | `late` | registers are captured after the vCPUs ran on |
//! | `stale` | registers of one vCPU are from before it ran on |
//! | `leaky` | pages that a fork left writable are not said to be read-only |
//! | `forgetful` | memory keeps nothing of what is written to it |
//! | `at_large` | devices are not stopped, and have the state from before they ran on |

mod at_large;
mod changed;
mod forgetful;
mod late;
mod leaky;
mod stale;
#[cfg(test)]
mod tests;

pub(super) use at_large::AtLarge;
pub(super) use forgetful::Forgetful;
pub(super) use late::Late;
pub(super) use leaky::Leaky;
pub(super) use stale::{Old, Stale};
