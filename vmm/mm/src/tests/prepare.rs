//! What happens while a fork, or its preparation, is under way: how much is prepared at once and how often
//! again, and who lets go.

use std::sync::{Mutex, OnceLock, Weak};

use super::super::soft::soft_pool_of;
use super::*;

const REGION: u64 = 4;

/// An MMU whose guest writes to memory while pages are protected: to the first pages of some regions at each
/// call.
#[derive(Default)]
struct Busy {
    guest: OnceLock<Weak<SoftVm<AnyPolicy>>>,
    /// What is still to be written at the next calls, by region.
    writes: Mutex<Vec<Vec<u64>>>,
    /// The runs that were protected, by region.
    protected: Mutex<Vec<(u64, u64)>>,
}

struct BusyMmu(Arc<SoftMmu>, Arc<Busy>);

impl Mmu for BusyMmu {
    fn map(&self, first: Gfn, to: Pfn, count: u64, may: Protection) -> Result<(), MmuError> {
        self.0.map(first, to, count, may)
    }
    fn protect(&self, first: Gfn, count: u64, may: Protection) -> Result<(), MmuError> {
        self.0.protect(first, count, may)?;
        if let Some(guest) = self.1.guest.get().and_then(Weak::upgrade)
            && may == Protection::ReadOnly
        {
            let run = (first.0 / REGION, count / REGION);
            self.1.protected.lock().unwrap().push(run);
            let now = self.1.writes.lock().unwrap().pop().unwrap_or_default();
            now.iter().for_each(|&region| write(&guest, region));
        }
        Ok(())
    }
}

fn write(vm: &SoftVm<AnyPolicy>, region: u64) {
    vm.cpu_write(Gfn(region * REGION), 1).unwrap();
}

/// Has the guest write to `regions` regions, and prepares a fork, while it writes to `meanwhile`. Says which
/// runs of regions were protected, and which regions are writable after.
fn prepare(regions: u64, meanwhile: &[&[u64]], is_huge: bool) -> (Vec<(u64, u64)>, Vec<u64>) {
    let (pool, memory) = soft_pool_of(Order::new(2), 512).unwrap();
    let busy = Arc::<Busy>::default();
    let between = |inner| Box::new(BusyMmu(inner, Arc::clone(&busy))) as Box<dyn Mmu>;
    let vm = SoftVm::with_mmu(&pool, &memory, right(), 80 * REGION, between).unwrap();
    let vm = Arc::new(if is_huge { vm } else { vm.with_base_pages() });
    (0..regions).for_each(|region| write(&vm, region));
    if !is_huge {
        // Runs are as long as what is writable in them.
        let last = |region| Gfn(region * REGION + REGION - 1);
        (0..regions).for_each(|region| vm.cpu_write(last(region), 1).unwrap());
    }
    *busy.writes.lock().unwrap() = meanwhile.iter().rev().map(|w| w.to_vec()).collect();
    assert!(busy.guest.set(Arc::downgrade(&vm)).is_ok());
    vm.space.prepare_fork();
    let runs = busy.protected.lock().unwrap().clone();
    let is_writable = |n: &u64| vm.space.entry(Gfn(n * REGION)).unwrap().is_writable();
    (runs, (0..80).filter(is_writable).collect())
}

const NONE: [u64; 0] = [];

/// An MMU that has a device let go of a page while others are protected.
struct LettingGo(Arc<SoftMmu>, Arc<Mutex<Option<Pin>>>);

impl Mmu for LettingGo {
    fn map(&self, first: Gfn, to: Pfn, count: u64, may: Protection) -> Result<(), MmuError> {
        self.0.map(first, to, count, may)
    }
    fn protect(&self, first: Gfn, count: u64, may: Protection) -> Result<(), MmuError> {
        drop(self.1.lock().unwrap().take());
        self.0.protect(first, count, may)
    }
}

/// It stayed writable for the sake of the pin, so it must not be shared: the pin does not matter any more.
#[test]
fn a_page_that_is_let_go_of_during_a_fork_is_copied() {
    let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
    let pin = Arc::<Mutex<_>>::default();
    let between = |inner| Box::new(LettingGo(inner, Arc::clone(&pin))) as Box<dyn Mmu>;
    let vm = SoftVm::with_mmu(&pool, &memory, right(), REGION, between).unwrap();
    for n in 0..REGION {
        vm.cpu_write(Gfn(n), 100 + n).unwrap();
    }
    *pin.lock().unwrap() = Some(vm.space.pin(Q, Access::Write).unwrap());
    let frozen = vm.space.fork().unwrap();
    assert!(pin.lock().unwrap().is_none());
    let entry = vm.space.entry(Q).unwrap();
    assert!(entry.is_writable() && pool.state(entry.pfn()).is_exclusive());
    assert_eq!(vm.space.stats().eager_copied, 1);
    vm.cpu_write(Q, 1).unwrap();
    let seen: Vec<_> = (0..REGION)
        .map(|n| vm.read_frozen(&frozen, Gfn(n)))
        .collect();
    assert_eq!(seen, [100, 101, 102, 103]);
}

#[test]
fn a_fork_is_prepared_a_few_pieces_at_a_time() {
    let (runs, writable) = prepare(40, &[], true);
    assert_eq!(runs, [(0, 16), (16, 16), (32, 8)]);
    assert_eq!(writable, NONE);
    // In small entries these regions have two chunks each.
    let (runs, writable) = prepare(20, &[], false);
    assert_eq!(runs, [(0, 8), (8, 8), (16, 4)]);
    assert_eq!(writable, NONE);
}

#[test]
fn what_was_written_meanwhile_is_prepared_again() {
    let (runs, writable) = prepare(40, &[&[], &[1, 3]], true);
    assert_eq!(runs, [(0, 16), (16, 16), (32, 8), (1, 1), (3, 1)]);
    assert_eq!(writable, NONE);
}

/// As long as each round has half as much to do as the one before, and not for a few.
#[test]
fn a_fork_is_prepared_again_as_long_as_that_becomes_less() {
    let fresh = |from: u64, count: u64| (from..from + count).collect::<Vec<_>>();
    for (first, second, rounds) in [
        (15, 0, 1),
        (16, 0, 2),
        (32, 15, 2),
        (32, 16, 3),
        (32, 17, 2),
        (33, 16, 3),
        (33, 17, 2),
    ] {
        // Each round touches something new when it has done its last part.
        let parts = |count: u64| count.div_ceil(16) as usize;
        let mut meanwhile = vec![vec![]; parts(first) - 1];
        if second > 0 {
            meanwhile.push(fresh(40, second));
            meanwhile.append(&mut vec![vec![]; parts(second) - 1]);
        }
        meanwhile.push(vec![70]);
        let meanwhile: Vec<_> = meanwhile.iter().map(Vec::as_slice).collect();
        let (runs, writable) = prepare(first, &meanwhile, true);
        let seen = match (writable.as_slice(), second) {
            ([70], 0) => 1,
            ([70], _) | ([], 0) => 2,
            ([], _) => 3,
            _ => panic!("{runs:?} {writable:?}"),
        };
        assert_eq!(seen, rounds, "{first} and then {second}: {runs:?}");
    }
}
