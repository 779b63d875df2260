//! Loops that never end well unless everything is given back: for `benches/stress.rs`.
//!
//! | file | concept |
//! |---|---|
//! | [`level`] | how much memory there was when, and whether that grew |
//! | [`rewinds`] | snapshots and restores of the payload, under DMA, with all oracles |
//! | [`churn`] | a parent that runs, and clones that do a few operations and go |
//! | [`storms`] | many clones at once, again and again, with all oracles |
//! | [`report`], [`text`] | the numbers; the same for people |
//!
//! Beside them in the same report: [`copies`](crate::copies), other ways to make a copy that runs.

pub mod churn;
pub mod level;
pub mod report;
pub mod rewinds;
pub mod storms;
#[cfg(test)]
mod tests;
pub mod text;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest::abi::Pattern;
use vmm::accel::Accel;
use vmm::policy::Policy;
use vmm::session::config::{Config, GuestSource, PageSize, RunLength};

/// When a loop is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// After so long.
    Time(Duration),
    /// After so many rounds: snapshots, clones, storms.
    Rounds(u64),
}

/// How long a loop is to go on, and who is told how far it is.
pub struct Going<'a> {
    /// How long.
    pub length: Length,
    /// Ends it before.
    pub stop: &'a AtomicBool,
    /// Is told now and then, in a few words.
    pub tell: &'a mut (dyn FnMut(&str) + Send),
}

impl Going<'_> {
    /// Whether there is to be another round after `rounds` of them since `began`.
    fn goes_on(&self, rounds: u64, began: Instant) -> bool {
        let is_left = match self.length {
            Length::Time(time) => began.elapsed() < time,
            Length::Rounds(most) => rounds < most,
        };
        is_left && !self.stop.load(Ordering::Relaxed)
    }
}

/// The payload, as loops run it.
fn payload(memory: u64, vcpus: u64, devices: u64, length: Length) -> Config {
    Config {
        guest: GuestSource::Payload,
        accel: Accel::Kvm,
        trust_guest: false,
        memory,
        vcpus,
        length: match length {
            Length::Time(time) => RunLength::Duration(time),
            Length::Rounds(rounds) => RunLength::Snapshots(rounds),
        },
        snapshot_every: Duration::from_millis(2),
        keep: 3,
        restore_every: 1,
        dma_devices: devices,
        registered_buffers: 4,
        pattern: Pattern::Hot,
        seed: 7,
        track_dirty: None,
        policy: Policy::Exclusive,
        page_size: PageSize::Huge,
        copy_ahead: true,
        dump_guest_memory: false,
        inject: None,
    }
}
