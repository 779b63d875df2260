//! The command line.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    path::PathBuf,
    time::Duration,
};

use clap::{
    ArgAction, Parser, Subcommand,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use guest::abi::Pattern;

use super::fork::ForkArgs;
use super::snapshot::SnapshotArgs;
use super::units::{parse_size, parse_time};
use crate::accel::Accel;
use crate::policy::Policy;
use crate::session::compare::Race;
use crate::session::config::{Config, GuestSource, Injection, PageSize, RunLength, pattern_named};

const AFTER_HELP: &str = "\
Sizes are binary: K, M, G, T (or KiB, MiB, ...). Times: us, ms, s, m, h.

Examples:
  vmm                                         ten seconds with the built-in guest
  vmm --duration 60s --vcpus 4 --pattern hot  a longer run, most writes in few pages
  vmm --snapshots 1000 --report run.json      a number of snapshots, results as JSON
  vmm --policy mapcount                       see an old Linux leak into snapshots (exit code 3)
  vmm --accel user                            the same where there is no KVM
  vmm --inject share-pinned                   see an oracle catch a wrong fork (exit code 3)
  vmm fork -n 100                             a hundred clones of a running guest, all running
  vmm fork --depth 3 --width 2                clones of clones of clones
  vmm snapshot save snaps/warm                run, and keep a snapshot as files
  vmm snapshot run snaps/warm                 run on from there, in another process
  vmm compare                                 three generations of Linux's rules, side by side
  vmm compare --scenario B1 --policy mapcount one historical bug, step by step
  vmm doctor                                  what this machine can and cannot do

Ctrl-C ends a run early, with its report, as do SIGTERM and SIGHUP. A second one kills it.

Exit codes:
  0  every snapshot taken was right
  1  the run could not start or finish, the guest crashed, or nothing was checked
  2  the command line makes no sense
  3  an oracle found a violation";

/// Snapshot a running KVM guest while devices do DMA into it, and check every snapshot bit for bit.
///
/// Boots a guest that writes its memory in a way that can be predicted, takes copy-on-write snapshots of it
/// while it runs, compares each with what memory must have held at that instant, and rewinds the guest to
/// some of them. At the end it says what was found.
#[derive(Debug, Parser)]
#[command(
    name = "vmm",
    version,
    after_help = AFTER_HELP,
    max_term_width = 100,
    allow_negative_numbers = true,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// Write what was found as JSON, too
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) report: Option<PathBuf>,

    /// Write what each thread did when, for ui.perfetto.dev or chrome://tracing
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) trace: Option<PathBuf>,

    /// Log more to standard error: -v what happens, -vv every step, -vvv everything
    #[arg(short, long, action = ArgAction::Count, help_heading = "Output", global = true)]
    pub(crate) verbose: u8,
}

/// What a run is asked to do.
#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// The program to run: the built-in `payload`, or an ELF that follows the guest ABI
    #[arg(
        long,
        value_name = "payload|FILE",
        default_value = "payload",
        help_heading = "Guest",
        value_parser = parse_guest
    )]
    guest: GuestSource,

    /// What runs the guest's vCPUs. Under `user` nothing keeps the guest from what this process can do: its
    /// code runs as code of the process, which says so when it starts. The built-in payload does no harm
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "auto",
        help_heading = "Guest"
    )]
    accel: Accel,

    /// Run a program other than `payload` without KVM too: it can do whatever this process can
    #[arg(long, help_heading = "Guest")]
    trust_guest: bool,

    /// Memory of the guest
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "256M",
        help_heading = "Guest",
        value_parser = parse_size
    )]
    memory: u64,

    /// vCPUs of the guest
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Guest")]
    vcpus: u64,

    /// How vCPUs choose the pages they write
    #[arg(
        long,
        value_name = "PATTERN",
        default_value = "uniform",
        help_heading = "Guest",
        value_parser = pattern_parser()
    )]
    pattern: Pattern,

    /// Seed of everything that is chosen; a run with the same seed writes the same memory [default: random]
    #[arg(long, value_name = "N", help_heading = "Guest")]
    seed: Option<u64>,

    /// DMA devices that read and write the guest's memory
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Devices")]
    dma_devices: u64,

    /// Buffers each device holds pinned from request to request; every second one only
    /// to read, now and then anew
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Devices")]
    registered_buffers: u64,

    /// Time from one snapshot to the next
    #[arg(
        long,
        value_name = "TIME",
        default_value = "20ms",
        help_heading = "Snapshots",
        value_parser = parse_time
    )]
    snapshot_every: Duration,

    /// Snapshots kept alive at once; the oldest makes room for the next
    #[arg(
        long,
        value_name = "N",
        default_value_t = 4,
        help_heading = "Snapshots"
    )]
    keep: usize,

    /// Rewind the guest to one of the kept snapshots after every N; 0 is never
    #[arg(
        long,
        value_name = "N",
        default_value_t = 10,
        help_heading = "Snapshots"
    )]
    restore_every: u64,

    /// How long to run [default: 10s; 2s if it is to be saved]
    #[arg(
        long,
        value_name = "TIME",
        help_heading = "Run",
        conflicts_with = "snapshots",
        value_parser = parse_time
    )]
    duration: Option<Duration>,

    /// Run until this many snapshots are taken, instead of for a time
    #[arg(long, value_name = "N", help_heading = "Run")]
    snapshots: Option<u64>,

    /// Do one thing wrong on purpose, to see that an oracle catches it; the run must end with exit code 3
    #[arg(long, value_name = "FAULT", help_heading = "Run")]
    inject: Option<Injection>,

    /// Ask every TIME which pages were written, beside the running guest, as a live
    /// migration does [default: never]
    #[arg(long, value_name = "TIME", help_heading = "Memory", value_parser = parse_time)]
    track_dirty: Option<Duration>,

    /// Largest pages that memory is kept in
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "2M",
        help_heading = "Memory"
    )]
    page_size: PageSize,

    /// Whether a thread copies, after each snapshot, what the guest writes between all of them, before the
    /// guest faults on it, and another keeps memory ready for copies: before the first snapshot a quarter of
    /// what the guest uses, 256 MiB at most. They take what CPU time the vCPUs leave
    #[arg(
        long,
        value_name = "WHETHER",
        default_value = "on",
        value_parser = parse_switch,
        action = clap::ArgAction::Set,
        help_heading = "Memory"
    )]
    copy_ahead: bool,

    /// Rules by which pages are shared and copied
    #[arg(
        long,
        value_name = "POLICY",
        default_value = "exclusive",
        help_heading = "Memory"
    )]
    policy: Policy,

    /// Have the guest's memory in core dumps of this program; they are without it otherwise
    #[arg(long, help_heading = "Output")]
    dump_guest_memory: bool,
}

/// What the program does besides running a guest.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Fork(ForkArgs),
    Snapshot(SnapshotArgs),
    Compare(CompareArgs),
    Doctor(DoctorArgs),
}

/// Find out what this machine can and cannot do for a run, and what to do about it
///
/// Tries each thing a run needs: KVM, memory and who limits it, huge pages, mappings, threads, files,
/// signals. Exits with 0 if `vmm` without flags can run here, and with 1 if not.
#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON instead of the screen
    #[arg(long)]
    pub(crate) json: bool,
}

/// Race the copy-on-write policies of three generations of Linux, and act their historical bugs out
///
/// Runs the same guest, devices and snapshots under each policy, then every scenario under each policy and on
/// the kernel of this host, and prints one screen. Exits with 0 if every policy behaved as its table says,
/// wrong ones included, and with 3 if not.
#[derive(Debug, clap::Args)]
pub(crate) struct CompareArgs {
    /// How long to race under each policy
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = parse_time)]
    duration: Duration,

    /// Memory of the guest
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    memory: u64,

    /// vCPUs of the guest
    #[arg(long, value_name = "N", default_value_t = 2)]
    vcpus: u64,

    /// What runs the vCPUs, in the race and in the scenarios
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "auto",
        conflicts_with = "list"
    )]
    pub(crate) accel: Accel,

    /// Seed of everything that is chosen [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Print JSON instead of the screen
    #[arg(long)]
    pub(crate) json: bool,

    /// List the scenarios
    #[arg(long, conflicts_with_all = ["scenario", "json"])]
    pub(crate) list: bool,

    /// Leave the race out, whose outcome is also a matter of how fast the guest is
    #[arg(long, conflicts_with_all = ["scenario", "list", "duration", "memory", "vcpus", "seed"])]
    pub(crate) no_race: bool,

    /// Play this scenario alone, and tell it step by step
    #[arg(long, value_name = "ID")]
    pub(crate) scenario: Option<String>,

    /// The policy to tell the scenario under
    #[arg(
        long,
        value_name = "POLICY",
        default_value = "exclusive",
        requires = "scenario"
    )]
    pub(crate) policy: Policy,

    /// What to play the scenario on
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "vcpu",
        requires = "scenario"
    )]
    pub(crate) on: PlayedOn,
}

/// What a scenario is played on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PlayedOn {
    /// A virtual machine with a vCPU, which `--accel` runs
    Vcpu,
    /// A software model of one: needs no KVM
    Soft,
    /// The kernel of this host, with processes
    Kernel,
}

impl CompareArgs {
    /// The race that was asked for. Draws a seed if none was given.
    pub(crate) fn race(&self) -> Race {
        Race {
            duration: self.duration,
            seed: self.seed.unwrap_or_else(random_seed),
            memory: self.memory,
            vcpus: self.vcpus,
            accel: self.accel,
        }
    }
}

impl Args {
    /// What the run is asked to do. Draws a seed if none was given.
    pub(crate) fn config(&self) -> Config {
        self.run.config(Duration::from_secs(10))
    }
}

impl RunArgs {
    /// Whether it was said when the run is over.
    pub(crate) fn has_length(&self) -> bool {
        self.snapshots.is_some() || self.duration.is_some()
    }

    /// The same, of a run that lasts `duration` unless something else was asked for.
    pub(crate) fn config(&self, duration: Duration) -> Config {
        Config {
            guest: self.guest.clone(),
            accel: self.accel,
            trust_guest: self.trust_guest,
            memory: self.memory,
            vcpus: self.vcpus,
            length: match (self.snapshots, self.duration) {
                (Some(snapshots), _) => RunLength::Snapshots(snapshots),
                (None, Some(duration)) => RunLength::Duration(duration),
                (None, None) => RunLength::Duration(duration),
            },
            snapshot_every: self.snapshot_every,
            keep: self.keep,
            restore_every: self.restore_every,
            dma_devices: self.dma_devices,
            registered_buffers: self.registered_buffers,
            pattern: self.pattern,
            seed: self.seed.unwrap_or_else(random_seed),
            track_dirty: self.track_dirty,
            policy: self.policy,
            page_size: self.page_size,
            copy_ahead: self.copy_ahead,
            dump_guest_memory: self.dump_guest_memory,
            inject: self.inject,
        }
    }
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("there are on, off".to_owned()),
    }
}

/// Seeds are typed again by people, and read by programs that keep numbers as doubles: 32 bits will do.
pub(super) fn random_seed() -> u64 {
    // The standard library's only source of randomness.
    RandomState::new().build_hasher().finish() & u64::from(u32::MAX)
}

fn parse_guest(text: &str) -> Result<GuestSource, String> {
    match text {
        "" => Err("must be payload, or a path".to_owned()),
        "payload" => Ok(GuestSource::Payload),
        path => Ok(GuestSource::File(path.into())),
    }
}

pub(super) fn pattern_parser() -> impl TypedValueParser<Value = Pattern> {
    PossibleValuesParser::new([
        PossibleValue::new("dense").help("Page after page, over and over"),
        PossibleValue::new("uniform").help("All pages alike, in an order that keeps changing"),
        PossibleValue::new("hot").help("Nine writes of ten in a tenth of the pages"),
        PossibleValue::new("sparse").help("One page of every 2 MiB"),
    ])
    .map(|name| pattern_named(&name).expect("every name listed is that of a pattern"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::session::config::pattern_name;

    fn parse(flags: &[&str]) -> Config {
        Args::try_parse_from(["vmm"].iter().chain(flags))
            .unwrap()
            .config()
    }

    fn refusal(flags: &[&str]) -> String {
        Args::try_parse_from(["vmm"].iter().chain(flags))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn no_flags_give_the_documented_defaults() {
        let expected = Config {
            seed: 5,
            copy_ahead: true,
            ..crate::session::config::tests::example()
        };
        assert_eq!(parse(&["--seed", "5"]), expected);
    }

    #[test]
    fn every_flag_arrives() {
        let config = parse(&[
            "--guest=a.elf",
            "--accel=user",
            "--trust-guest",
            "--memory=1G",
            "--vcpus=4",
            "--snapshots=9",
            "--snapshot-every=5ms",
            "--keep=3",
            "--restore-every=0",
            "--dma-devices=1",
            "--registered-buffers=2",
            "--pattern=sparse",
            "--seed=18446744073709551615",
            "--track-dirty=7ms",
            "--policy=refcount",
            "--page-size=4K",
            "--copy-ahead=off",
            "--dump-guest-memory",
            "--inject=leak-pin",
        ]);
        assert_eq!(
            config,
            Config {
                guest: GuestSource::File("a.elf".into()),
                accel: Accel::User,
                trust_guest: true,
                memory: 1 << 30,
                vcpus: 4,
                length: RunLength::Snapshots(9),
                snapshot_every: Duration::from_millis(5),
                keep: 3,
                restore_every: 0,
                dma_devices: 1,
                registered_buffers: 2,
                pattern: Pattern::Sparse,
                seed: u64::MAX,
                track_dirty: Some(Duration::from_millis(7)),
                policy: Policy::Refcount,
                page_size: PageSize::Base,
                copy_ahead: false,
                dump_guest_memory: true,
                inject: Some(Injection::LeakPin),
            }
        );
        assert_eq!(
            parse(&["--duration", "2m"]).length,
            RunLength::Duration(Duration::from_secs(120))
        );
    }

    #[test]
    fn every_pattern_has_a_name() {
        for name in ["dense", "uniform", "hot", "sparse"] {
            assert_eq!(pattern_name(parse(&["--pattern", name]).pattern), name);
        }
    }

    #[test]
    fn every_policy_can_be_asked_for() {
        for policy in Policy::ALL {
            assert_eq!(parse(&["--policy", policy.name()]).policy, policy);
        }
    }

    #[test]
    fn every_fault_can_be_asked_for() {
        for fault in Injection::ALL {
            assert_eq!(parse(&["--inject", fault.name()]).inject, Some(fault));
        }
    }

    #[test]
    fn a_run_has_one_length() {
        let refusal = refusal(&["--duration", "1s", "--snapshots", "3"]);
        assert!(refusal.contains("cannot be used with"), "{refusal}");
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        let refused = refusal(&["--memory", "lots"]);
        assert!(refused.contains("must be a number and a unit"), "{refused}");
        let refused = refusal(&["--duration", "10"]);
        assert!(refused.contains("write 10us, 10ms, 10s"), "{refused}");
        assert!(refusal(&["--pattern", "x"]).contains("possible values: dense"));
    }

    #[test]
    fn seeds_differ_and_are_short() {
        let (one, other) = (random_seed(), random_seed());
        assert_ne!(one, other);
        assert!(one <= u64::from(u32::MAX));
    }
}
