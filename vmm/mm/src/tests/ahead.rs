//! Breaks ahead of the writes: what is known to be written again, and nothing else.

use super::super::soft::soft_pool_of;
use super::*;

const REGION: u64 = 4;
const PAGES: u64 = 3 * REGION;
const NOTHING: [u64; 0] = [];

struct World {
    pool: Arc<FramePool>,
    vm: SoftVm<AnyPolicy>,
}

/// Three regions, each of a huge folio of four pages; page `n` holds `100 + n`.
fn world() -> World {
    let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
    let vm = SoftVm::new(&pool, &memory, right(), PAGES).unwrap();
    vm.space.notes_writes();
    vm.space.leave_to_fork(0);
    for n in 0..PAGES {
        vm.cpu_write(Gfn(n), 100 + n).unwrap();
    }
    World { pool, vm }
}

impl World {
    /// Does all there is to do.
    fn break_ahead(&self) {
        while self.vm.space.break_ahead() {}
    }
    fn writable(&self) -> Vec<u64> {
        let entry = |n: &u64| self.vm.space.entry(Gfn(*n)).unwrap();
        (0..PAGES).filter(|n| entry(n).is_writable()).collect()
    }
    /// Forks, writes `pages`, and lets the fork go. Says what was writable before they were written.
    fn round(&self, value: u64, pages: &[u64]) -> Vec<u64> {
        let frozen = self.vm.space.fork().unwrap();
        let before: Vec<_> = (0..PAGES).map(|n| self.vm.cpu_read(Gfn(n))).collect();
        self.break_ahead();
        let writable = self.writable();
        for &n in pages {
            self.vm.cpu_write(Gfn(n), value).unwrap();
        }
        for n in 0..PAGES {
            assert_eq!(self.vm.read_frozen(&frozen, Gfn(n)), before[n as usize]);
        }
        writable
    }
    fn settle(self) {
        let Self { pool, vm } = self;
        drop(vm);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
    }
}

#[test]
fn what_was_written_before_two_forks_is_broken_ahead() {
    let w = world();
    // All of it was written before the first fork, as regions.
    assert_eq!(w.round(1, &[1, 2]), NOTHING);
    assert_eq!(w.round(2, &[2, 9]), NOTHING);
    let before = w.vm.space.stats();
    assert_eq!(w.round(3, &[2, 9]), [2]);
    let after = w.vm.space.stats();
    assert_eq!(
        (after.ahead - before.ahead, after.copied - before.copied),
        (1, 2)
    );
    assert_eq!(w.round(4, &[]), [2, 9]);
    w.settle();
}

/// What was only read lies between two regions that were written: one call protects all three.
#[test]
fn what_was_read_only_is_not_taken_for_written() {
    let w = world();
    drop(w.vm.space.fork().unwrap());
    w.vm.cpu_write(P, 1).unwrap();
    drop(w.vm.space.pin(Gfn(REGION), Access::Read).unwrap());
    w.vm.cpu_write(Gfn(2 * REGION), 1).unwrap();
    let written: Vec<_> = (0..REGION).chain(2 * REGION..PAGES).collect();
    assert_eq!(w.writable(), written);
    assert!(w.vm.space.entry(Gfn(REGION)).unwrap().is_huge());
    let frozen = w.vm.space.fork().unwrap();
    w.break_ahead();
    assert_eq!(w.writable(), written);
    drop(frozen);
    w.settle();
}

/// A fork that was prepared finds it read-only.
#[test]
fn what_was_written_before_a_fork_was_prepared_counts_too() {
    let w = world();
    let mut ahead = vec![];
    for n in 1..5 {
        ahead.push(w.round(n, &[5]));
        w.vm.space.prepare_fork();
        assert_eq!(w.writable(), NOTHING);
    }
    assert_eq!(ahead, [vec![], vec![], vec![5], vec![5]]);
    w.settle();
}

#[test]
fn regions_are_broken_ahead_whole() {
    let w = world();
    w.vm.space.set_whole_price(0);
    let all: Vec<_> = (0..REGION).collect();
    assert_eq!(w.round(1, &all), NOTHING);
    let before = w.vm.space.stats();
    assert_eq!(w.round(2, &all), all);
    let after = w.vm.space.stats();
    assert_eq!(
        (after.ahead - before.ahead, after.copied - before.copied),
        (1, REGION)
    );
    assert!(w.vm.space.entry(P).unwrap().is_huge());
    w.settle();
}

/// What a region costs at a fault is no matter here: nobody waits.
#[test]
fn a_region_is_broken_ahead_whole_though_its_faults_would_not_be() {
    let w = world();
    w.vm.space.set_whole_price(u32::MAX);
    drop(w.vm.space.fork().unwrap());
    w.vm.cpu_write(P, 1).unwrap();
    assert_eq!(w.vm.space.stats().whole, 0, "nobody had it any more");
    let frozen = w.vm.space.fork().unwrap();
    w.break_ahead();
    assert_eq!(w.writable(), (0..REGION).collect::<Vec<_>>());
    assert!(w.vm.space.entry(P).unwrap().is_huge());
    let stats = w.vm.space.stats();
    assert_eq!((stats.whole, stats.ahead, stats.copied), (1, 1, REGION));
    w.vm.cpu_write(P, 2).unwrap();
    assert_eq!(w.vm.read_frozen(&frozen, P), 1);
    drop(frozen);
    w.settle();
}

/// What is broken ahead is writable at the next fork whoever wrote it: only where nothing is broken ahead is
/// it seen that nobody does.
#[test]
fn what_is_not_written_any_more_is_found_out() {
    let w = world();
    w.round(0, &[5]);
    w.round(1, &[5]);
    let ahead: Vec<_> = (0..20).map(|n| w.round(n, &[]).len()).collect();
    let end = ahead.iter().position(|&pages| pages == 0).unwrap();
    assert!((1..8).contains(&end), "{ahead:?}");
    assert!(ahead[end..].iter().all(|&pages| pages == 0), "{ahead:?}");
    w.settle();
}

#[test]
fn nothing_is_broken_ahead_while_somebody_asks_what_is_written() {
    let w = world();
    w.vm.space.take_dirty().unwrap();
    for n in 1..4 {
        w.round(n, &[5]);
    }
    assert_eq!(w.vm.space.stats().ahead, 0);
    w.settle();
}

#[test]
fn what_cannot_be_broken_ahead_is_left_to_the_fault() {
    let (pool, memory) = soft_pool_of(Order::new(2), PAGES + 5).unwrap();
    let vm = SoftVm::new(&pool, &memory, right(), PAGES).unwrap();
    vm.space.notes_writes();
    let w = World { pool, vm };
    for n in 0..PAGES {
        w.vm.cpu_write(Gfn(n), n).unwrap();
    }
    w.round(1, &[5]);
    w.round(2, &[5]);
    // There is no memory for a copy.
    let held: Vec<_> = std::iter::from_fn(|| w.pool.allocate(&w.pool.payer()).ok()).collect();
    let frozen = w.vm.space.fork().unwrap();
    w.break_ahead();
    assert_eq!((w.writable(), w.vm.space.stats().ahead), (vec![], 0));
    drop(held);
    w.vm.cpu_write(Gfn(5), 3).unwrap();
    assert_eq!(w.vm.read_frozen(&frozen, Gfn(5)), 2);
    drop(frozen);
    w.settle();
}

/// The guest was faster; or the page is gone.
#[test]
fn what_is_writable_or_untouched_is_passed_over() {
    let w = world();
    w.round(1, &[5, 6]);
    w.round(2, &[5, 6]);
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(Gfn(5), 3).unwrap();
    w.vm.space.discard(Gfn(6), 1).unwrap();
    let (in_use, before) = (w.pool.usage().in_use, w.vm.space.stats());
    w.break_ahead();
    assert_eq!(
        (w.pool.usage().in_use, w.vm.space.stats()),
        (in_use, before)
    );
    assert!(!w.vm.space.entry(Gfn(6)).unwrap().is_present());
    assert_eq!(w.vm.read_frozen(&frozen, Gfn(6)), 2);
    drop(frozen);
    w.settle();
}
