//! A run that goes on.
//!
//! | file | concept |
//! |---|---|
//! | `cycle` | the loop: what is due, and in which order |
//! | `taking` | taking a snapshot, with the fault that is injected into it |
//! | `room` | room for snapshots, and which have to go |
//! | `restoring` | rewinding the guest |
//! | `draws` | what the guest has drawn that is in no snapshot |
//! | `guest` | what the guest says |
//! | `ticking` | what is done every tenth of a second |
//! | `counts` | how far guest, devices and memory are |
//! | `finishing` | everything is taken apart, and the report written |
//! | `beginning` | what it begins with, if that is not a guest that boots |
//! | `keeping` | saving a last snapshot, while it goes on |
//! | `random` | choices that a seed repeats |

mod beginning;
mod counts;
mod cycle;
mod draws;
mod finishing;
mod guest;
mod keeping;
mod random;
mod restoring;
mod room;
mod taking;
mod ticking;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

pub(super) use self::beginning::{Begun, Job};
use self::random::SplitMix64;
use super::RunError;
use super::config::Config;
use super::kept::{Checkpoints, Keeping, LoadGoing};
use super::life::{DeviceWatch, LifeWatch};
use super::occasion::Occasion;
use super::ports::Inbox;
use super::progress::Observer;
use super::report::{CheckpointCounts, LoadCounts, Report, StepTimes, nanoseconds};
use super::stall::StallMeter;
use super::tracker::Tracker;
use super::vm::PayloadVm;
use crate::check::{Boot, Examiner, ViolationCounts, Worker};
use crate::dma::Mismatch;
use crate::run_snapshot::RunSnapshot;
use palimpsest::kept::Base;
use palimpsest::vm::Accelerator;

/// Between two calls of the observer.
const TICK: Duration = Duration::from_millis(100);

/// A run that goes on.
pub(super) struct Drive<'a> {
    config: &'a Config,
    accelerator: &'a Accelerator,
    stop: &'a AtomicBool,
    observer: &'a mut dyn Observer,
    /// What is to be saved, if anything is.
    keeping: Option<Keeping>,
    /// What was saved every so often, when the run is over.
    checkpoints: Option<CheckpointCounts>,
    // Before the VM, whose frames it has.
    base: Option<Base>,
    loaded: Option<LoadCounts>,
    /// What of that goes on.
    loading: Option<LoadGoing>,
    vm: PayloadVm,
    inbox: Inbox,
    worker: Worker,
    started: Instant,
    /// Snapshots that can be restored, oldest first.
    kept: VecDeque<Arc<RunSnapshot>>,
    /// The one the VM ran on from.
    parent: Option<Arc<RunSnapshot>>,
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
    steps: StepTimes,
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
    /// Operations that the guest had done when the run began.
    ops_before: u64,
    /// Snapshots that there were when the run began.
    taken_before: u64,
    recent_ops: (Instant, u64, f64),
    violations: ViolationCounts,
    /// The latest last.
    mismatches: VecDeque<Mismatch>,
    random: SplitMix64,
    leaked: bool,
}

impl<'a> Drive<'a> {
    /// Starts the guest: where it was, if it was loaded.
    pub(super) fn start(
        job: Job<'a>,
        (vm, begun): (PayloadVm, Option<Begun>),
        inbox: Inbox,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, RunError> {
        let Job {
            config,
            accelerator,
            keep,
            stop,
        } = job;
        let examiner = Examiner::new(
            config.seed,
            config.pattern,
            vm.layout,
            Arc::clone(vm.frames().physmap()),
            Arc::clone(vm.frames().pool()),
        )
        .stepping_aside(Arc::clone(vm.aside()));
        let worker = Worker::start(examiner).map_err(RunError::Checker)?;
        let stall = StallMeter::new(vm.layout, vm.machine().tsc_khz());
        if begun.is_none() {
            vm.start().map_err(RunError::Start)?;
        }
        let tracker = Tracker::new(config, &vm.layout);
        let now = Instant::now();
        let mut drive = Self {
            config,
            accelerator,
            stop,
            observer,
            keeping: keep.map(|keep| match keep.every.clone() {
                Some(every) => {
                    let checkpoints = Checkpoints::new(keep, every);
                    Keeping::Checkpoints(Box::new(checkpoints), None)
                }
                None => Keeping::Wanted(keep),
            }),
            checkpoints: None,
            base: None,
            loaded: None,
            loading: None,
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
            steps: StepTimes::none(),
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
            ops_before: 0,
            taken_before: 0,
            recent_ops: (now, 0, 0.0),
            violations: ViolationCounts::default(),
            mismatches: VecDeque::new(),
            random: SplitMix64(config.seed),
            leaked: false,
        };
        if let Some(begun) = begun {
            drive.begin_with(begun)?;
        }
        Ok(drive)
    }

    /// Runs to the end, takes everything apart, and reports.
    pub(super) fn run(mut self, policy: &str) -> Result<Report, RunError> {
        let mut end = self.drive();
        self.end_keeping(&mut end);
        let duration = self.started.elapsed();
        self.tick();
        if end.by.leaves_the_guest_running() {
            self.await_life();
        }
        Ok(self.finish(end, duration, policy))
    }
}
