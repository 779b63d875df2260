//! The races. Each is one model: loom calls it once for every interleaving.
//!
//! An assertion that a safeguard's absence is to trip says what broke:
//!
//! | word | meaning |
//! |---|---|
//! | coherence | a pin is the page it was taken of |
//! | isolation | nobody sees what is not theirs |
//! | lost | what was written is in the page |
//! | tracking | what was written is in an answer of `take_dirty` |
//! | torn | a child has all that was written before what it has |
//! | once | what is to be done once was done once |

mod backed;
mod clone;
mod dirty;
mod fault;
mod folio;
mod fork;
mod get;
mod lent;
mod memory;
mod pin;
mod rearrange;

pub(crate) use backed::*;
pub(crate) use clone::*;
pub(crate) use dirty::*;
pub(crate) use fault::*;
pub(crate) use folio::*;
pub(crate) use fork::*;
pub(crate) use get::*;
pub(crate) use lent::*;
pub(crate) use memory::*;
pub(crate) use pin::*;
pub(crate) use rearrange::*;

use std::sync::Arc;

use loom::thread;

use crate::mm::soft::{SoftMemory, SoftVm, soft_pool};
use crate::mm::{CowPolicy, FramePool, Frozen, Gfn, Pfn};

/// A policy a race can be run under.
pub(crate) trait Policy: CowPolicy + Default {}
impl<P: CowPolicy + Default> Policy for P {}

const P: Gfn = Gfn(0);
const OLD: u64 = 5;
const NEW: u64 = 6;
const DMA: u64 = 7;
const CLONES: u64 = 9;

struct World<C> {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    vm: Arc<SoftVm<C>>,
}

/// A VM whose one page holds [`OLD`].
fn world<C: Policy>() -> World<C> {
    world_of(1)
}

/// A VM of `pages` pages that hold [`OLD`].
fn world_of<C: Policy>(pages: u64) -> World<C> {
    let (pool, memory) = soft_pool(8).unwrap();
    let vm = SoftVm::new(&pool, &memory, C::default(), pages).unwrap();
    for page in 0..pages {
        vm.cpu_write(Gfn(page), OLD).unwrap();
    }
    World {
        pool,
        memory,
        vm: Arc::new(vm),
    }
}

impl<C: Policy> World<C> {
    /// Runs `part` beside the rest.
    fn beside<T: 'static>(
        &self,
        part: impl FnOnce(&SoftVm<C>) -> T + 'static,
    ) -> thread::JoinHandle<T> {
        let vm = Arc::clone(&self.vm);
        thread::spawn(move || part(&vm))
    }

    fn fork(&self) -> Arc<Frozen> {
        self.vm.space.fork().unwrap()
    }

    fn clone_of(&self, frozen: &Frozen) -> SoftVm<C> {
        SoftVm::clone_of(frozen, &self.memory, C::default()).unwrap()
    }

    /// A running clone, and nobody else, that shares the page.
    fn clone(&self) -> SoftVm<C> {
        let frozen = self.fork();
        self.clone_of(&frozen)
    }

    fn write(&self, value: u64) {
        self.vm.cpu_write(P, value).unwrap();
    }

    fn read(&self) -> u64 {
        self.vm.cpu_read(P)
    }

    fn read_frozen(&self, frozen: &Frozen) -> u64 {
        self.vm.read_frozen(frozen, P)
    }

    fn frame(&self) -> Pfn {
        self.vm.space.entry(P).unwrap().pfn()
    }

    /// Nothing is left when everything is dropped.
    fn settle(self) {
        let Self { pool, vm, .. } = self;
        drop(vm);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
        let charges = pool.charges();
        assert_eq!((charges.open, charges.closed), (0, 0));
    }
}
