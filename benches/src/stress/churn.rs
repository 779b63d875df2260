//! A parent that runs, and clones of it that do a few operations and go: snapshot, clone, run, drop, again
//! and again, under DMA.
//!
//! The guest [stamps](Program::Stamp) its pages, and a device its own, with numbers that go up: what each
//! page must hold follows from how far either is. So every snapshot is held against its registers and its
//! device, and every clone, when it has run, against its own. A byte that one writes and another sees is
//! found, since no two are equally far.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::abi::PAGE_SIZE;
use palimpsest::host::{PinnedBuffer, Ram};
use palimpsest::kvm::{Kvm, VcpuState};
use palimpsest::mm::Access;
use palimpsest::snapshot::Snapshot;
use palimpsest::vcpus::Capture;
use palimpsest::vm::Shells;
use serde::{Deserialize, Serialize};
use vmm::check::account;
use vmm::cli::chain;

use super::Going;
use super::level::{Flatness, Levels};
use super::rewinds::note;
use crate::clones::MeasureError;
use crate::clones::parent::{Entries, Parent, ParentConfig};
use crate::clones::program::{Begins, DATA_GPA, Program, beginning, last_number, stamp_at};
use crate::summary::{Summary, Times};

/// What the guest stamps, and what its device does behind that.
const STAMPED: u64 = 8 << 20;
const STAMPED_PAGES: u64 = STAMPED / PAGE_SIZE;
pub(super) const DEVICE_GPA: u64 = DATA_GPA + STAMPED;
const DEVICE_PAGES: u64 = 128;
/// Pages of those that it holds for good. For the others it pins each when it writes there.
const REGISTERED: u64 = 16;
/// Pages that the device writes at a time, and how often it does.
const BATCH: u64 = 16;
const DEVICE_EVERY: Duration = Duration::from_millis(1);
/// What a clone does before it goes.
const OPERATIONS: u64 = 10_000;
/// Of the pages that are stamped one of so many is checked in each round, others in the next.
const CHECKED_STEP: u64 = 8;
/// Between two words about how far it is.
const TELL: Duration = Duration::from_millis(500);

/// What became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Churn {
    /// Bytes of memory of parent and clones.
    pub memory: u64,
    /// Clones that were made, ran and went.
    pub clones: u64,
    /// How long it went on.
    pub seconds: f64,
    /// From the wish, before the snapshot, to the clone's first instruction.
    pub first_instruction_us: Summary,
    /// Pauses of the parent.
    pub pause_us: Summary,
    /// Pages that devices wrote.
    pub device_pages: u64,
    /// Words of pages that were checked.
    pub checked: u64,
    /// What was not as it should be.
    pub wrong: Vec<String>,
    /// Memory.
    pub flatness: Flatness,
}

/// A device that numbers its pages.
struct Numbering {
    ram: Ram,
    registered: PinnedBuffer,
    /// Pages written.
    number: u64,
}

impl Numbering {
    /// One in `ram` that has written `number` pages before.
    fn new(ram: &Ram, number: u64) -> Result<Self, MeasureError> {
        let registered = ram.pin(DEVICE_GPA, REGISTERED * PAGE_SIZE, Access::Write);
        Ok(Self {
            ram: ram.clone(),
            registered: registered.map_err(|error| MeasureError::Reach(error.into()))?,
            number,
        })
    }

    fn write_next(&mut self) -> Result<(), MeasureError> {
        let at = self.number % DEVICE_PAGES * PAGE_SIZE;
        self.number += 1;
        let page = [self.number.to_le_bytes(); PAGE_SIZE as usize / 8];
        let bytes = page.as_flattened();
        if at < REGISTERED * PAGE_SIZE {
            let mut done = 0;
            for slice in self.registered.part(at..at + PAGE_SIZE) {
                slice.copy_from(&bytes[done..done + slice.len()]);
                done += slice.len();
            }
            return Ok(());
        }
        let written = self.ram.write(DEVICE_GPA + at, bytes);
        written.map_err(|error| MeasureError::Reach(error.into()))
    }
}

/// The parent's device, on a thread of its own.
struct Device {
    shared: Arc<DeviceShared>,
    thread: Option<JoinHandle<()>>,
}

struct DeviceShared {
    stop: AtomicBool,
    /// Held while it writes: it stops between two pages.
    device: Mutex<(Numbering, Option<String>)>,
}

impl Device {
    fn start(ram: &Ram) -> Result<Self, MeasureError> {
        let shared = Arc::new(DeviceShared {
            stop: AtomicBool::new(false),
            device: Mutex::new((Numbering::new(ram, 0)?, None)),
        });
        let its = Arc::clone(&shared);
        let life = move || {
            while !its.stop.load(Ordering::Relaxed) {
                let mut device = lock(&its.device);
                let (numbering, failed) = &mut *device;
                if let Err(error) = (0..BATCH).try_for_each(|_| numbering.write_next()) {
                    *failed = Some(chain(&error));
                    return;
                }
                drop(device);
                thread::sleep(DEVICE_EVERY);
            }
        };
        let thread = thread::Builder::new().name("dma".to_owned()).spawn(life);
        let thread = thread.map_err(|source| MeasureError::Host {
            what: "start the device",
            source,
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Stops it between two pages, for as long as the result lives.
    fn stopped(&self) -> MutexGuard<'_, (Numbering, Option<String>)> {
        lock(&self.shared.device)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Checks pages, and remembers what was wrong.
#[derive(Default)]
pub(super) struct Checker {
    pub(super) checked: u64,
    pub(super) wrong: Vec<String>,
}

impl Checker {
    /// Holds what `read` gives against registers and device.
    pub(super) fn check(
        &mut self,
        whose: &str,
        round: u64,
        state: &VcpuState,
        device: u64,
        read: impl Fn(u64, &mut [u8]) -> Result<(), MeasureError>,
    ) -> Result<(), MeasureError> {
        let stamped = (round % CHECKED_STEP..STAMPED_PAGES).step_by(CHECKED_STEP as usize);
        let stamped = stamped.map(|page| {
            let gpa = DATA_GPA + page * PAGE_SIZE;
            (gpa, stamp_at(state, STAMPED_PAGES, page))
        });
        let of_device = (0..DEVICE_PAGES).map(|page| {
            // The last word of a page as well as the first: they are written as one.
            let gpa = DEVICE_GPA + page * PAGE_SIZE + (round + page) % 2 * (PAGE_SIZE - 8);
            (gpa, last_number(device, DEVICE_PAGES, page))
        });
        for (gpa, expected) in stamped.chain(of_device) {
            let mut word = [0; 8];
            read(gpa, &mut word)?;
            let found = u64::from_le_bytes(word);
            self.checked += 1;
            if found != expected {
                let what = format!(
                    "{whose} of round {round}: {found} at {gpa:#x}, where {expected} must be"
                );
                note(&mut self.wrong, what);
            }
        }
        Ok(())
    }
}

/// Goes round until the time is over. Snapshots that a clone was made of are given to `retire`, which drops
/// them, or does not.
///
/// # Errors
/// If something cannot be made. What is wrong with memory is in the result.
pub fn run(
    kvm: &Kvm,
    memory: u64,
    going: &mut Going<'_>,
    retire: &mut dyn FnMut(Snapshot),
) -> Result<Churn, MeasureError> {
    let parent = Parent::boot(
        kvm,
        &ParentConfig {
            memory,
            entries: Entries::Huge,
            program: Program::Stamp(STAMPED),
            clones: 2,
            copies: 2 * memory,
        },
    )?;
    let frames = parent.frames().clone();
    let shells = Shells::start(Kvm::open()?, frames.clone(), memory, 1, 2);
    let shells = shells.map_err(|source| MeasureError::Host {
        what: "start the thread that makes shells",
        source,
    })?;
    let device = Device::start(parent.vm().ram())?;
    let [mut firsts, mut pauses] = [const { Times::new() }; 2];
    let mut checker = Checker::default();
    let mut levels = Levels::default();
    let (began, mut rounds, mut device_pages) = (Instant::now(), 0, 0);
    let mut next_tell = began;
    while going.goes_on(rounds, began) {
        rounds += 1;
        let wish = Instant::now();
        let stopped = device.stopped();
        if let Some(why) = &stopped.1 {
            checker.wrong.push(format!("the device has failed: {why}"));
            break;
        }
        let number = stopped.0.number;
        let (taken, timing) = parent.vm().snapshot()?;
        drop(stopped);
        let state = VcpuState::of_saved(&taken.vcpus()[0])?;
        let snapshot = beginning(&taken, Begins::Operations(OPERATIONS))?;
        let clone = parent.start_clone(kvm, &snapshot, Some(shells.take()?))?;
        firsts.record(clone.first_instruction(wish)?);
        pauses.record(timing.pause());
        // It runs, and has a device of its own that writes beside.
        clone.gate().let_on();
        let mut its = Numbering::new(clone.vm().ram(), number)?;
        (0..DEVICE_PAGES / 2).try_for_each(|_| its.write_next())?;
        clone.gate().wait(2)?;
        clone.gate().let_on();
        let paused = clone.vm().machine().pause(Capture::Registers)?;
        let its_state = paused.states()?.remove(0);
        let least = state.regs().rax + OPERATIONS - 1;
        if its_state.regs().rax < least {
            let what = format!("the clone of round {rounds} has not done its operations");
            note(&mut checker.wrong, what);
        }
        checker.check("clone", rounds, &its_state, its.number, |gpa, word| {
            let read = clone.vm().ram().read(gpa, word);
            read.map_err(|error| MeasureError::Reach(error.into()))
        })?;
        checker.check("snapshot", rounds, &state, number, |gpa, word| {
            let read = frames.read(taken.memory(), gpa, word);
            read.map_err(|error| MeasureError::Reach(error.into()))
        })?;
        device_pages += its.number - number;
        drop(its);
        drop(paused);
        drop(clone);
        drop(snapshot);
        retire(taken);
        let looked = levels.look(frames.pool().usage().in_use * PAGE_SIZE);
        looked.map_err(|source| MeasureError::Host {
            what: "tell how much memory this process has",
            source,
        })?;
        let now = Instant::now();
        if now >= next_tell {
            next_tell = now + TELL;
            (going.tell)(&format!(
                "{:.0} s, {rounds} clones, {} wrong",
                (now - began).as_secs_f64(),
                checker.wrong.len()
            ));
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    device_pages += device.stopped().0.number;
    drop(device);
    drop(parent);
    drop(shells);
    let left = account(frames.pool(), frames.budget());
    checker.wrong.extend(left.iter().map(ToString::to_string));
    Ok(Churn {
        memory,
        clones: rounds,
        seconds,
        first_instruction_us: firsts.summary().unwrap_or_default(),
        pause_us: pauses.summary().unwrap_or_default(),
        device_pages,
        checked: checker.checked,
        wrong: checker.wrong,
        flatness: levels.flatness(),
    })
}
