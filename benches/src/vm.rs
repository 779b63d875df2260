//! The measuring guest, running on the memory of any technique.

use std::mem::offset_of;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::abi::{
    BOOT_MAGIC, BootInfo, DEVICE_STRIDE, Layout, PAGE_SIZE, PORT_PANIC, Pattern, REGION_SIZE, Text,
};
use guest::sweep::{Choice, LAPS, Lap, SweepOrders, SweepPage};
use palimpsest::kvm::{
    BootError, Capture, GuestRam, Image, Kvm, KvmError, Machine, PortAction, PortHandler,
    StopReason, VcpuState, write_boot_info, write_page_tables,
};

use crate::technique::{Taken, Technique, TechniqueError};

const REGION_PAGES: u64 = REGION_SIZE / PAGE_SIZE;
/// Pages a device writes at a time, and how often it does.
const DEVICE_BATCH: u64 = 16;
const DEVICE_EVERY: Duration = Duration::from_millis(1);
/// How long a guest may take for what it is waited for. The slowest technique needs a minute for the first touch of 8 GiB.
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
    /// Bytes that [`Pattern::Dense`] sweeps, and bytes that a lap of any pattern writes to, a page a write.
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
    /// Somebody pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// A running guest. Fields are dropped in this order: who uses memory goes before memory.
pub struct Vm {
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
pub struct Progress {
    /// Whether it has written all of its share.
    pub resident: bool,
    /// Writes.
    pub ops: u64,
    /// Laps.
    pub laps: u64,
}

/// A snapshot that was taken, and when.
pub struct Snapshot<'a> {
    /// Memory.
    pub memory: Box<dyn Taken + 'a>,
    /// Registers.
    pub vcpus: Vec<VcpuState>,
    /// From the kick to the last vCPU running again.
    pub pause: Duration,
    /// How far each vCPU was.
    pub at: Vec<Progress>,
}

impl Vm {
    /// Boots the guest on the memory of `technique`.
    pub fn boot(
        kvm: &Kvm,
        technique: Arc<dyn Technique>,
        config: &GuestConfig,
    ) -> Result<Self, VmError> {
        let image = Image::parse(guest::SWEEP)?;
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
        technique.populate(layout.hammer_base..config.memory)?;
        let ram = technique.ram();
        image.load(&*ram)?;
        write_page_tables(&*ram, config.memory)?;
        write_boot_info(
            &*ram,
            &BootInfo {
                magic: BOOT_MAGIC,
                seed: 0,
                layout,
                pattern: config.pattern as u64,
            },
        )?;
        for (vcpu, orders) in (0..).zip(&orders) {
            let gpa = layout.vcpu_page(vcpu) + offset_of!(SweepPage, orders) as u64;
            ram.write(gpa, &bytes(orders))
                .map_err(TechniqueError::Memory)?;
        }

        let ended = Arc::new(Mutex::new(Vec::new()));
        let ends = Arc::clone(&ended);
        let machine = Machine::new(
            kvm,
            technique.window(),
            Arc::clone(&ram),
            config.vcpus as usize,
            Arc::new(Ports(Arc::clone(&ram))),
            Box::new(move |vcpu, outcome| lock(&ends).push(format!("vcpu {vcpu}: {outcome}"))),
        )?;
        let device = config
            .dma
            .then(|| DeviceThread::start(&*technique, layout.device_area(0)))
            .transpose()?;
        machine.start(image.entry())?;
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

    /// Takes a snapshot.
    pub fn snapshot(&self) -> Result<Snapshot<'_>, VmError> {
        self.snapshot_and(|_| ())
    }

    /// Takes a snapshot, and calls `look` with guest memory while nothing writes to it.
    pub fn snapshot_and(&self, look: impl FnOnce(&dyn GuestRam)) -> Result<Snapshot<'_>, VmError> {
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
        Ok(Snapshot {
            memory,
            vcpus,
            pause,
            at,
        })
    }

    /// How far each vCPU is.
    pub fn progress(&self) -> Result<Vec<Progress>, VmError> {
        (0..self.orders.len())
            .map(|vcpu| self.page(vcpu).map(|page| page.progress()))
            .collect()
    }

    /// All writes so far.
    pub fn ops(&self) -> Result<u64, VmError> {
        Ok(self.progress()?.iter().map(|p| p.ops).sum())
    }

    /// Laps `laps` of vCPU `vcpu`. Fewer, if some are not kept any more or not there yet.
    pub fn laps(&self, vcpu: usize, laps: Range<u64>) -> Result<Vec<Lap>, VmError> {
        let page = self.page(vcpu)?;
        // Read after: what may have been overwritten since is left out.
        let now = self.page(vcpu)?.progress().laps;
        let kept = laps.start.max((now + 1).saturating_sub(LAPS))..laps.end;
        let there = page.progress().laps;
        Ok((kept.start..kept.end.min(there))
            .map(|lap| page.lap(lap))
            .collect())
    }

    /// Waits until `done` holds for every vCPU.
    pub fn wait(
        &self,
        what: &'static str,
        stop: &AtomicBool,
        done: impl Fn(usize, Progress) -> bool,
    ) -> Result<(), VmError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let progress = self.progress()?;
            if progress
                .iter()
                .enumerate()
                .all(|(vcpu, progress)| done(vcpu, *progress))
            {
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

    fn page(&self, vcpu: usize) -> Result<PageBytes, VmError> {
        let mut page = PageBytes([0; size_of::<SweepPage>()]);
        self.ram
            .read(self.layout.vcpu_page(vcpu as u64), &mut page.0)
            .map_err(TechniqueError::Memory)?;
        Ok(page)
    }
}

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
            guest::sweep::Order::new(choice)?;
            Some(SweepOrders {
                first: layout.hammer_base + border(vcpu) * REGION_SIZE,
                resident,
                choice,
                lap: sweep,
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

/// A [`SweepPage`] as it was read.
struct PageBytes([u8; size_of::<SweepPage>()]);

impl PageBytes {
    fn word(&self, offset: usize) -> u64 {
        self.0[offset..offset + 8]
            .iter()
            .rev()
            .fold(0, |word, &byte| word << 8 | u64::from(byte))
    }

    fn progress(&self) -> Progress {
        Progress {
            resident: self.word(offset_of!(SweepPage, resident)) != 0,
            ops: self.word(offset_of!(SweepPage, ops)),
            laps: self.word(offset_of!(SweepPage, laps)),
        }
    }

    fn lap(&self, lap: u64) -> Lap {
        let at = offset_of!(SweepPage, ring) + (lap % LAPS) as usize * size_of::<Lap>();
        Lap {
            start: self.word(at + offset_of!(Lap, start)),
            end: self.word(at + offset_of!(Lap, end)),
            longest_gap: self.word(at + offset_of!(Lap, longest_gap)),
            ops: self.word(at + offset_of!(Lap, ops)),
        }
    }
}

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
