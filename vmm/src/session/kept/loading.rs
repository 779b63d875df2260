//! A VM made of a snapshot in a store. Each chunk of memory is read and checked before anybody sees it: all of them
//! before the guest runs, or as they are used.

use std::sync::Arc;
use std::time::Instant;

use guest::abi::Layout;
use palimpsest::kept::{self, Base, LazyOptions, Progress, Refusal};
use palimpsest::kvm::{KvmError, StateError};
use palimpsest::mm::{BringError, ForkError};
use palimpsest::vm::Accelerator;

use super::facts;
use super::lazily::{Going, Lazy};
use super::source::Source;
use crate::check::Boot;
use crate::incarnation::{Entropy, Incarnation, Incarnations};
use crate::run_snapshot::{ForeignStateError, RunSnapshot};
use crate::session::config::{Config, PageSize, Size};
use crate::session::need::MemoryPlan;
use crate::session::policy_of;
use crate::session::ports::Events;
use crate::session::report::LoadCounts;
use crate::session::vm::{Guest, PayloadVm, PayloadVmError};

/// Why a snapshot could not be loaded. Nothing of it has run.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot run here.
    #[error("`{name}` cannot run here")]
    Refused {
        /// The snapshot.
        name: String,
        /// Why.
        source: Refusal,
    },
    /// It would run without isolation, and nobody has said that whoever saved it is trusted.
    #[error(
        "`{name}`: without KVM what was saved runs as code of this process, and can do whatever that can, whatever \
         guest it says to be: if you trust whoever has saved it, say --trust-guest"
    )]
    Untrusted {
        /// The snapshot.
        name: String,
    },
    /// Its memory cannot be laid out as it says.
    #[error("`{name}` says that its program ends at {image_end:#x}: no memory of {} is laid out so", Size(*memory))]
    Layout {
        /// The snapshot.
        name: String,
        /// What it says.
        image_end: u64,
        /// Bytes of memory.
        memory: u64,
    },
    /// The store does not give it, or there is no room for it.
    #[error("cannot load `{name}`")]
    Load {
        /// The snapshot.
        name: String,
        /// Why.
        source: kept::LoadError,
    },
    /// What it has of vCPUs or devices is none.
    #[error("`{name}` is of a machine that cannot be")]
    Foreign {
        /// The snapshot.
        name: String,
        /// Why.
        source: ForeignStateError,
    },
    /// KVM does not take its registers.
    #[error("`{name}` has registers that cannot be set here")]
    States {
        /// The snapshot.
        name: String,
        /// Why.
        source: KvmError,
    },
    /// What it has of the registers that booting has set is none.
    #[error("`{name}` does not say which registers booting has set")]
    Boot {
        /// The snapshot.
        name: String,
        /// Why, if something is there.
        source: Option<StateError>,
    },
    /// What it has of pages that nobody writes is none.
    #[error("`{name}` does not say which pages its guest never writes")]
    Reference {
        /// The snapshot.
        name: String,
    },
    /// Its vCPUs are in no state that is one.
    #[error("`{name}` is of vcpus that cannot be")]
    State {
        /// The snapshot.
        name: String,
        /// Why.
        source: StateError,
    },
    /// Its memory cannot be read as it is used.
    #[error(
        "`{name}` cannot be read as it is used: this KVM has its own copy of the guest's page tables, and a guest that \
         can change to others would be told of page faults that are none; leave out --lazy always"
    )]
    NotLazily {
        /// The snapshot.
        name: String,
    },
    /// Some of its memory is not there, or damaged.
    #[error("cannot load `{name}`")]
    Bring {
        /// The snapshot.
        name: String,
        /// Why.
        source: BringError,
    },
    /// No VM for it.
    #[error(transparent)]
    Vm(#[from] PayloadVmError),
    /// Its memory could not be frozen.
    #[error("cannot freeze the memory that was loaded")]
    Freeze(#[source] ForkError),
}

impl Source {
    /// Refuses to run it where `accelerator` isolates nothing, unless `config` says that it is trusted. Even if it says
    /// that its guest is the built-in one: what is in its memory is what somebody has put there.
    pub(in crate::session) fn is_trusted_under(
        &self,
        accelerator: &Accelerator,
        config: &Config,
    ) -> Result<(), LoadError> {
        match accelerator {
            Accelerator::User(_) if !config.trust_guest => Err(LoadError::Untrusted {
                name: self.name().to_string(),
            }),
            _ => Ok(()),
        }
    }
}

/// What a snapshot is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::session) enum Purpose {
    /// It is to run on.
    Run,
    /// It is looked at, and no vCPU runs.
    Look,
}

/// Whether the memory of `source` is to be read as it is used.
fn is_lazy(
    accelerator: &Accelerator,
    source: &Source,
    snapshot: &palimpsest::snapshot::Snapshot,
) -> Result<bool, LoadError> {
    if source.loading.lazy == Lazy::Never {
        return Ok(false);
    }
    let name = || source.name().to_string();
    let may = kept::may_be_lazy(accelerator, snapshot);
    let may = may.map_err(|source| LoadError::State {
        name: name(),
        source,
    })?;
    match source.loading.lazy {
        Lazy::Always if !may => Err(LoadError::NotLazily { name: name() }),
        _ => Ok(may),
    }
}

/// A VM that does not run yet, in the memory of a snapshot.
#[derive(Debug)]
pub(in crate::session) struct Loaded {
    pub(in crate::session) vm: PayloadVm,
    /// What it is to be started from: number 1 of the run.
    pub(in crate::session) snapshot: Arc<RunSnapshot>,
    /// What is known of the guest since it booted, if it follows the formula.
    pub(in crate::session) boot: Option<Boot>,
    /// What the next save has in common with it.
    pub(in crate::session) base: Base,
    pub(in crate::session) counts: LoadCounts,
    /// What goes on while the guest runs, if not all was read before.
    pub(in crate::session) going: Option<Going>,
    /// When it was begun.
    pub(in crate::session) began: Instant,
    /// What is not as it was.
    pub(in crate::session) notes: Vec<String>,
}

/// Loads `source` into a VM that `accelerator` runs, as `config` says. `watch` is told how far it is, and says whether
/// to go on.
pub(in crate::session) fn load(
    accelerator: &Accelerator,
    config: &Config,
    source: &Source,
    plan: MemoryPlan,
    events: Events,
    purpose: Purpose,
    watch: &mut dyn FnMut(&Progress) -> bool,
) -> Result<Loaded, LoadError> {
    let (began, policy) = (Instant::now(), policy_of(config));
    let kept = &source.kept;
    let name = || source.name().to_string();
    let image_end = source.facts.image_end;
    let layout = Layout::new(
        config.memory,
        image_end,
        config.vcpus,
        config.dma_devices,
        config.registered_buffers,
    );
    let layout = layout.ok_or_else(|| LoadError::Layout {
        name: name(),
        image_end,
        memory: config.memory,
    })?;
    let refused = |source| LoadError::Refused {
        name: name(),
        source,
    };
    // Before anything is read: that takes a while.
    let machine = &kept.manifest().machine;
    kept::check(accelerator, machine, 0).map_err(refused)?;
    let reference = facts::reference(kept).ok_or_else(|| LoadError::Reference { name: name() })?;
    let not_loaded = |source| LoadError::Load {
        name: name(),
        source,
    };
    let saved = source.incarnation();
    let incarnations = Arc::new(Incarnations::after(Entropy::Host, saved.number));
    let saved = Arc::<Incarnation>::new(saved);
    let frames = PayloadVm::frames_of(config, plan)?;
    let options = LazyOptions {
        base_pages: config.page_size == PageSize::Base,
        account: None,
    };
    // Nothing is read yet, and nothing will be if it cannot be so.
    let (frozen, chunks) = kept::lazily(kept, &frames, options).map_err(not_loaded)?;
    let mut snapshot = kept::snapshot_of(kept, frozen).map_err(not_loaded)?;
    let is_lazy = match purpose {
        Purpose::Run => is_lazy(accelerator, source, &snapshot)?,
        Purpose::Look => true,
    };
    let (memory, going) = if is_lazy {
        let frozen = snapshot.memory();
        let backed = frozen.backed_regions();
        let memory = PayloadVm::memory_of(accelerator, config, policy, &frames, frozen, &layout)?;
        let going = Going::new(chunks, backed, source.loading.prefetch);
        (memory, Some(going))
    } else {
        drop((chunks, snapshot, frames));
        let memory = PayloadVm::memory(accelerator, config, policy, plan, &layout)?;
        kept::fill(kept, memory.ram(), watch).map_err(not_loaded)?;
        let frozen = memory.space().fork().map_err(LoadError::Freeze)?;
        snapshot = kept::snapshot_of(kept, frozen).map_err(not_loaded)?;
        (memory, None)
    };
    let base = Base::new(kept, Arc::clone(snapshot.memory()));
    let snapshot = RunSnapshot::new(1, None, snapshot).map_err(|source| LoadError::Foreign {
        name: name(),
        source,
    })?;
    let guest = Guest {
        layout,
        image_end,
        reference,
        incarnations,
        incarnation: Arc::clone(&saved),
        // It is not booted.
        entry: 0,
    };
    let boot = match source.facts.follows_formula {
        false => None,
        true => {
            let registers = facts::registers(kept, config.vcpus);
            let none = |source| LoadError::Boot {
                name: name(),
                source,
            };
            let registers = registers.map_err(|source| none(Some(source)))?;
            let registers = registers.ok_or_else(|| none(None))?;
            let latch = || Ok::<_, std::convert::Infallible>(registers);
            match Boot::latch(memory.ram(), &layout, &guest.reference, latch) {
                Ok(boot) => boot,
                Err(never) => match never {},
            }
        }
    };
    let vm = PayloadVm::of_guest(accelerator, config, memory, guest, events)?;
    let notes = kept::check(accelerator, machine, vm.machine().tsc_khz()).map_err(refused)?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Loaded {
        vm,
        snapshot: Arc::new(snapshot.of(saved)),
        boot,
        base,
        counts: LoadCounts {
            store: source.store().path().display().to_string(),
            name: name(),
            chunks: kept.index().len(),
            bytes: source.bytes(),
            seconds,
            is_lazy,
            ..LoadCounts::default()
        },
        going,
        began,
        notes,
    })
}
