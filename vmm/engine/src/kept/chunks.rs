//! A snapshot in a store as the backing of a machine's memory: its chunks are read when somebody wants them.
//!
//! A chunk is read into frames that nobody else has, and its hash is that of **what is in the frames**. Then they are
//! shown. So whatever becomes of the file, before, while or after it is read, what a guest sees is what was saved; a
//! file that is another than it was is an error, and one that is shorter a short read and no signal.

#![expect(unsafe_code, reason = "reads files into frames that are nobody's yet")]

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::load::LoadError;
use super::store::{Buffer, CHUNK_BYTES, Kept, SnapshotName, StoreError};
use crate::host::PhysMap;
use crate::kvm::tables::may_begin_hidden;
use crate::kvm::{StateError, VcpuState};
use crate::memory::Frames;
use crate::mm::{Account, Backing, BackingError, Frozen, PAGE_SIZE, Pfn, REGION_PAGES, Toucher};
use crate::snapshot::Snapshot;
use crate::timeline::span;
use crate::vm::By;

/// Why a chunk could not be brought.
#[derive(Debug, thiserror::Error)]
#[error("cannot load what snapshot `{snapshot}` has at {gpa:#x}")]
pub struct ChunkError {
    /// The snapshot.
    pub snapshot: SnapshotName,
    /// Where its region begins.
    pub gpa: u64,
    /// What is wrong, with the chunk's file and where in it.
    pub source: StoreError,
}

/// How much of a snapshot was brought, and for whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BroughtCounts {
    /// Chunks that there are.
    pub chunks: u64,
    /// Those that a vCPU has touched first.
    pub by_vcpus: u64,
    /// Those that a device, or other host code, has.
    pub by_host: u64,
    /// Those that somebody has who reads a snapshot: a save, a check.
    pub by_readers: u64,
    /// Those that were brought before anybody wanted them.
    pub ahead: u64,
    /// What vCPUs have waited for chunks that they have brought: in all, and at most for one.
    pub waited: Duration,
    /// See there.
    pub waited_most: Duration,
}

impl BroughtCounts {
    /// Chunks that were brought.
    pub fn brought(&self) -> u64 {
        self.by_vcpus + self.by_host + self.by_readers + self.ahead
    }
}

/// What is known of the chunks of a snapshot that was loaded lazily. It is there as long as anybody has it, whether
/// the machine is or not.
pub struct Chunks {
    kept: Arc<Kept>,
    physmap: Arc<PhysMap>,
    /// By [`Toucher`].
    brought: [AtomicU64; 4],
    /// Nanoseconds.
    waited: AtomicU64,
    waited_most: AtomicU64,
    /// Regions that were touched, the first first; not those that nobody wanted yet.
    order: Mutex<Vec<u32>>,
}

impl Chunks {
    fn new(kept: &Arc<Kept>, frames: &Frames) -> Arc<Self> {
        Arc::new(Self {
            kept: Arc::clone(kept),
            physmap: Arc::clone(frames.physmap()),
            brought: Default::default(),
            waited: AtomicU64::new(0),
            waited_most: AtomicU64::new(0),
            order: Mutex::default(),
        })
    }

    /// The snapshot that they are of.
    pub fn kept(&self) -> &Arc<Kept> {
        &self.kept
    }

    /// How many were brought so far.
    pub fn counts(&self) -> BroughtCounts {
        let of = |toucher| self.brought[number(toucher)].load(Ordering::Relaxed);
        let nanos = |of: &AtomicU64| Duration::from_nanos(of.load(Ordering::Relaxed));
        BroughtCounts {
            chunks: self.kept.index().len(),
            by_vcpus: of(Toucher::Vcpu),
            by_host: of(Toucher::Host),
            by_readers: of(Toucher::Reader),
            ahead: of(Toucher::Prefetch),
            waited: nanos(&self.waited),
            waited_most: nanos(&self.waited_most),
        }
    }

    /// The regions that vCPUs and devices have had brought so far, in order.
    pub fn touched(&self) -> Vec<u32> {
        let order = self.order.lock();
        order.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads a region into `frames`, and checks it there.
    fn read(&self, region: u64, frames: &[Pfn]) -> Result<(), StoreError> {
        let (first, count) = (frames[0], frames.len() as u64);
        let run = (first.0..first.0 + count).map(Pfn);
        if frames.iter().copied().eq(run) {
            // SAFETY: they are nobody else's, by the contract of `Backing::bring`.
            return unsafe {
                self.physmap.with_fresh(first, count, |bytes| {
                    self.kept.region(region, bytes).map(drop)
                })
            };
        }
        let mut content = Buffer::new((count * PAGE_SIZE) as usize);
        self.kept.region(region, &mut content)?;
        for (&pfn, page) in frames.iter().zip(content.chunks(PAGE_SIZE as usize)) {
            self.physmap.slice(pfn, 0, PAGE_SIZE).copy_from(page);
        }
        Ok(())
    }
}

fn number(toucher: Toucher) -> usize {
    match toucher {
        Toucher::Vcpu => 0,
        Toucher::Host => 1,
        Toucher::Reader => 2,
        Toucher::Prefetch => 3,
    }
}

impl Backing for Chunks {
    fn bring(&self, region: usize, frames: &[Pfn], toucher: Toucher) -> Result<(), BackingError> {
        let _span = span!("bring chunk", region = region as u64);
        let began = Instant::now();
        self.read(region as u64, frames)
            .map_err(|source| ChunkError {
                snapshot: self.kept.name().clone(),
                gpa: region as u64 * CHUNK_BYTES,
                source,
            })?;
        self.brought[number(toucher)].fetch_add(1, Ordering::Relaxed);
        if matches!(toucher, Toucher::Vcpu | Toucher::Host) {
            let order = self.order.lock();
            let mut order = order.unwrap_or_else(PoisonError::into_inner);
            order.push(region as u32);
        }
        if toucher == Toucher::Vcpu {
            let took = began.elapsed().as_nanos() as u64;
            self.waited.fetch_add(took, Ordering::Relaxed);
            self.waited_most.fetch_max(took, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl fmt::Debug for Chunks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunks")
            .field("snapshot", self.kept.name())
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

/// How the memory of a snapshot is brought.
#[derive(Debug, Default)]
pub struct LazyOptions {
    /// In base pages of 4 KiB alone.
    pub base_pages: bool,
    /// Who pays for what is brought. Without, it is an account without a limit.
    pub account: Option<Account>,
}

/// The memory of `kept` as it was saved, none of which is read yet: what machines are made of
/// ([`Memory::clone_of`](crate::memory::Memory::clone_of)), each of which finds there what any of them has brought.
/// Chunks are read, and checked, as somebody wants what is in them, into `frames`.
///
/// # Errors
/// If its memory is no number of pages.
pub fn lazily(
    kept: &Arc<Kept>,
    frames: &Frames,
    options: LazyOptions,
) -> Result<(Arc<Frozen>, Arc<Chunks>), LoadError> {
    const {
        assert!(
            REGION_PAGES * PAGE_SIZE == CHUNK_BYTES,
            "a chunk is a region"
        )
    };
    let bytes = kept.index().memory_bytes();
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(LoadError::Size {
            snapshot: bytes,
            memory: bytes.next_multiple_of(PAGE_SIZE),
        });
    }
    if options.base_pages {
        frames.physmap().use_base_pages();
    }
    let chunks = Chunks::new(kept, frames);
    let pool = frames.pool();
    let account = options.account.unwrap_or_else(|| pool.open_account(None));
    let regions = kept.index().iter().map(|(region, _)| region as usize);
    let backing = Arc::clone(&chunks) as Arc<dyn Backing>;
    let pages = bytes / PAGE_SIZE;
    let frozen = Frozen::backed(pool, account, pages, !options.base_pages, regions, backing);
    Ok((frozen, chunks))
}

/// Whether a machine that `by` runs may begin as `snapshot` says in memory that is not read yet. Not where KVM keeps its
/// own copy of the guest's page tables and the guest could change to others, or has a handler for page faults: KVM
/// reads tables by itself, and if they are not there gives the guest a page fault that it has no reason for.
///
/// # Errors
/// If the state of a vCPU is none.
pub fn may_be_lazy<'a>(by: impl Into<By<'a>>, snapshot: &Snapshot) -> Result<bool, StateError> {
    let platform = match by.into() {
        By::Kvm(kvm) => kvm.platform(),
        By::User(user) => user.platform(),
    };
    let states = snapshot.vcpus().iter().map(VcpuState::of_saved);
    Ok(may_begin_hidden(
        platform,
        &states.collect::<Result<Vec<_>, _>>()?,
    ))
}
