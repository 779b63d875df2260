//! Clones: what it takes to make one, and what becomes of frames when all of them write.

use std::sync::atomic::Ordering;

use super::super::soft::soft_pool_of;
use super::refusing::RefusingMemory;
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

#[test]
fn neighbouring_folios_are_adopted_with_one_call() {
    let host = host();
    let mut parent = host.machine(PAGES);
    let frozen = parent.vm.space.fork().unwrap();
    let clone = host.clone_of(&frozen, &parent.pages);
    assert_eq!((clone.mmu.calls(), clone.mappings()), (1, 1));
    assert!(
        (0..PAGES)
            .all(|n| clone.entry(n).is_huge() && clone.entry(n).pfn() == parent.entry(n).pfn())
    );
    clone.check();
    drop((clone, frozen));
    // Nobody knows of anything in region 1, and the snapshot has region 2 elsewhere.
    parent.vm.space.discard(Gfn(REGION), REGION).unwrap();
    (REGION..2 * REGION).for_each(|n| parent.pages[n as usize] = 0);
    let frozen = parent.vm.space.fork().unwrap();
    let before = parent.pages.clone();
    parent.vm.space.set_whole_price(0);
    parent.write(2 * REGION, 1);
    let clone = host.clone_of(&frozen, &before);
    assert_eq!((clone.mmu.calls(), clone.mappings()), (3, 4));
    clone.check();
    drop((clone, frozen, parent));
    host.settle();
}

#[test]
fn an_untouched_space_is_cloned_without_a_call() {
    let host = host();
    let pool = Arc::clone(&host.pool);
    let space = AddressSpace::new(pool, right(), Box::new(SoftMmu::new(PAGES)), PAGES).unwrap();
    let mut clone = host.clone_of(&space.fork().unwrap(), &[0; PAGES as usize]);
    assert_eq!(clone.mmu.calls(), 0);
    clone.write(3, 1);
    assert!(clone.entry(0).is_huge(), "a first touch is of the region");
    clone.check();
    drop((clone, space));
    host.settle();
}

/// However the snapshot lies in memory.
#[test]
fn pages_are_adopted_by_runs_of_frames() {
    let host = host();
    for written in [vec![5], vec![4, 5], vec![5, 6, 9], (0..PAGES).collect()] {
        let mut parent = host.machine(PAGES + 1);
        let frozen = parent.vm.space.fork().unwrap();
        let before = parent.pages.clone();
        written.iter().for_each(|&n| parent.write(n, n));
        let frames: Vec<Pfn> = (0..=PAGES).map(|n| frozen.frame(Gfn(n)).unwrap()).collect();
        let runs = runs(&frames, |a, b| b.0 == a.0 + 1);
        let clone = host.clone_of(&frozen, &before);
        assert_eq!((clone.mmu.calls(), clone.mappings()), (runs as u64, runs));
        clone.check();
        parent.check();
        // Its own forks have it in common with the snapshot.
        let second = clone.vm.space.fork().unwrap();
        assert_eq!(second.region_address(P), frozen.region_address(P));
    }
    host.settle();
}

/// 200 of them would need more frame numbers than there are.
#[test]
fn clones_have_no_frames_of_their_own_until_they_write() {
    let host = host_with(REGION, 2 * PAGES + REGION);
    let parent = host.machine(PAGES);
    let frozen = parent.vm.space.fork().unwrap();
    let mut clones: Vec<_> = (0..50)
        .map(|_| host.clone_of(&frozen, &parent.pages))
        .collect();
    assert_eq!(host.pool.usage().in_use, PAGES);
    let free: Vec<_> = std::iter::from_fn(|| host.pool.allocate().ok()).collect();
    assert!(clones[0].vm.cpu_write(P, 1).is_err());
    drop(free);
    clones[0].write(0, 1);
    assert_eq!(host.pool.usage().in_use, PAGES + 1);
    clones.iter().for_each(Machine::check);
    drop((clones, frozen, parent));
    host.settle();
}

/// Nothing is left of a clone that could not be made: of counts, of mappings, of memory.
#[test]
fn a_clone_that_is_refused_leaves_nothing_behind() {
    let host = host();
    let mut parent = host.machine(PAGES);
    let frozen = parent.vm.space.fork().unwrap();
    let before = parent.pages.clone();
    [5, 9, 10].into_iter().for_each(|n| parent.write(n, 1));
    let state = || {
        let frames = (0..FRAMES).map(|n| host.pool.state(Pfn(n)));
        // A frame that was the snapshot's alone may be shared again for all that anybody knows.
        let counts: Vec<_> = frames.map(|s| (s.maps(), s.gets(), s.pins())).collect();
        (counts, host.pool.usage().in_use)
    };
    let (untouched, mmu) = (state(), Arc::<Refusals>::default());
    let frames: Vec<Pfn> = (0..PAGES).map(|n| frozen.frame(Gfn(n)).unwrap()).collect();
    let calls = runs(&frames, |a, b| b.0 == a.0 + 1) as u64;
    for nth in 0.. {
        mmu.at(nth);
        let result = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu);
        mmu.never();
        if let Ok(clone) = result {
            assert_eq!(nth, calls);
            clone.check();
            break;
        }
        assert!(matches!(result.err().unwrap(), ForkError::Map(_)));
        assert_eq!(state(), untouched, "refused at call {nth}");
        parent.check();
    }
    assert_eq!(state(), untouched);
    drop((frozen, parent));
    host.settle();
}

/// [`Exclusive`], but nothing can be shared.
struct NothingIsShared;

impl CowPolicy for NothingIsShared {
    fn name(&self) -> &'static str {
        "nothing is shared"
    }
    fn goes_by_the_bit(&self) -> bool {
        true
    }
    fn may_share(&self, _: FrameState) -> bool {
        false
    }
    fn may_reuse(&self, frame: FrameState) -> bool {
        Exclusive.may_reuse(frame)
    }
    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        Exclusive.may_pin(frame, access)
    }
}

#[test]
fn a_clone_for_whose_copies_there_is_no_memory_leaves_nothing_behind() {
    const FEW: u64 = 2 * PAGES;
    for limit in PAGES + 1..=FEW {
        let memory = SoftMemory::new(FRAMES);
        let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
        let pool = FramePool::with_folios_of(Order::new(2), bytes, FRAMES, limit).unwrap();
        let host = Host { pool, memory };
        let parent = host.machine(PAGES);
        let frozen = parent.vm.space.fork().unwrap();
        let policy = Box::new(NothingIsShared);
        let clone = Machine::clone_of(
            &frozen,
            policy,
            &host.memory,
            &parent.pages,
            &Arc::default(),
        );
        match clone {
            Ok(clone) => clone.check(),
            Err(error) => assert!(matches!(error, ForkError::EagerCopy { .. })),
        }
        assert_eq!(host.pool.usage().in_use, PAGES, "limit {limit}");
        parent.check();
        drop((frozen, parent));
        host.settle();
    }
}

/// A region of 512 pages in so many runs is shared, in more it is copied.
#[test]
fn a_region_that_is_scattered_is_copied_whole() {
    const HUGE: u64 = REGION_PAGES;
    for (step, is_copied) in [(32, false), (4, true)] {
        let host = host_with(HUGE, 8 * HUGE);
        let mut parent = host.machine(HUGE);
        let frozen = parent.vm.space.fork().unwrap();
        let before = parent.pages.clone();
        (0..HUGE).step_by(step).for_each(|n| parent.write(n, 1));
        let mut clone = host.clone_of(&frozen, &before);
        clone.check();
        let runs = if is_copied { 1 } else { 2 * HUGE / step as u64 };
        assert_eq!((clone.mmu.calls(), clone.mappings() as u64), (runs, runs));
        assert_eq!(clone.copied(), if is_copied { HUGE } else { 0 });
        assert_eq!(clone.entry(7).is_huge(), is_copied);
        // Read-only, so that what it writes is known; and its own.
        assert!(!clone.entry(7).is_writable());
        clone.write(7, 2);
        assert_eq!(clone.vm.space.stats().reused, u64::from(is_copied));
        let second = clone.vm.space.fork().unwrap();
        let reads = |n| clone.vm.read_frozen(&second, Gfn(n));
        assert_eq!([0, 7, 9].map(reads), [100, 2, 109]);
        drop((second, clone, frozen, parent));
        host.settle();
    }
}

#[test]
fn where_mappings_are_short_every_region_takes_one() {
    let host = host();
    let mut parent = host.machine(PAGES);
    parent.vm.space.discard(Gfn(6), 1).unwrap();
    parent.pages[6] = 0;
    let frozen = parent.vm.space.fork().unwrap();
    let before = parent.pages.clone();
    [5, 10].into_iter().for_each(|n| parent.write(n, 1));
    let mmu = Arc::<Refusals>::default();
    mmu.crowded.store(1, Ordering::Relaxed);
    let clone = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu).unwrap();
    clone.check();
    assert!([0, 5, 10, 12].map(|n| clone.entry(n).is_huge()) == [true; 4]);
    assert_eq!((clone.mmu.calls(), clone.copied()), (4, 2 * REGION - 1));
    drop(clone);
    // Each call is refused, and so is memory: what cannot be copied is shared.
    for nth in 0..4 {
        let in_use = host.pool.usage().in_use;
        mmu.at(nth);
        let refused = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu);
        assert!(matches!(refused.err(), Some(ForkError::Map(_))));
        mmu.never();
        assert_eq!(host.pool.usage().in_use, in_use);
    }
    let all: Vec<_> = std::iter::from_fn(|| host.pool.allocate().ok()).collect();
    let clone = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu).unwrap();
    clone.check();
    assert!(!clone.entry(5).is_huge() && clone.copied() == 0);
    drop((all, clone, frozen, parent));
    host.settle();
}

/// A host that refuses memory for the copy of a region has it shared.
#[test]
fn a_region_for_which_the_host_has_no_memory_is_shared() {
    let memory = RefusingMemory::new(FRAMES);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, FRAMES, FRAMES).unwrap();
    let host = Host {
        pool,
        memory: Arc::clone(&memory.inner),
    };
    let mut parent = host.machine(PAGES);
    let frozen = parent.vm.space.fork().unwrap();
    let before = parent.pages.clone();
    parent.write(5, 1);
    let mmu = Arc::<Refusals>::default();
    mmu.crowded.store(1, Ordering::Relaxed);
    memory.refusals.from(0);
    let clone = Machine::clone_of(&frozen, right(), &host.memory, &before, &mmu).unwrap();
    memory.refusals.never();
    assert!(!clone.entry(5).is_huge() && clone.copied() == 0);
    clone.check();
    drop((clone, frozen, parent));
    host.settle();
}

/// Page by page: each to its place in the new home, so that neighbours join.
#[test]
fn a_region_moves_house_when_a_clone_runs_on_in_its_frames() {
    let host = host();
    let mut parent = host.machine(PAGES);
    let mut clone = host.clone(&parent);
    parent.write(5, 1);
    let (old, new) = (parent.entry(4).pfn(), parent.entry(5).pfn());
    assert_eq!(parent.mappings(), 3);
    assert_eq!(host.pool.frames().head(new).0 + 1, new.0, "its place");
    parent.write(6, 2);
    assert_eq!(parent.entry(6).pfn().0, new.0 + 1);
    assert_eq!(parent.mappings(), 3);
    parent.write(4, 3);
    parent.write(7, 4);
    assert_eq!((parent.mappings(), parent.copied()), (3, REGION));
    // The clone is alone there now, and takes over all of it in place.
    clone.write(5, 7);
    assert!(clone.entry(4).is_huge() && clone.entry(4).is_writable());
    assert_eq!((clone.entry(4).pfn(), clone.copied()), (old, 0));
    [&parent, &clone].into_iter().for_each(Machine::check);
    drop((parent, clone));
    host.settle();
}

/// In one piece, with one call, and whose turn it is does not matter.
#[test]
fn a_region_moves_house_in_one_piece() {
    let host = host();
    let mut parent = host.machine(PAGES);
    for round in 0..3 {
        let mut clone = host.clone(&parent);
        parent.vm.space.set_whole_price(0);
        let before = parent.entry(REGION).pfn();
        let copied = parent.copied();
        parent.mmu.never();
        parent.write(REGION + 1, round);
        assert_eq!((parent.mmu.calls(), parent.copied()), (1, copied + REGION));
        let entry = parent.entry(REGION);
        assert!(entry.is_huge() && entry.is_writable() && entry.pfn() != before);
        assert_eq!(parent.vm.space.stats().split, 0);
        clone.write(REGION, 9);
        assert_eq!((clone.entry(REGION).pfn(), clone.copied()), (before, 0));
        [&parent, &clone].into_iter().for_each(Machine::check);
    }
    drop(parent);
    host.settle();
}

/// The frames of a home that was given up are anybody's once they are free.
#[test]
fn an_old_home_is_anybodys() {
    let host = host_with(REGION, 3 * REGION);
    let mut parent = host.machine(REGION);
    let clone = host.clone(&parent);
    parent.vm.space.set_whole_price(0);
    parent.write(0, 1);
    assert!(parent.entry(0).is_huge());
    assert!(host.pool.reserve(REGION).is_err(), "the clone has it");
    drop(clone);
    drop(host.pool.reserve(REGION).unwrap());
    // And back again.
    let clone = host.clone(&parent);
    parent.write(1, 2);
    assert!(parent.entry(0).is_huge());
    [&parent, &clone].into_iter().for_each(Machine::check);
    drop((clone, parent));
    host.settle();
}

/// Whoever rewrites all of its memory ends as a fresh machine would, and copies each page once: the clone, who
/// was cloned, or both by turns.
#[test]
fn dense_rewrites_end_in_huge_entries_and_few_mappings() {
    const REGION: u64 = 16;
    const PAGES: u64 = 4 * REGION;
    let both = |n: u64| [(0, n), (1, n)];
    let turns: [(&str, Vec<(usize, u64)>); 5] = [
        ("the clone", (0..PAGES).map(|n| (1, n)).collect()),
        ("who was cloned", (0..PAGES).map(|n| (0, n)).collect()),
        ("one after the other", {
            let of = |m| (0..PAGES).map(move |n| (m, n));
            of(0).chain(of(1)).collect()
        }),
        ("by turns", (0..PAGES).flat_map(both).collect()),
        (
            "by turns, backwards",
            (0..PAGES).rev().flat_map(both).collect(),
        ),
    ];
    for (who, writes) in turns {
        for price in [0, 2, 3, 5, 8] {
            let host = host_with(REGION, 64 * REGION);
            let parent = host.machine(PAGES);
            let clone = host.clone(&parent);
            let mut machines = [parent, clone];
            machines
                .iter()
                .for_each(|m| m.vm.space.set_whole_price(price));
            for &(m, n) in &writes {
                machines[m].write(n, 1000 * (m as u64 + 1) + n);
            }
            for (m, machine) in machines.iter().enumerate() {
                machine.check();
                let why = format!("{who}, {m}, price {price}: {:?}", machine.vm.space.stats());
                if writes.iter().any(|&(who, _)| who == m) {
                    assert!(machine.are_all_huge(), "{why}");
                    assert!(machine.copied() <= PAGES, "{why}");
                }
            }
            let alone = writes.len() as u64 == PAGES;
            let fewest = |m: &Machine| m.mappings() == 1 || !alone;
            assert!(machines.iter().all(fewest), "{who}, price {price}");
            let copied: u64 = machines.iter().map(Machine::copied).sum();
            assert!(alone || copied >= PAGES);
            drop(machines);
            host.settle();
        }
    }
}

/// Pages that were taken over one by one, because the other had left them, come home with the rest.
#[test]
fn stragglers_come_home_with_the_rest() {
    const BIG: u64 = 16;
    let host = host_with(BIG, 8 * BIG);
    let mut parent = host.machine(BIG);
    let mut clone = host.clone(&parent);
    // 0: the clone leaves, 1: the parent does, and the clone has it to itself; then all the rest.
    clone.write(0, 1);
    parent.write(1, 2);
    clone.write(1, 3);
    assert_eq!(clone.vm.space.stats().reused, 1);
    clone.vm.space.set_whole_price(0);
    clone.write(2, 4);
    assert!(clone.are_all_huge());
    assert_eq!(clone.copied(), BIG - 1, "and the straggler was moved");
    assert_eq!(clone.entry(0).pfn().0 % BIG, 0);
    // A device that holds one keeps it where it is.
    let mut other = host.clone(&parent);
    other.write(0, 5);
    parent.write(3, 6);
    other.write(3, 7);
    let pin = other.vm.space.pin(Gfn(3), Access::Write).unwrap();
    other.vm.space.set_whole_price(0);
    other.write(4, 8);
    assert_eq!(pin.pfn(), other.entry(3).pfn());
    assert!(!other.entry(0).is_huge());
    [&parent, &clone, &other]
        .into_iter()
        .for_each(Machine::check);
    drop((pin, parent, clone, other));
    host.settle();
}

/// What a machine could have where it is, because all others have left, comes home with the pages that are
/// there already: each is copied once, and all are one folio.
#[test]
fn what_others_have_left_comes_home_with_the_rest() {
    const BIG: u64 = 16;
    let host = host_with(BIG, 8 * BIG);
    let mut parent = host.machine(BIG);
    let mut clone = host.clone(&parent);
    clone.write(0, 1);
    parent.vm.space.set_whole_price(0);
    parent.write(1, 2);
    clone.vm.space.set_whole_price(0);
    clone.mmu.never();
    clone.write(2, 3);
    assert!(clone.are_all_huge() && parent.are_all_huge());
    // The page that faults is taken over in place, the rest copied in two runs; that page is fetched, which
    // takes two calls; and all is mapped as one.
    assert_eq!((clone.copied(), clone.mmu.calls()), (BIG - 1, 6));
    [&parent, &clone].into_iter().for_each(Machine::check);
    drop((parent, clone));
    host.settle();
}

/// What only readers and snapshots share does not make a region move, nor do a few pages that others share.
#[test]
fn a_region_stays_for_a_reader_and_for_a_page_that_is_merged() {
    let host = host();
    let mut vm = host.machine(PAGES);
    let home = vm.entry(0).pfn();
    let frozen = vm.vm.space.fork().unwrap();
    let held = frozen.get(Gfn(1)).unwrap();
    vm.write(1, 1);
    assert_eq!(vm.vm.space.stats().writer_moved, 1);
    drop((held, frozen));
    let back = vm.vm.space.migrate(Gfn(1)).unwrap();
    assert_eq!(back.0, home.0 + 1, "home is where it was");
    vm.vm.space.set_whole_price(0);
    let frozen = vm.vm.space.fork().unwrap();
    let held = frozen.get(Gfn(9)).unwrap();
    vm.write(9, 1);
    assert!(!vm.entry(9).is_huge(), "page by page, beside a reader");
    drop((held, frozen));
    // Pages of equal content, one of which leaves.
    vm.vm.space.set_whole_price(1000);
    vm.write(4, 7);
    vm.write(8, 7);
    vm.vm.space.merge(Gfn(4), &vm.vm.space, Gfn(8)).unwrap();
    vm.write(4, 8);
    let elsewhere = vm.vm.space.fork().unwrap();
    vm.write(5, 9);
    assert_eq!(
        vm.entry(5).pfn().0,
        home.0 + 5,
        "the others are at home still"
    );
    vm.check();
    drop((elsewhere, vm));
    host.settle();
}

/// T4: who is the last to have a folio takes it over, without a copy and in one piece, in whatever order the
/// others have left it and however.
#[test]
fn the_last_machine_takes_over_without_a_copy() {
    #[derive(Clone, Copy, Debug)]
    enum Leaving {
        Whole,
        Pages,
        Dropped,
    }
    const ORDERS: [[usize; 3]; 6] = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    let ways = [Leaving::Whole, Leaving::Pages, Leaving::Dropped];
    for order in ORDERS {
        for ways in ways.iter().flat_map(|&a| ways.map(|b| [a, b])) {
            let host = host();
            let parent = host.machine(PAGES);
            let clone = host.clone(&parent);
            let clones_clone = host.clone(&clone);
            let frame = parent.entry(0).pfn();
            let mut machines = [parent, clone, clones_clone].map(Some);
            for (&who, way) in order.iter().zip(ways) {
                let machine = machines[who].as_mut().unwrap();
                match way {
                    Leaving::Dropped => machines[who] = None,
                    Leaving::Whole => {
                        machine.vm.space.set_whole_price(0);
                        (0..PAGES).for_each(|n| machine.write(n, who as u64));
                    }
                    Leaving::Pages => (0..PAGES).for_each(|n| machine.write(n, who as u64)),
                }
            }
            let last = machines[order[2]].as_mut().unwrap();
            (0..PAGES).for_each(|n| last.write(n, 9));
            let why = format!("{order:?} {ways:?}");
            assert_eq!((last.copied(), last.entry(0).pfn()), (0, frame), "{why}");
            assert!(last.are_all_huge() && last.mappings() == 1, "{why}");
            machines.iter().flatten().for_each(Machine::check);
            drop(machines);
            host.settle();
        }
    }
}

/// A chain of clones, each with a snapshot, all of which have written: dropped in any order, the middle first,
/// all that is left is as it was, and in the end nothing is left.
#[test]
fn a_chain_of_clones_goes_in_any_order() {
    enum Link {
        Live(Box<Machine>),
        Frozen(Arc<Frozen>, Vec<u64>),
    }
    fn each_order(items: &mut Vec<usize>, from: usize, see: &mut impl FnMut(&[usize])) {
        if from == items.len() {
            return see(items);
        }
        for n in from..items.len() {
            items.swap(from, n);
            each_order(items, from + 1, see);
            items.swap(from, n);
        }
    }
    each_order(&mut (0..6).collect(), 0, &mut |order| {
        let host = host();
        let mut links: Vec<Option<Link>> = Vec::new();
        let mut machine = host.machine(PAGES);
        for generation in 0..3u64 {
            machine.vm.space.set_whole_price(generation as u32);
            machine.write(generation, 1);
            machine.write(REGION + 1, generation);
            let frozen = machine.vm.space.fork().unwrap();
            let pages = machine.pages.clone();
            let next = host.clone_of(&frozen, &pages);
            (0..REGION + 2).for_each(|n| machine.write(n, 10 * generation + n));
            links.push(Some(Link::Frozen(frozen, pages)));
            links.push(Some(Link::Live(Box::new(machine))));
            machine = next;
        }
        for &n in order {
            links[n] = None;
            machine.check();
            for link in links.iter().flatten() {
                match link {
                    Link::Live(machine) => machine.check(),
                    Link::Frozen(frozen, pages) => {
                        for (gfn, &value) in (0..).map(Gfn).zip(pages) {
                            assert_eq!(machine.vm.read_frozen(frozen, gfn), value);
                        }
                    }
                }
            }
        }
        (0..PAGES).for_each(|n| machine.write(n, n));
        machine.check();
        drop(machine);
        host.settle();
    });
}

/// No memory for a folio in a new home: page by page, as far as there is any, and no page is lost.
#[test]
fn a_move_for_which_there_is_no_memory_is_of_pages() {
    for spare in 0..REGION {
        let memory = SoftMemory::new(FRAMES);
        let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
        let limit = REGION + spare;
        let pool = FramePool::with_folios_of(Order::new(2), bytes, FRAMES, limit).unwrap();
        let host = Host { pool, memory };
        let mut parent = host.machine(REGION);
        let clone = host.clone(&parent);
        parent.vm.space.set_whole_price(0);
        for n in 0..REGION {
            let done = parent.vm.cpu_write(Gfn(n), n).is_ok();
            assert_eq!(done, n < spare, "{spare} to spare, page {n}");
            parent.pages[n as usize] = if done { n } else { 100 + n };
        }
        [&parent, &clone].into_iter().for_each(Machine::check);
        assert_eq!(host.pool.usage().in_use, REGION + spare);
        drop((parent, clone));
        host.settle();
    }
}
