//! The protocol on the software MMU, an operation at a time. Here: what the tests share.
//!
//! | file | tests |
//! |---|---|
//! | `transitions` | PROTOCOL.md 3.2 for base frames: faults, pins, forks, restores |
//! | `folio` | huge folios: sharing, splitting, breaking whole regions |
//! | `backed` | what is somewhere else: who has it brought, and what if it cannot be |
//! | `get`, `dirty`, `discard`, `migrate`, `merge`, `force` | each operation: its contract, each of its errors |
//! | `differ` | where two snapshots differ |
//! | `account` | who pays for what, and what becomes of who may have no more; promises |
//! | `census` | what each has alone and shares; why a frame is alive |
//! | `clones` | what it takes to make a clone; who moves where when all of them write |
//! | `in_common` | which regions snapshots have in common |
//! | `lent` | what clones borrow: who counts it, who moves, when it becomes theirs |
//! | `policies` | the rules as tables; which scenario goes wrong under which policy |
//! | `allocator` | who has which frame, against a plain list
//! | `commit` | who waits for the host, and what goes back to it
//! | `pool` | where frames come from, and what happens at the limit |
//! | `predictor` | what is done with predictions, whatever they are |
//! | `prepare` | forks that are prepared: how much at once, and how often again |
//! | `protected` | which pages became read-only |
//! | `values` | addresses, entries and frame states |
//! | `soft` | the software MMU |
//! | `refused` | every operation, with each call it makes of the MMU refused, before, in or after it |
//! | `refusing` | an MMU and memory that fail on demand |
//!
//! An operation that fails must leave everything as it was (I10): a [`Picture`] is taken before and after.

mod account;
mod ahead;
mod allocator;
mod backed;
mod census;
mod clones;
mod commit;
mod differ;
mod dirty;
mod discard;
mod folio;
mod force;
mod get;
mod in_common;
mod lent;
mod merge;
mod migrate;
mod policies;
mod pool;
mod predictor;
mod prepare;
mod protected;
mod refused;
pub(super) mod refusing;
mod soft;
mod transitions;
mod values;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::refusing::{Refusals, RefusingMmu};
use super::policy::CowPolicy;
use super::soft::{SoftMemory, SoftMmu, SoftVm, soft_pool};
use super::*;

const P: Gfn = Gfn(0);
const Q: Gfn = Gfn(1);
/// Nothing waits longer than this for something that should happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// An address space whose MMU can be told to refuse, and its pool.
struct World {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    vm: SoftVm<AnyPolicy>,
    mmu: Arc<Refusals>,
}

/// The right policy.
pub(super) fn right() -> AnyPolicy {
    Box::new(Exclusive)
}

fn world() -> World {
    world_of(4, 64)
}

fn world_of(pages: u64, frames: u64) -> World {
    world_under(right(), pages, frames)
}

fn world_under(policy: AnyPolicy, pages: u64, frames: u64) -> World {
    let (pool, memory) = soft_pool(frames).unwrap();
    world_in(pool, memory, policy, pages)
}

fn world_in(pool: Arc<FramePool>, memory: Arc<SoftMemory>, policy: AnyPolicy, pages: u64) -> World {
    let mmu = Arc::new(Refusals::default());
    let vm = SoftVm::with_mmu(&pool, &memory, policy, pages, |inner| {
        Box::new(RefusingMmu {
            inner,
            refusals: Arc::clone(&mmu),
        })
    })
    .unwrap()
    .with_base_pages();
    World {
        pool,
        memory,
        vm,
        mmu,
    }
}

impl FramePool {
    /// For frames that are allocated without a machine: an account of their own.
    pub(super) fn payer(&self) -> Account {
        self.open_account(None)
    }
}

impl World {
    fn state(&self, gfn: Gfn) -> FrameState {
        self.pool.state(self.entry(gfn).pfn())
    }
    fn entry(&self, gfn: Gfn) -> Entry {
        self.vm.space.entry(gfn).unwrap()
    }
    /// Entry and bit, as PROTOCOL.md 3.1 names them.
    fn slot(&self, gfn: Gfn) -> &'static str {
        let (entry, state) = (self.entry(gfn), self.state(gfn));
        match (
            entry.is_present(),
            entry.is_writable(),
            state.is_exclusive(),
        ) {
            (false, ..) => "ZERO",
            (_, true, true) => "WX",
            (_, false, true) => "RX",
            (_, false, false) => "RS",
            (_, true, false) => "WS",
        }
    }
    fn stats(&self) -> MmStats {
        self.vm.space.stats()
    }
    /// Leaves a page read-only and exclusive: what a fork that was refused, or dirty tracking, does.
    fn protect_without_sharing(&self, gfn: Gfn) {
        let pin = self.vm.space.pin(gfn, Access::Read).unwrap();
        drop(pin);
        let frozen = self.vm.space.fork().unwrap();
        drop(frozen);
        self.vm.space.unshare(gfn).unwrap();
    }
    /// Another address space of as many pages with frames of the same pool, under the right policy.
    fn neighbour(&self) -> World {
        let pages = self.vm.space.pages();
        world_in(
            Arc::clone(&self.pool),
            Arc::clone(&self.memory),
            right(),
            pages,
        )
    }
    fn picture(&self) -> Picture {
        Picture::of(&self.pool, &[self])
    }
}

/// All that a failed operation must leave as it was.
#[derive(PartialEq)]
struct Picture {
    /// Of each page of each space: its entry, whether it is marked dirty, what the MMU maps, what a vCPU
    /// reads.
    pages: Vec<(Entry, bool, (Pfn, Protection), u64)>,
    /// Of each frame.
    frames: Vec<FrameState>,
    in_use: u64,
}

impl Picture {
    fn of(pool: &FramePool, worlds: &[&World]) -> Self {
        let page = |w: &World, gfn| {
            let entry = w.entry(gfn);
            let shown = w.vm.mmu.page(gfn);
            (entry, entry.is_dirty(), shown, w.vm.cpu_read(gfn))
        };
        let pages = worlds
            .iter()
            .flat_map(|w| (0..w.vm.space.pages()).map(|n| page(w, Gfn(n))))
            .collect();
        let frames = (0..pool.frames().len()).map(|n| pool.state(Pfn(n)));
        Self {
            pages,
            frames: frames.collect(),
            in_use: pool.usage().in_use,
        }
    }
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = self
            .pages
            .iter()
            .enumerate()
            .filter(|(_, p)| p.0.is_present() || p.1);
        let frames = self.frames.iter().enumerate().filter(|(_, s)| s.refs() > 0);
        f.debug_struct("Picture")
            .field("pages", &pages.collect::<Vec<_>>())
            .field("frames", &frames.collect::<Vec<_>>())
            .field("in_use", &self.in_use)
            .finish()
    }
}

/// Has the MMU refuse the first call that `operation` makes of it, in a fresh world its second, and so on
/// until it succeeds. Every failure must leave all as it was, and must not stand in the way of another try.
/// Says how often it failed.
fn refused_at_each_call<W, T, E: fmt::Debug>(
    setup: impl Fn() -> W,
    mmu: impl Fn(&W) -> &Refusals,
    picture: impl Fn(&W) -> Picture,
    operation: impl Fn(&W) -> Result<T, E>,
) -> u64 {
    for nth in 0.. {
        let world = setup();
        let before = picture(&world);
        mmu(&world).at(nth);
        let result = operation(&world);
        mmu(&world).never();
        if result.is_ok() {
            return nth;
        }
        assert_eq!(picture(&world), before, "refused at call {nth}");
        assert!(
            operation(&world).is_ok(),
            "again, after call {nth} was refused"
        );
    }
    unreachable!("an operation asks the MMU a finite number of times")
}

/// What `operation` says while somebody else has `locks`. A failure and not a hang if it waits for one of
/// them.
fn beside<L, T: Send>(locks: L, operation: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let operation = scope.spawn(operation);
        let patience = Instant::now() + PATIENCE;
        while !operation.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        let waits = !operation.is_finished();
        drop(locks);
        let answer = operation.join().unwrap();
        assert!(!waits, "it waits for a lock");
        answer
    })
}
