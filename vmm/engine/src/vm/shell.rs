//! Shells: what of a clone can be made before it is known of which snapshot.
//!
//! A window, a VM of KVM's with a memslot on it, vCPUs and their threads take the host most of a millisecond,
//! and are the same for every clone with as many vCPUs and as much memory. So they are made beforehand, by a
//! thread of its own, and a clone takes one that is there.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::BuildError;
use crate::causes::Cause;
use crate::host::Window;
use crate::kvm::{
    GuestRam, Kvm, KvmError, Machine, OnStop, Outcome, PortAction, PortHandler, StopReason,
};
use crate::memory::{Frames, MemoryError};
use crate::timeline::span;

/// Why there is no shell.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// No window.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused.
    #[error("cannot make the virtual machine")]
    Kvm(#[from] KvmError),
}

/// A VM of KVM's that has vCPUs and a window, and no memory yet.
pub struct Shell {
    machine: Machine,
    window: Arc<Window>,
    inside: Arc<Inside>,
}

impl Shell {
    /// A shell of `vcpus` vCPUs for `bytes` bytes of memory in `frames`.
    ///
    /// # Errors
    /// If there are no vCPUs or too many, the host has no address space or no more threads, or KVM refuses.
    pub fn new(kvm: &Kvm, frames: &Frames, bytes: u64, vcpus: usize) -> Result<Self, ShellError> {
        let window = Arc::new(frames.vacant_window(bytes)?);
        let inside = Arc::new(Inside {
            bytes,
            filling: OnceLock::new(),
        });
        let told = Arc::clone(&inside);
        let machine = Machine::new(
            kvm,
            Arc::clone(&window) as _,
            Arc::clone(&inside) as _,
            vcpus,
            Arc::clone(&inside) as _,
            Box::new(move |vcpu, outcome| told.has_stopped(vcpu, outcome)),
        )?;
        Ok(Self {
            machine,
            window,
            inside,
        })
    }

    /// What its memslot points at. It shows nothing yet: [`Memory::clone_of`](crate::memory::Memory::clone_of)
    /// takes it from there, once, and nobody else may.
    pub fn window(&self) -> &Arc<Window> {
        &self.window
    }

    /// The machine, for a VM whose memory is behind `window`.
    pub(super) fn fill(
        self,
        window: &Arc<Window>,
        ram: Arc<dyn GuestRam>,
        ports: Arc<dyn PortHandler>,
        on_stop: OnStop,
    ) -> Result<Machine, BuildError> {
        if !Arc::ptr_eq(&self.window, window) {
            return Err(BuildError::OtherWindow);
        }
        // Nobody else fills it: a shell is consumed by this.
        let _ = self.inside.filling.set(Filling {
            ram,
            ports,
            on_stop,
        });
        Ok(self.machine)
    }
}

impl fmt::Debug for Shell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shell")
            .field("machine", &self.machine)
            .field("bytes", &self.inside.bytes)
            .finish_non_exhaustive()
    }
}

/// What vCPUs that are there already will ask, once somebody has said whose they are. None of them runs
/// before.
struct Inside {
    bytes: u64,
    filling: OnceLock<Filling>,
}

struct Filling {
    ram: Arc<dyn GuestRam>,
    ports: Arc<dyn PortHandler>,
    on_stop: OnStop,
}

/// Nothing is in a shell yet.
#[derive(Debug, thiserror::Error)]
#[error("the shell has no memory yet")]
struct Empty;

impl Inside {
    fn filling(&self) -> Result<&Filling, Empty> {
        self.filling.get().ok_or(Empty)
    }

    fn has_stopped(&self, vcpu: usize, outcome: Outcome) {
        match self.filling.get() {
            Some(filling) => (filling.on_stop)(vcpu, outcome),
            None => tracing::warn!("vcpu {vcpu} of a shell has ended: {outcome}"),
        }
    }
}

impl GuestRam for Inside {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        self.filling()?.ram.write_fault(gfn)
    }

    fn touch(&self, gfn: u64) -> Result<bool, Cause> {
        self.filling()?.ram.touch(gfn)
    }

    fn hidden(&self) -> u64 {
        self.filling().map_or(0, |filling| filling.ram.hidden())
    }

    fn first_hidden(&self, from: u64) -> Option<u64> {
        self.filling().ok()?.ram.first_hidden(from)
    }

    fn was_entered(&self, time: Duration) {
        if let Ok(filling) = self.filling() {
            filling.ram.was_entered(time);
        }
    }

    fn was_handled(&self, time: Duration) {
        if let Ok(filling) = self.filling() {
            filling.ram.was_handled(time);
        }
    }

    fn pin(&self, gpa: u64, len: u64) -> Result<Box<dyn std::any::Any + Send>, Cause> {
        self.filling()?.ram.pin(gpa, len)
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        self.filling()?.ram.read(gpa, buf)
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        self.filling()?.ram.write(gpa, buf)
    }
}

impl PortHandler for Inside {
    fn out(&self, vcpu: usize, port: u16, value: u32) -> PortAction {
        match self.filling() {
            Ok(filling) => filling.ports.out(vcpu, port, value),
            Err(source) => PortAction::Stop(StopReason::Failed {
                source: Box::new(source),
            }),
        }
    }
}

/// Shells that are made before somebody asks for one, by a thread of its own. Dropping it drops those that
/// nobody has taken.
pub struct Shells {
    stock: Arc<Stock>,
    thread: Option<JoinHandle<()>>,
}

struct Stock {
    kvm: Kvm,
    frames: Frames,
    bytes: u64,
    vcpus: usize,
    state: Mutex<StockState>,
    changed: Condvar,
}

#[derive(Default)]
struct StockState {
    ready: VecDeque<Shell>,
    /// How many there are to be.
    wanted: usize,
    /// The thread could not make one. It tries again when somebody asks.
    failed: bool,
    is_over: bool,
}

impl Shells {
    /// Begins to make `wanted` shells of `vcpus` vCPUs for `bytes` bytes of memory in `frames`, and as many
    /// again as are taken.
    ///
    /// # Errors
    /// If the host has no more threads.
    pub fn start(
        kvm: Kvm,
        frames: Frames,
        bytes: u64,
        vcpus: usize,
        wanted: usize,
    ) -> io::Result<Self> {
        let stock = Arc::new(Stock {
            kvm,
            frames,
            bytes,
            vcpus,
            state: Mutex::new(StockState {
                wanted,
                ..StockState::default()
            }),
            changed: Condvar::new(),
        });
        let made = Arc::clone(&stock);
        let thread = thread::Builder::new()
            .name("shells".into())
            .spawn(move || made.restock())?;
        Ok(Self {
            stock,
            thread: Some(thread),
        })
    }

    /// A shell: one that is ready, or else a new one.
    ///
    /// # Errors
    /// If a new one cannot be made.
    pub fn take(&self) -> Result<Shell, ShellError> {
        let ready = {
            let mut state = self.stock.lock();
            state.failed = false;
            state.ready.pop_front()
        };
        self.stock.changed.notify_all();
        ready.map_or_else(|| self.stock.make(), Ok)
    }

    /// Sets how many shells are to be ready. Those beyond that are dropped as they are taken by nobody: none
    /// is made before there are fewer.
    pub fn want(&self, wanted: usize) {
        self.stock.lock().wanted = wanted;
        self.stock.changed.notify_all();
    }

    /// The frames that clones in them have theirs of.
    pub fn frames(&self) -> &Frames {
        &self.stock.frames
    }

    /// How many are ready.
    pub fn ready(&self) -> usize {
        self.stock.lock().ready.len()
    }

    /// Waits until as many are ready as are wanted, or one could not be made. Says how many there are.
    pub fn wait_until_ready(&self) -> usize {
        let mut state = self.stock.lock();
        while state.ready.len() < state.wanted && !state.failed {
            let waited = self.stock.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.ready.len()
    }
}

impl Stock {
    fn lock(&self) -> MutexGuard<'_, StockState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self) -> Result<Shell, ShellError> {
        let _span = span!("make shell");
        Shell::new(&self.kvm, &self.frames, self.bytes, self.vcpus)
    }

    /// The thread's life.
    fn restock(&self) {
        let mut state = self.lock();
        while !state.is_over {
            if state.ready.len() >= state.wanted || state.failed {
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(state);
            let made = self.make();
            state = self.lock();
            match made {
                Ok(shell) => state.ready.push_back(shell),
                Err(error) => {
                    // Whoever takes one makes it himself, and hears why not.
                    tracing::debug!(%error, "no shell beforehand");
                    state.failed = true;
                }
            }
            self.changed.notify_all();
        }
    }
}

impl Drop for Shells {
    fn drop(&mut self) {
        self.stock.lock().is_over = true;
        self.stock.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Shells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shells")
            .field("ready", &self.ready())
            .field("bytes", &self.stock.bytes)
            .finish_non_exhaustive()
    }
}
