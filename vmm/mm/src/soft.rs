//! A software MMU and frames of one word: enough of a machine to drive the protocol without one.
//!
//! A page's content is a single 64-bit word. What makes it faithful is the flush: a vCPU's access and a
//! change of the MMU exclude each other, so that when [`Mmu::protect`] returns no write through the old
//! protection is still on its way. That is what KVM's MMU notifier gives the real window.

use std::io;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};

use super::addr::{Gfn, Order, Pfn, Protection};
use super::backed::{Backing, BackingError, Toucher};
use super::commit::AllocError;
use super::fault::FaultError;
use super::frozen::Frozen;
use super::hold::{Get, Pin};
use super::mmu::{FrameMemory, Mmu, MmuError};
use super::policy::CowPolicy;
use super::pool::FramePool;
use super::space::AddressSpace;
use super::sync::{AtomicU64, Ordering, RwLock, read, write, zeroed};

/// Frames of one word each.
#[derive(Debug)]
pub struct SoftMemory {
    words: Box<[AtomicU64]>,
}

impl SoftMemory {
    /// `frames` frames.
    pub fn new(frames: u64) -> Arc<Self> {
        Arc::new(Self {
            words: zeroed(frames as usize),
        })
    }

    /// The word in a frame.
    pub fn load(&self, pfn: Pfn) -> u64 {
        self.words[pfn.0 as usize].load(Ordering::Acquire)
    }

    /// Writes the word in a frame.
    pub fn store(&self, pfn: Pfn, value: u64) {
        self.words[pfn.0 as usize].store(value, Ordering::Release);
    }
}

impl FrameMemory for SoftMemory {
    fn commit(&self, _first: Pfn, _count: u64) -> io::Result<()> {
        Ok(())
    }
    fn copy(&self, from: Pfn, to: Pfn) {
        self.store(to, self.load(from));
    }
    fn zero(&self, frame: Pfn) {
        self.store(frame, 0);
    }
    fn equal(&self, one: Pfn, other: Pfn) -> bool {
        self.load(one) == self.load(other)
    }
    /// Only the first word of a frame is there; writes beyond it are lost.
    fn write(&self, frame: Pfn, offset: u64, bytes: &[u8]) {
        let mut word = self.load(frame).to_le_bytes();
        for (byte, at) in bytes.iter().zip(offset as usize..word.len()) {
            word[at] = *byte;
        }
        self.store(frame, u64::from_le_bytes(word));
    }
    fn uncommit(&self, first: Pfn, count: u64) -> io::Result<()> {
        (first.0..first.0 + count).for_each(|n| self.store(Pfn(n), 0));
        Ok(())
    }
}

/// The frame of a page that is hidden.
const HIDDEN: Pfn = Pfn(u64::MAX);

/// What each page of one address space is mapped to.
#[derive(Debug)]
pub struct SoftMmu {
    pages: RwLock<Vec<(Pfn, Protection)>>,
}

impl SoftMmu {
    /// An MMU of `pages` pages that show zeros.
    pub fn new(pages: u64) -> Arc<Self> {
        Arc::new(Self {
            pages: RwLock::new(vec![(Pfn::ZERO, Protection::ReadOnly); pages as usize]),
        })
    }

    /// What `gfn` is mapped to; a frame that there is not, if it is hidden.
    pub fn page(&self, gfn: Gfn) -> (Pfn, Protection) {
        read(&self.pages)[gfn.0 as usize]
    }

    /// Whether `gfn` is hidden.
    pub fn is_hidden(&self, gfn: Gfn) -> bool {
        self.page(gfn).0 == HIDDEN
    }
}

impl Mmu for Arc<SoftMmu> {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        let mut pages = write(&self.pages);
        for i in 0..count {
            let pfn = match frame {
                Pfn::ZERO => Pfn::ZERO,
                Pfn(n) => Pfn(n + i),
            };
            pages[(first.0 + i) as usize] = (pfn, protection);
        }
        Ok(())
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        let mut pages = write(&self.pages);
        for page in &mut pages[first.0 as usize..(first.0 + count) as usize] {
            // As `mprotect` on a window: zeros stay read-only.
            if page.0 != Pfn::ZERO && page.0 != HIDDEN {
                page.1 = protection;
            }
        }
        Ok(())
    }

    fn hide(&self, first: Gfn, count: u64) -> Result<(), MmuError> {
        let mut pages = write(&self.pages);
        for page in &mut pages[first.0 as usize..(first.0 + count) as usize] {
            *page = (HIDDEN, Protection::ReadOnly);
        }
        Ok(())
    }
}

/// What backs a snapshot, one word a page.
#[derive(Debug)]
pub struct SoftBacking {
    memory: Arc<SoftMemory>,
    /// Pages of a region.
    each: usize,
    words: Vec<u64>,
    /// How often each region was brought, and for whom.
    brought: StdMutex<Vec<(usize, Toucher)>>,
    /// The regions that cannot be.
    bad: StdMutex<Vec<usize>>,
}

impl SoftBacking {
    /// Of a snapshot with a page for each of `words`, for `pool`, whose frames are in `memory`.
    pub fn new(pool: &FramePool, memory: &Arc<SoftMemory>, words: Vec<u64>) -> Arc<Self> {
        Arc::new(Self {
            memory: Arc::clone(memory),
            each: pool.huge().pages() as usize,
            words,
            brought: StdMutex::default(),
            bad: StdMutex::default(),
        })
    }

    /// A snapshot that it backs all of that is not zeros.
    pub fn frozen(self: &Arc<Self>, pool: &Arc<FramePool>, uses_huge: bool) -> Arc<Frozen> {
        let regions = (0..).zip(self.words.chunks(self.each));
        let regions = regions.filter(|(_, words)| words.iter().any(|&word| word != 0));
        Frozen::backed(
            pool,
            pool.open_account(None),
            self.words.len() as u64,
            uses_huge,
            regions.map(|(index, _)| index),
            Arc::clone(self) as Arc<dyn Backing>,
        )
    }

    /// Which regions were brought so far, in order, and for whom.
    pub fn brought(&self) -> Vec<(usize, Toucher)> {
        let brought = self.brought.lock();
        brought.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has these regions be bad from now on, and no others.
    pub fn spoil(&self, regions: &[usize]) {
        *self.bad.lock().unwrap_or_else(PoisonError::into_inner) = regions.to_vec();
    }
}

impl Backing for SoftBacking {
    fn bring(&self, region: usize, frames: &[Pfn], toucher: Toucher) -> Result<(), BackingError> {
        let words = &self.words[region * self.each..];
        let bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        for (n, (&pfn, &word)) in frames.iter().zip(words).enumerate() {
            if n > 0 && bad.contains(&region) {
                return Err(format!("region {region} is bad").into());
            }
            self.memory.store(pfn, word);
        }
        let brought = self.brought.lock();
        let mut brought = brought.unwrap_or_else(PoisonError::into_inner);
        brought.push((region, toucher));
        Ok(())
    }
}

/// Faults in a row that a write may take. Each but the last is one that a fork or the like has undone.
const MOST_FAULTS: u32 = 1000;

/// An address space with a software MMU, and a vCPU's and a device's view of it.
#[derive(Debug)]
pub struct SoftVm<P> {
    /// The address space.
    pub space: AddressSpace<P>,
    /// Its MMU.
    pub mmu: Arc<SoftMmu>,
    memory: Arc<SoftMemory>,
}

/// A pool of `frames` frames of one word.
///
/// # Panics
/// If `frames` is 0.
pub fn soft_pool(frames: u64) -> Result<(Arc<FramePool>, Arc<SoftMemory>), AllocError> {
    soft_pool_of(Order::HUGE, frames)
}

/// As [`soft_pool`], with huge folios of another size.
///
/// # Errors
/// As [`FramePool::new`].
///
/// # Panics
/// If `frames` is 0.
pub fn soft_pool_of(
    huge: Order,
    frames: u64,
) -> Result<(Arc<FramePool>, Arc<SoftMemory>), AllocError> {
    let memory = SoftMemory::new(frames);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(huge, bytes, frames, frames)?;
    Ok((pool, memory))
}

impl<P: CowPolicy> SoftVm<P> {
    /// A VM of what is there already: `space`, whose MMU ends in `mmu`.
    pub fn over(space: AddressSpace<P>, mmu: Arc<SoftMmu>, memory: &Arc<SoftMemory>) -> Self {
        Self {
            space,
            mmu,
            memory: Arc::clone(memory),
        }
    }

    /// An untouched VM of `pages` pages.
    ///
    /// # Errors
    /// If the pool has no room for it.
    pub fn new(
        pool: &Arc<FramePool>,
        memory: &Arc<SoftMemory>,
        policy: P,
        pages: u64,
    ) -> Result<Self, AllocError> {
        Self::with_mmu(pool, memory, policy, pages, |mmu| Box::new(mmu))
    }

    /// As [`SoftVm::new`], with something between the address space and its MMU.
    ///
    /// # Errors
    /// If the pool has no room for it.
    pub fn with_mmu(
        pool: &Arc<FramePool>,
        memory: &Arc<SoftMemory>,
        policy: P,
        pages: u64,
        between: impl FnOnce(Arc<SoftMmu>) -> Box<dyn Mmu>,
    ) -> Result<Self, AllocError> {
        let mmu = SoftMmu::new(pages);
        let through = between(Arc::clone(&mmu));
        let space = AddressSpace::new(Arc::clone(pool), policy, through, pages)?;
        Ok(Self::over(space, mmu, memory))
    }

    /// The same, without huge folios.
    #[must_use]
    pub fn with_base_pages(mut self) -> Self {
        self.space = self.space.with_base_pages();
        self
    }

    /// A VM that runs on from `frozen`.
    ///
    /// # Errors
    /// As [`AddressSpace::from_frozen`].
    pub fn clone_of(
        frozen: &Frozen,
        memory: &Arc<SoftMemory>,
        policy: P,
    ) -> Result<Self, super::fork::ForkError> {
        let mmu = SoftMmu::new(frozen.pages());
        let space = AddressSpace::from_frozen(frozen, policy, Box::new(Arc::clone(&mmu)))?;
        Ok(Self::over(space, mmu, memory))
    }

    /// A vCPU reads a page.
    ///
    /// # Panics
    /// If it is hidden, and cannot be shown.
    pub fn cpu_read(&self, gfn: Gfn) -> u64 {
        self.try_cpu_read(gfn).expect("what is hidden can be shown")
    }

    /// A vCPU reads a page, which may be hidden.
    ///
    /// # Errors
    /// If it cannot be shown.
    pub fn try_cpu_read(&self, gfn: Gfn) -> Result<u64, FaultError> {
        loop {
            {
                let pages = read(&self.mmu.pages);
                let (pfn, _) = pages[gfn.0 as usize];
                if pfn != HIDDEN {
                    return Ok(self.memory.load(pfn));
                }
            }
            self.space.touch(gfn)?;
        }
    }

    /// A vCPU writes a page, faulting as often as it must.
    ///
    /// # Errors
    /// If a fault can't be resolved.
    ///
    /// # Panics
    /// If the page is read-only after so many faults still: a vCPU would fault for ever.
    pub fn cpu_write(&self, gfn: Gfn, value: u64) -> Result<(), FaultError> {
        for _ in 0..MOST_FAULTS {
            {
                let pages = read(&self.mmu.pages);
                let (pfn, protection) = pages[gfn.0 as usize];
                if protection == Protection::ReadWrite {
                    self.memory.store(pfn, value);
                    return Ok(());
                }
            }
            self.space.write_fault(gfn)?;
        }
        panic!("{gfn:?} is read-only after {MOST_FAULTS} faults");
    }

    /// A device reads through its pin.
    pub fn dma_read(&self, pin: &Pin) -> u64 {
        self.memory.load(pin.pfn())
    }

    /// A device writes through its pin.
    pub fn dma_write(&self, pin: &Pin, value: u64) {
        self.memory.store(pin.pfn(), value);
    }

    /// A host-side reader reads through its hold.
    pub fn read_held(&self, get: &Get) -> u64 {
        self.memory.load(get.pfn())
    }

    /// What a snapshot has in a page; 0 beyond its end.
    pub fn read_frozen(&self, frozen: &Frozen, gfn: Gfn) -> u64 {
        frozen
            .with_frame(gfn, |pfn| self.memory.load(pfn))
            .unwrap_or(0)
    }
}
