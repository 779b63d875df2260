//! A running VM: memory, vCPUs and devices, put together and taken apart in the right order.

use std::io;
use std::sync::Arc;

use guest::abi::{Layout, PAGE_SIZE, PORT_DOORBELL_EVENT};

use super::config::{Config, Injection, PageSize, Size};
use super::need::Plan;
use super::ports::{Event, Events, Ports};
use crate::boot;
use crate::check::Reference;
use crate::check::inject::LeakyMmu;
use palimpsest::device::{self, DeviceSet};
use palimpsest::host::{Ahead, Dumps, MappingBudget, PhysMap, Ram, Window};
use palimpsest::kvm::{BootError, Kvm, KvmError, Machine};
use palimpsest::mm::{AddressSpace, AllocError, CowPolicy, FramePool, Mmu, REGION_PAGES};
use palimpsest::snapshot::Parts;

/// Why a VM could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
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
    /// Memory is too small for program, vCPUs and devices.
    #[error(
        "--memory {} is too small: the guest program ends at {image_end:#x}, and {vcpus} vcpus and {devices} devices must fit above it",
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
    /// No frames.
    #[error(transparent)]
    Alloc(#[from] AllocError),
    /// KVM refused.
    #[error("cannot make the virtual machine")]
    Kvm(#[from] KvmError),
    /// The host has no more threads.
    #[error("cannot start the thread that copies ahead")]
    Ahead(#[source] io::Error),
    /// Devices did not start.
    #[error("cannot start the devices")]
    Devices(#[from] device::StartError),
}

/// A virtual machine. Fields are in the order they must be dropped in: first who uses memory, then memory.
#[derive(Debug)]
pub(super) struct Vm<P: CowPolicy> {
    pub(super) machine: Machine,
    pub(super) devices: Arc<DeviceSet<P>>,
    ahead: Option<Ahead>,
    pub(super) ram: Ram<P>,
    pub(super) layout: Layout,
    pub(super) books: Books,
    /// Memory before the guest has run.
    pub(super) reference: Reference,
    entry: u64,
}

/// What outlives a VM: where its frames and mappings are accounted for.
#[derive(Clone, Debug)]
pub(super) struct Books {
    pub(super) pool: Arc<FramePool>,
    pub(super) physmap: Arc<PhysMap>,
    pub(super) budget: Arc<MappingBudget>,
}

impl<P: CowPolicy> Vm<P> {
    /// Puts a VM together, with its program loaded; it does not run yet. It takes no more memory than `plan` says.
    pub(super) fn build(
        kvm: &Kvm,
        config: &Config,
        image: Vec<u8>,
        policy: P,
        plan: Plan,
        events: Events,
    ) -> Result<Self, BuildError> {
        let no_good = |source| BuildError::Image {
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
        .ok_or(BuildError::Layout {
            memory: config.memory,
            image_end: image.end(),
            vcpus: config.vcpus,
            devices: config.dma_devices,
        })?;

        let pages = config.memory / PAGE_SIZE;
        let frames = plan.physmap;
        let bytes = frames * PAGE_SIZE;
        let reserve = |what, bytes| {
            move |source| BuildError::Reserve {
                what,
                bytes,
                source,
            }
        };
        let dumps = if config.dump_guest_memory {
            Dumps::WithGuest
        } else {
            Dumps::WithoutGuest
        };
        let physmap = PhysMap::with_dumps(frames, dumps).map_err(reserve("frames", bytes))?;
        let budget = Arc::new(MappingBudget::of_this_process());
        let pool = FramePool::new(Arc::clone(&physmap) as _, frames, plan.frames)?;
        let window = Window::new(Arc::clone(&physmap), Arc::clone(&budget), pages)
            .map_err(reserve("the guest's window", config.memory))?;
        let window = Arc::new(window);
        let slot = Arc::clone(&window);
        let mmu: Box<dyn Mmu> = match config.inject {
            Some(Injection::SkipWriteProtect) => {
                // Each operation of the guest writes there.
                let first = layout.vcpu_base / PAGE_SIZE;
                Box::new(LeakyMmu::new(window, first..first + REGION_PAGES))
            }
            _ => Box::new(window),
        };
        let mut space = AddressSpace::new(Arc::clone(&pool), policy, mmu, pages)?;
        if config.page_size == PageSize::Base {
            space = space.with_base_pages();
            physmap.use_base_pages();
        }
        let ram = Ram::new(Arc::new(space), Arc::clone(&physmap));

        image.load(&ram).map_err(no_good)?;
        boot::write_first_memory(&ram, layout, config.seed, config.pattern)?;

        let reference = Reference::new(&ram, &layout, image.writable());
        let devices = Arc::new(DeviceSet::start(&ram, &layout, config.seed)?);
        let ports = Ports {
            ram: ram.clone(),
            devices: Arc::clone(&devices),
            events: events.clone(),
        };
        let on_stop = Box::new(move |vcpu, outcome| events.send(Event::Ended(vcpu, outcome)));
        let machine = Machine::new(
            kvm,
            slot,
            Arc::new(ram.clone()),
            config.vcpus as usize,
            Arc::new(ports),
            on_stop,
        )?;
        for (device, port) in devices.devices().iter().zip(PORT_DOORBELL_EVENT..) {
            machine.register_doorbell(port, device.doorbell())?;
        }
        let ahead = config
            .copy_ahead
            .then(|| Ahead::start(Arc::clone(ram.space())))
            .transpose()
            .map_err(BuildError::Ahead)?;
        Ok(Self {
            machine,
            devices,
            ahead,
            ram,
            layout,
            books: Books {
                pool,
                physmap,
                budget,
            },
            reference,
            entry: image.entry(),
        })
    }

    /// Starts the vCPUs.
    pub(super) fn start(&self) -> Result<(), KvmError> {
        let left_out = self.machine.left_out();
        if !left_out.is_empty() {
            tracing::info!(
                "this KVM cannot save and restore MSRs {left_out:#x?}: snapshots are without them"
            );
        }
        self.machine.start(|vcpu| boot::entry(self.entry, vcpu))
    }

    /// What snapshots are taken of.
    pub(super) fn parts(&self) -> Parts<'_, P> {
        Parts {
            machine: &self.machine,
            devices: &self.devices,
            space: self.ram.space(),
            ahead: self.ahead.as_ref(),
        }
    }
}
