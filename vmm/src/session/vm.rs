//! A running VM: the engine's, with the payload's devices.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use guest::abi::{Layout, PAGE_SIZE, PORT_DOORBELL_EVENT};
use palimpsest::aside::Aside;
use palimpsest::host::{Dumps, Ram, Window};
use palimpsest::kvm::{BootError, KvmError, Machine};
use palimpsest::memory::{Frames, Memory, MemoryError, MemoryOptions};
use palimpsest::mm::{Account, AddressSpace, AnyPolicy, Frozen, Mmu, REGION_PAGES};
use palimpsest::snapshot::Parts;
use palimpsest::vcpus::Capture;
use palimpsest::vm::{self, Accelerator, CloneError, Shell};

use super::config::{Config, GuestSource, Injection, PageSize, Size};
use super::faults::Forgetful;
use super::need::MemoryPlan;
use super::policy_of;
use super::ports::{Event, Events, Ports};
use crate::boot;
use crate::check::inject::LeakyMmu;
use crate::check::{Boot, Observation, Reference};
use crate::dma::{DeviceSet, StartError};
use crate::incarnation::{Entropy, Incarnation, IncarnationError, Incarnations};
use crate::run_snapshot::RunSnapshot;

/// Why a VM could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum PayloadVmError {
    /// The guest program is no good.
    #[error("--guest {guest}: cannot load it")]
    Image {
        /// Which.
        guest: String,
        /// Why.
        source: BootError,
    },
    /// What the guest finds in its memory at first could not be written.
    #[error("cannot write the guest's first memory")]
    Boot(#[from] BootError),
    /// The guest could not be given a generation.
    #[error("cannot give the guest a generation")]
    Generation(#[from] IncarnationError),
    /// Memory is too small for program, vCPUs and devices.
    #[error(
        "--memory {} is too small: the guest program ends at {image_end:#x}, \
         and {vcpus} vcpus and {devices} devices must fit above it",
        Size(*memory)
    )]
    Layout {
        /// Bytes of guest memory.
        memory: u64,
        /// Where the program ends.
        image_end: u64,
        /// vCPUs.
        vcpus: u64,
        /// Devices.
        devices: u64,
    },
    /// The host has no room for the frames or the window.
    #[error("cannot reserve {} for {what}", Size(*bytes))]
    Reserve {
        /// For what.
        what: &'static str,
        /// How much.
        bytes: u64,
        /// The host's reason.
        source: io::Error,
    },
    /// There is no memory.
    #[error(transparent)]
    Memory(MemoryError),
    /// KVM refused, or the host has no more of something.
    #[error(transparent)]
    Build(#[from] vm::BuildError),
    /// Devices did not start.
    #[error("cannot start the devices")]
    Devices(#[from] StartError),
}

impl From<MemoryError> for PayloadVmError {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::Reserve {
                what,
                bytes,
                source,
            } => Self::Reserve {
                what,
                bytes,
                source,
            },
            other => Self::Memory(other),
        }
    }
}

/// A virtual machine with the payload's devices. The fields are in the order in which they go.
#[derive(Debug)]
pub(super) struct PayloadVm {
    vm: palimpsest::vm::Vm<AnyPolicy>,
    aside: Arc<Aside>,
    pub(super) devices: Arc<DeviceSet>,
    pub(super) layout: Layout,
    /// Memory before the guest has run.
    pub(super) reference: Reference,
    pub(super) incarnations: Arc<Incarnations>,
    /// The incarnation that it is in.
    pub(super) incarnation: Arc<Incarnation>,
    /// Where its program ends: its memory is laid out behind it.
    pub(super) image_end: u64,
    entry: u64,
}

/// The guest in a VM's memory, as far as the VM need not know it.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) layout: Layout,
    pub(super) image_end: u64,
    pub(super) reference: Reference,
    pub(super) incarnations: Arc<Incarnations>,
    pub(super) incarnation: Arc<Incarnation>,
    pub(super) entry: u64,
}

/// The pages that stay writable when a fork is to skip some: each operation of the guest writes there.
pub(super) fn leaky_pages(layout: &Layout) -> Range<u64> {
    let first = layout.vcpu_base / PAGE_SIZE;
    first..first + REGION_PAGES
}

/// What the address space of a guest is to change: its window, or one that a fault is in.
fn mmu(config: &Config, layout: &Layout, window: Arc<Window>) -> Box<dyn Mmu> {
    match config.inject {
        Some(Injection::SkipWriteProtect) => Box::new(LeakyMmu::new(window, leaky_pages(layout))),
        _ => Box::new(window),
    }
}

/// Devices for the guest in `memory`, and the VM that `build` makes of it with them.
fn with_devices(
    memory: Memory<AnyPolicy>,
    layout: &Layout,
    config: &Config,
    aside: &Arc<Aside>,
    events: Events,
    build: impl FnOnce(
        vm::Builder<'_, AnyPolicy>,
    ) -> Result<palimpsest::vm::Vm<AnyPolicy>, vm::BuildError>,
) -> Result<(Arc<DeviceSet>, palimpsest::vm::Vm<AnyPolicy>), PayloadVmError> {
    let ram = memory.ram().clone();
    let devices = Arc::new(DeviceSet::start(&ram, layout, config.seed)?);
    let ports = Ports {
        ram,
        devices: Arc::clone(&devices),
        events: events.clone(),
    };
    let mut builder = palimpsest::vm::Vm::builder(memory)
        .ports(Arc::new(ports))
        .on_stop(move |vcpu, outcome| events.send(Event::Ended(vcpu, outcome)))
        .copy_ahead(config.copy_ahead)
        .aside(Arc::clone(aside));
    for (device, port) in devices.devices().iter().zip(PORT_DOORBELL_EVENT..) {
        builder = builder
            .device(Arc::clone(device) as _)
            .doorbell(port, device.doorbell());
    }
    let vm = build(builder)?;
    Ok((devices, vm))
}

impl PayloadVm {
    /// Puts a VM together, with its program loaded, that takes as much memory as `plan` says at most. It does
    /// not run yet.
    pub(super) fn build(
        accelerator: &Accelerator,
        config: &Config,
        image: Vec<u8>,
        policy: AnyPolicy,
        plan: MemoryPlan,
        events: Events,
    ) -> Result<Self, PayloadVmError> {
        let no_good = |source| PayloadVmError::Image {
            guest: config.guest.to_string(),
            source,
        };
        let image = boot::parse(image).map_err(no_good)?;
        let layout = Layout::new(
            config.memory,
            image.end(),
            config.vcpus,
            config.dma_devices,
            config.registered_buffers,
        )
        .ok_or(PayloadVmError::Layout {
            memory: config.memory,
            image_end: image.end(),
            vcpus: config.vcpus,
            devices: config.dma_devices,
        })?;

        let memory = Self::memory(accelerator, config, policy, plan, &layout)?;
        let ram = memory.ram().clone();
        image.load(&ram).map_err(no_good)?;
        boot::write_first_memory(&ram, layout, config.seed, config.pattern)?;
        let incarnations = Arc::new(Incarnations::new(match config.guest {
            GuestSource::Payload => Entropy::Seed(config.seed),
            // Whatever it does with it is its own business, and nobody else is to know it.
            GuestSource::File(_) => Entropy::Host,
        }));
        let incarnation = Arc::new(incarnations.boot(&ram, &layout)?);

        let guest = Guest {
            layout,
            image_end: image.end(),
            reference: Reference::new(&ram, &layout, image.writable()),
            incarnations,
            incarnation,
            entry: image.entry(),
        };
        Self::of_guest(accelerator, config, memory, guest, events)
    }

    /// The memory of one, all of it zeros, that takes as much as `plan` says at most.
    pub(super) fn memory(
        accelerator: &Accelerator,
        config: &Config,
        policy: AnyPolicy,
        plan: MemoryPlan,
        layout: &Layout,
    ) -> Result<Memory<AnyPolicy>, PayloadVmError> {
        let frames = Self::frames_of(config, plan)?;
        let options = MemoryOptions {
            base_pages: config.page_size == PageSize::Base,
            placement: accelerator.placement(),
            ..MemoryOptions::default()
        };
        let between = |window| mmu(config, layout, window);
        let memory = Memory::with(&frames, config.memory, policy, options, between)?;
        Ok(memory)
    }

    /// The frames of one that takes as much as `plan` says at most.
    pub(super) fn frames_of(config: &Config, plan: MemoryPlan) -> Result<Frames, PayloadVmError> {
        let dumps = if config.dump_guest_memory {
            Dumps::WithGuest
        } else {
            Dumps::WithoutGuest
        };
        Ok(Frames::with_limit(plan.physmap, plan.frames, dumps)?)
    }

    /// The memory of one that is what `frozen` is, which is in `frames`.
    pub(super) fn memory_of(
        accelerator: &Accelerator,
        config: &Config,
        policy: AnyPolicy,
        frames: &Frames,
        frozen: &Frozen,
        layout: &Layout,
    ) -> Result<Memory<AnyPolicy>, PayloadVmError> {
        let window = Arc::new(frames.window(config.memory, accelerator.placement())?);
        let options = MemoryOptions {
            base_pages: config.page_size == PageSize::Base,
            ..MemoryOptions::default()
        };
        let between = |window| mmu(config, layout, window);
        let memory = Memory::clone_of(frames, frozen, policy, options, window, between)?;
        Ok(memory)
    }

    /// One around `memory`, in which `guest` is.
    pub(super) fn of_guest(
        accelerator: &Accelerator,
        config: &Config,
        memory: Memory<AnyPolicy>,
        guest: Guest,
        events: Events,
    ) -> Result<Self, PayloadVmError> {
        let aside = Arc::<Aside>::default();
        let layout = guest.layout;
        let (devices, vm) = with_devices(memory, &layout, config, &aside, events, |builder| {
            builder.build(accelerator, config.vcpus as usize)
        })?;
        Ok(Self {
            vm,
            aside,
            devices,
            layout,
            reference: guest.reference,
            incarnations: guest.incarnations,
            incarnation: guest.incarnation,
            image_end: guest.image_end,
            entry: guest.entry,
        })
    }

    /// A clone of this one, or of a clone of it, in `shell`: with the memory of `snapshot`, and devices of its
    /// own. It does not run yet. `config` is that of this one; `account` pays for what it writes.
    pub(super) fn clone_of(
        &self,
        snapshot: &RunSnapshot,
        shell: Shell,
        config: &Config,
        account: Account,
        events: Events,
    ) -> Result<Self, PayloadVmError> {
        let memory = Memory::clone_of(
            self.frames(),
            snapshot.memory(),
            policy_of(config),
            MemoryOptions {
                base_pages: config.page_size == PageSize::Base,
                prices: Some(self.ram().prices().as_learnt()),
                account: Some(account),
                ..MemoryOptions::default()
            },
            Arc::clone(shell.window()),
            |window| Box::new(window),
        )?;
        let (layout, aside) = (self.layout, Arc::clone(&self.aside));
        let (devices, vm) = with_devices(memory, &layout, config, &aside, events, |builder| {
            builder.build_in(shell)
        })?;
        Ok(Self {
            vm,
            aside,
            devices,
            layout,
            reference: self.reference.clone(),
            incarnations: Arc::clone(&self.incarnations),
            // Until it is started.
            incarnation: Arc::clone(snapshot.incarnation().unwrap_or(&self.incarnation)),
            image_end: self.image_end,
            entry: self.entry,
        })
    }

    /// Starts a clone where `snapshot` was taken, as an incarnation of its own: with a new generation, unless
    /// a fault is to leave it the old one. Returns when its last vCPU was about to run.
    pub(super) fn start_from(
        &mut self,
        snapshot: &RunSnapshot,
        config: &Config,
    ) -> Result<Instant, CloneError> {
        let mut begun = None;
        let running = self.vm.start_from(snapshot.taken(), || {
            begun = Some(self.begin_copy(&self.incarnation, config)?);
            Ok(())
        })?;
        if let Some(incarnation) = begun {
            self.incarnation = Arc::new(incarnation);
        }
        Ok(running)
    }

    /// Begins a copy of `original`, whose memory is in place and nothing runs.
    pub(super) fn begin_copy(
        &self,
        original: &Incarnation,
        config: &Config,
    ) -> Result<Incarnation, IncarnationError> {
        let ram = self.ram();
        match config.inject {
            Some(Injection::SameGeneration) => {
                let ram = Forgetful(ram);
                self.incarnations.copy(&ram, &self.layout, original)
            }
            _ => self.incarnations.copy(ram, &self.layout, original),
        }
    }

    /// What the running guest says of itself, if it follows the formula by now.
    ///
    /// # Errors
    /// If its vCPUs cannot be stopped for that.
    pub(super) fn latch(&self) -> Result<Option<Boot>, KvmError> {
        let registers = || {
            let paused = self.machine().pause(Capture::Registers)?;
            let states = paused.states()?;
            paused.resume();
            Ok(states)
        };
        Boot::latch(self.ram(), &self.layout, &self.reference, registers)
    }

    /// Requests that each device has done.
    pub(super) fn requests_by_device(&self) -> Vec<u64> {
        let devices = self.devices.devices().iter();
        devices
            .map(|device| device.stats())
            .map(|stats| stats.to_guest + stats.from_guest)
            .collect()
    }

    /// What the guest has drawn, which stands still and follows the formula.
    pub(super) fn draws_at_rest(&self, boot: &Boot) -> Observation {
        let word = |gpa| {
            let mut bytes = [0; 8];
            self.ram()
                .read(gpa, &mut bytes)
                .map_or(0, |()| u64::from_le_bytes(bytes))
        };
        boot.draws_at_rest(&self.layout, word)
    }

    /// Starts the vCPUs.
    pub(super) fn start(&self) -> Result<(), KvmError> {
        let left_out = self.machine().left_out();
        if !left_out.is_empty() {
            tracing::info!(
                "this KVM cannot save and restore MSRs {left_out:#x?}: snapshots are without them"
            );
        }
        let entry = |vcpu| boot::entry(&self.layout, self.entry, vcpu);
        self.vm.start(entry)
    }

    /// Who steps aside for it.
    pub(super) fn aside(&self) -> &Arc<Aside> {
        &self.aside
    }

    /// What snapshots are taken of.
    pub(super) fn parts(&self) -> Parts<'_, AnyPolicy> {
        self.vm.parts()
    }

    pub(super) fn machine(&self) -> &Machine {
        self.vm.machine()
    }

    pub(super) fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    pub(super) fn space(&self) -> &AddressSpace<AnyPolicy> {
        self.vm.memory().space()
    }

    /// The frames, which outlive the VM.
    pub(super) fn frames(&self) -> &Frames {
        self.vm.memory().frames()
    }
}
