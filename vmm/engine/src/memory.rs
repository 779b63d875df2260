//! Frames that the VMs of a process share, and the memory of one of them.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::host::{
    Dumps, MappingBudget, PhysMap, Placement, Precedence, Prices, Ram, StockKeeper, Window,
};
use crate::mm::{
    Account, AddressSpace, AllocError, CowPolicy, Exclusive, ForkError, FramePool, Frozen,
    FrozenError, Gfn, Mmu, PAGE_SIZE,
};

/// Why there is no memory for a VM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host gives no address space.
    #[error("cannot reserve {bytes} bytes of address space for {what}")]
    Reserve {
        /// For what.
        what: &'static str,
        /// How much.
        bytes: u64,
        /// The host's reason.
        source: io::Error,
    },
    /// There are no frames.
    #[error(transparent)]
    Alloc(#[from] AllocError),
    /// A size that is no number of pages, or more than can be addressed.
    #[error("{bytes} bytes are no number of pages of {PAGE_SIZE} bytes")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// A snapshot could not be shared with a clone.
    #[error("cannot share the snapshot's memory with a clone")]
    Share(#[source] ForkError),
    /// A snapshot of memory in other frames.
    #[error("the snapshot is of memory in other frames")]
    OtherFrames,
    /// A window of another size than the snapshot's memory.
    #[error("a window of {window} bytes does not fit a snapshot of {snapshot} bytes")]
    WindowSize {
        /// Bytes of the window.
        window: u64,
        /// Bytes of the snapshot's memory.
        snapshot: u64,
    },
}

/// Frames, the memory behind them, and the mappings that show them: one set for all VMs of a process, and for
/// their snapshots.
#[derive(Clone, Debug)]
pub struct Frames {
    pool: Arc<FramePool>,
    physmap: Arc<PhysMap>,
    budget: Arc<MappingBudget>,
    stock: Arc<Mutex<Option<StockKeeper>>>,
}

impl Frames {
    /// Room for `bytes` of memory, rounded down to whole pages, all of which may be used. Core dumps are
    /// without it. A frame takes memory of the host's when it is first used.
    ///
    /// # Errors
    /// If `bytes` are less than a page, or the host has no address space for them or no memory for their
    /// records.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        let frames = bytes / PAGE_SIZE;
        Self::with_limit(frames, frames, Dumps::WithoutGuest)
    }

    /// Room for `frames` frames of 4 KiB, of which no more than `limit` have memory at a time; and whether
    /// core dumps have them.
    ///
    /// # Errors
    /// As [`Frames::new`].
    pub fn with_limit(frames: u64, limit: u64, dumps: Dumps) -> Result<Self, MemoryError> {
        Self::with_more_behind(frames, 0, limit, dumps)
    }

    /// The same, with `more` frames behind them in the physmap that no address space has and no snapshot: for
    /// what guests have beside their address space. Whoever uses them has them committed.
    ///
    /// # Errors
    /// As [`Frames::new`].
    pub fn with_more_behind(
        frames: u64,
        more: u64,
        limit: u64,
        dumps: Dumps,
    ) -> Result<Self, MemoryError> {
        let all = frames.saturating_add(more);
        let bytes = all.saturating_mul(PAGE_SIZE);
        if frames == 0 || bytes == u64::MAX {
            return Err(MemoryError::Size { bytes });
        }
        let reserve = |source| MemoryError::Reserve {
            what: "frames",
            bytes,
            source,
        };
        let physmap = PhysMap::with_dumps(all, dumps).map_err(reserve)?;
        let pool = FramePool::new(Arc::clone(&physmap) as _, frames, limit)?;
        Ok(Self {
            pool,
            physmap,
            budget: Arc::new(MappingBudget::of_this_process()),
            stock: Arc::default(),
        })
    }

    /// Has a thread keep memory ready for copies, from now on and until all that share this are dropped; as
    /// [`crate::vm::Builder::copy_ahead`] says.
    ///
    /// # Errors
    /// The host's, if it can't have another thread.
    pub fn keep_stock(&self) -> io::Result<()> {
        let mut stock = self.stock.lock().unwrap_or_else(PoisonError::into_inner);
        if stock.is_none() {
            *stock = Some(StockKeeper::start(&self.pool)?);
        }
        Ok(())
    }

    /// Who has which frame.
    pub fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    /// Where their bytes are.
    pub fn physmap(&self) -> &Arc<PhysMap> {
        &self.physmap
    }

    /// Copies `buf.len()` bytes at `gpa` out of a snapshot, which must be of memory in these frames: of one
    /// in others the bytes are anybody's.
    ///
    /// # Errors
    /// If the snapshot has no such page, or it is backed and cannot be brought. What lies before it was copied.
    ///
    /// # Panics
    /// If the snapshot is in other frames, and one of them has no memory here.
    pub fn read(&self, frozen: &Frozen, gpa: u64, buf: &mut [u8]) -> Result<(), FrozenError> {
        let mut done = 0;
        while done < buf.len() {
            let at = gpa.saturating_add(done as u64);
            let offset = at % PAGE_SIZE;
            let end = buf.len().min(done + (PAGE_SIZE - offset) as usize);
            let part = &mut buf[done..end];
            frozen.with_frame(Gfn::of_gpa(at), |pfn| {
                let slice = self.physmap.slice(pfn, offset, part.len() as u64);
                slice.copy_to(part)
            })?;
            done = end;
        }
        Ok(())
    }

    /// A window of `bytes` bytes on to these frames, all of which shows zeros.
    ///
    /// # Errors
    /// If the host has no address space for it, or no mapping.
    pub fn window(&self, bytes: u64, placement: Placement) -> Result<Window, MemoryError> {
        let (physmap, budget) = (Arc::clone(&self.physmap), Arc::clone(&self.budget));
        let window = Window::placed(physmap, budget, bytes / PAGE_SIZE, placement);
        window.map_err(|source| MemoryError::Reserve {
            what: "the guest's window",
            bytes,
            source,
        })
    }

    /// A window of `bytes` bytes on to these frames that has nothing to show before it is a clone's.
    pub(crate) fn vacant_window(&self, bytes: u64) -> Result<Window, MemoryError> {
        let (physmap, budget) = (Arc::clone(&self.physmap), Arc::clone(&self.budget));
        let window = Window::vacant(physmap, budget, bytes / PAGE_SIZE);
        window.map_err(|source| MemoryError::Reserve {
            what: "the guest's window",
            bytes,
            source,
        })
    }

    /// How many mappings the windows of this process may use.
    pub fn budget(&self) -> &Arc<MappingBudget> {
        &self.budget
    }
}

/// How the memory of a VM is kept.
#[derive(Debug, Default)]
pub struct MemoryOptions {
    /// In base pages of 4 KiB alone, without huge folios. All [`Frames`] that it is in have base pages from
    /// then on.
    pub base_pages: bool,
    /// Where the window is.
    pub placement: Placement,
    /// What faults cost. If there is nothing here, that is learnt while the guest runs.
    pub prices: Option<Prices>,
    /// Who pays for the frames that it and its snapshots have: an account of the pool's. Without, it has one
    /// of its own that has no limit.
    pub account: Option<Account>,
}

/// The memory of a VM: an address space, the window that vCPUs see it through, and [`Ram`], by which
/// everybody else does.
///
/// The copy-on-write policy `P` is known to the owner of this, and to nobody who uses it.
pub struct Memory<P: CowPolicy = Exclusive> {
    ram: Ram,
    space: Arc<AddressSpace<P>>,
    window: Arc<Window>,
    frames: Frames,
}

impl Memory<Exclusive> {
    /// `bytes` of memory, all of it zero, under the policy that is right. It takes no frames before it is
    /// written.
    ///
    /// # Errors
    /// If `bytes` are no multiple of the page size or none, or the host has no address space for a window, or
    /// the pool no room.
    pub fn new(frames: &Frames, bytes: u64) -> Result<Self, MemoryError> {
        let plain = |window| Box::new(window) as _;
        Self::with(frames, bytes, Exclusive, MemoryOptions::default(), plain)
    }
}

impl<P: CowPolicy> Memory<P> {
    /// The same under `policy`, kept as `options` say. `between` may put something between the address space
    /// and its window, and gives back what the address space is to change: for who wants to watch it, or to
    /// have it go wrong.
    ///
    /// # Errors
    /// As [`Memory::new`].
    pub fn with(
        frames: &Frames,
        bytes: u64,
        policy: P,
        options: MemoryOptions,
        between: impl FnOnce(Arc<Window>) -> Box<dyn Mmu>,
    ) -> Result<Self, MemoryError> {
        let pages = bytes / PAGE_SIZE;
        if pages == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Size { bytes });
        }
        let window = Arc::new(frames.window(bytes, options.placement)?);
        let mmu = between(Arc::clone(&window));
        let mut space = AddressSpace::new(Arc::clone(&frames.pool), policy, mmu, pages)?;
        if let Some(account) = options.account {
            space = space.with_account(account);
        }
        if options.base_pages {
            space = space.with_base_pages();
            frames.physmap.use_base_pages();
        }
        Ok(Self::over(frames, space, window).with_prices(options.prices))
    }

    /// A clone's: what was in memory when `snapshot` was taken of it, which must be in `frames`. It shares
    /// every frame with the snapshot, and whoever else has it, until one of them writes there. `window` shows
    /// zeros everywhere, as [`Frames::window`] gives it, or is a shell's; `between` is as in [`Memory::with`], and so are
    /// `options`, but for the placement, which is the window's.
    ///
    /// What it takes does not depend on how much memory there is, but on how many stretches of it are
    /// neighbours in the physmap.
    ///
    /// # Errors
    /// If the snapshot or the window is of other frames, or they are of different sizes, or there are not enough
    /// mappings. A shell's window is no good any more then.
    pub fn clone_of(
        frames: &Frames,
        snapshot: &Frozen,
        policy: P,
        options: MemoryOptions,
        window: Arc<Window>,
        between: impl FnOnce(Arc<Window>) -> Box<dyn Mmu>,
    ) -> Result<Self, MemoryError> {
        if !Arc::ptr_eq(snapshot.pool(), &frames.pool) || !window.shows(&frames.physmap) {
            return Err(MemoryError::OtherFrames);
        }
        let bytes = snapshot.pages() * PAGE_SIZE;
        if window.len() != bytes {
            return Err(MemoryError::WindowSize {
                window: window.len(),
                snapshot: bytes,
            });
        }
        let precedence = Precedence::default();
        let _first = precedence.take();
        let mmu = between(Arc::clone(&window));
        let account = options
            .account
            .unwrap_or_else(|| frames.pool.open_account(None));
        let space = AddressSpace::from_frozen_with_account(snapshot, policy, mmu, account);
        let mut space = space.map_err(MemoryError::Share)?;
        window
            .settle()
            .map_err(|error| MemoryError::Share(ForkError::Map(error)))?;
        if options.base_pages {
            space = space.with_base_pages();
        }
        Ok(Self::over(frames, space, window).with_prices(options.prices))
    }

    fn with_prices(mut self, prices: Option<Prices>) -> Self {
        if let Some(prices) = prices {
            self.ram = self.ram.with_prices(prices);
        }
        self
    }

    /// Of an address space that is there already, which changes the whole of `window` or a part of it. Its
    /// frames must be of `frames`.
    pub fn over(frames: &Frames, space: AddressSpace<P>, window: Arc<Window>) -> Self {
        let space = Arc::new(space);
        Self {
            ram: Ram::new(Arc::clone(&space) as _, Arc::clone(&frames.physmap)),
            space,
            window,
            frames: frames.clone(),
        }
    }

    /// Guest memory by guest-physical address: to be read, written and pinned by host code.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The address space: forks, statistics, dirty tracking.
    pub fn space(&self) -> &Arc<AddressSpace<P>> {
        &self.space
    }

    /// What a memslot points at.
    pub fn window(&self) -> &Arc<Window> {
        &self.window
    }

    /// The frames it is in.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }
}

impl<P: CowPolicy> fmt::Debug for Memory<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("bytes", &self.ram.size())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mm::{FrameMemory, Pfn};

    #[test]
    fn sizes_that_are_no_pages_are_refused() {
        let frames = Frames::new(8 << 20).unwrap();
        for bytes in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, u64::MAX] {
            let error = Memory::new(&frames, bytes).unwrap_err();
            assert!(
                matches!(error, MemoryError::Size { bytes: b } if b == bytes),
                "{bytes}: {error}"
            );
        }
        // Pages, but more than there are addresses.
        let error = Memory::new(&frames, u64::MAX - (PAGE_SIZE - 1)).unwrap_err();
        assert!(matches!(error, MemoryError::Reserve { .. }), "{error}");
        assert_eq!(
            Memory::new(&frames, PAGE_SIZE).unwrap().ram().size(),
            PAGE_SIZE
        );
    }

    #[test]
    fn frames_that_cannot_be_numbered_are_refused() {
        let none = Frames::new(PAGE_SIZE - 1).unwrap_err();
        assert!(matches!(none, MemoryError::Size { bytes: 0 }), "{none}");
        let many = Frames::with_limit(u64::MAX / 8, 1, Dumps::WithoutGuest).unwrap_err();
        assert!(matches!(many, MemoryError::Size { .. }), "{many}");
    }

    #[test]
    fn frames_behind_the_pools_are_nobodys() {
        let frames = Frames::with_more_behind(64, 3, 64, Dumps::WithoutGuest).unwrap();
        let behind = |more: u64| frames.physmap().slice(Pfn(64 + more), 0, 4);
        frames.physmap().commit(Pfn(64), 3).unwrap();
        for more in 0..3 {
            behind(more).copy_from(b"mine");
        }
        // All that there is, and a bit more.
        let memory = Memory::new(&frames, 32 * PAGE_SIZE).unwrap();
        let mut snapshots = Vec::new();
        while memory.ram().write(0, &[1; 32 * PAGE_SIZE as usize]).is_ok() {
            snapshots.push(memory.space().fork().unwrap());
        }
        for more in 0..3 {
            let mut bytes = [0; 4];
            behind(more).copy_to(&mut bytes[..]);
            assert_eq!(&bytes, b"mine");
        }
        let many = Frames::with_more_behind(1, u64::MAX, 1, Dumps::WithoutGuest).unwrap_err();
        assert!(matches!(many, MemoryError::Size { .. }), "{many}");
    }

    #[test]
    fn a_snapshot_is_read_over_page_borders_and_not_beyond_its_end() {
        let frames = Frames::new(8 << 20).unwrap();
        let memory = Memory::new(&frames, 4 * PAGE_SIZE).unwrap();
        let text: Vec<u8> = (0..=255).cycle().take(9000).collect();
        memory.ram().write(100, &text).unwrap();
        memory.ram().write(4 * PAGE_SIZE - 1, &[9]).unwrap();
        let frozen = memory.space().fork().unwrap();
        memory.ram().write(100, &[0; 9000]).unwrap();

        let mut back = vec![0; 9000];
        frames.read(&frozen, 100, &mut back).unwrap();
        assert_eq!(back, text);
        // A page that nobody has written is zero; what lies before the end is copied.
        let mut end = [1, 1];
        frames.read(&frozen, 3 * PAGE_SIZE, &mut end).unwrap();
        assert_eq!(end, [0, 0]);
        let beyond = frames.read(&frozen, 4 * PAGE_SIZE - 1, &mut end);
        assert!(beyond.is_err());
        assert_eq!(end, [9, 0]);
        for gpa in [4 * PAGE_SIZE, 1 << 40, u64::MAX] {
            assert!(frames.read(&frozen, gpa, &mut end).is_err(), "{gpa:#x}");
            frames.read(&frozen, gpa, &mut []).unwrap();
        }
    }

    #[test]
    fn frames_go_back_when_memory_and_snapshots_are_gone() {
        let frames = Frames::new(8 << 20).unwrap();
        let memory = Memory::new(&frames, 4 * PAGE_SIZE).unwrap();
        memory.ram().write(0, &[1; 5000]).unwrap();
        let frozen = memory.space().fork().unwrap();
        drop(memory);
        let mut byte = [0];
        frames.read(&frozen, 4999, &mut byte).unwrap();
        assert_eq!(byte, [1]);
        assert!(frames.pool().usage().in_use > 0);
        drop(frozen);
        assert_eq!(frames.pool().usage().in_use, 0);
    }
}
