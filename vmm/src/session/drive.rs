//! The loop of a run.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest::abi::{Failure, FailureKind, PAGE_SIZE};
use guest::formula::Schedule;
use hdrhistogram::Histogram;

use super::RunError;
use super::config::{Config, GuestSource, Injection, RunLength};
use super::faults::{AtLarge, Late, Old, Stale};
use super::life::{self, DeviceWatch, LifeWatch};
use super::occasion::{Counters, Occasion, PATIENCE, overdue, wait_until};
use super::ports::{Event, Inbox};
use super::progress::{Observer, Progress};
use super::report::{
    DirtyCounts, DmaCounts, EndedBy, FaultCounts, GuestCounts, MemoryPeaks, PinCounts, Quantiles,
    Report, SnapshotCounts, Verdict, nanoseconds,
};
use super::skew::SetBack;
use super::stall::StallMeter;
use super::tracker::Tracker;
use super::vm::Vm;
use crate::check::{
    self, Boot, Examiner, Look, Oracle, Violation, ViolationCounts, Worker, account,
};
use crate::dma::{DeviceState, Mismatch};
use crate::snapshot::Snapshot;
use palimpsest::causes::chain;
use palimpsest::kvm::{self, KvmError, MachineStats, Outcome, Rung, StopReason, VcpuState};
use palimpsest::mm::{CowPolicy, ForkError, MmStats, PoolUsage};
use palimpsest::snapshot::{Preparation, RewindError, TakeError, Timing};
use palimpsest::vcpus::{Capture, VcpusError};

/// Between two calls of the observer.
const TICK: Duration = Duration::from_millis(100);
/// Looks the checker may be behind before the next snapshot waits for it.
const MOST_BACKLOG: u64 = 3;
/// What devices read and should not have, kept until the guest reports it. Others are of requests that a restore undid.
const MOST_MISMATCHES: usize = 512;
/// How long an ended vCPU's reason may take to arrive.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A run that goes on.
pub(super) struct Drive<'a, P: CowPolicy> {
    config: &'a Config,
    stop: &'a AtomicBool,
    observer: &'a mut dyn Observer,
    vm: Vm<P>,
    inbox: Inbox,
    worker: Worker,
    started: Instant,
    /// Snapshots that can be restored, oldest first.
    kept: VecDeque<Arc<Snapshot>>,
    /// The one the VM ran on from.
    parent: Option<Arc<Snapshot>>,
    taken: u64,
    restored: u64,
    /// Snapshots that were to be kept, and had to make room.
    dropped: u64,
    /// What was not checked though it must be.
    unchecked: Vec<String>,
    /// Messages of the guest that could not be listened to.
    unheard: u64,
    in_flight: u64,
    next_snapshot: Instant,
    next_tick: Instant,
    pauses: Histogram<u64>,
    last_pause: Option<Duration>,
    stall: StallMeter,
    life: LifeWatch,
    device_life: DeviceWatch,
    /// What is known of the guest since it booted, once it follows the formula.
    boot: Option<Arc<Boot>>,
    /// The first snapshot that was taken since.
    first_of_boot: u64,
    /// Of the injected fault, if there is one.
    occasion: Occasion,
    /// The snapshot taken last is one after which the guest is to be rewound, and has not been.
    restore_is_due: bool,
    tracker: Option<Tracker>,
    /// Operations that restores have undone.
    ops_undone: u64,
    recent_ops: (Instant, u64, f64),
    violations: ViolationCounts,
    /// The latest last.
    mismatches: VecDeque<Mismatch>,
    random: Random,
    leaked: bool,
}

/// How a run ended.
struct End {
    by: EndedBy,
    error: Option<String>,
}

impl End {
    fn fine(by: EndedBy) -> Self {
        Self { by, error: None }
    }

    fn error(error: &dyn std::error::Error) -> Self {
        Self {
            by: EndedBy::Error,
            error: Some(chain(error)),
        }
    }

    fn of_vcpu(vcpu: usize, outcome: &Outcome) -> Self {
        let crash = |error: String| Self {
            by: EndedBy::GuestCrash,
            error: Some(error),
        };
        match outcome {
            Outcome::Stopped(StopReason::Exit { status: 0 }) => Self::fine(EndedBy::GuestExit),
            Outcome::Stopped(reason @ StopReason::Exit { .. }) => Self {
                by: EndedBy::GuestExit,
                error: Some(reason.to_string()),
            },
            Outcome::Stopped(reason @ StopReason::Panic { .. }) => crash(reason.to_string()),
            Outcome::Crashed { .. } => crash(format!("vcpu {vcpu}: {outcome}")),
            Outcome::Stopped(StopReason::Failed { .. }) | Outcome::Failed { .. } => Self {
                by: EndedBy::Error,
                error: Some(format!("vcpu {vcpu}: {outcome}")),
            },
        }
    }
}

impl<'a, P: CowPolicy> Drive<'a, P> {
    /// Starts the guest.
    pub(super) fn start(
        vm: Vm<P>,
        config: &'a Config,
        inbox: Inbox,
        stop: &'a AtomicBool,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, RunError> {
        let examiner = Examiner::new(
            config.seed,
            config.pattern,
            vm.layout,
            Arc::clone(vm.frames().physmap()),
            Arc::clone(vm.frames().pool()),
        );
        let worker = Worker::start(examiner).map_err(RunError::Checker)?;
        let stall = StallMeter::new(vm.layout, vm.machine().tsc_khz());
        vm.start().map_err(RunError::Start)?;
        let tracker = Tracker::new(config, &vm.layout);
        let now = Instant::now();
        Ok(Self {
            config,
            stop,
            observer,
            vm,
            inbox,
            worker,
            started: now,
            kept: VecDeque::new(),
            parent: None,
            taken: 0,
            restored: 0,
            dropped: 0,
            unchecked: Vec::new(),
            unheard: 0,
            in_flight: 0,
            next_snapshot: now + config.snapshot_every,
            next_tick: now + TICK,
            pauses: nanoseconds(),
            last_pause: None,
            stall,
            life: LifeWatch::default(),
            device_life: DeviceWatch::default(),
            boot: None,
            first_of_boot: 0,
            occasion: Occasion::new(config.inject, config.vcpus),
            restore_is_due: false,
            tracker,
            ops_undone: 0,
            recent_ops: (now, 0, 0.0),
            violations: ViolationCounts::default(),
            mismatches: VecDeque::new(),
            random: Random(config.seed),
            leaked: false,
        })
    }

    /// Runs to the end, takes everything apart, and reports.
    pub(super) fn run(
        mut self,
        policy: &str,
        platform: &kvm::Platform,
    ) -> Result<Report, RunError> {
        let end = self.drive();
        let duration = self.started.elapsed();
        self.tick();
        if end.by.leaves_the_guest_running() {
            self.await_life();
        }
        Ok(self.finish(end, duration, policy, platform))
    }

    /// Waits for vCPUs that have done nothing since the guest was rewound, as long as they may take, unless somebody wants to be gone.
    fn await_life(&mut self) {
        while self.life.is_waiting() && !self.stop.load(Ordering::Relaxed) {
            let patience = life::patience(self.stall.longest());
            let ops = self.counters().ops();
            if let Some(violation) = self.life.look(&ops, patience) {
                self.violation(&violation);
            }
            if let Some(event) = self.inbox.wait(Duration::from_millis(1))
                && self.handle(event).is_some()
            {
                return;
            }
        }
    }

    fn drive(&mut self) -> End {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return End::fine(EndedBy::CtrlC);
            }
            let now = Instant::now();
            let is_over = match self.config.length {
                RunLength::Duration(length) => {
                    (now >= self.started + length).then_some(EndedBy::Duration)
                }
                RunLength::Snapshots(count) => (self.taken >= count).then_some(EndedBy::Snapshots),
            };
            let ops = self.counters().ops();
            if let Some(by) = is_over
                && self
                    .occasion
                    .is_over(&ops, &self.requests_by_device(), &self.vm.layout)
            {
                return End::fine(by);
            }
            if let Some(error) = self.occasion.overdue() {
                return End {
                    by: EndedBy::Error,
                    error: Some(error),
                };
            }
            if is_over.is_some() {
                if let Some(note) = self.occasion.go_on() {
                    self.observer.note(&note);
                }
                self.restore_is_due |= self.occasion.lacks_a_restore();
            }
            let is_ripe = self.occasion.is_ripe(&ops);
            if let Err(end) = self.latch() {
                return end;
            }
            if now >= self.next_tick {
                self.next_tick = now + TICK;
                self.tick();
            }
            if let Some(error) = self.vm.devices.take_error() {
                return End::error(&error);
            }
            if let Err(error) = self.vm.space().check() {
                return End::error(&error);
            }
            if self.worker.is_dead() {
                return End {
                    by: EndedBy::Error,
                    error: Some("the checker has panicked".to_owned()),
                };
            }
            if let Err(end) = self.track(now) {
                return end;
            }
            if self.restore_is_due && is_ripe {
                if let Err(end) = self.restore() {
                    return end;
                }
                continue;
            }
            // What is still missing for the fault does not wait for its time.
            let is_wanted = is_over.is_none() || !self.occasion.has_steps();
            let due = now >= self.next_snapshot || (is_over.is_some() && is_wanted);
            if due
                && is_ripe
                && is_wanted
                && self.may_be_checked()
                && !self.restore_is_due
                && self.worker.backlog() <= MOST_BACKLOG
                && self.has_room()
            {
                // The next one is due a whole interval from now: a late one is not made up for by a burst.
                self.next_snapshot = now + self.config.snapshot_every;
                if let Err(end) = self.snapshot() {
                    return end;
                }
            }
            let mut wake = if due {
                Duration::from_millis(1)
            } else {
                self.next_snapshot.min(self.next_tick) - now
            };
            if let Some(tracker) = &self.tracker {
                wake = wake.min(tracker.next().saturating_duration_since(now));
            }
            if let Some(event) = self.inbox.wait(wake.min(TICK))
                && let Some(end) = self.handle(event)
            {
                return end;
            }
        }
    }

    /// A round of dirty tracking, if one is due. Beside the running guest, if that can be.
    fn track(&mut self, now: Instant) -> Result<(), End> {
        let Some(tracker) = &mut self.tracker else {
            return Ok(());
        };
        if now < tracker.next() {
            return Ok(());
        }
        let parts = self.vm.parts();
        match parts.while_protecting(|| tracker.round(parts.space)) {
            Ok(done) => done.map_err(|error| End::error(&error)),
            Err(error) => Err(self.why_vcpus_ended(error)),
        }
    }

    fn handle(&mut self, event: Event) -> Option<End> {
        match event {
            Event::Console(text) => self.observer.console(&format!("{text}\n")),
            Event::Failure(failure) => {
                let violation = self.failure(&failure);
                self.violation(&violation);
            }
            Event::UnreadableFailure(why) => {
                let what = format!("the guest reports a failure that cannot be read, {why}");
                self.violation(&Violation::new(Oracle::Life, what));
            }
            Event::Ended(vcpu, outcome) => return Some(End::of_vcpu(vcpu, &outcome)),
        }
        None
    }

    /// Has the guest say, while it runs, whether it follows the formula: what it has said once holds, whatever a snapshot says.
    fn latch(&mut self) -> Result<(), End> {
        if self.boot.is_some() {
            return Ok(());
        }
        let (ram, machine) = (self.vm.ram(), self.vm.machine());
        let registers = || {
            let paused = machine.pause(Capture::Registers)?;
            let states = paused.states()?;
            paused.resume();
            Ok::<_, KvmError>(states)
        };
        match Boot::latch(ram, &self.vm.layout, &self.vm.reference, registers) {
            Ok(boot) => {
                self.boot = boot.map(Arc::new);
                self.first_of_boot = self.taken + 1;
            }
            Err(error) => return Err(self.why_vcpus_ended(error.into())),
        }
        let is_late = self.started.elapsed() > PATIENCE;
        if !self.may_be_checked() && is_late {
            return Err(End {
                by: EndedBy::Error,
                error: Some(format!(
                    "the guest has not begun to write memory after {} s",
                    PATIENCE.as_secs()
                )),
            });
        }
        Ok(())
    }

    /// Whether it is known what a snapshot must hold, or never will be: the payload follows the formula, others may.
    fn may_be_checked(&self) -> bool {
        self.boot.is_some() || self.config.guest != GuestSource::Payload
    }

    /// Takes a snapshot, hands it to the checker, retires an old one, and maybe rewinds.
    fn snapshot(&mut self) -> Result<(), End> {
        self.stall.before_snapshot(self.vm.ram());
        let (counters, devices) = (Counters::of(&self.vm), &self.vm.devices);
        let waited_in_vain = Cell::new(false);
        let run_on = || waited_in_vain.set(!counters.wait_for_ops(self.stop));
        let go_on = || {
            let completed = || {
                let states = devices.devices().iter().map(|device| device.state());
                states
                    .map(|state| state.queue.next_used)
                    .collect::<Vec<_>>()
            };
            let before = completed();
            let has_gone_on = || {
                before
                    .iter()
                    .zip(completed())
                    .any(|(before, now)| *before != now)
            };
            waited_in_vain.set(!wait_until(self.stop, has_gone_on));
        };
        let (ram, layout, config) = (self.vm.ram(), &self.vm.layout, self.config);
        let skewed = RefCell::new(SetBack::default());
        let set_back = |older: &VcpuState| {
            let done = counters.ops().first().copied().unwrap_or(0);
            skewed.replace(SetBack::new(ram, layout, config, older, done));
        };
        let preparation = match self.room() {
            2.. => Preparation::Early,
            _ => Preparation::None,
        };
        let number = self.taken + 1;
        let parent = self.parent.as_ref().map(|p| p.number());
        let (space, tracker) = (self.vm.space(), &mut self.tracker);
        let mut tracked = Ok(());
        let mut parts = self.vm.parts();
        let vcpus = parts.vcpus;
        let late = Late {
            vcpus,
            run_on: &run_on,
        };
        let stale = Stale {
            vcpus,
            run_on: &run_on,
            old: match config.inject {
                Some(Injection::SkewVcpus) => Old::All,
                _ => Old::Extended,
            },
            older: OnceCell::new(),
        };
        let at_large;
        match config.inject {
            Some(Injection::RunDevices) => {
                at_large = AtLarge::of(&parts.devices, go_on);
                parts.devices = at_large.iter().map(|device| device as _).collect();
            }
            Some(Injection::LateRegisters) => parts.vcpus = &late,
            Some(Injection::StaleRegisters | Injection::SkewVcpus) => parts.vcpus = &stale,
            _ => {}
        }
        // The guest has run on since there was room, and written.
        let nothing_to_drop = self.kept.is_empty() && self.parent.is_none();
        let (pool, pages) = (self.vm.frames().pool(), space.pages());
        let may_fork = || {
            let has_room = nothing_to_drop || room_for(pool.usage(), pages) > 0;
            // The last thing before the fork: memory is not what it was meanwhile.
            if has_room
                && stale.old == Old::All
                && let Some(older) = stale.older.get()
            {
                set_back(older);
            }
            has_room
        };
        let taken = parts.take_with(preparation, &may_fork, || {
            skewed.take().undo(ram);
            tracked = tracker.as_mut().map_or(Ok(()), |t| t.round(space));
        });
        let (snapshot, timing) = match taken {
            Ok(taken) => taken,
            Err(TakeError::Vcpus(error)) => return Err(self.why_vcpus_ended(error)),
            Err(TakeError::CalledOff) => {
                self.next_snapshot = Instant::now();
                return Ok(());
            }
            // The VM is as it was. Sooner or later there is none left to drop.
            Err(TakeError::Memory(ForkError::EagerCopy { .. })) if !self.kept.is_empty() => {
                self.drop_oldest();
                return Ok(());
            }
            Err(error) => return Err(End::error(&error)),
        };
        if let (true, Some(fault)) = (waited_in_vain.get(), self.config.inject) {
            return Err(End {
                by: EndedBy::Error,
                error: Some(overdue(fault)),
            });
        }
        tracked.map_err(|error| End::error(&error))?;
        if let Some(error) = self.vm.devices.take_error() {
            // A request was lost to it, so the snapshot would not pass: this is the better reason.
            return Err(End::error(&error));
        }
        self.taken = number;
        self.note_pause(timing);
        let snapshot = Snapshot::new(number, parent, snapshot);
        let snapshot = Arc::new(snapshot.map_err(|error| End::error(&error))?);
        let tracked = self.tracker.as_mut().and_then(|t| t.at(&snapshot));
        let is_in_flight = |state: &DeviceState| state.in_flight.is_some();
        self.in_flight += u64::from(snapshot.devices().iter().any(is_in_flight));
        let look = Look {
            boot: self.boot.clone(),
            parent: self.parent.clone(),
            tracked,
        };
        self.worker.first_look(&snapshot, look);
        self.parent = Some(Arc::clone(&snapshot));
        self.kept.push_back(snapshot);
        while self.kept.len() > self.config.keep {
            self.retire_oldest();
        }
        if self.config.inject == Some(Injection::LeakPin) && !self.leaked {
            self.leaked = true;
            self.vm.devices.leak_one_pin().map_err(|e| End::error(&e))?;
        }
        self.occasion
            .snapshot(self.counters().ops(), self.requests_by_device());
        let every = self.config.restore_every;
        self.restore_is_due = every > 0 && number.is_multiple_of(every);
        // With a fault in the run, the guest does something first.
        if self.restore_is_due && self.config.inject.is_none() {
            return self.restore();
        }
        Ok(())
    }

    fn note_pause(&mut self, timing: Timing) {
        let pause = timing.pause();
        self.pauses.saturating_record(pause.as_nanos() as u64);
        self.last_pause = Some(pause);
    }

    /// How often all of the guest's memory could be copied with what frames there are left.
    fn room(&self) -> u64 {
        room_for(self.vm.frames().pool().usage(), self.vm.space().pages())
    }

    /// Whether a snapshot may be taken: afterwards the guest may write all of its memory, and each page of it is copied once. If there is
    /// no room for that, and nothing on its way out that will make room, the oldest snapshot has to go.
    fn has_room(&mut self) -> bool {
        if self.room() > 0 {
            return true;
        }
        if self.worker.backlog() > 0 {
            return false;
        }
        if !self.kept.is_empty() {
            self.drop_oldest();
            return false;
        }
        // These two hold the last one for what can be compared with it.
        self.parent = None;
        self.tracker.iter_mut().for_each(Tracker::forget);
        true
    }

    fn drop_oldest(&mut self) {
        self.retire_oldest();
        self.dropped += 1;
        if self.dropped == 1 {
            let limit = self.vm.frames().pool().usage().limit * PAGE_SIZE;
            self.observer.note(&format!(
                "snapshots go early to make room: this run may take {} MiB",
                limit >> 20
            ));
        }
    }

    fn retire_oldest(&mut self) {
        let Some(oldest) = self.kept.pop_front() else {
            return;
        };
        let heir = self
            .kept
            .iter()
            .find(|s| s.parent() == Some(oldest.number()));
        self.worker.last_look(oldest, heir);
    }

    fn restore(&mut self) -> Result<(), End> {
        self.restore_is_due = false;
        let chosen = match self.config.inject {
            // The one that the guest has run on from.
            Some(Injection::StalePage) => self.kept.len().saturating_sub(1),
            _ => self.random.below(self.kept.len()),
        };
        let Some(snapshot) = self.kept.get(chosen).map(Arc::clone) else {
            return Ok(());
        };
        self.stall.before_restore(self.vm.ram());
        let ops_before = self.counters().ops();
        let before: u64 = ops_before.iter().sum();
        let patience = life::patience(self.stall.longest());
        if let Some(violation) = self.life.look(&ops_before, patience) {
            self.violation(&violation);
        }
        let stale = (self.config.inject == Some(Injection::StalePage))
            .then(|| self.page_to_come(&snapshot))
            .flatten();
        let (ram, layout) = (self.vm.ram().clone(), self.vm.layout);
        let pool = Arc::clone(self.vm.frames().pool());
        let mut wrong = None;
        let restored = self.vm.parts().restore(snapshot.taken(), || {
            wrong = check::restored(&ram, &snapshot, &layout, &pool);
            if let Some((gpa, page)) = stale
                && let Err(error) = ram.write(gpa, &page)
            {
                tracing::warn!(%error, "cannot inject a stale page");
            }
        });
        if let Err(error) = restored {
            // Nothing runs on that could be watched.
            (self.life, self.device_life) = (LifeWatch::default(), DeviceWatch::default());
            return Err(match error {
                RewindError::Vcpus(error) => self.why_vcpus_ended(error),
                error => End::error(&error),
            });
        }
        if let Some(violation) = wrong {
            self.violation(&violation);
        }
        self.restored += 1;
        if snapshot.number() < self.first_of_boot {
            self.boot = None;
        }
        let ops: Vec<u64> = snapshot.vcpus().iter().map(|v| v.mm7()).collect();
        self.ops_undone += before.saturating_sub(ops.iter().sum());
        // Not by the registers: memory may be an operation behind them.
        let now = self.counters().ops();
        self.occasion.restore(now.clone());
        if self.boot.is_some() {
            self.life.rewound(snapshot.number(), now);
            let requests = self.requests_by_device();
            self.device_life
                .rewound(snapshot.number(), &ops_before, ops, requests);
        } else {
            (self.life, self.device_life) = (LifeWatch::default(), DeviceWatch::default());
        }
        self.parent = Some(snapshot);
        Ok(())
    }

    /// A vCPU has ended by itself, or can't be stopped: its own words are better than the pauser's.
    fn why_vcpus_ended(&mut self, error: VcpusError) -> End {
        let deadline = Instant::now() + LAST_WORDS;
        if matches!(error, VcpusError::Stopped { .. }) {
            while let Some(event) = self
                .inbox
                .wait(deadline.saturating_duration_since(Instant::now()))
            {
                if let Some(end) = self.handle(event) {
                    return end;
                }
            }
        }
        End::error(&error)
    }

    /// The page that vCPU 0 wrote with the second operation after `snapshot`, and what is in it now: when the guest is rewound, it looks at that
    /// page before anything else that it does anew.
    fn page_to_come(&self, snapshot: &Snapshot) -> Option<(u64, Vec<u8>)> {
        let op = snapshot.vcpus().first()?.mm7() + 1;
        let (pattern, layout) = (self.config.pattern, &self.vm.layout);
        let schedule = Schedule::new(pattern, layout.slots(pattern, 0), self.config.seed, 0);
        let gpa = layout.slot_gpa(pattern, 0, schedule.slot_of(op));
        let mut page = vec![0; PAGE_SIZE as usize];
        self.vm.ram().read(gpa, &mut page).ok()?;
        Some((gpa, page))
    }

    fn counters(&self) -> Counters<'_> {
        Counters::of(&self.vm)
    }

    /// Requests that each device has done.
    fn requests_by_device(&self) -> Vec<u64> {
        let devices = self.vm.devices.devices().iter();
        devices
            .map(|device| device.stats())
            .map(|stats| stats.to_guest + stats.from_guest)
            .collect()
    }

    fn failure(&mut self, failure: &Failure) -> Violation {
        let kind = FailureKind::from_raw(failure.kind);
        let (oracle, what) = match kind {
            Some(FailureKind::Page) => (Oracle::Life, "a page is not what the guest left there"),
            Some(FailureKind::DmaToGuest) => (
                Oracle::Coherence,
                "the guest does not see what a device wrote",
            ),
            Some(FailureKind::DmaFromGuest) => (
                Oracle::Coherence,
                "a device does not see what the guest wrote",
            ),
            Some(FailureKind::Margin) => (
                Oracle::Coherence,
                "the guest's own bytes beside a DMA buffer are lost",
            ),
            Some(FailureKind::Ring) => (
                Oracle::Coherence,
                "a completion makes no sense to the guest",
            ),
            Some(FailureKind::Register) => {
                (Oracle::Life, "a register is not what the vcpu left there")
            }
            None => (Oracle::Life, "the guest reports a failure of unknown kind"),
        };
        let mut v = Violation::new(
            oracle,
            format!("{what} (vcpu {}, operation {})", failure.vcpu, failure.op),
        );
        v.expected = format!("{:#018x}", failure.expected);
        v.found = match kind {
            Some(FailureKind::DmaFromGuest) => self.seen_by_device(failure),
            _ => format!("{:#018x}", failure.found),
        };
        if kind == Some(FailureKind::Register) {
            return v;
        }
        v.gpa = Some(failure.gpa);
        if failure.seq != 0 || failure.device != 0 {
            v.last_writer = format!("device {}, request {}", failure.device, failure.seq);
        }
        if let Ok(entry) = self
            .vm
            .space()
            .entry(palimpsest::mm::Gfn::of_gpa(failure.gpa))
        {
            v.frame = format!("{entry:?} {:?}", self.vm.frames().pool().state(entry.pfn()));
        }
        v
    }

    /// What the device saw of a request that `failure` is about. The guest can't know: it sees what it wrote itself.
    fn seen_by_device(&mut self, failure: &Failure) -> String {
        self.collect_mismatches();
        let of_request = |m: &&Mismatch| (m.device, m.seq) == (failure.device, failure.seq);
        match self.mismatches.iter().rev().find(of_request) {
            Some(mismatch) => format!("{:#018x}", mismatch.found),
            None => format!("{:#018x} by the guest, else by the device", failure.found),
        }
    }

    fn collect_mismatches(&mut self) {
        for mismatch in self.vm.devices.take_mismatches() {
            tracing::debug!(?mismatch, "a device read something unexpected");
            self.mismatches.push_back(mismatch);
        }
        let old = self.mismatches.len().saturating_sub(MOST_MISMATCHES);
        self.mismatches.drain(..old);
    }

    fn violation(&mut self, violation: &Violation) {
        self.violations.add(violation.oracle);
        self.observer.violation(violation);
    }

    fn tick(&mut self) {
        for violation in self.worker.take_violations() {
            self.violation(&violation);
        }
        let ops = self.counters().ops();
        let patience = life::patience(self.stall.longest());
        if let Some(violation) = self.life.look(&ops, patience) {
            self.violation(&violation);
        }
        let requests = self.requests_by_device();
        if let Some(violation) = self.device_life.look(&ops, &requests, patience) {
            self.violation(&violation);
        }
        self.stall.look(self.vm.ram());
        self.collect_mismatches();
        let lost = self.inbox.take_lost();
        self.unheard += lost as u64;
        if lost > 0 {
            self.observer.note(&format!(
                "the guest says more than can be listened to: {lost} messages lost"
            ));
        }
        let progress = self.progress(ops.iter().sum());
        self.observer.progress(&progress);
    }

    fn progress(&mut self, ops_now: u64) -> Progress {
        let now = Instant::now();
        let ops = ops_now + self.ops_undone;
        let (then, before, rate) = self.recent_ops;
        let elapsed = (now - then).as_secs_f64();
        if elapsed >= 0.5 {
            self.recent_ops = (now, ops, ops.saturating_sub(before) as f64 / elapsed);
        }
        let (mm, dma) = (self.vm.space().stats(), self.vm.devices.stats());
        let usage = self.vm.frames().pool().usage();
        Progress {
            elapsed: now - self.started,
            total: match self.config.length {
                RunLength::Duration(length) => Some(length),
                RunLength::Snapshots(_) => None,
            },
            ops,
            ops_per_s: rate,
            snapshots: self.taken,
            checked: self.worker.progress().checked,
            restored: self.restored,
            last_pause: self.last_pause,
            worst_pause: self
                .last_pause
                .map(|_| Duration::from_nanos(self.pauses.max())),
            faults: fault_counts(&mm, &self.vm.machine().stats()),
            pins: pin_counts(&mm, dma.registered),
            dirty: self.dirty_counts(),
            dma_requests: dma.to_guest + dma.from_guest,
            dma_bytes: dma.bytes,
            violations: self.violations,
            frames_in_use: usage.in_use,
            frames_committed: usage.committed,
            vmas: self.vm.frames().budget().used(),
        }
    }

    fn dirty_counts(&self) -> DirtyCounts {
        self.tracker
            .as_ref()
            .map_or_else(DirtyCounts::default, Tracker::counts)
    }

    /// Takes everything apart, looks at what is left, and writes it all down.
    fn finish(
        mut self,
        mut end: End,
        duration: Duration,
        policy: &str,
        platform: &kvm::Platform,
    ) -> Report {
        self.stall.finish(self.vm.ram());
        let ops = self.counters().ops();
        let ops = ops.iter().sum::<u64>() + self.ops_undone;
        // The guest is stopped first: what is checked from here on is still checked against a machine that was running.
        self.vm.machine().stop();
        let (mm, dma) = (self.vm.space().stats(), self.vm.devices.stats());
        let faults = fault_counts(&mm, &self.vm.machine().stats());
        let dirty = self.dirty_counts();
        // They hold snapshots.
        (self.parent, self.tracker) = (None, None);
        while !self.kept.is_empty() {
            self.retire_oldest();
        }
        let (violations, finished) = self.worker.finish();
        for violation in violations {
            self.violation(&violation);
        }
        let late = finished.map_err(|error| End::error(&error)).and_then(|()| {
            self.vm
                .devices
                .take_error()
                .map_or(Ok(()), |e| Err(End::error(&e)))
        });
        if let (None, Err(late)) = (&end.error, late) {
            end = late;
        }
        let checks = self.worker.progress();
        if checks.checked == 0 {
            let why = match end.by {
                EndedBy::GuestExit => "no snapshot was taken before the guest exited",
                EndedBy::CtrlC => "no snapshot was taken before the run was ended",
                _ => {
                    "no snapshot was taken: run for longer (--duration), or take them more often (--snapshot-every)"
                }
            };
            self.unchecked.push(why.to_owned());
        }
        // What vCPUs said last.
        while let Some(event) = self.inbox.wait(Duration::ZERO) {
            if !matches!(event, Event::Ended(..)) {
                self.handle(event);
            }
        }

        let Self {
            config,
            observer,
            vm,
            mut violations,
            taken,
            restored,
            dropped,
            mut unchecked,
            unheard,
            in_flight,
            pauses,
            stall,
            ..
        } = self;
        let frames = vm.frames().clone();
        let usage = frames.pool().usage();
        let stopped = vm.machine().wait_until_stopped();
        drop(vm);
        match stopped {
            Ok(()) => {
                for violation in account(frames.pool(), frames.budget()) {
                    violations.add(violation.oracle);
                    observer.violation(&violation);
                }
            }
            // What a vCPU that is stuck holds is not lost: there is nothing to account for before it lets go.
            Err(stuck) if end.error.is_none() => end = End::error(&stuck),
            Err(_) => {}
        }

        if let Some(fault) = config.inject
            && violations.total() == 0
        {
            let oracle = fault.caught_by();
            unchecked.push(if end.by == EndedBy::CtrlC {
                format!("the run was ended before {oracle} could catch the injected {fault}")
            } else {
                format!("the injected {fault} was NOT caught by {oracle}")
            });
        }
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            platform: platform.into(),
            config: config.clone(),
            policy: policy.to_owned(),
            verdict: Verdict::of(&violations, end.error.as_deref(), &unchecked),
            error: end.error,
            unchecked,
            ended_by: end.by,
            duration_s: duration.as_secs_f64(),
            guest: GuestCounts::over(ops, duration),
            stall_us: Quantiles::of(stall.stalls()),
            snapshots: SnapshotCounts {
                taken,
                checked: checks.checked,
                restored,
                dropped,
                in_flight,
            },
            pause_us: Quantiles::of(&pauses),
            faults,
            pins: pin_counts(&mm, dma.registered),
            dma: DmaCounts {
                to_guest: dma.to_guest,
                from_guest: dma.from_guest,
                bytes: dma.bytes,
            },
            dirty,
            checked_pages: checks.pages,
            violations,
            memory: MemoryPeaks {
                frames_peak: usage.peak,
                bytes_peak: usage.peak * PAGE_SIZE,
                committed_peak: usage.committed_peak * PAGE_SIZE,
                vmas_peak: frames.budget().peak(),
                vmas_limit: frames.budget().limit(),
            },
            lines_lost: unheard,
        }
    }
}

/// How often `pages` pages could be copied with what frames are left.
fn room_for(usage: PoolUsage, pages: u64) -> u64 {
    usage.limit.saturating_sub(usage.in_use) / pages
}

fn fault_counts(mm: &MmStats, machine: &MachineStats) -> FaultCounts {
    let by = |rung| machine.rungs.of(rung);
    FaultCounts {
        reused: mm.reused,
        copied: mm.sharers_moved + mm.writer_moved,
        unshared: mm.unshared,
        eager_copied: mm.eager_copied,
        zero_filled: mm.zero_filled,
        neighbours: mm.neighbours,
        whole: mm.whole,
        split: mm.split,
        ahead: mm.ahead,
        by_kvm: by(Rung::Kvm),
        by_operand: by(Rung::Operand),
        by_walk: by(Rung::Walk),
        by_event: by(Rung::Event),
        by_region: by(Rung::Region),
        by_all: by(Rung::All),
        emulated: machine.emulated_stores,
    }
}

fn pin_counts(mm: &MmStats, registered: u64) -> PinCounts {
    PinCounts {
        fast: mm.pins_fast,
        slow: mm.pins_slow,
        registered,
    }
}

/// A small generator for choices that need no quality, so that a seed repeats them (splitmix64).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }
}
