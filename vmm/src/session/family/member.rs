//! One machine of a family.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::report::MemberReport;
use crate::check::Violation;
use crate::dma::Mismatch;
use crate::run_snapshot::RunSnapshot;
use crate::session::end::End;
use crate::session::failure;
use crate::session::life::{self, DeviceWatch, LifeWatch};
use crate::session::occasion::GuestCounters;
use crate::session::ports::{Event, Inbox};
use crate::session::vm::PayloadVm;
use palimpsest::causes::chain;
use palimpsest::mm::Promise;

/// How long a machine may take to say why it has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// What each machine of a family may add to the longest time that one of them does nothing: they have turns.
const TURN: Duration = Duration::from_millis(200);

/// A machine that lives.
pub(super) struct Member {
    pub(super) vm: PayloadVm,
    inbox: Inbox,
    pub(super) parent: Option<usize>,
    pub(super) depth: u64,
    /// The snapshot it runs on from, if that lives.
    pub(super) runs_on_from: Weak<RunSnapshot>,
    /// From the wish for a clone to its first instruction.
    pub(super) first_instruction: Option<Duration>,
    /// Operations that had been done when it was made, by its ancestors or in another process.
    ops_before: u64,
    life: LifeWatch,
    device_life: DeviceWatch,
    recent: (Instant, u64, f64),
    /// As much memory as it may write.
    _promise: Promise,
}

/// What was heard of a machine since it was last listened to.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) console: Vec<String>,
    pub(super) violations: Vec<Violation>,
    /// Why it has ended, if it has.
    pub(super) ended: Option<String>,
}

impl Member {
    /// The root, whose guest had done `ops_before` operations when it was started.
    pub(super) fn root(vm: PayloadVm, inbox: Inbox, promise: Promise, ops_before: u64) -> Self {
        Self {
            vm,
            inbox,
            parent: None,
            depth: 0,
            runs_on_from: Weak::new(),
            first_instruction: None,
            ops_before,
            life: LifeWatch::default(),
            device_life: DeviceWatch::default(),
            recent: (Instant::now(), ops_before, 0.0),
            _promise: promise,
        }
    }

    /// A clone of `parent`, which is of generation `depth`, made from `origin` in so long.
    pub(super) fn clone_of(
        (parent, depth): (usize, u64),
        vm: PayloadVm,
        inbox: Inbox,
        origin: &Arc<RunSnapshot>,
        promise: Promise,
        first_instruction: Duration,
    ) -> Self {
        let ops: Vec<u64> = origin.vcpus().iter().map(|v| v.mm7()).collect();
        let ops_before = ops.iter().sum();
        let mut life = LifeWatch::default();
        // Memory may be an operation behind the registers.
        let mut device_life = DeviceWatch::default();
        let requests = vm.requests_by_device();
        life.rewound(origin.number(), GuestCounters::of(&vm).ops());
        device_life.rewound(origin.number(), &ops, ops.clone(), requests);
        Self {
            vm,
            inbox,
            parent: Some(parent),
            depth: depth + 1,
            runs_on_from: Arc::downgrade(origin),
            first_instruction: Some(first_instruction),
            ops_before,
            life,
            device_life,
            recent: (Instant::now(), ops_before, 0.0),
            _promise: promise,
        }
    }

    /// Operations of all vCPUs, those of its ancestors among them.
    pub(super) fn ops(&self) -> u64 {
        GuestCounters::of(&self.vm).ops().iter().sum()
    }

    pub(super) fn recent_ops_per_s(&mut self) -> f64 {
        let (then, before, rate) = self.recent;
        let elapsed = then.elapsed().as_secs_f64();
        if elapsed < 0.5 {
            return rate;
        }
        let ops = self.ops();
        let rate = ops.saturating_sub(before) as f64 / elapsed;
        self.recent = (Instant::now(), ops, rate);
        rate
    }

    /// Takes what the machine has said, and looks whether it and its devices go on. There are `machines` that
    /// share the CPUs.
    pub(super) fn listen(&mut self, machines: u32) -> Heard {
        let mut heard = self.take_words();
        if let Some(error) = self.vm.devices.take_error() {
            heard.ended.get_or_insert_with(|| chain(&error));
        }
        if let Err(error) = self.vm.space().check() {
            heard.ended.get_or_insert_with(|| chain(&error));
        }
        let patience = life::patience(TURN * machines);
        let ops = GuestCounters::of(&self.vm).ops();
        heard.violations.extend(self.life.look(&ops, patience));
        let requests = self.vm.requests_by_device();
        heard
            .violations
            .extend(self.device_life.look(&ops, &requests, patience));
        heard
    }

    /// Takes what the machine has said so far.
    pub(super) fn take_words(&self) -> Heard {
        let mut heard = Heard::default();
        let mismatches = self.vm.devices.take_mismatches();
        while let Some(event) = self.inbox.wait(Duration::ZERO) {
            self.hear(event, &mismatches, &mut heard);
        }
        heard
    }

    /// Whether a vCPU has done nothing since the machine was made.
    pub(super) fn has_yet_to_live(&self) -> bool {
        self.life.is_waiting()
    }

    /// Takes what a machine says, one of whose vCPUs has ended, until it has said why.
    pub(super) fn last_words(&self) -> Heard {
        let deadline = Instant::now() + LAST_WORDS;
        let mismatches = self.vm.devices.take_mismatches();
        let mut heard = Heard::default();
        while heard.ended.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(event) = self.inbox.wait(left) else {
                break;
            };
            self.hear(event, &mismatches, &mut heard);
        }
        heard
    }

    fn hear(&self, event: Event, mismatches: &[Mismatch], heard: &mut Heard) {
        match event {
            Event::Console(text) => heard.console.push(text),
            Event::Failure(failure) => {
                let violation = failure::violation(&failure, &self.vm, mismatches.iter());
                heard.violations.push(violation);
            }
            Event::UnreadableFailure(why) => {
                heard.violations.push(failure::unreadable(&why));
            }
            Event::Ended(vcpu, outcome) => {
                let end = End::of_vcpu(vcpu, &outcome);
                let why = end
                    .error
                    .unwrap_or_else(|| "the guest has exited".to_owned());
                heard.ended.get_or_insert(why);
            }
        }
    }

    /// What is to be said of it when it goes.
    pub(super) fn report(&self, id: usize) -> MemberReport {
        let stats = self.vm.space().stats();
        MemberReport {
            id,
            parent: self.parent,
            depth: self.depth,
            first_instruction_us: self
                .first_instruction
                .map(|time| (time.as_nanos() as f64 / 100.0).round() / 10.0),
            ops: self.ops().saturating_sub(self.ops_before),
            pages_copied: stats.copied,
        }
    }
}
