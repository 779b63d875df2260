//! A family: a guest that runs, clones of it, and clones of those, all of them running at once and checked.
//!
//! ```text
//!   warm up           fork                               run on                   some go        end
//!   root ──────────── s1 ── root runs on ─────────────── snapshots of all ─────── ───────────── a last
//!                      ├──── clone 1 ──── s2 ── ...      in turn, checked         root first    snapshot
//!                      └──── clone 2 ...                                                        of each
//! ```
//! All have their frames from one pool. What each must hold is a formula of its own registers, so a byte that one
//! writes and another sees is found by the oracles that check single guests: clones are never equally far. One
//! examiner looks at the snapshots of all.
//!
//! | file | concept |
//! |---|---|
//! | [`config`] | what a family is asked to be |
//! | `member` | one machine of it |
//! | `growing` | the root, and how clones come to be |
//! | `living` | all run; some are dropped |
//! | `finishing` | everything is taken apart, and the report written |
//! | [`report`] | what was found |
//! | [`progress`] | how it is watched |

pub mod config;
mod finishing;
mod growing;
mod living;
mod member;
pub mod progress;
pub mod report;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use self::config::FamilyConfig;
use self::member::{Heard, Member};
use self::progress::{FamilyObserver, FamilyProgress, MemberProgress, Phase};
use self::report::FamilyReport;
use super::end::End;
use super::kept::LoadGoing;
use super::need::ON_THE_WAY;
use super::occasion::GuestCounters;
use super::ports::events;
use super::report::{LoadCounts, nanoseconds};
use super::vm::PayloadVm;
use super::{Beginning, RunError, kept, policy_of};
use crate::accel::{self, Opened};
use crate::check::{Boot, Examiner, Look, Violation, ViolationCounts, Worker};
use crate::incarnation::Incarnation;
use crate::run_snapshot::RunSnapshot;
use palimpsest::causes::chain;
use palimpsest::host::Limits;
use palimpsest::kvm::{Kvm, Platform, PlatformError};
use palimpsest::mm::{PAGE_SIZE, PoolUsage, Promise, PromiseError};
use palimpsest::snapshot::TakeError;
use palimpsest::vcpus::VcpusError;
use palimpsest::vm::{Accelerator, Shells};

/// Between two calls of the observer.
const TICK: Duration = Duration::from_millis(100);

/// Why a family could not start.
#[derive(Debug, thiserror::Error)]
pub enum FamilyError {
    /// The root could not.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Without KVM a process has room for one machine.
    #[error(
        "clones need KVM: without it a guest's addresses are addresses of this process, which has each once \
         (docs/decisions/0011){}", why.as_ref().map_or(String::new(), |why| format!("; {why}"))
    )]
    User {
        /// Why there is no KVM, if nobody has asked to do without.
        why: Option<String>,
    },
    /// KVM cannot be opened once more, by the thread that makes shells.
    #[error("cannot open kvm for clones")]
    Kvm(#[from] PlatformError),
    /// No memory for the root.
    #[error("no memory for the root")]
    Promise(#[source] PromiseError),
    /// No thread that makes shells.
    #[error("cannot start the thread that makes shells")]
    Shells(#[source] std::io::Error),
}

/// Runs a family of `image` as `config` says, until that is over or `stop` is set.
///
/// # Errors
/// If the root could not be started. Whatever happens after that is in the report.
pub fn run(
    config: &FamilyConfig,
    image: Vec<u8>,
    stop: &AtomicBool,
    observer: &mut dyn FamilyObserver,
) -> Result<FamilyReport, FamilyError> {
    run_from(config, Beginning::Boot(image), stop, observer)
}

/// The same, whose root begins with whatever there is: all clones of a guest that was loaded share its frames.
///
/// # Errors
/// As [`run`].
pub fn run_from(
    config: &FamilyConfig,
    beginning: Beginning,
    stop: &AtomicBool,
    observer: &mut dyn FamilyObserver,
) -> Result<FamilyReport, FamilyError> {
    let guest = &config.guest;
    let Opened { accelerator, note } = accel::open(guest.accel).map_err(RunError::from)?;
    if matches!(accelerator, Accelerator::User(_)) {
        return Err(FamilyError::User {
            why: note.and_then(|note| note.split_once(": ").map(|(_, why)| why.to_owned())),
        });
    }
    let limits = Limits::detect().map_err(RunError::Limits)?;
    let plan = config.plan(&limits).map_err(|error| match beginning {
        Beginning::Boot(_) => RunError::from(error),
        Beginning::Load(_) => error.of_saved().into(),
    })?;
    let (sender, inbox) = events();
    let (vm, loaded) = match beginning {
        Beginning::Boot(image) => {
            let vm = PayloadVm::build(&accelerator, guest, image, policy_of(guest), plan, sender);
            (vm.map_err(RunError::from)?, None)
        }
        Beginning::Load(source) => {
            let mut loading = |progress: &palimpsest::kept::Progress| {
                observer.loading(progress);
                !stop.load(Ordering::Relaxed)
            };
            let loaded = kept::load(
                &accelerator,
                guest,
                &source,
                plan,
                sender,
                kept::Purpose::Run,
                &mut loading,
            );
            let loaded = loaded.map_err(RunError::from)?;
            loaded.notes.iter().for_each(|note| observer.note(note));
            let begun = LoadedRoot {
                snapshot: loaded.snapshot,
                boot: loaded.boot.map(Arc::new),
                counts: loaded.counts,
                going: loaded.going,
                began: loaded.began,
            };
            (loaded.vm, Some(begun))
        }
    };
    let platform = accelerator.platform();
    let shells = Shells::start(
        Kvm::open()?,
        vm.frames().clone(),
        guest.memory,
        guest.vcpus as usize,
        0,
    )
    .map_err(FamilyError::Shells)?;
    let family = Family::start(config, (vm, loaded), inbox, shells, stop, observer)?;
    Ok(family.run(platform))
}

/// What a root was loaded from.
struct LoadedRoot {
    snapshot: Arc<RunSnapshot>,
    boot: Option<Arc<Boot>>,
    counts: LoadCounts,
    going: Option<LoadGoing>,
    began: Instant,
}

/// A family that lives.
struct Family<'a> {
    config: &'a FamilyConfig,
    stop: &'a AtomicBool,
    observer: &'a mut dyn FamilyObserver,
    // Before the shells, whose frames theirs are.
    members: Vec<Option<Member>>,
    /// What is left to say of those that are gone.
    gone: Vec<report::MemberReport>,
    shells: Shells,
    worker: Worker,
    started: Instant,
    next_tick: Instant,
    next_snapshot: Instant,
    phase: Phase,
    /// All there ever were: what one has drawn, nobody is to draw again.
    incarnations: Vec<Arc<Incarnation>>,
    /// Snapshots that clones were made of, and the memory that may be theirs alone.
    origins: Vec<(Arc<RunSnapshot>, Promise)>,
    /// What all others may have alone.
    for_snapshots: Promise,
    /// Others, the oldest first.
    kept: VecDeque<Arc<RunSnapshot>>,
    /// Which machine each snapshot is of, by number.
    owners: HashMap<u64, usize>,
    taken: u64,
    /// What the root was loaded from, if it was.
    loaded: Option<LoadCounts>,
    /// What of that goes on.
    loading: Option<LoadGoing>,
    boot: Option<Arc<Boot>>,
    first_instruction: Histogram<u64>,
    /// Of snapshots that clones were made of.
    fork_pauses: Histogram<u64>,
    /// Of all others.
    pauses: Histogram<u64>,
    forking: Option<report::Forking>,
    refused: Option<String>,
    violations: ViolationCounts,
    unchecked: Vec<String>,
    errors: Vec<String>,
    /// Whose turn is next to have a snapshot taken.
    turn: usize,
}

impl<'a> Family<'a> {
    fn start(
        config: &'a FamilyConfig,
        (mut vm, loaded): (PayloadVm, Option<LoadedRoot>),
        inbox: super::ports::Inbox,
        shells: Shells,
        stop: &'a AtomicBool,
        observer: &'a mut dyn FamilyObserver,
    ) -> Result<Self, FamilyError> {
        let examiner = Examiner::new(
            config.guest.seed,
            config.guest.pattern,
            vm.layout,
            Arc::clone(vm.frames().physmap()),
            Arc::clone(vm.frames().pool()),
        )
        .stepping_aside(Arc::clone(vm.aside()));
        let mut worker = Worker::start(examiner).map_err(RunError::Checker)?;
        let pool = vm.frames().pool();
        let memory = config.guest.memory / PAGE_SIZE;
        // There is as much: a run with less was refused.
        let promise = pool.try_promise(memory).map_err(FamilyError::Promise)?;
        let most_snapshots = (config.guest.keep as u64 + ON_THE_WAY) * memory;
        let left = pool.usage().limit.saturating_sub(memory);
        // Where there is little, clones and what they are made of come before a second snapshot.
        let of_family = config.of_clones_and_origins() / PAGE_SIZE;
        let for_snapshots = left.saturating_sub(of_family).max(memory.min(left));
        let for_snapshots = pool.try_promise(most_snapshots.min(for_snapshots));
        let for_snapshots = for_snapshots.map_err(FamilyError::Promise)?;
        let (mut taken, mut boot, mut incarnations) = (0, None, Vec::new());
        let mut loading = None;
        let ops_before = GuestCounters::of(&vm).ops().iter().sum();
        let counts = match loaded {
            None => {
                vm.start().map_err(RunError::Start)?;
                None
            }
            Some(loaded) => {
                // What it was saved as has drawn numbers, too.
                incarnations.push(Arc::clone(&vm.incarnation));
                let running = vm.start_from(&loaded.snapshot, &config.guest);
                let running = running.map_err(RunError::from)?;
                let mut counts = loaded.counts;
                counts.first_instruction_s = running.duration_since(loaded.began).as_secs_f64();
                loading = loaded.going;
                if let Some(going) = &mut loading
                    && let Err(why) = going.prefetch(vm.frames())
                {
                    observer.note(&why);
                }
                boot = loaded.boot;
                let look = Look {
                    boot: boot.clone(),
                    ..Look::default()
                };
                worker.first_look(&loaded.snapshot, look);
                worker.retire_oldest(&mut VecDeque::from([loaded.snapshot]));
                taken = 1;
                Some(counts)
            }
        };
        incarnations.push(Arc::clone(&vm.incarnation));
        let now = Instant::now();
        Ok(Self {
            config,
            stop,
            observer,
            incarnations,
            loaded: counts,
            loading,
            members: vec![Some(Member::root(vm, inbox, promise, ops_before))],
            for_snapshots,
            gone: Vec::new(),
            shells,
            worker,
            started: now,
            next_tick: now + TICK,
            next_snapshot: now,
            phase: Phase::WarmingUp,
            origins: Vec::new(),
            kept: VecDeque::new(),
            // What was loaded is the root's.
            owners: (1..=taken).map(|number| (number, 0)).collect(),
            taken,
            boot,
            first_instruction: nanoseconds(),
            fork_pauses: nanoseconds(),
            pauses: nanoseconds(),
            forking: None,
            refused: None,
            violations: ViolationCounts::default(),
            unchecked: Vec::new(),
            errors: Vec::new(),
            turn: 0,
        })
    }

    /// Has the family grow, live and die, and reports.
    fn run(mut self, platform: &Platform) -> FamilyReport {
        let ended = self.grow().and_then(|()| self.live());
        let ended = match ended {
            Err(End { error: None, by }) => by,
            Err(End {
                error: Some(error),
                by,
            }) => {
                self.errors.push(error);
                by
            }
            Ok(by) => by,
        };
        self.finish(ended, platform)
    }

    /// Whether there is memory for another snapshot, that clones are not made of: for all that its machine may
    /// write while it lives.
    fn has_room_for_snapshot(&self) -> bool {
        let memory = self.config.guest.memory / PAGE_SIZE;
        let most = (self.for_snapshots.frames() / memory).max(1);
        self.kept.len() as u64 + self.worker.backlog() < most
    }

    /// Takes a snapshot of a machine and hands it to the checker.
    fn snapshot(&mut self, of: usize) -> Result<Option<Arc<RunSnapshot>>, End> {
        let Some(member) = self.members[of].as_ref() else {
            return Ok(None);
        };
        let parent = member.runs_on_from.upgrade();
        let (taken, timing) = match member.vm.parts().take() {
            Ok(taken) => taken,
            Err(TakeError::Vcpus(error)) => {
                return self.cannot_be_paused(of, &error).map(|()| None);
            }
            Err(error) => return self.has_ended(of, &chain(&error)).map(|()| None),
        };
        if let Some(error) = member.vm.devices.take_error() {
            // A request was lost to it, so the snapshot would not pass: this is the better reason.
            return self.has_ended(of, &chain(&error)).map(|()| None);
        }
        self.taken += 1;
        let number = self.taken;
        let snapshot = RunSnapshot::new(number, parent.as_ref().map(|p| p.number()), taken);
        let snapshot = snapshot.map_err(|error| End::error(&error))?;
        let snapshot = Arc::new(snapshot.of(Arc::clone(&member.vm.incarnation)));
        self.owners.insert(number, of);
        let pauses = match self.phase {
            Phase::Forking { .. } => &mut self.fork_pauses,
            _ => &mut self.pauses,
        };
        pauses.saturating_record(timing.pause().as_nanos() as u64);
        let look = Look {
            boot: self.boot.clone(),
            parent,
            tracked: None,
        };
        self.worker.first_look(&snapshot, look);
        if let Some(member) = self.members[of].as_mut() {
            member.runs_on_from = Arc::downgrade(&snapshot);
        }
        Ok(Some(snapshot))
    }

    /// The vCPUs of a machine cannot be paused. If one has ended, its own words are better than the pauser's.
    fn cannot_be_paused(&mut self, of: usize, error: &VcpusError) -> Result<(), End> {
        let mut heard = match &self.members[of] {
            Some(member) if matches!(error, VcpusError::Stopped { .. }) => member.last_words(),
            _ => Heard::default(),
        };
        heard.ended.get_or_insert_with(|| chain(error));
        self.take_in(of, heard)
    }

    /// A machine has ended.
    fn has_ended(&mut self, of: usize, why: &str) -> Result<(), End> {
        let quota = match why.contains("out of quota") {
            true => " (--quota is what a clone may have)",
            false => "",
        };
        self.errors.push(format!("machine {of}{quota}: {why}"));
        self.drop_member(of);
        match self.members.iter().flatten().next() {
            Some(_) => Ok(()),
            None => Err(End::failed("no machine is left".to_owned())),
        }
    }

    /// Passes on what was heard of a machine, which has ended if that says so.
    fn take_in(&mut self, of: usize, heard: Heard) -> Result<(), End> {
        let ended = self.pass_on(of, heard);
        ended.map_or(Ok(()), |why| self.has_ended(of, &why))
    }

    /// Passes on what a machine has said; returns why it has ended, if it has.
    fn pass_on(&mut self, of: usize, heard: Heard) -> Option<String> {
        for text in heard.console {
            self.observer.console(of, &text);
        }
        for violation in heard.violations {
            self.violation(Some(of), &violation);
        }
        heard.ended
    }

    /// What is due every tenth of a second. Says whether the run is to go on.
    fn tick(&mut self) -> Result<(), End> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(End::fine(super::report::EndedBy::CtrlC));
        }
        let now = Instant::now();
        if now < self.next_tick {
            return Ok(());
        }
        self.next_tick = now + TICK;
        for violation in self.worker.take_violations() {
            self.violation(None, &violation);
        }
        if self.worker.is_dead() {
            return Err(End::failed(self.worker.why_dead()));
        }
        let machines = self.members.len() as u32;
        for of in 0..self.members.len() {
            let Some(member) = self.members[of].as_mut() else {
                continue;
            };
            let heard = member.listen(machines);
            self.take_in(of, heard)?;
        }
        let progress = self.progress();
        self.observer.progress(&progress);
        Ok(())
    }

    fn progress(&mut self) -> FamilyProgress {
        let pool = self.pool_usage();
        let members = self
            .members
            .iter_mut()
            .enumerate()
            .filter_map(|(id, member)| {
                let member = member.as_mut()?;
                Some(MemberProgress {
                    id,
                    parent: member.parent,
                    depth: member.depth,
                    ops: member.ops(),
                    ops_per_s: member.recent_ops_per_s(),
                })
            });
        FamilyProgress {
            elapsed: self.started.elapsed(),
            phase: self.phase,
            members: members.collect(),
            wanted: self.config.machines(),
            snapshots: self.taken,
            checked: self.worker.progress().checked,
            violations: self.violations,
            bytes_in_use: pool.in_use * PAGE_SIZE,
            bytes_limit: pool.limit * PAGE_SIZE,
        }
    }

    fn violation(&mut self, of: Option<usize>, violation: &Violation) {
        let owner = || self.owners.get(&violation.snapshot?).copied();
        let of = of.or_else(owner);
        self.violations.add(violation.oracle);
        self.observer.violation(of, violation);
    }

    fn pool_usage(&self) -> PoolUsage {
        self.shells.frames().pool().usage()
    }

    /// Drops a machine; what is to be said of it is kept, what it has said last is heard, and what it has drawn
    /// is looked at.
    fn drop_member(&mut self, of: usize) {
        let Some(member) = self.members[of].take() else {
            return;
        };
        self.gone.push(member.report(of));
        // Else its vCPUs wait for their turn behind all others before they can end.
        let _first = member.vm.ram().precedence().take();
        member.vm.machine().stop();
        let stopped = member.vm.machine().wait_until_stopped();
        // Why it has ended, if it has by itself, is known or does not matter any more.
        self.pass_on(of, member.take_words());
        if stopped.is_ok()
            && let Some(boot) = &self.boot
        {
            let drawn = member.vm.draws_at_rest(boot);
            let incarnation = Arc::clone(&member.vm.incarnation);
            self.worker.look_at_draws(incarnation, drawn);
        }
    }
}
