//! The mix: who takes part, and the oracles they check along the way and at the end.
//!
//! | oracle | what it says |
//! |---|---|
//! | isolation | a snapshot reads as it did when taken; nobody but a clone sees what it wrote |
//! | coherence | while a page is pinned, entry and MMU show the pinned frame, which is exclusive |
//! | lost | who is the only one to write a page reads what he wrote last |
//! | tracking | a page that is in no further answer of `take_dirty` is as it was after the last |
//! | accounting | when everybody is gone, so is every frame |
//! | count | nothing is refused because a count is at its limit |

use std::sync::Arc;

use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::{self, JoinHandle};

use crate::mm::soft::{SoftMemory, SoftVm, soft_pool_of};
use crate::mm::{Access, Charges, CowPolicy, FramePool, Frozen, Gfn, Order, Pfn};

/// Written by a vCPU alone.
const VCPUS: Gfn = Gfn(0);
/// Written by a device alone.
const DEVICES: Gfn = Gfn(1);
/// Written by another vCPU with few values, so that they are equal now and then, and merged.
const ALIKE: [Gfn; 2] = [Gfn(2), Gfn(3)];
/// Written by that vCPU as well, and discarded by somebody else.
const BALLOON: Gfn = Gfn(4);
const PAGES: u64 = 5;
/// What a clone writes; others write less.
const CLONES: u64 = 1000;
/// How often everybody does what he does.
const ROUNDS: u64 = 3;

struct World<C> {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
    vm: SoftVm<C>,
    has_folios: bool,
}

/// An address space whose pages all hold 1.
fn world<C: CowPolicy + Default>(huge: Order) -> Arc<World<C>> {
    let (pool, memory) = soft_pool_of(huge, 96).unwrap();
    let vm = SoftVm::new(&pool, &memory, C::default(), PAGES).unwrap();
    for page in 0..PAGES {
        vm.cpu_write(Gfn(page), 1).unwrap();
    }
    Arc::new(World {
        pool,
        memory,
        vm,
        has_folios: huge != Order::HUGE,
    })
}

/// Everybody is gone: so is everything.
fn settle<C>(w: Arc<World<C>>) {
    let Ok(World { pool, vm, .. }) = Arc::try_unwrap(w) else {
        panic!("everybody has ended");
    };
    drop(vm);
    assert_eq!(pool.leftovers(9), [], "accounting");
    assert_eq!(pool.usage().in_use, 0, "accounting");
    assert_eq!(pool.charges(), Charges::default(), "accounting");
}

/// One schedule with two huge folios of two pages, and a page that is in none. Regions are broken whole at
/// the second fault, so that they are split and huge again all the time. Nobody tracks what is written: that
/// would keep them split.
pub(crate) fn mix_of_folios<C: CowPolicy + Default>() {
    let w = world::<C>(Order::new(1));
    w.vm.space.set_whole_price(2);
    w.vm.space.leave_to_fork(0);
    w.vm.space.notes_writes();
    let all = [
        start(&w, |w| write(w, VCPUS)),
        start(&w, write_alike_and_balloon),
        start(&w, dma_write),
        start(&w, dma_read),
        start(&w, dma_read_range),
        start(&w, read),
        start(&w, snapshot),
        start(&w, snapshot),
        start(&w, break_ahead),
        start(&w, clone),
    ];
    for one in all {
        one.join().unwrap();
    }
    settle(w);
}

/// One schedule.
pub(crate) fn mix<C: CowPolicy + Default>() {
    let w = world::<C>(Order::HUGE);
    let tracker = start(&w, track);
    let others = [
        start(&w, |w| write(w, VCPUS)),
        start(&w, write_alike_and_balloon),
        start(&w, dma_write),
        start(&w, dma_read),
        start(&w, read),
        start(&w, snapshot),
        start(&w, clone),
        start(&w, compact),
        start(&w, deduplicate_and_balloon),
    ];
    for other in others {
        other.join().unwrap();
    }
    let known = tracker.join().unwrap();
    let last = w.vm.space.take_dirty().unwrap();
    for page in (0..PAGES).map(Gfn) {
        let same = w.vm.cpu_read(page) == known[page.0 as usize];
        assert!(same || last.contains(page), "tracking: {page:?}");
    }

    settle(w);
}

fn start<C: CowPolicy, T: Send + 'static>(
    w: &Arc<World<C>>,
    part: impl FnOnce(&World<C>) -> T + Send + 'static,
) -> JoinHandle<T> {
    let w = Arc::clone(w);
    thread::spawn(move || part(&w))
}

fn any_page() -> Gfn {
    Gfn(thread_rng().gen_range(0..PAGES))
}

fn any_access() -> Access {
    if thread_rng().r#gen() {
        Access::Read
    } else {
        Access::Write
    }
}

fn write<C: CowPolicy>(w: &World<C>, page: Gfn) {
    for value in 2..2 + ROUNDS {
        w.vm.cpu_write(page, value).unwrap();
        assert_eq!(w.vm.cpu_read(page), value, "lost");
        thread::yield_now();
        assert_eq!(w.vm.cpu_read(page), value, "lost");
    }
}

fn write_alike_and_balloon<C: CowPolicy>(w: &World<C>) {
    for _ in 0..ROUNDS {
        let page = ALIKE[thread_rng().gen_range(0..2)];
        let value = thread_rng().gen_range(1..3);
        w.vm.cpu_write(page, value).unwrap();
        assert_eq!(w.vm.cpu_read(page), value, "lost");
        w.vm.cpu_write(BALLOON, value).unwrap();
        let seen = w.vm.cpu_read(BALLOON);
        assert!([0, value].contains(&seen), "lost");
    }
}

/// While a page is pinned it stays where it is.
fn check_pin<C: CowPolicy>(w: &World<C>, page: Gfn, pinned: Pfn) {
    let (entry, mmu) = (w.vm.space.entry(page).unwrap(), w.vm.mmu.page(page));
    assert_eq!((entry.pfn(), mmu.0), (pinned, pinned), "coherence");
    // Who splits a folio, or finds that it can't be shared, changes two words, and nobody without a lock may
    // ask in between.
    let is_exclusive = || w.pool.state(pinned).is_exclusive();
    assert!(w.has_folios || is_exclusive(), "coherence");
}

/// What is refused only if a count is at its limit, which none is but by mistake.
fn counted<T, E: std::fmt::Debug>(pinned: Result<T, E>) -> T {
    pinned.unwrap_or_else(|error| panic!("a count is wrong: {error:?}"))
}

fn dma_write<C: CowPolicy>(w: &World<C>) {
    let mut value = 2;
    for _ in 0..ROUNDS {
        // A registered buffer: it takes more than one transfer.
        let pin = counted(w.vm.space.pin(DEVICES, Access::Write));
        for _ in 0..2 {
            w.vm.dma_write(&pin, value);
            assert_eq!(w.vm.cpu_read(DEVICES), value, "coherence");
            check_pin(w, DEVICES, pin.pfn());
            value += 1;
        }
        drop(pin);
        assert_eq!(w.vm.cpu_read(DEVICES), value - 1, "lost");
    }
}

fn dma_read<C: CowPolicy>(w: &World<C>) {
    for _ in 0..ROUNDS {
        let page = any_page();
        let pin = counted(w.vm.space.pin(page, any_access()));
        for _ in 0..2 {
            assert!(w.vm.dma_read(&pin) < CLONES, "isolation");
            check_pin(w, page, pin.pfn());
            thread::yield_now();
        }
    }
}

/// Across the folios, and the page that is in none.
fn dma_read_range<C: CowPolicy>(w: &World<C>) {
    for _ in 0..ROUNDS {
        let first = any_page();
        let count = thread_rng().gen_range(1..=PAGES - first.0);
        let runs = counted(w.vm.space.pin_range(first, count, any_access()));
        for _ in 0..2 {
            let frames: Vec<_> = runs.iter().flat_map(|run| run.pfns()).collect();
            assert_eq!(frames.len() as u64, count);
            for (n, pinned) in (first.0..).zip(frames) {
                assert!(w.memory.load(pinned) < CLONES, "isolation");
                check_pin(w, Gfn(n), pinned);
            }
            thread::yield_now();
        }
    }
}

fn read<C: CowPolicy>(w: &World<C>) {
    for _ in 0..ROUNDS {
        let hold = w.vm.space.get(any_page(), any_access()).unwrap();
        for _ in 0..2 {
            assert!(w.vm.read_held(&hold) < CLONES, "isolation");
            thread::yield_now();
        }
        drop(hold);
        w.vm.space.unshare(any_page()).unwrap();
    }
}

fn break_ahead<C: CowPolicy>(w: &World<C>) {
    for _ in 0..2 * ROUNDS {
        w.vm.space.break_ahead();
        thread::yield_now();
    }
}

fn pages_of<C: CowPolicy>(w: &World<C>, frozen: &Frozen) -> Vec<u64> {
    (0..PAGES)
        .map(|page| w.vm.read_frozen(frozen, Gfn(page)))
        .collect()
}

fn snapshot<C: CowPolicy>(w: &World<C>) {
    for _ in 0..ROUNDS {
        if w.has_folios && thread_rng().r#gen() {
            w.vm.space.prepare_fork();
        }
        let frozen = w.vm.space.fork().unwrap();
        let at_fork = pages_of(w, &frozen);
        let page = any_page();
        let hold = frozen.get(page).unwrap();
        for _ in 0..2 {
            thread::yield_now();
            assert_eq!(pages_of(w, &frozen), at_fork, "isolation");
            let held = w.vm.read_held(&hold);
            assert_eq!(held, at_fork[page.0 as usize], "isolation");
        }
    }
}

fn clone<C: CowPolicy + Default>(w: &World<C>) {
    let frozen = w.vm.space.fork().unwrap();
    let at_fork = pages_of(w, &frozen);
    let clone = SoftVm::clone_of(&frozen, &w.memory, C::default()).unwrap();
    drop(frozen);
    let mut expected = at_fork;
    for value in CLONES..CLONES + ROUNDS {
        let page = any_page();
        clone.cpu_write(page, value).unwrap();
        expected[page.0 as usize] = value;
        thread::yield_now();
        for page in (0..PAGES).map(Gfn) {
            let seen = clone.cpu_read(page);
            assert_eq!(seen, expected[page.0 as usize], "isolation");
            assert!(w.vm.cpu_read(page) < CLONES, "isolation");
        }
    }
}

fn compact<C: CowPolicy>(w: &World<C>) {
    for _ in 0..2 * ROUNDS {
        // Refused while somebody holds or shares the page.
        let _ = w.vm.space.migrate(any_page());
    }
}

fn deduplicate_and_balloon<C: CowPolicy>(w: &World<C>) {
    for _ in 0..ROUNDS {
        // Refused while they differ, or somebody holds one.
        let _ = w.vm.space.merge(ALIKE[0], &w.vm.space, ALIKE[1]);
        let _ = w.vm.space.discard(BALLOON, 1);
        w.vm.space.write_fault(BALLOON).unwrap();
    }
}

/// What it knows of each page: what it read after the page was last in an answer.
fn track<C: CowPolicy>(w: &World<C>) -> [u64; PAGES as usize] {
    let mut known = [0; PAGES as usize];
    for _ in 0..ROUNDS {
        for page in w.vm.space.take_dirty().unwrap().iter() {
            known[page.0 as usize] = w.vm.cpu_read(page);
            assert!(known[page.0 as usize] < CLONES, "isolation");
        }
        thread::yield_now();
    }
    known
}
