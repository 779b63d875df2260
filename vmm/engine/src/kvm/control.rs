//! The handshake between a machine and its vCPU threads.
//!
//! Each vCPU has a *command* (run, pause, stop), which its thread looks at before every entry to the guest,
//! and a *slot*, which says what the thread is doing and what task it has while parked. Registers are read
//! and written by the vCPU's own thread: it does so while the pauser goes on with its own work, and all vCPUs
//! do so at once.
//!
//! ```text
//!           command = Run              command = Pause, kick
//!   Parked ─────────────▶ Running ─────────────▶ Parked ── task: Queued ▶ Running ▶ Captured | Done | Failed
//!      └─── command = Stop ──┴──── or a crash, or an exit ───▶ Ended
//! ```
//! The command of a vCPU changes with its slot locked, so that a parked thread cannot miss one; a running
//! thread reads its own without the lock (see [`kick`](super::kick) for why it cannot miss one either).
//!
//! On a machine whose CPUs are all busy a wake-up too many is a vCPU that waits for a slice of somebody's.
//! So every vCPU has a lock and a wake-up of its own, and whoever waits for vCPUs is woken once, by the last
//! of them: each slot says what is [`Awaited`] of it, and [`Pending`] counts the slots that say so. A slot's
//! lock is taken before that of the count.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use rustix::thread::sched_getcpu;

use super::error::StateError;
use super::placement::{self, CpuPin, Cpus, FreeThread};
use super::registers::EntryState;
use super::state::{Clock, VcpuState};

/// What a vCPU's thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum VcpuCommand {
    Run,
    Pause,
    Stop,
}

/// What a vCPU's thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// In the guest, or on its way to it, or handling an exit.
    Running,
    /// Out of the guest with no instruction half done.
    Parked,
    /// It will never run again.
    Ended,
}

/// Something to do with the registers of a parked vCPU.
#[derive(Debug)]
pub(crate) enum RegisterTask {
    /// Read them all.
    Capture,
    /// Set them all.
    Restore(Box<VcpuState>, Clock),
    /// Set them to the entry state.
    Enter(EntryState),
}

/// What became of the task of a parked vCPU.
#[derive(Debug)]
pub(crate) enum TaskState {
    Idle,
    Queued(RegisterTask),
    Running,
    Captured(Box<VcpuState>),
    Done,
    Failed(StateError),
}

impl TaskState {
    pub(crate) fn is_pending(&self) -> bool {
        matches!(self, Self::Queued(_) | Self::Running)
    }
}

/// One vCPU, as its thread and the machine see it.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) phase: Phase,
    /// When `phase` began.
    pub(crate) since: Instant,
    pub(crate) task: TaskState,
    /// Whether the vCPU is to run when its task is done, unless that fails.
    runs_after: bool,
    /// Whether it does not run because that has failed.
    has_failed_to_run: bool,
    /// What somebody waits for.
    awaited: Option<Awaited>,
    /// Where the thread was.
    cpus: Cpus,
    /// The thread, if it can be told where to run.
    thread: Option<FreeThread>,
    /// Where it is to run first.
    pin: Option<CpuPin>,
}

/// What a vCPU can be waited for to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    /// Parked. Nobody is waited for any longer once a vCPU has ended.
    Parked,
    /// No longer parked; or parked for good, because the task after which it was to run has failed.
    Running,
    /// Without a task that is not done; or ended.
    WithoutTask,
    /// Ended.
    Ended,
}

impl Awaited {
    fn is(self, slot: &Slot) -> bool {
        match self {
            Self::Parked => slot.phase != Phase::Running,
            Self::Running => slot.phase != Phase::Parked || slot.has_failed_to_run,
            Self::WithoutTask => !slot.task.is_pending() || slot.phase == Phase::Ended,
            Self::Ended => slot.phase == Phase::Ended,
        }
    }
}

/// How many slots have something awaited of them.
#[derive(Debug, Default)]
struct Pending {
    slots: usize,
    /// Whether a vCPU has ended.
    has_ended: bool,
}

#[derive(Debug)]
struct VcpuControl {
    command: AtomicU8,
    slot: Mutex<Slot>,
    /// A command or a task is there for the vCPU, which is parked.
    wake: Condvar,
}

/// What a machine shares with its vCPU threads.
#[derive(Debug)]
pub(crate) struct Control {
    vcpus: Vec<CachePadded<VcpuControl>>,
    pending: Mutex<Pending>,
    /// Nothing is awaited any longer, or a vCPU has ended.
    to_machine: Condvar,
    /// Locked by whoever waits: there is one thing awaited of a slot.
    waiting: Mutex<()>,
}

/// A vCPU did not do in time what it was told.
#[derive(Debug)]
pub(crate) struct TimedOut {
    /// The first of them.
    pub(crate) vcpu: usize,
}

impl Control {
    /// For `vcpus` vCPUs, all parked.
    pub(crate) fn new(vcpus: usize) -> Self {
        let vcpu = |_| {
            CachePadded::new(VcpuControl {
                command: AtomicU8::new(VcpuCommand::Pause as u8),
                slot: Mutex::new(Slot {
                    phase: Phase::Parked,
                    since: Instant::now(),
                    task: TaskState::Idle,
                    runs_after: false,
                    has_failed_to_run: false,
                    awaited: None,
                    cpus: Cpus::default(),
                    thread: None,
                    pin: None,
                }),
                wake: Condvar::new(),
            })
        };
        Self {
            vcpus: (0..vcpus).map(vcpu).collect(),
            pending: Mutex::default(),
            to_machine: Condvar::new(),
            waiting: Mutex::default(),
        }
    }

    /// The slot of vCPU `vcpu`.
    pub(crate) fn slot(&self, vcpu: usize) -> MutexGuard<'_, Slot> {
        lock(&self.vcpus[vcpu].slot)
    }

    /// What `of` says of each slot.
    pub(crate) fn each<T>(&self, mut of: impl FnMut(&mut Slot) -> T) -> Vec<T> {
        let slots = self.vcpus.iter().map(|vcpu| lock(&vcpu.slot));
        slots.map(|mut slot| of(&mut slot)).collect()
    }

    /// The command of vCPU `vcpu`. SeqCst: the other half of
    /// [`KickFlag::clear`](super::kick::KickFlag::clear).
    pub(crate) fn command(&self, vcpu: usize) -> VcpuCommand {
        match self.vcpus[vcpu].command.load(Ordering::SeqCst) {
            0 => VcpuCommand::Run,
            1 => VcpuCommand::Pause,
            _ => VcpuCommand::Stop,
        }
    }

    /// Gives all vCPUs a command, and wakes those that are parked. The command to stop is never taken back.
    pub(crate) fn give(&self, command: VcpuCommand) {
        for vcpu in &self.vcpus {
            if vcpu.give(command) {
                vcpu.wake.notify_one();
            }
        }
    }

    /// Gives all vCPUs the command to run, and wakes those that are parked: as far as there are CPUs, not
    /// two on one (see [`placement`](super::placement)).
    pub(crate) fn give_run(&self) {
        let here = sched_getcpu();
        let parked = self.each(|slot| match slot.phase {
            Phase::Parked => Some(slot.cpus),
            Phase::Running | Phase::Ended => None,
        });
        let places = placement::places(&parked, here);
        self.wake(&places, here, |control| control.give(VcpuCommand::Run));
    }

    /// Gives the vCPU of a machine that has just one, and is parked, a task, and has it run when that is done:
    /// it need not be woken for either by itself. It stays parked if the task fails. It begins on this thread's
    /// CPU, which is free when this thread waits: where it was made another machine may run.
    pub(crate) fn give_start(&self, task: RegisterTask) {
        let (mut task, here) = (Some(task), sched_getcpu());
        self.wake(&[Some(here)], here, |control| {
            let mut slot = lock(&control.slot);
            if let Some(task) = task.take() {
                slot.task = TaskState::Queued(task);
                slot.runs_after = true;
            }
            true
        });
    }

    /// Does `give` to each vCPU, and wakes those of which it says so, each where its place is; those on this
    /// thread's CPU, which is `here`, last.
    fn wake(
        &self,
        places: &[Option<usize>],
        here: usize,
        mut give: impl FnMut(&VcpuControl) -> bool,
    ) {
        // This thread's CPU is free when it waits.
        let is_here = |vcpu: &usize| places[*vcpu] == Some(here);
        let (last, first): (Vec<_>, Vec<_>) = (0..self.vcpus.len()).partition(is_here);
        for vcpu in first.into_iter().chain(last) {
            let control = &self.vcpus[vcpu];
            let mut slot = lock(&control.slot);
            if let (Some(cpu), Some(thread)) = (places[vcpu], slot.thread) {
                slot.pin = thread.pin(cpu);
            }
            drop(slot);
            if give(control) {
                control.wake.notify_one();
            }
        }
    }

    /// Lets those run anywhere that were told where to run first, and have not begun.
    pub(crate) fn let_loose(&self) {
        drop(self.each(|slot| slot.pin.take()));
    }

    /// This thread is that of vCPU `vcpu`.
    pub(crate) fn is_on_this_thread(&self, vcpu: usize) {
        self.slot(vcpu).thread = FreeThread::this();
    }

    /// Gives all vCPUs the command to pause, and a task for then. Which of them were running.
    pub(crate) fn give_pause(&self, task: impl Fn() -> TaskState) -> Vec<bool> {
        let vcpus = self.vcpus.iter().map(|vcpu| {
            // With the slot locked for both: one that has yet to see that it may run must not do the task
            // before it does.
            let mut slot = lock(&vcpu.slot);
            slot.task = task();
            vcpu.set(VcpuCommand::Pause);
            if slot.phase == Phase::Parked {
                vcpu.wake.notify_one();
            }
            slot.phase == Phase::Running
        });
        vcpus.collect()
    }

    /// Gives vCPU `vcpu`, which is parked, a task.
    pub(crate) fn give_task(&self, vcpu: usize, task: RegisterTask) {
        let control = &self.vcpus[vcpu];
        lock(&control.slot).task = TaskState::Queued(task);
        control.wake.notify_one();
    }

    /// Waits until each of the first `vcpus` is what is `awaited` of it, at most `limit`.
    ///
    /// # Errors
    /// If one is not by then. Of what is awaited as [`Awaited::Parked`] it is no error that one has ended.
    pub(crate) fn wait(
        &self,
        vcpus: usize,
        awaited: Awaited,
        limit: Duration,
    ) -> Result<(), TimedOut> {
        let _alone = lock(&self.waiting);
        let deadline = Instant::now() + limit;
        for control in &self.vcpus[..vcpus] {
            let mut slot = lock(&control.slot);
            if !awaited.is(&slot) {
                slot.awaited = Some(awaited);
                lock(&self.pending).slots += 1;
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let is_over = |p: &Pending| p.slots == 0 || awaited == Awaited::Parked && p.has_ended;
        let waited = self
            .to_machine
            .wait_timeout_while(lock(&self.pending), left, |pending| !is_over(pending))
            .unwrap_or_else(PoisonError::into_inner);
        let timed_out = !is_over(&waited.0);
        drop(waited);
        let mut late = None;
        for (vcpu, control) in self.vcpus[..vcpus].iter().enumerate() {
            if lock(&control.slot).awaited.take().is_some() {
                lock(&self.pending).slots -= 1;
                late = late.or(Some(vcpu));
            }
        }
        match late {
            Some(vcpu) if timed_out => Err(TimedOut { vcpu }),
            _ => Ok(()),
        }
    }

    /// The thread of vCPU `vcpu` is now doing something else.
    pub(crate) fn enter_phase(&self, vcpu: usize, phase: Phase) {
        self.change(vcpu, |slot| {
            set_phase(slot, phase);
            slot.cpus.parked = sched_getcpu();
        });
        if phase == Phase::Ended {
            lock(&self.pending).has_ended = true;
            self.to_machine.notify_all();
        }
    }

    /// Waits, parked, for a task. `None` once the command is no longer to pause; the vCPU then counts as
    /// running.
    pub(crate) fn next_task(&self, vcpu: usize) -> Option<RegisterTask> {
        let control = &self.vcpus[vcpu];
        let mut slot = lock(&control.slot);
        loop {
            if matches!(slot.task, TaskState::Queued(_))
                && let TaskState::Queued(task) =
                    std::mem::replace(&mut slot.task, TaskState::Running)
            {
                return Some(task);
            }
            if self.command(vcpu) != VcpuCommand::Pause {
                set_phase(&mut slot, Phase::Running);
                let pin = slot.pin.take();
                slot.cpus.ran = sched_getcpu();
                self.changed(slot);
                drop(pin);
                return None;
            }
            let waited = control.wake.wait(slot);
            slot = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The task that [`Control::next_task`] gave is finished.
    pub(crate) fn finish(&self, vcpu: usize, task: TaskState) {
        let control = &self.vcpus[vcpu];
        self.change(vcpu, |slot| {
            if std::mem::take(&mut slot.runs_after) {
                slot.has_failed_to_run = matches!(task, TaskState::Failed(_));
                if !slot.has_failed_to_run {
                    control.set(VcpuCommand::Run);
                }
            }
            slot.task = task;
        });
    }

    fn change(&self, vcpu: usize, change: impl FnOnce(&mut Slot)) {
        let mut slot = self.slot(vcpu);
        change(&mut slot);
        self.changed(slot);
    }

    /// Wakes whoever waits if `slot` was the last that was awaited to be what it is now.
    fn changed(&self, mut slot: MutexGuard<'_, Slot>) {
        if slot.awaited.is_none_or(|awaited| !awaited.is(&slot)) {
            return;
        }
        slot.awaited = None;
        let mut pending = lock(&self.pending);
        pending.slots -= 1;
        let was_last = pending.slots == 0;
        drop((pending, slot));
        if was_last {
            self.to_machine.notify_all();
        }
    }
}

impl VcpuControl {
    /// Sets the command. Its slot is locked.
    fn set(&self, command: VcpuCommand) {
        if self.command.load(Ordering::SeqCst) != VcpuCommand::Stop as u8 {
            self.command.store(command as u8, Ordering::SeqCst);
        }
    }

    /// Gives it a command. Whether it is parked, and to be woken for it.
    fn give(&self, command: VcpuCommand) -> bool {
        let slot = lock(&self.slot);
        self.set(command);
        slot.phase == Phase::Parked
    }
}

/// A thread that panicked with the lock left what it locks whole: every change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_phase(slot: &mut Slot, phase: Phase) {
    if slot.phase != phase {
        slot.phase = phase;
        slot.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc;
    use std::thread;

    use rustix::thread::{gettid, sched_getaffinity};

    use super::*;

    const SOON: Duration = Duration::from_secs(60);
    const VCPUS: usize = 3;

    /// The life of a vCPU's thread: it counts how often it looks, and what it does.
    fn live(control: &Control, vcpu: usize, looks: &AtomicU64, tasks: &AtomicU64) {
        loop {
            match control.command(vcpu) {
                VcpuCommand::Run => {
                    looks.fetch_add(1, Ordering::SeqCst);
                    thread::yield_now();
                }
                VcpuCommand::Pause => {
                    control.enter_phase(vcpu, Phase::Parked);
                    while control.next_task(vcpu).is_some() {
                        tasks.fetch_add(1, Ordering::SeqCst);
                        control.finish(vcpu, TaskState::Done);
                    }
                }
                VcpuCommand::Stop => break,
            }
        }
        control.enter_phase(vcpu, Phase::Ended);
    }

    /// Ends the threads, however the test ends.
    struct Ended<'a>(&'a Control);

    impl Drop for Ended<'_> {
        fn drop(&mut self) {
            self.0.give(VcpuCommand::Stop);
        }
    }

    fn with_threads(test: impl FnOnce(&Control, &AtomicU64, &AtomicU64)) {
        let control = Control::new(VCPUS);
        let (looks, tasks) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            let _ended = Ended(&control);
            for vcpu in 0..VCPUS {
                let (control, looks, tasks) = (&control, &looks, &tasks);
                scope.spawn(move || live(control, vcpu, looks, tasks));
            }
            // As a machine that starts: each has a task before it runs.
            for vcpu in 0..VCPUS {
                control.give_task(vcpu, RegisterTask::Capture);
            }
            control.wait(VCPUS, Awaited::WithoutTask, SOON).unwrap();
            test(&control, &looks, &tasks);
            control.give(VcpuCommand::Stop);
            control.wait(VCPUS, Awaited::Ended, SOON).unwrap();
        });
        assert_eq!(lock(&control.pending).slots, 0);
    }

    #[test]
    fn a_thousand_pauses_lose_no_wake_up_and_no_task() {
        with_threads(|control, looks, tasks| {
            for pauses in 1..=1000 {
                control.give_run();
                control.wait(VCPUS, Awaited::Running, SOON).unwrap();
                let task = || TaskState::Queued(RegisterTask::Capture);
                control.give_pause(task);
                control.wait(VCPUS, Awaited::Parked, SOON).unwrap();
                let phases = control.each(|slot| slot.phase);
                assert_eq!(phases, [Phase::Parked; VCPUS]);
                control.wait(VCPUS, Awaited::WithoutTask, SOON).unwrap();
                let done = tasks.load(Ordering::SeqCst);
                assert_eq!(done, (pauses + 1) * VCPUS as u64);
                let before = looks.load(Ordering::SeqCst);
                control.give_pause(|| TaskState::Idle);
                assert_eq!(looks.load(Ordering::SeqCst), before, "one ran");
            }
        });
    }

    /// Woken once, it does its task and then runs; or does not, if the task fails.
    #[test]
    fn a_vcpu_runs_when_its_task_is_done_and_not_when_it_fails() {
        for fails in [false, true] {
            let control = Control::new(1);
            let tasks = AtomicU64::new(0);
            thread::scope(|scope| {
                let _ended = Ended(&control);
                scope.spawn(|| {
                    while control.command(0) != VcpuCommand::Stop {
                        control.enter_phase(0, Phase::Parked);
                        while control.next_task(0).is_some() {
                            tasks.fetch_add(1, Ordering::SeqCst);
                            let failed = StateError::Msr { index: 9 };
                            let state = match fails {
                                true => TaskState::Failed(failed),
                                false => TaskState::Done,
                            };
                            control.finish(0, state);
                        }
                        while control.command(0) == VcpuCommand::Run {
                            thread::yield_now();
                        }
                    }
                    control.enter_phase(0, Phase::Ended);
                });
                control.give_start(RegisterTask::Capture);
                control.wait(1, Awaited::Running, SOON).unwrap();
                assert_eq!(tasks.load(Ordering::SeqCst), 1);
                let slot = control.slot(0);
                let (phase, failed) = (slot.phase, matches!(slot.task, TaskState::Failed(_)));
                drop(slot);
                let expected = match fails {
                    true => (Phase::Parked, true),
                    false => (Phase::Running, false),
                };
                assert_eq!((phase, failed), expected);
                let command = match fails {
                    true => VcpuCommand::Pause,
                    false => VcpuCommand::Run,
                };
                assert_eq!(control.command(0), command);
            });
        }
    }

    #[test]
    fn who_is_late_is_named() {
        let control = Control::new(VCPUS);
        for vcpu in [0, 2] {
            control.enter_phase(vcpu, Phase::Running);
        }
        let timed_out = control.wait(VCPUS, Awaited::Running, Duration::ZERO);
        assert_eq!(timed_out.map_err(|late| late.vcpu), Err(1));
        // Of who was waited for in vain nothing is awaited any longer.
        control.enter_phase(1, Phase::Running);
        control
            .wait(VCPUS, Awaited::Running, Duration::ZERO)
            .unwrap();
        assert_eq!(lock(&control.pending).slots, 0);
    }

    #[test]
    fn nobody_is_waited_for_to_park_when_one_has_ended() {
        let control = Control::new(VCPUS);
        for vcpu in 0..VCPUS {
            control.enter_phase(vcpu, Phase::Running);
        }
        thread::scope(|scope| {
            let waits = scope.spawn(|| control.wait(VCPUS, Awaited::Parked, SOON));
            control.enter_phase(1, Phase::Ended);
            waits.join().unwrap().unwrap();
        });
        assert_eq!(control.each(|slot| slot.phase)[0], Phase::Running);
        assert_eq!(lock(&control.pending).slots, 0);
        let timed_out = control.wait(VCPUS, Awaited::Ended, Duration::ZERO);
        assert_eq!(timed_out.map_err(|late| late.vcpu), Err(0));
    }

    /// It may wait for the CPU that it was told to run on for as long as somebody else needs that.
    #[test]
    fn who_does_not_begin_may_run_anywhere_again() {
        let control = Control::new(1);
        let (say, heard) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let control = &control;
            scope.spawn(move || {
                control.is_on_this_thread(0);
                control.enter_phase(0, Phase::Parked);
                say.send((gettid(), sched_getcpu())).unwrap();
                // It never looks at its command.
                let _ = ended.recv();
            });
            let (thread, cpu) = heard.recv().unwrap();
            let may_run = || sched_getaffinity(Some(thread)).unwrap();
            let before = may_run();
            let mut slot = control.slot(0);
            // Where somebody has said on which CPUs this process runs, nobody is told.
            let is_free = slot.thread.is_some();
            slot.pin = slot.thread.and_then(|thread| thread.pin(cpu));
            assert_eq!(slot.pin.is_some(), is_free);
            drop(slot);
            assert!(!is_free || may_run().count() == 1);
            control.let_loose();
            assert_eq!(may_run(), before);
            drop(end);
        });
    }

    #[test]
    fn the_command_to_stop_is_never_taken_back() {
        let control = Control::new(1);
        control.give(VcpuCommand::Stop);
        control.give(VcpuCommand::Run);
        control.give_pause(|| TaskState::Idle);
        assert_eq!(control.command(0), VcpuCommand::Stop);
    }
}
