//! The flags of `vmm fork`.

use std::path::PathBuf;
use std::time::Duration;

use guest::abi::Pattern;

use crate::accel::Accel;
use crate::cli::args::{pattern_parser, random_seed};
use crate::cli::snapshot::{CacheArgs, LoadingArgs, ReachArgs};
use crate::cli::units::{parse_size, parse_time};
use crate::policy::Policy;
use crate::session::config::{Config, GuestSource, Injection, PageSize, RunLength};
use crate::session::family::config::{FamilyConfig, Shape};

/// Fork a running guest into clones that run, and check all of them bit for bit
///
/// Boots the built-in guest, lets it warm up, and makes clones of it while it runs: each shares every page with
/// all others until one of them writes there. All run at once, with devices of their own; snapshots of each in
/// turn are checked as those of a single guest. Then the root is dropped, and every third clone, and the rest runs
/// on. At the end it says how long a clone took to its first instruction, who has which memory, and what was
/// found.
#[derive(Debug, clap::Args)]
#[command(
    mut_arg("lazy", |arg| arg.requires("from")),
    mut_arg("prefetch", |arg| arg.requires("from"))
)]
pub(crate) struct ForkArgs {
    /// Begin with a guest that was saved instead of one that boots: what it is is as it was saved
    #[arg(
        long,
        value_name = "STORE/NAME",
        conflicts_with_all = ["memory", "vcpus", "dma_devices", "pattern", "seed"]
    )]
    pub(crate) from: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) loading: LoadingArgs,

    #[command(flatten)]
    pub(crate) reach: ReachArgs,

    #[command(flatten)]
    pub(crate) cache: CacheArgs,

    /// Clones of the guest
    #[arg(
        short = 'n',
        long,
        value_name = "N",
        default_value_t = 10,
        conflicts_with_all = ["depth", "width"]
    )]
    clones: u64,

    /// Clones of clones instead: so many generations
    #[arg(long, value_name = "N")]
    depth: Option<u64>,

    /// Clones of each machine, with --depth [default: 2]
    #[arg(long, value_name = "N", requires = "depth")]
    width: Option<u64>,

    /// Memory of the guest, and so of each clone
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    memory: u64,

    /// Memory that a clone may have by itself, beside what it shares, copies for its snapshots among it: it
    /// ends when it needs more, and as much is kept for each, at most --memory [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    quota: Option<u64>,

    /// vCPUs of the guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u64,

    /// DMA devices of each machine
    #[arg(long, value_name = "N", default_value_t = 2)]
    dma_devices: u64,

    /// How vCPUs choose the pages they write
    #[arg(long, value_name = "PATTERN", default_value = "hot", value_parser = pattern_parser())]
    pattern: Pattern,

    /// How long the guest runs before it is forked
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time)]
    warm_up: Duration,

    /// How long all run once they are there
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    duration: Duration,

    /// Time from the snapshot of one machine, to be checked, to that of the next
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = parse_time)]
    snapshot_every: Duration,

    /// Such snapshots kept alive at once
    #[arg(long, value_name = "N", default_value_t = 4)]
    keep: usize,

    /// Rules by which pages are shared and copied
    #[arg(long, value_name = "POLICY", default_value = "exclusive")]
    policy: Policy,

    /// Do one thing wrong on purpose, to see that an oracle catches it; exit code 3
    #[arg(long, value_name = "FAULT", value_parser = parse_fault)]
    inject: Option<Injection>,

    /// Seed of everything that is chosen [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// What runs the vCPUs: clones need KVM
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    accel: Accel,

    /// Write what was found as JSON, too
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
}

/// The faults that show in a family.
const FAULTS: [Injection; 3] = [
    Injection::ReuseShared,
    Injection::SharePinned,
    Injection::SameGeneration,
];

fn parse_fault(text: &str) -> Result<Injection, String> {
    let named = FAULTS.into_iter().find(|fault| fault.name() == text);
    named.ok_or_else(|| format!("there are {}", FAULTS.map(Injection::name).join(", ")))
}

impl ForkArgs {
    /// What was asked for. Draws a seed if none was given.
    pub(crate) fn config(&self) -> FamilyConfig {
        FamilyConfig {
            guest: Config {
                guest: GuestSource::Payload,
                accel: self.accel,
                trust_guest: false,
                memory: self.memory,
                vcpus: self.vcpus,
                length: RunLength::Duration(self.duration),
                snapshot_every: self.snapshot_every,
                keep: self.keep,
                restore_every: 0,
                dma_devices: self.dma_devices,
                registered_buffers: 2,
                pattern: self.pattern,
                seed: self.seed.unwrap_or_else(random_seed),
                track_dirty: None,
                policy: self.policy,
                page_size: PageSize::Huge,
                // A thread for each machine would be one too many.
                copy_ahead: false,
                dump_guest_memory: false,
                inject: self.inject,
            },
            shape: match (self.depth, self.width) {
                (Some(depth), width) => Shape::Tree {
                    depth,
                    width: width.unwrap_or(2),
                },
                (None, _) => Shape::Clones(self.clones),
            },
            quota: self.quota,
            warm_up: self.warm_up,
            duration: self.duration,
        }
    }
}

impl ForkArgs {
    /// The same, of a guest that was saved of a run that was asked to do what `saved` says.
    pub(crate) fn config_from(&self, saved: Config) -> FamilyConfig {
        let asked = self.config();
        let guest = Config {
            memory: saved.memory,
            vcpus: saved.vcpus,
            dma_devices: saved.dma_devices,
            registered_buffers: saved.registered_buffers,
            pattern: saved.pattern,
            seed: saved.seed,
            guest: saved.guest,
            ..asked.guest
        };
        FamilyConfig { guest, ..asked }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        fork: ForkArgs,
    }

    fn parse(flags: &[&str]) -> Result<FamilyConfig, String> {
        let line = Line::try_parse_from(["fork"].iter().chain(flags));
        line.map(|line| line.fork.config())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn shapes_are_what_was_asked_for() {
        let shape = |flags: &[&str]| parse(flags).unwrap().shape;
        assert_eq!(shape(&[]), Shape::Clones(10));
        assert_eq!(shape(&["-n", "100"]), Shape::Clones(100));
        let tree = |depth, width| Shape::Tree { depth, width };
        assert_eq!(shape(&["--depth", "3"]), tree(3, 2));
        assert_eq!(shape(&["--depth", "3", "--width", "4"]), tree(3, 4));
        for both in [&["-n", "5", "--depth", "2"][..], &["--width", "2"]] {
            assert!(parse(both).is_err());
        }
    }

    #[test]
    fn faults_are_those_that_a_family_shows() {
        for fault in FAULTS {
            let config = parse(&["--inject", fault.name()]).unwrap();
            assert_eq!(config.guest.inject, Some(fault));
        }
        let refused = parse(&["--inject", "stale-page"]).unwrap_err();
        assert!(
            refused.contains("there are reuse-shared, share-pinned, same-generation"),
            "{refused}"
        );
    }
}
