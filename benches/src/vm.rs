//! The measuring guest, running on the memory of any technique.

use std::mem::offset_of;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::abi::{DEVICE_STRIDE, Layout, PAGE_SIZE, PORT_PANIC, Pattern, REGION_SIZE, Text};
use guest::sweep::{Choice, LAPS, Lap, SweepOrders, SweepPage};
use palimpsest::kvm::{
    BootError, GuestRam, KvmError, Machine, OnStop, PortAction, PortHandler, StopReason, VcpuState,
};
use palimpsest::vcpus::Capture;
use palimpsest::vm::By;
use vmm::boot;

use crate::technique::{SnapshotMemory, Technique, TechniqueError};

const REGION_PAGES: u64 = REGION_SIZE / PAGE_SIZE;
/// Pages a device writes at a time, and how often it does.
const DEVICE_BATCH: u64 = 16;
const DEVICE_EVERY: Duration = Duration::from_millis(1);
/// Writes of the shortest lap: some 0.2 ms.
const SHORTEST_LAP: u64 = 16_384;
/// How long a guest may take for what it is waited for. The slowest technique needs a minute for the first
/// touch of 8 GiB.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often a guest that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(1);

/// What the guest is and does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestConfig {
    /// Bytes of memory, all of which the guest touches.
    pub memory: u64,
    /// vCPUs. They share the memory out among them.
    pub vcpus: u64,
    /// Which pages it writes.
    pub pattern: Pattern,
    /// Bytes that [`Pattern::Dense`] sweeps. A lap of any pattern is as many writes as it has pages, or
    /// several times that.
    pub sweep: u64,
    /// Bytes that are hot in [`Pattern::Hot`].
    pub hot: u64,
    /// One write of how many is not hot.
    pub cold_every: u64,
    /// Whether a device writes guest memory beside.
    pub dma: bool,
}

/// Why there is no guest, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The program could not be loaded.
    #[error("cannot load the measuring guest")]
    Boot(#[from] BootError),
    /// Memory is too small.
    #[error("{} MiB of memory are too few for {vcpus} vcpus of this pattern", memory >> 20)]
    TooSmall {
        /// Bytes.
        memory: u64,
        /// vCPUs.
        vcpus: u64,
    },
    /// The machine has too little memory for the guest and its snapshot.
    #[error("it needs {} MiB of memory, and {} MiB are available", needed >> 20, available >> 20)]
    NoMemory {
        /// Bytes it could take.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The technique failed.
    #[error(transparent)]
    Technique(#[from] TechniqueError),
    /// The guest ended.
    #[error("the guest has ended: {0}")]
    Ended(String),
    /// The device failed.
    #[error("the device has failed: {0}")]
    Device(String),
    /// The guest does not get on.
    #[error("the guest is not done with {what} after {} s", PATIENCE.as_secs())]
    Stuck {
        /// What it is waited for.
        what: &'static str,
    },
    /// The host was not there in time, over and over.
    #[error(
        "the guest forgets its laps before they can be looked at: this machine is too busy to measure on"
    )]
    Missed,
    /// Somebody pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// A running guest. Fields are dropped in this order: who uses memory goes before memory.
pub struct BenchVm {
    machine: Machine,
    device: Option<DeviceThread>,
    technique: Arc<dyn Technique>,
    ram: Arc<dyn GuestRam>,
    layout: Layout,
    orders: Vec<SweepOrders>,
    /// Why vCPUs have ended. None should.
    ended: Arc<Mutex<Vec<String>>>,
}

/// How far a vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuProgress {
    /// Whether it has written all of its share.
    pub resident: bool,
    /// Writes.
    pub ops: u64,
    /// Laps.
    pub laps: u64,
}

/// A snapshot that was taken, and when.
pub struct MeasuredSnapshot<'a> {
    /// Memory.
    pub memory: Box<dyn SnapshotMemory + 'a>,
    /// Registers.
    pub vcpus: Vec<VcpuState>,
    /// From the kick to the last vCPU running again.
    pub pause: Duration,
    /// How far each vCPU was when the technique began to prepare for it.
    pub since: Vec<VcpuProgress>,
    /// How far each vCPU was.
    pub at: Vec<VcpuProgress>,
}

impl BenchVm {
    /// Boots the guest on the memory of `technique`, run by `by`.
    pub fn boot(
        by: By<'_>,
        technique: Arc<dyn Technique>,
        config: &GuestConfig,
    ) -> Result<Self, VmError> {
        let image = boot::parse(guest::SWEEP)?;
        let too_small = VmError::TooSmall {
            memory: config.memory,
            vcpus: config.vcpus,
        };
        let devices = config.dma.into();
        let Some((layout, orders)) =
            Layout::new(config.memory, image.end(), config.vcpus, devices, 0)
                .and_then(|layout| Some((layout, orders(&layout, config)?)))
        else {
            return Err(too_small);
        };
        // All of it: the guest's own notes and stacks too.
        technique.populate(0..config.memory)?;
        let ram = technique.ram();
        image.load(&*ram)?;
        boot::write_first_memory(&*ram, layout, 0, config.pattern)?;
        for (vcpu, orders) in (0..).zip(&orders) {
            let gpa = layout.vcpu_page(vcpu) + offset_of!(SweepPage, orders) as u64;
            ram.write(gpa, &bytes(orders))
                .map_err(TechniqueError::Memory)?;
        }

        let ended = Arc::new(Mutex::new(Vec::new()));
        let ends = Arc::clone(&ended);
        let (vcpus, ports) = (config.vcpus as usize, Arc::new(Ports(Arc::clone(&ram))));
        let on_stop: OnStop =
            Box::new(move |vcpu, outcome| lock(&ends).push(format!("vcpu {vcpu}: {outcome}")));
        let machine = match (by, technique.window()) {
            (By::Kvm(kvm), _) => {
                let slot = technique.slot();
                Machine::new(kvm, slot, Arc::clone(&ram), vcpus, ports, on_stop)?
            }
            (By::User(user), Some(window)) => {
                user.machine(window, Arc::clone(&ram), vcpus, ports, on_stop)?
            }
            (By::User(_), None) => return Err(KvmError::Placement.into()),
        };
        let device = config
            .dma
            .then(|| DeviceThread::start(&*technique, layout.device_area(0)))
            .transpose()?;
        machine.start(|vcpu| boot::entry(&layout, image.entry(), vcpu))?;
        Ok(Self {
            machine,
            device,
            technique,
            ram,
            layout,
            orders,
            ended,
        })
    }

    /// The technique.
    pub fn technique(&self) -> &dyn Technique {
        &*self.technique
    }

    /// Guest memory.
    pub fn ram(&self) -> &dyn GuestRam {
        &*self.ram
    }

    /// What each vCPU does.
    pub fn orders(&self) -> &[SweepOrders] {
        &self.orders
    }

    /// Frequency of the guest's time-stamp counter.
    pub fn tsc_khz(&self) -> u32 {
        self.machine.tsc_khz()
    }

    /// Stops the vCPUs, captures their registers, and lets them run on: what a snapshot takes without memory.
    pub fn stop_and_go(&self) -> Result<Duration, VmError> {
        let paused = self.machine.pause(Capture::Registers)?;
        paused.states()?;
        let kicked = paused.kicked();
        Ok(paused.resume() - kicked)
    }

    /// Takes a snapshot.
    pub fn snapshot(&self) -> Result<MeasuredSnapshot<'_>, VmError> {
        self.snapshot_and(|_| ())
    }

    /// Takes a snapshot, and calls `look` with guest memory while nothing writes to it.
    pub fn snapshot_and(
        &self,
        look: impl FnOnce(&dyn GuestRam),
    ) -> Result<MeasuredSnapshot<'_>, VmError> {
        let since = self.progress()?;
        self.technique.prepare()?;
        let paused = self.machine.pause(Capture::Registers)?;
        // The device stops between two batches.
        let stopped = self.device.as_ref().map(|device| lock(&device.shared.gate));
        let at = self.progress()?;
        let memory = self.technique.snapshot()?;
        look(&*self.ram);
        let vcpus = paused.states()?;
        drop(stopped);
        let kicked = paused.kicked();
        let pause = paused.resume() - kicked;
        self.technique.resumed();
        Ok(MeasuredSnapshot {
            memory,
            vcpus,
            pause,
            since,
            at,
        })
    }

    /// How far each vCPU is.
    pub fn progress(&self) -> Result<Vec<VcpuProgress>, VmError> {
        (0..self.orders.len())
            .map(|vcpu| {
                let [resident, ops, laps] = self.words(vcpu, offset_of!(SweepPage, resident))?;
                Ok(VcpuProgress {
                    resident: resident != 0,
                    ops,
                    laps,
                })
            })
            .collect()
    }

    /// All writes so far.
    pub fn ops(&self) -> Result<u64, VmError> {
        Ok(self.progress()?.iter().map(|p| p.ops).sum())
    }

    /// Laps `laps` of vCPU `vcpu`. Fewer, if some are not kept any more or not there yet.
    pub fn laps(&self, vcpu: usize, laps: Range<u64>) -> Result<Vec<Lap>, VmError> {
        let [there] = self.words(vcpu, offset_of!(SweepPage, laps))?;
        let mut read = Vec::new();
        for lap in laps.start.max(there.saturating_sub(LAPS))..laps.end.min(there) {
            let at = offset_of!(SweepPage, ring) + (lap % LAPS) as usize * size_of::<Lap>();
            let [start, end, longest_gap, ops] = self.words(vcpu, at)?;
            read.push((
                lap,
                Lap {
                    start,
                    end,
                    longest_gap,
                    ops,
                },
            ));
        }
        // What may have been overwritten meanwhile is left out: the lap that is being done has the place of
        // one that was read, perhaps.
        let [now] = self.words(vcpu, offset_of!(SweepPage, laps))?;
        let kept = (now + 1).saturating_sub(LAPS);
        Ok(read
            .into_iter()
            .filter_map(|(lap, read)| (lap >= kept).then_some(read))
            .collect())
    }

    /// Waits until `done` holds for every vCPU.
    pub fn wait(
        &self,
        what: &'static str,
        stop: &AtomicBool,
        mut done: impl FnMut(usize, VcpuProgress) -> Result<bool, VmError>,
    ) -> Result<(), VmError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut all = true;
            for (vcpu, progress) in self.progress()?.into_iter().enumerate() {
                all &= done(vcpu, progress)?;
            }
            if all {
                return Ok(());
            }
            self.check()?;
            if stop.load(Ordering::Relaxed) {
                return Err(VmError::Interrupted);
            }
            if Instant::now() > deadline {
                return Err(VmError::Stuck { what });
            }
            thread::sleep(LOOK);
        }
    }

    /// Fails if the guest or its device has ended.
    pub fn check(&self) -> Result<(), VmError> {
        if let Some(why) = lock(&self.ended).first() {
            return Err(VmError::Ended(why.clone()));
        }
        let device = self.device.as_ref();
        match device.and_then(|device| lock(&device.shared.gate).clone()) {
            Some(why) => Err(VmError::Device(why)),
            None => Ok(()),
        }
    }

    /// Pages the device has written.
    pub fn device_pages(&self) -> u64 {
        self.device
            .as_ref()
            .map_or(0, |device| *lock(&device.shared.pages))
    }

    /// Words of what vCPU `vcpu` says of itself, from byte `offset` on.
    fn words<const N: usize>(&self, vcpu: usize, offset: usize) -> Result<[u64; N], VmError> {
        let mut bytes = [[0; 8]; N];
        let gpa = self.layout.vcpu_page(vcpu as u64) + offset as u64;
        self.ram
            .read(gpa, bytes.as_flattened_mut())
            .map_err(TechniqueError::Memory)?;
        Ok(bytes.map(u64::from_le_bytes))
    }
}

const _: () = {
    // What is read in one piece lies in one piece.
    let resident = offset_of!(SweepPage, resident);
    assert!(offset_of!(SweepPage, ops) == resident + 8);
    assert!(offset_of!(SweepPage, laps) == resident + 16);
    assert!(offset_of!(Lap, start) == 0 && offset_of!(Lap, end) == 8);
    assert!(offset_of!(Lap, longest_gap) == 16 && offset_of!(Lap, ops) == 24);
};

/// What each vCPU does. `None` if there is too little memory.
fn orders(layout: &Layout, config: &GuestConfig) -> Option<Vec<SweepOrders>> {
    let regions = (layout.memory - layout.hammer_base) / REGION_SIZE;
    let vcpus = layout.vcpus;
    let border = |vcpu: u64| regions * vcpu / vcpus;
    (0..vcpus)
        .map(|vcpu| {
            let resident = (border(vcpu + 1) - border(vcpu)) * REGION_PAGES;
            let sweep = (config.sweep / PAGE_SIZE / vcpus).min(resident);
            let choice = Choice {
                pattern: config.pattern as u64,
                pages: match config.pattern {
                    Pattern::Dense => sweep,
                    Pattern::Uniform | Pattern::Hot | Pattern::Sparse => resident,
                },
                hot: config.hot / PAGE_SIZE / vcpus,
                cold_every: config.cold_every,
            };
            guest::sweep::Route::new(choice)?;
            Some(SweepOrders {
                first: layout.hammer_base + border(vcpu) * REGION_SIZE,
                resident,
                choice,
                // Whole sweeps, and long enough that the host sees a lap before it is forgotten.
                lap: sweep * SHORTEST_LAP.div_ceil(sweep.max(1)),
            })
        })
        .collect()
}

/// `orders` as they are in memory.
fn bytes(orders: &SweepOrders) -> Vec<u8> {
    // Taken apart by name, in the order of `repr(C)`: a field that is added does not compile here.
    let &SweepOrders {
        first,
        resident,
        choice:
            Choice {
                pattern,
                pages,
                hot,
                cold_every,
            },
        lap,
    } = orders;
    let words = [first, resident, pattern, pages, hot, cold_every, lap];
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}
const _: () = assert!(size_of::<SweepOrders>() == 7 * 8);

/// The guest has nothing to say but why it cannot go on.
struct Ports(Arc<dyn GuestRam>);

impl Ports {
    fn text(&self, gpa: u64) -> String {
        let mut header = [0; size_of::<Text>()];
        let mut text = vec![0; 256];
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
        if self.0.read(gpa, &mut header).is_err() {
            return "?".to_owned();
        }
        text.truncate(word(&header[8..]) as usize);
        match self.0.read(word(&header[..8]), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(_) => "?".to_owned(),
        }
    }
}

impl PortHandler for Ports {
    fn out(&self, _vcpu: usize, port: u16, value: u32) -> PortAction {
        PortAction::Stop(match port {
            PORT_PANIC => StopReason::Panic {
                message: self.text(value.into()),
            },
            _ => StopReason::Exit { status: value },
        })
    }
}

/// A thread that writes guest memory as a device does.
struct DeviceThread {
    shared: Arc<DeviceShared>,
    thread: Option<JoinHandle<()>>,
}

struct DeviceShared {
    stop: AtomicBool,
    /// Held while the device writes. Has the reason if it cannot any more.
    gate: Mutex<Option<String>>,
    pages: Mutex<u64>,
}

impl DeviceThread {
    fn start(technique: &dyn Technique, area: u64) -> Result<Self, TechniqueError> {
        let gpas = area..area + DEVICE_STRIDE;
        let mut device = technique.device(gpas.clone())?;
        let shared = Arc::new(DeviceShared {
            stop: AtomicBool::new(false),
            gate: Mutex::new(None),
            pages: Mutex::new(0),
        });
        let its = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("dma".to_owned())
            .spawn(move || {
                let mut gpa = gpas.start;
                let mut word = 0;
                while !its.stop.load(Ordering::Relaxed) {
                    let mut failed = lock(&its.gate);
                    for _ in 0..DEVICE_BATCH {
                        word += 1;
                        if let Err(error) = device.write_page(gpa, word) {
                            *failed = Some(error.to_string());
                            return;
                        }
                        gpa += PAGE_SIZE;
                        if gpa == gpas.end {
                            gpa = gpas.start;
                        }
                    }
                    *lock(&its.pages) = word;
                    drop(failed);
                    thread::sleep(DEVICE_EVERY);
                }
            })
            .map_err(|source| TechniqueError::Host {
                what: "start the device",
                source,
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for DeviceThread {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pattern: Pattern, vcpus: u64) -> GuestConfig {
        GuestConfig {
            memory: 256 << 20,
            vcpus,
            pattern,
            sweep: 128 << 20,
            hot: 16 << 20,
            cold_every: 10,
            dma: false,
        }
    }

    fn orders_of(config: &GuestConfig) -> Option<Vec<SweepOrders>> {
        let layout = Layout::new(config.memory, 3 << 20, config.vcpus, 0, 0)?;
        orders(&layout, config)
    }

    #[test]
    fn vcpus_share_memory_out() {
        for vcpus in 1..=5 {
            let orders = orders_of(&config(Pattern::Uniform, vcpus)).unwrap();
            // Image and vCPU pages have three regions.
            let mut next = 6 << 20;
            for orders in orders {
                assert_eq!(orders.first, next);
                assert_eq!(orders.choice.pages, orders.resident);
                next += orders.resident * PAGE_SIZE;
            }
            assert_eq!(next, 256 << 20, "{vcpus} vcpus");
        }
    }

    #[test]
    fn together_they_sweep_what_was_asked_for() {
        for vcpus in [1, 2, 4] {
            let orders = orders_of(&config(Pattern::Dense, vcpus)).unwrap();
            let swept: u64 = orders.iter().map(|orders| orders.choice.pages).sum();
            assert_eq!(swept * PAGE_SIZE, 128 << 20);
            let hot = orders_of(&config(Pattern::Hot, vcpus)).unwrap();
            let hot: u64 = hot.iter().map(|orders| orders.choice.hot).sum();
            assert_eq!(hot * PAGE_SIZE, 16 << 20);
        }
    }

    #[test]
    fn laps_are_whole_sweeps_and_not_short() {
        for sweep in [4096, 1 << 20, 100 << 20, 1 << 30] {
            let mut config = config(Pattern::Dense, 1);
            config.sweep = sweep;
            let orders = orders_of(&config).unwrap()[0];
            assert!(orders.lap >= SHORTEST_LAP, "{sweep}");
            assert_eq!(orders.lap % orders.choice.pages, 0);
        }
    }

    #[test]
    fn too_little_memory_is_refused() {
        let refused = |change: fn(&mut GuestConfig)| {
            let mut config = config(Pattern::Hot, 2);
            change(&mut config);
            orders_of(&config).is_none()
        };
        assert!(!refused(|_| ()));
        assert!(refused(|config| config.memory = 8 << 20));
        assert!(refused(|config| config.hot = 256 << 20));
        assert!(refused(|config| config.hot = 4096));
        assert!(refused(|config| {
            config.pattern = Pattern::Dense;
            config.sweep = 4096;
        }));
    }
}
