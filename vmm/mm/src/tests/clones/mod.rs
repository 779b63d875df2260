//! Clones. Here: what the tests share.
//!
//! | file | tests |
//! |---|---|
//! | `making` | what it takes to make one, and what is left of one that cannot be made |
//! | `diverging` | what becomes of frames, homes and mappings when all machines write, and go |
//! | `gathering` | a region that moves house for a page, and then as a whole |

mod diverging;
mod gathering;
mod making;

use super::super::soft::soft_pool_of;
use super::*;

/// Pages of a region, and of a machine.
const REGION: u64 = 4;
const PAGES: u64 = 4 * REGION;
const FRAMES: u64 = 64 * REGION;

/// A machine, and what it asks of its MMU.
struct Machine {
    vm: SoftVm<AnyPolicy>,
    mmu: Arc<Refusals>,
    pages: Vec<u64>,
}

impl Machine {
    fn over(
        make: impl FnOnce(Box<dyn Mmu>) -> Result<AddressSpace<AnyPolicy>, ForkError>,
        memory: &Arc<SoftMemory>,
        pages: Vec<u64>,
        mmu: &Arc<Refusals>,
    ) -> Result<Self, ForkError> {
        let inner = SoftMmu::new(pages.len() as u64);
        let refusing = RefusingMmu {
            inner: Arc::clone(&inner),
            refusals: Arc::clone(mmu),
        };
        let vm = SoftVm::over(make(Box::new(refusing))?, inner, memory);
        // Small breaks, unless a test says otherwise.
        vm.space.set_whole_price(1000);
        Ok(Self {
            vm,
            mmu: Arc::clone(mmu),
            pages,
        })
    }

    fn clone_of(
        frozen: &Frozen,
        policy: AnyPolicy,
        memory: &Arc<SoftMemory>,
        pages: &[u64],
        mmu: &Arc<Refusals>,
    ) -> Result<Self, ForkError> {
        mmu.calls_from_now();
        let make = |mmu| AddressSpace::from_frozen(frozen, policy, mmu);
        Self::over(make, memory, pages.to_vec(), mmu)
    }

    fn entry(&self, gfn: u64) -> Entry {
        self.vm.space.entry(Gfn(gfn)).unwrap()
    }

    fn write(&mut self, gfn: u64, value: u64) {
        self.vm.cpu_write(Gfn(gfn), value).unwrap();
        self.pages[gfn as usize] = value;
    }

    /// Mappings that a host would need: of pages that follow each other, in frames that do, with the same
    /// rights.
    fn mappings(&self) -> usize {
        let pages: Vec<_> = (0..self.pages.len() as u64)
            .map(|n| self.vm.mmu.page(Gfn(n)))
            .collect();
        runs(&pages, |(a, right), (b, next)| {
            right == next && b.0 == a.0 + u64::from(*a != Pfn::ZERO)
        })
    }

    fn are_all_huge(&self) -> bool {
        (0..self.pages.len() as u64).all(|n| self.entry(n).is_huge() && self.entry(n).is_writable())
    }

    fn copied(&self) -> u64 {
        self.vm.space.stats().copied
    }

    fn check(&self) {
        for (gfn, &value) in (0..).map(Gfn).zip(&self.pages) {
            assert_eq!(self.vm.cpu_read(gfn), value, "{gfn:?}");
            let entry = self.vm.space.entry(gfn).unwrap();
            assert_eq!(self.vm.mmu.page(gfn), (entry.pfn(), entry.protection()));
        }
    }
}

/// In how many runs `all` is, of which each follows the one before.
fn runs<T>(all: &[T], follows: impl Fn(&T, &T) -> bool) -> usize {
    all.chunk_by(follows).count()
}

struct Host {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
}

fn host() -> Host {
    host_with(REGION, FRAMES)
}

fn host_with(region: u64, frames: u64) -> Host {
    let order = Order::new(region.trailing_zeros() as u8);
    let (pool, memory) = soft_pool_of(order, frames).unwrap();
    Host { pool, memory }
}

impl Host {
    /// A machine whose page `n` holds `100 + n`, in huge entries.
    fn machine(&self, pages: u64) -> Machine {
        let pool = Arc::clone(&self.pool);
        let make = |mmu| Ok(AddressSpace::new(pool, right(), mmu, pages).unwrap());
        let mmu = Arc::default();
        let mut new = Machine::over(make, &self.memory, vec![0; pages as usize], &mmu).unwrap();
        (0..pages).for_each(|n| new.write(n, 100 + n));
        new
    }

    fn clone_of(&self, frozen: &Frozen, pages: &[u64]) -> Machine {
        Machine::clone_of(frozen, right(), &self.memory, pages, &Arc::default()).unwrap()
    }

    /// A clone of a machine as it is now, and nobody's snapshot.
    fn clone(&self, machine: &Machine) -> Machine {
        self.clone_of(&machine.vm.space.fork().unwrap(), &machine.pages)
    }

    /// Everybody is gone: so are all frames and all homes.
    fn settle(self) {
        assert_eq!(self.pool.leftovers(9), []);
        assert_eq!(self.pool.usage().in_use, 0);
        let all = self.pool.frames().len() - self.pool.huge().pages();
        assert!(self.pool.reserve(all).is_ok(), "a home is left");
    }
}
