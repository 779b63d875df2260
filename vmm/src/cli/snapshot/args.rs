//! The verbs of `vmm snapshot`, and their flags.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use palimpsest::kept::store::{Compression, SnapshotName};

use super::place::{CacheArgs, ReachArgs};
use crate::accel::Accel;
use crate::cli::args::RunArgs;
use crate::cli::units::{parse_size, parse_time};
use crate::policy::Policy;
use crate::session::config::{Config, Injection, PageSize, RunLength};
use crate::session::kept::{Lazy, Loading, Prefetch};

/// Keep snapshots as files, and run on from them in another process or on another host
///
/// A snapshot is STORE/NAME: the directory of a store, and a name in it; or the URL of a store in an object store
/// (s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH) where one is read from, or pushed to. Credentials are in the
/// environment, by the names that everybody uses (AWS_ACCESS_KEY_ID, AWS_ENDPOINT and so on). All snapshots of a store share what they have
/// in common: memory is in chunks of 2 MiB that are named by the hash of what is in them. Nothing has its final name
/// before it is whole and durable, and nothing is used that was not checked. docs/format.md says what is in a store.
#[derive(Debug, clap::Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    Save(Box<SaveArgs>),
    Run(RunKeptArgs),
    Load(LoadArgs),
    List(ListArgs),
    Info(InfoArgs),
    Verify(VerifyArgs),
    Diff(DiffArgs),
    Prune(PruneArgs),
    Push(PushArgs),
    Pull(PullArgs),
}

/// Run a guest, and save its last snapshot while it runs on
///
/// Takes the flags of a run, but --trace and --inject: what a fault has spoilt is not kept. When that is over the snapshot that was taken last is saved, beside the running guest, and
/// the run ends when it is durable. A store that is not there is made.
#[derive(Debug, clap::Args)]
#[command(mut_arg("inject", |arg| arg.hide(true)))]
pub(super) struct SaveArgs {
    /// Where to save it
    #[arg(value_name = "STORE/NAME", conflicts_with = "inject")]
    pub(super) path: PathBuf,

    #[command(flatten)]
    pub(super) keeping: KeepingArgs,

    #[command(flatten)]
    pub(super) run: RunArgs,

    /// Write what was found as JSON, too
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(super) report: Option<PathBuf>,
}

/// How a snapshot is saved.
#[derive(Debug, clap::Args)]
pub(super) struct KeepingArgs {
    /// The snapshot of the store that this one is an increment of [default: what the run began with]
    #[arg(long, value_name = "NAME", help_heading = "Saving")]
    pub(super) parent: Option<SnapshotName>,

    /// Compress the chunks that are written, at this level of zstd, 1 to 19 [default level: 3]
    #[arg(
        long,
        value_name = "LEVEL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "3",
        value_parser = clap::value_parser!(i32).range(1..=19),
        help_heading = "Saving"
    )]
    zstd: Option<i32>,

    /// The most memory that is read and written a second, to leave the guest more of the host [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_rate, help_heading = "Saving")]
    pub(super) rate: Option<NonZeroU64>,

    /// Save one every so often, as NAME-000001 and so on, each an increment of the last; until Ctrl-C, unless the
    /// run has a length. One that cannot be saved is said, and the run goes on
    #[arg(long, value_name = "TIME", value_parser = parse_every, help_heading = "Saving")]
    pub(super) every: Option<Duration>,

    /// With --every, drop all of them but the last N, as soon as one more is saved [default: all are kept]
    #[arg(long, value_name = "N", requires = "every", help_heading = "Saving")]
    pub(super) keep_last: Option<NonZeroUsize>,
}

fn parse_every(text: &str) -> Result<Duration, String> {
    let every = parse_time(text).map_err(|error| error.to_string())?;
    match every.is_zero() {
        true => Err("must be more than 0".to_owned()),
        false => Ok(every),
    }
}

fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    let rate = parse_size(text).map_err(|error| error.to_string())?;
    NonZeroU64::new(rate)
        .ok_or_else(|| "must be more than 0: nothing would ever be saved".to_owned())
}

impl KeepingArgs {
    pub(super) fn compression(&self) -> Compression {
        self.zstd
            .map_or(Compression::None, |level| Compression::Zstd { level })
    }
}

/// Run on from a snapshot that was saved, and check everything as in any run
///
/// The guest runs on where it was saved, with a generation of its own: what two runs of one snapshot draw as random
/// numbers differs. What memory must hold is known from what was saved with it.
#[derive(Debug, clap::Args)]
#[command(
    mut_arg("parent", |arg| arg.requires("save")),
    mut_arg("zstd", |arg| arg.requires("save")),
    mut_arg("rate", |arg| arg.requires("save")),
    mut_arg("every", |arg| arg.requires("save"))
)]
pub(super) struct RunKeptArgs {
    /// The snapshot to run
    #[arg(value_name = "STORE/NAME")]
    pub(super) path: PathBuf,

    /// Save the last snapshot of this run under this name, in the same store: an increment of what it began with
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "inject",
        help_heading = "Saving"
    )]
    pub(super) save: Option<SnapshotName>,

    #[command(flatten)]
    pub(super) keeping: KeepingArgs,

    /// How long to run [default: 5s]
    #[arg(long, value_name = "TIME", conflicts_with = "snapshots", value_parser = parse_time)]
    duration: Option<Duration>,

    /// Run until this many snapshots are taken, instead of for a time
    #[arg(long, value_name = "N")]
    snapshots: Option<u64>,

    /// Time from one snapshot to the next [default: as it was saved]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    snapshot_every: Option<Duration>,

    /// Snapshots kept alive at once [default: as it was saved]
    #[arg(long, value_name = "N")]
    keep: Option<usize>,

    /// Rewind the guest to one of them after every N; 0 is never [default: as it was saved]
    #[arg(long, value_name = "N")]
    restore_every: Option<u64>,

    #[command(flatten)]
    pub(super) place: PlaceArgs,

    #[command(flatten)]
    pub(super) loading: LoadingArgs,

    #[command(flatten)]
    pub(super) reach: ReachArgs,

    #[command(flatten)]
    pub(super) cache: CacheArgs,

    /// Do one thing wrong on purpose, to see that an oracle catches it; exit code 3
    #[arg(long, value_name = "FAULT")]
    inject: Option<Injection>,

    /// Write what was found as JSON, too
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,
}

/// When what was saved is read.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct LoadingArgs {
    /// When memory is read that was saved: as the guest uses it, or before it runs
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        help_heading = "Loading"
    )]
    lazy: Lazy,

    /// What of it is read when a CPU is idle, before the guest wants it
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "earlier",
        help_heading = "Loading"
    )]
    prefetch: Prefetch,
}

impl LoadingArgs {
    pub(in crate::cli) fn loading(self) -> Loading {
        Loading {
            lazy: self.lazy,
            prefetch: self.prefetch,
        }
    }
}

/// What may be another than it was.
#[derive(Debug, clap::Args)]
pub(super) struct PlaceArgs {
    /// What runs the vCPUs: what ran them when they were saved [default: that]
    #[arg(long, value_name = "WHAT")]
    accel: Option<Accel>,

    /// Run it without KVM: it can do whatever this process can, whoever has saved it
    #[arg(long)]
    pub(super) trust_guest: bool,

    /// Rules by which pages are shared and copied [default: as it was saved]
    #[arg(long, value_name = "POLICY")]
    policy: Option<Policy>,

    /// Largest pages that memory is kept in [default: as it was saved]
    #[arg(long, value_name = "SIZE")]
    page_size: Option<PageSize>,
}

impl PlaceArgs {
    /// `config`, where this says otherwise.
    pub(super) fn apply(&self, config: Config) -> Config {
        Config {
            accel: self.accel.unwrap_or(config.accel),
            trust_guest: self.trust_guest,
            policy: self.policy.unwrap_or(config.policy),
            page_size: self.page_size.unwrap_or(config.page_size),
            ..config
        }
    }
}

impl RunKeptArgs {
    /// `config`, where this says otherwise.
    pub(super) fn apply(&self, config: Config) -> Config {
        let config = self.place.apply(config);
        Config {
            length: match (self.snapshots, self.duration) {
                (Some(snapshots), _) => RunLength::Snapshots(snapshots),
                (None, duration) => RunLength::Duration(duration.unwrap_or(Duration::from_secs(5))),
            },
            snapshot_every: self.snapshot_every.unwrap_or(config.snapshot_every),
            keep: self.keep.unwrap_or(config.keep),
            restore_every: self.restore_every.unwrap_or(config.restore_every),
            inject: self.inject,
            ..config
        }
    }
}

/// Load a snapshot into a machine and check what is in it, without running on
#[derive(Debug, clap::Args)]
pub(super) struct LoadArgs {
    /// The snapshot to load
    #[arg(value_name = "STORE/NAME")]
    pub(super) path: PathBuf,

    #[command(flatten)]
    pub(super) place: PlaceArgs,

    #[command(flatten)]
    pub(super) reach: ReachArgs,

    #[command(flatten)]
    pub(super) cache: CacheArgs,

    /// Print JSON instead of the screen
    #[arg(long)]
    pub(super) json: bool,
}

/// List the snapshots of a store, and what each takes
#[derive(Debug, clap::Args)]
pub(super) struct ListArgs {
    /// The store
    #[arg(value_name = "STORE")]
    pub(super) store: PathBuf,

    #[command(flatten)]
    pub(super) reach: ReachArgs,

    /// Print JSON instead of the screen
    #[arg(long)]
    pub(super) json: bool,
}

/// Say what a snapshot is
#[derive(Debug, clap::Args)]
pub(super) struct InfoArgs {
    /// The snapshot
    #[arg(value_name = "STORE/NAME")]
    pub(super) path: PathBuf,

    #[command(flatten)]
    pub(super) reach: ReachArgs,

    /// Print its manifest
    #[arg(long)]
    pub(super) json: bool,
}

/// Read all of a snapshot, or of each snapshot of a store, and say what is wrong with it; exit code 1 if anything is
///
/// What is whole and cannot be run by this program, or on this host, is said in a note: nothing is wrong with it.
#[derive(Debug, clap::Args)]
pub(super) struct VerifyArgs {
    /// The snapshot, or the store
    #[arg(value_name = "STORE[/NAME]")]
    pub(super) path: PathBuf,

    #[command(flatten)]
    pub(super) reach: ReachArgs,

    /// Print JSON instead of the screen
    #[arg(long)]
    pub(super) json: bool,
}

/// Say how two snapshots differ
#[derive(Debug, clap::Args)]
pub(super) struct DiffArgs {
    /// One of them
    #[arg(value_name = "STORE/NAME")]
    pub(super) one: PathBuf,

    /// The other
    #[arg(value_name = "STORE/NAME")]
    pub(super) other: PathBuf,

    #[command(flatten)]
    pub(super) reach: ReachArgs,

    #[command(flatten)]
    pub(super) cache: CacheArgs,

    /// Print JSON instead of the screen
    #[arg(long)]
    pub(super) json: bool,
}

/// Drop snapshots by name, and collect what no snapshot names
///
/// Waits for who saves to the store or loads from it. A store by URL is not collected, since nobody can wait for a push
/// that goes on elsewhere: --drop takes snapshots away there, and leaves their chunks.
#[derive(Debug, clap::Args)]
pub(super) struct PruneArgs {
    /// The store
    #[arg(value_name = "STORE")]
    pub(super) store: PathBuf,

    /// Drop this snapshot first; may be given several times
    #[arg(long, value_name = "NAME")]
    pub(super) drop: Vec<SnapshotName>,

    /// How long to wait for who uses the store
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    pub(super) wait: Duration,

    #[command(flatten)]
    pub(super) reach: ReachArgs,

    /// Print JSON instead of the screen
    #[arg(long)]
    pub(super) json: bool,
}

/// Copy a snapshot to an object store, or to another directory
///
/// Chunks that are there are not sent again, whoever has sent them; a push that was cut goes on when it is done again.
/// Nothing has the snapshot's name there before all of it is there, and of two that push different snapshots by one name
/// one is first, and the other is told. The store is made if there is nothing.
#[derive(Debug, clap::Args)]
pub(super) struct PushArgs {
    /// The snapshot
    #[arg(value_name = "STORE/NAME")]
    pub(super) from: PathBuf,

    /// The store to copy it to
    #[arg(value_name = "URL")]
    pub(super) to: PathBuf,

    /// Compress the chunks that are sent, at this level of zstd, 1 to 19; 0 sends them as they are
    #[arg(
        long,
        value_name = "LEVEL",
        default_value_t = 3,
        value_parser = clap::value_parser!(i32).range(0..=19)
    )]
    pub(super) zstd: i32,

    /// Read each chunk back that was sent or found there, and send those again that are damaged there
    #[arg(long)]
    pub(super) check: bool,

    #[command(flatten)]
    pub(super) copy: CopyArgs,
}

/// Copy a snapshot from an object store, or from another directory, to a directory
///
/// All of it is checked as it comes. Chunks that are there are not fetched; a pull that was cut goes on when it is done
/// again. The store is made if there is nothing.
#[derive(Debug, clap::Args)]
pub(super) struct PullArgs {
    /// The snapshot
    #[arg(value_name = "URL/NAME")]
    pub(super) from: PathBuf,

    /// The store to copy it to
    #[arg(value_name = "STORE")]
    pub(super) to: PathBuf,

    /// Compress the chunks that are written, at this level of zstd, 1 to 19 [default level: 3]
    #[arg(
        long,
        value_name = "LEVEL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "3",
        value_parser = clap::value_parser!(i32).range(1..=19)
    )]
    pub(super) zstd: Option<i32>,

    #[command(flatten)]
    pub(super) copy: CopyArgs,
}

/// How a snapshot is copied.
#[derive(Debug, clap::Args)]
pub(super) struct CopyArgs {
    /// The name that it is to have there [default: the one that it has]
    #[arg(long = "as", value_name = "NAME")]
    pub(super) name: Option<SnapshotName>,

    /// Chunks that are under way at once
    #[arg(long, value_name = "N", default_value = "8")]
    pub(super) at_once: NonZeroUsize,

    #[command(flatten)]
    pub(super) reach: ReachArgs,

    /// Print JSON instead of the screen
    #[arg(long)]
    pub(super) json: bool,
}
