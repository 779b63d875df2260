//! A virtual machine: its memslot, its vCPU threads, and stopping them.
//!
//! ```no_run
//! # use palimpsest::kvm::*;
//! # use palimpsest::vcpus::Capture;
//! # use std::sync::Arc;
//! # fn example(kvm: &Kvm, window: Arc<palimpsest::host::Window>, ram: Arc<dyn GuestRam>,
//! #            handler: Arc<dyn PortHandler>, entry: EntryState) -> Result<(), KvmError> {
//! let machine = Machine::new(kvm, window, ram, 2, handler, Box::new(|vcpu, outcome| {
//!     eprintln!("vcpu {vcpu}: {outcome}");
//! }))?;
//! machine.start(|_| entry)?;
//! let paused = machine.pause(Capture::Registers)?;
//! // Fork memory here: registers are read meanwhile.
//! let states = paused.states()?;
//! let running = paused.resume();
//! # Ok(())
//! # }
//! ```

#![expect(
    unsafe_code,
    reason = "the memslot: the kernel is given a range of host memory"
)]

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, Phase, RegisterTask, Slot, TaskState, VcpuCommand};
use super::error::{KvmError, MAX_VCPUS, PATIENCE};
use super::fault::{Ladder, RungCounts};
use super::kick;
use super::memory::{GuestRam, Memslot};
use super::outcome::Outcome;
use super::paravirt::{self, Targets};
use super::platform::{Kvm, create_vcpu, create_vm, msr_set};
use super::port::PortHandler;
use super::registers::{self, EntryState};
use super::state::{Capturer, Clock, VcpuState, XsaveFits};
use super::table_bits;
use super::tables::{PageTables, Translation};
use super::vcpu::{Counters, SyncRegs, Vcpu};
use super::watch::Watch;
use crate::vcpus::Capture;

/// Is told on a vCPU's thread that the vCPU has ended by itself, and why. Not called for vCPUs that the
/// machine stops.
pub type OnStop = Box<dyn Fn(usize, Outcome) + Send + Sync>;

/// What the vCPUs of a machine have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineStats {
    /// Write faults: exits because a page was not writable.
    pub write_faults: u64,
    /// Exits because a port was written.
    pub port_exits: u64,
    /// Write faults that each rung of the [ladder](super::fault) has resolved.
    pub rungs: RungCounts,
    /// Stores that KVM emulated and gave to the VMM to carry out.
    pub emulated_stores: u64,
    /// Kicks: one a running vCPU and pause.
    pub kicks: u64,
}

/// A virtual machine. Dropping it stops its vCPUs and waits for their threads.
pub struct Machine {
    vm: VmFd,
    control: Arc<Control>,
    counters: Arc<Counters>,
    threads: Arc<Vec<JoinHandle<()>>>,
    /// Ended before the threads are.
    watch: Option<Watch>,
    ram: Arc<dyn GuestRam>,
    /// Where the memslot points.
    _slot: Arc<dyn Memslot>,
    region: kvm_userspace_memory_region,
    translation: Translation,
    /// Whether the machine was started. Locked while somebody drives it: pauses exclude each other.
    started: Mutex<bool>,
    /// Whether a vCPU did not end when it was told to.
    is_stuck: AtomicBool,
    tsc_khz: u32,
    left_out: Vec<u32>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.threads.len())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// A machine with `vcpus` vCPUs and all of `slot` as its memory. It does not run before it is started.
    pub fn new(
        kvm: &Kvm,
        slot: Arc<dyn Memslot>,
        ram: Arc<dyn GuestRam>,
        vcpus: usize,
        handler: Arc<dyn PortHandler>,
        on_stop: OnStop,
    ) -> Result<Self, KvmError> {
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(KvmError::VcpuCount { vcpus });
        }
        let vm = create_vm(kvm)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: slot.len(),
            userspace_addr: slot.host_address().as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the range is the guest's, as a `Memslot` promises, which is kept as long as somebody may go
        // there.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| KvmError::Memory {
            len: slot.len(),
            source,
        })?;
        paravirt::guard(&vm).map_err(|source| KvmError::Msrs { source })?;
        let translation = Translation::of(kvm.platform());
        if translation == Translation::ShadowOnSvm {
            exit_on_emulation_failure(&vm).map_err(|source| KvmError::Emulation { source })?;
        }
        let xsave2 = vm.check_extension_int(Cap::Xsave2);
        let xsave_fits = XsaveFits::check(xsave2).ok_or(KvmError::XsaveSize { bytes: xsave2 })?;
        const ALL_SYNC_REGS: i32 = 0b111;
        let sync_regs = if vm.check_extension_int(Cap::SyncRegs) & ALL_SYNC_REGS == ALL_SYNC_REGS {
            SyncRegs::Stale
        } else {
            SyncRegs::Absent
        };

        let control = Arc::new(Control::new(vcpus));
        let counters = Arc::new(Counters::new(vcpus));
        let on_stop = Arc::new(on_stop);
        kick::install().map_err(|source| KvmError::Thread { vcpu: 0, source })?;
        let mut machine = Self {
            vm,
            control,
            counters,
            threads: Arc::default(),
            watch: None,
            is_stuck: AtomicBool::new(false),
            ram: Arc::clone(&ram),
            _slot: Arc::clone(&slot),
            region,
            translation,
            started: Mutex::new(false),
            tsc_khz: 0,
            left_out: Vec::new(),
        };
        for index in 0..vcpus {
            let cpuid = registers::vcpu_cpuid(&kvm.cpuid, index as u8);
            let fd = create_vcpu(&machine.vm, index, &cpuid)?;
            let msrs = msr_set(kvm, &fd, index)?;
            if index == 0 {
                machine.tsc_khz = fd.get_tsc_khz().unwrap_or(0);
                machine.left_out.clone_from(&msrs.left_out);
            }
            let vcpu = Vcpu {
                index,
                fd,
                cpuid,
                capturer: Capturer::new(msrs),
                xsave_fits,
                sync_regs,
                ram: Arc::clone(&ram),
                _slot: Arc::clone(&slot),
                handler: Arc::clone(&handler),
                control: Arc::clone(&machine.control),
                counters: Arc::clone(&machine.counters),
                ladder: Ladder::new(),
                paravirt: Targets::default(),
                translation: machine.translation,
                lost_races: None,
                kicked: false,
                kicked_at: None,
            };
            let on_stop = Arc::clone(&on_stop);
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    if let Some(outcome) = vcpu.run() {
                        on_stop(index, outcome);
                    }
                })
                .map_err(|source| KvmError::Thread {
                    vcpu: index,
                    source,
                })?;
            // Nobody else has them before there is a watch.
            if let Some(threads) = Arc::get_mut(&mut machine.threads) {
                threads.push(thread);
            }
        }
        let watch = Watch::start(
            Arc::clone(&machine.threads),
            Arc::clone(&machine.control),
            Arc::clone(&machine.counters),
        );
        machine.watch = Some(watch.map_err(|source| KvmError::Watch { source })?);
        Ok(machine)
    }

    /// Starts all vCPUs, each where `entry` of its number says.
    pub fn start(&self, entry: impl Fn(usize) -> EntryState) -> Result<(), KvmError> {
        self.start_with(|vcpu| RegisterTask::Enter(entry(vcpu)))
    }

    /// Starts the vCPUs where they were captured.
    pub fn start_from(&self, states: &[VcpuState], clock: Clock) -> Result<(), KvmError> {
        self.check_count(states)?;
        self.start_with(|vcpu| RegisterTask::Restore(Box::new(states[vcpu].clone()), clock))
    }

    fn start_with(&self, task: impl FnMut(usize) -> RegisterTask) -> Result<(), KvmError> {
        let mut started = self.started.lock().unwrap_or_else(|e| e.into_inner());
        if *started {
            return Err(KvmError::AlreadyStarted);
        }
        self.do_all(task)?;
        *started = true;
        self.run_all();
        Ok(())
    }

    /// Stops all vCPUs at an instruction boundary.
    ///
    /// Returns when none of them is in the guest or in a handler. If one has ended already, or is stuck in a
    /// handler, the others run on and the error names it. Must not be called on a vCPU's thread.
    pub fn pause(&self, capture: Capture) -> Result<PausedMachine<'_>, KvmError> {
        let started = self.started.lock().unwrap_or_else(|e| e.into_inner());
        if !*started {
            return Err(KvmError::NotStarted);
        }
        let mut slots = self.control.lock();
        check_alive(&slots)?;
        for slot in slots.iter_mut() {
            slot.task = match capture {
                Capture::Registers => TaskState::Queued(RegisterTask::Capture),
                Capture::Nothing => TaskState::Idle,
            };
        }
        let kicked = Instant::now();
        self.control.give(&mut slots, VcpuCommand::Pause);
        let running: Vec<_> = slots
            .iter()
            .map(|slot| slot.phase == Phase::Running)
            .collect();
        drop(slots);
        let threads = self.threads.iter().zip(running).enumerate();
        for (vcpu, (thread, _)) in threads.filter(|(_, (_, run))| *run) {
            if let Err(source) = kick::kick(thread) {
                self.control
                    .give(&mut self.control.lock(), VcpuCommand::Run);
                return Err(KvmError::Kick { vcpu, source });
            }
            self.counters.kicks.fetch_add(1, Ordering::Relaxed);
        }

        let (mut slots, in_time) = self.control.wait(self.control.lock(), PATIENCE, |slots| {
            slots.iter().all(|slot| slot.phase == Phase::Parked)
                || slots.iter().any(|slot| slot.phase == Phase::Ended)
        });
        let stuck = slots.iter().position(|slot| slot.phase == Phase::Running);
        let result = match (in_time, stuck) {
            (Err(_), Some(vcpu)) => Err(KvmError::Stuck { vcpu }),
            _ => check_alive(&slots),
        };
        if let Err(error) = result {
            self.control.give(&mut slots, VcpuCommand::Run);
            return Err(error);
        }
        let parked = last_change(&slots).unwrap_or(kicked);
        Ok(PausedMachine {
            machine: self,
            _driving: started,
            kicked,
            parked,
        })
    }

    /// Makes a 1-, 2- or 4-byte `out` to `port` signal `event` instead of exiting to the VMM.
    pub fn register_doorbell(&self, port: u16, event: &EventFd) -> Result<(), KvmError> {
        let address = IoEventAddress::Pio(port.into());
        self.vm
            .register_ioevent(event, &address, NoDatamatch)
            .map_err(|source| KvmError::Doorbell { port, source })
    }

    /// Frequency of the guest's time-stamp counter in kHz; 0 if the host does not know it.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// MSRs that this host cannot save or set back, and that states therefore lack.
    pub fn left_out(&self) -> &[u32] {
        &self.left_out
    }

    /// Whether memory may become read-only while vCPUs run.
    ///
    /// Not on SVM without nested paging: nothing is left there of a vCPU in whose page tables KVM has a bit
    /// to set and finds them read-only. It may while all stand still, if
    /// [`PausedMachine::keep_tables_writable`] is called before they run on.
    pub fn may_lose_write_access(&self) -> bool {
        self.translation != Translation::ShadowOnSvm
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.threads.len()
    }

    /// What the vCPUs have done so far.
    pub fn stats(&self) -> MachineStats {
        let Counters {
            write_faults,
            rungs,
            emulated_stores,
            port_exits,
            kicks,
            ..
        } = &*self.counters;
        MachineStats {
            rungs: rungs.now(),
            emulated_stores: emulated_stores.load(Ordering::Relaxed),
            write_faults: write_faults.load(Ordering::Relaxed),
            port_exits: port_exits.load(Ordering::Relaxed),
            kicks: kicks.load(Ordering::Relaxed),
        }
    }

    /// Tells all vCPUs to stop for good, without waiting for them.
    pub fn stop(&self) {
        let mut slots = self.control.lock();
        self.control.give(&mut slots, VcpuCommand::Stop);
        drop(slots);
        self.kick_all();
    }

    /// Waits until all vCPUs have stopped for good.
    ///
    /// # Errors
    /// If one does not: it goes on to hold what it uses, memory too.
    pub fn wait_until_stopped(&self) -> Result<(), KvmError> {
        match self.wait_for_ends().iter().position(|ended| !ended) {
            Some(vcpu) => Err(KvmError::Stuck { vcpu }),
            None => Ok(()),
        }
    }

    /// Waits until all vCPUs have ended that have a thread, and says which have. Who was waited for in vain
    /// is not waited for again.
    fn wait_for_ends(&self) -> Vec<bool> {
        let patience = if self.is_stuck.load(Ordering::Relaxed) {
            Duration::ZERO
        } else {
            PATIENCE
        };
        let has_ended = |slot: &Slot| slot.phase == Phase::Ended;
        let threads = self.threads.len();
        let (slots, in_time) = self.control.wait(self.control.lock(), patience, |slots| {
            slots[..threads].iter().all(has_ended)
        });
        self.is_stuck.store(in_time.is_err(), Ordering::Relaxed);
        slots[..threads].iter().map(has_ended).collect()
    }

    /// Sends every vCPU the signal. What is refused is tried again: by the watch, or when the machine is
    /// dropped.
    fn kick_all(&self) {
        for (vcpu, thread) in self.threads.iter().enumerate() {
            if let Err(error) = kick::kick(thread) {
                tracing::warn!("cannot kick vcpu {vcpu} out of the guest: {error}");
            }
        }
    }

    /// Sends every vCPU the signal without a command.
    #[cfg(test)]
    pub(super) fn kick_for_nothing(&self) {
        self.kick_all();
    }

    fn check_count(&self, states: &[VcpuState]) -> Result<(), KvmError> {
        let (states, vcpus) = (states.len(), self.vcpus());
        if states == vcpus {
            Ok(())
        } else {
            Err(KvmError::StateCount { states, vcpus })
        }
    }

    /// The page tables of vCPUs in these states.
    fn page_tables(&self, states: &[VcpuState]) -> Result<PageTables, KvmError> {
        let vcpus = states.iter().map(|state| (state.sregs(), state.confined()));
        PageTables::of(vcpus, &*self.ram).map_err(|source| KvmError::Tables { source })
    }

    /// Gives every parked vCPU a task, and waits for all. If one fails, the machine is stopped: its vCPUs are
    /// of different times now.
    fn do_all(&self, mut task: impl FnMut(usize) -> RegisterTask) -> Result<(), KvmError> {
        let mut slots = self.finish_pending()?;
        for (vcpu, slot) in slots.iter_mut().enumerate() {
            slot.task = TaskState::Queued(task(vcpu));
        }
        drop(slots);
        self.control.task_given();
        let mut slots = self.finish_pending()?;
        for (vcpu, slot) in slots.iter_mut().enumerate() {
            if let TaskState::Failed(source) = std::mem::replace(&mut slot.task, TaskState::Idle) {
                self.control.give(&mut slots, VcpuCommand::Stop);
                return Err(KvmError::State { vcpu, source });
            }
        }
        Ok(())
    }

    /// Waits until no vCPU has a task left.
    fn finish_pending(&self) -> Result<MutexGuard<'_, Vec<Slot>>, KvmError> {
        let (slots, in_time) = self.control.wait(self.control.lock(), PATIENCE, |slots| {
            slots
                .iter()
                .all(|slot| !slot.task.is_pending() || slot.phase == Phase::Ended)
        });
        check_alive(&slots)?;
        let pending = slots.iter().position(|slot| slot.task.is_pending());
        match (in_time, pending) {
            (Err(_), Some(vcpu)) => Err(KvmError::Stuck { vcpu }),
            _ => Ok(slots),
        }
    }

    /// Lets all vCPUs run. Returns when the last of them was about to enter the guest.
    fn run_all(&self) -> Instant {
        let mut slots = self.control.lock();
        self.control.give(&mut slots, VcpuCommand::Run);
        let (slots, in_time) = self.control.wait(slots, PATIENCE, |slots| {
            slots.iter().all(|slot| slot.phase != Phase::Parked)
        });
        let parked = slots.iter().position(|slot| slot.phase == Phase::Parked);
        if let (Err(_), Some(vcpu)) = (in_time, parked) {
            tracing::warn!("vcpu {vcpu} was told to run, and has not begun");
        }
        last_change(&slots).unwrap_or_else(Instant::now)
    }

    /// Makes KVM forget what it keeps of the guest's page tables: it does when the memory that they are in
    /// goes.
    fn forget_tables(&self) -> Result<(), KvmError> {
        let gone = kvm_userspace_memory_region {
            memory_size: 0,
            ..self.region
        };
        for region in [gone, self.region] {
            // SAFETY: as in `Machine::new`.
            let set = unsafe { self.vm.set_user_memory_region(region) };
            set.map_err(|source| KvmError::Memory {
                len: self.region.memory_size,
                source,
            })?;
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        let ended = self.wait_for_ends();
        drop(self.watch.take());
        let threads = Arc::get_mut(&mut self.threads).map(std::mem::take);
        for (vcpu, thread) in threads.into_iter().flatten().enumerate() {
            if !ended[vcpu] {
                // It keeps what it uses: memory, its handler and its part of the machine.
                tracing::error!(
                    "vcpu {vcpu} did not end within {} s: it is stuck in a handler",
                    PATIENCE.as_secs()
                );
            // The last owner may be what `on_stop` holds: a thread cannot wait for itself.
            } else if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// A machine none of whose vCPUs runs. Dropping it lets them run on.
#[must_use = "the machine runs on when this is dropped"]
pub struct PausedMachine<'a> {
    machine: &'a Machine,
    _driving: MutexGuard<'a, bool>,
    kicked: Instant,
    parked: Instant,
}

impl fmt::Debug for PausedMachine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kicked, parked, .. } = self;
        f.debug_struct("PausedMachine")
            .field("kicked", kicked)
            .field("parked", parked)
            .finish_non_exhaustive()
    }
}

impl PausedMachine<'_> {
    /// When the vCPUs were told to stop.
    pub fn kicked(&self) -> Instant {
        self.kicked
    }

    /// When the last of them had.
    pub fn parked(&self) -> Instant {
        self.parked
    }

    /// The registers of all vCPUs; waits until they are captured.
    pub fn states(&self) -> Result<Vec<VcpuState>, KvmError> {
        let mut slots = self.machine.finish_pending()?;
        let mut asked = false;
        for slot in slots.iter_mut() {
            if matches!(slot.task, TaskState::Idle | TaskState::Done) {
                slot.task = TaskState::Queued(RegisterTask::Capture);
                asked = true;
            }
        }
        if asked {
            drop(slots);
            self.machine.control.task_given();
            slots = self.machine.finish_pending()?;
        }
        let mut states = Vec::with_capacity(slots.len());
        for (vcpu, slot) in slots.iter_mut().enumerate() {
            match &slot.task {
                TaskState::Captured(state) => states.push((**state).clone()),
                TaskState::Failed(_) => {
                    if let TaskState::Failed(source) =
                        std::mem::replace(&mut slot.task, TaskState::Idle)
                    {
                        return Err(KvmError::State { vcpu, source });
                    }
                }
                // Nobody else gives tasks while the machine is paused.
                TaskState::Idle | TaskState::Done | TaskState::Queued(_) | TaskState::Running => {
                    return Err(KvmError::Stuck { vcpu });
                }
            }
        }
        Ok(states)
    }

    /// The guest's page tables as they are: to be asked for before memory is restored, and handed to
    /// [`PausedMachine::restore`] after.
    pub fn page_tables(&self) -> Result<PageTables, KvmError> {
        match self.machine.translation {
            Translation::Nested => Ok(PageTables::default()),
            Translation::Shadow | Translation::ShadowOnSvm => {
                self.machine.page_tables(&self.states()?)
            }
        }
    }

    /// Sets the registers of all vCPUs. Memory is the caller's to restore, before; `tables` are those before
    /// that.
    ///
    /// What the vCPUs and KVM keep of the guest's page tables is forgotten, where these are others now.
    ///
    /// If a vCPU refuses, the machine is stopped for good: part of it would be of another time.
    pub fn restore(
        &self,
        states: &[VcpuState],
        clock: Clock,
        tables: &PageTables,
    ) -> Result<(), KvmError> {
        self.machine.check_count(states)?;
        if self.machine.translation != Translation::Nested
            && !self.machine.page_tables(states)?.are(tables)
        {
            self.machine.forget_tables()?;
        }
        self.machine
            .do_all(|vcpu| RegisterTask::Restore(Box::new(states[vcpu].clone()), clock))
    }

    /// Of pages that are read-only since the vCPUs stand still, or have changed and are read-only, makes
    /// those writable in which KVM may have a bit to set, where it must not find them read-only
    /// ([`Machine::may_lose_write_access`]).
    ///
    /// # Errors
    /// If one cannot be read or made writable. The guest must not run on.
    pub fn keep_tables_writable(&self, gfns: impl Iterator<Item = u64>) -> Result<(), KvmError> {
        if self.machine.may_lose_write_access() {
            return Ok(());
        }
        let kept = table_bits::keep_writable(&*self.machine.ram, gfns);
        kept.map_err(|source| KvmError::Tables { source })
    }

    /// Stops all vCPUs for good: none of them enters the guest again.
    pub fn stop(self) {
        self.machine.stop();
    }

    /// Lets all vCPUs run on. Returns the time when the last of them was about to enter the guest.
    pub fn resume(self) -> Instant {
        self.machine.run_all()
    }
}

impl Drop for PausedMachine<'_> {
    fn drop(&mut self) {
        // After `resume` this finds all vCPUs running, and after `stop` those that are stopped stay so.
        self.machine.run_all();
    }
}

/// Has KVM come out where it cannot emulate an instruction, instead of giving the guest an exception: with a
/// locked one on a page table that is read-only it may, when that is writable (`handle_emulation_failure` in
/// `arch/x86/kvm/x86.c`). Before Linux 5.14 it does not know how to.
fn exit_on_emulation_failure(vm: &VmFd) -> Result<(), errno::Error> {
    let cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE;
    if vm.check_extension_raw(cap.into()) == 0 {
        return Ok(());
    }
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [1, 0, 0, 0],
        ..Default::default()
    })
}

/// Fails if a vCPU has ended.
fn check_alive(slots: &[Slot]) -> Result<(), KvmError> {
    match slots.iter().position(|slot| slot.phase == Phase::Ended) {
        Some(vcpu) => Err(KvmError::Stopped { vcpu }),
        None => Ok(()),
    }
}

/// When the last vCPU changed its phase.
fn last_change(slots: &[Slot]) -> Option<Instant> {
    slots.iter().map(|slot| slot.since).max()
}
