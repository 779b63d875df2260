//! Huge folios, with four pages each: PROTOCOL.md groups D and F, and what is ours: holds by page, snapshots
//! that have regions in common, breaks of whole regions.

use super::super::soft::soft_pool_of;
use super::*;

pub(super) const REGION: u64 = 4;
/// The first page of the second region.
pub(super) const NEXT: Gfn = Gfn(REGION);

pub(super) struct Huge {
    pub(super) pool: Arc<FramePool>,
    pub(super) memory: Arc<SoftMemory>,
    pub(super) vm: SoftVm<AnyPolicy>,
}

pub(super) fn huge() -> Huge {
    huge_with(2 * REGION, 64)
}

pub(super) fn huge_with(pages: u64, frames: u64) -> Huge {
    let (pool, memory) = soft_pool_of(Order::new(2), frames).unwrap();
    let vm = SoftVm::new(&pool, &memory, right(), pages).unwrap();
    vm.space.leave_to_fork(0);
    Huge { pool, memory, vm }
}

impl Huge {
    /// With every page written: page `n` holds `100 + n`.
    pub(super) fn written(self) -> Self {
        for n in 0..self.vm.space.pages() {
            self.vm.cpu_write(Gfn(n), 100 + n).unwrap();
        }
        self
    }
    pub(super) fn entry(&self, gfn: Gfn) -> Entry {
        self.vm.space.entry(gfn).unwrap()
    }
    pub(super) fn state(&self, gfn: Gfn) -> FrameState {
        self.pool.state(self.entry(gfn).pfn())
    }
    pub(super) fn is_huge(&self, gfn: Gfn) -> bool {
        self.entry(gfn).is_huge()
    }
    pub(super) fn stats(&self) -> MmStats {
        self.vm.space.stats()
    }
    pub(super) fn read(&self, frozen: &Frozen, gfn: Gfn) -> u64 {
        self.vm.read_frozen(frozen, gfn)
    }
    /// That a snapshot holds what [`Huge::written`] wrote.
    pub(super) fn assert_as_written(&self, frozen: &Frozen) {
        for n in 0..frozen.pages() {
            assert_eq!(self.read(frozen, Gfn(n)), 100 + n, "page {n}");
        }
    }
    pub(super) fn settle(self) {
        let Self { pool, vm, .. } = self;
        drop(vm);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
        assert_eq!(pool.charges(), Charges::default());
    }
}

#[test]
fn the_first_touch_of_a_region_gets_all_of_it_a_folio() {
    let w = huge();
    w.vm.cpu_write(Gfn(2), 7).unwrap();
    for n in 0..REGION {
        let entry = w.entry(Gfn(n));
        assert!(entry.is_huge() && entry.is_writable(), "{entry:?}");
        assert_eq!(entry.pfn().0, w.entry(P).pfn().0 + n);
        assert_eq!((w.state(Gfn(n)).maps(), w.state(Gfn(n)).refs()), (1, 1));
        assert!(w.state(Gfn(n)).is_exclusive());
    }
    assert_eq!(w.entry(P).pfn().0 % REGION, 0, "aligned");
    assert!(!w.entry(NEXT).is_present());
    assert_eq!((w.vm.cpu_read(P), w.vm.cpu_read(Gfn(2))), (0, 7));
    assert_eq!((w.pool.usage().in_use, w.stats().zero_filled), (REGION, 1));
    w.settle();
}

#[test]
fn frames_that_were_used_are_zeros_again_in_a_new_folio() {
    let w = huge().written();
    w.vm.space.discard(P, REGION).unwrap();
    // The home is free and its memory, as far as this memory goes, is as it was left.
    let home = w.entry(NEXT).pfn().0 - REGION;
    (home..home + REGION).for_each(|n| w.memory.store(Pfn(n), 9));
    w.vm.cpu_write(Gfn(1), 5).unwrap();
    assert_eq!(
        (w.vm.cpu_read(Gfn(1)), w.entry(Gfn(1)).pfn().0),
        (5, home + 1)
    );
    w.settle();
}

#[test]
fn the_folio_of_a_space_that_is_gone_is_zeros_again() {
    // There is room for one home, beside the folio that the zero frame is in.
    let Huge { pool, memory, vm } = huge_with(2 * REGION, 3 * REGION).written();
    let first = vm.space.entry(P).unwrap().pfn();
    drop(vm);
    let w = Huge {
        vm: SoftVm::new(&pool, &memory, right(), 2 * REGION).unwrap(),
        pool,
        memory,
    };
    w.vm.cpu_write(Gfn(1), 5).unwrap();
    assert!(w.is_huge(P));
    assert_eq!(w.entry(P).pfn(), first);
    assert_eq!([0, 1, 2, 3].map(|n| w.vm.cpu_read(Gfn(n))), [0, 5, 0, 0]);
    w.settle();
}

#[test]
fn a_region_that_is_too_short_or_has_too_little_memory_is_in_base_pages() {
    let w = huge_with(REGION + 1, 64);
    w.vm.cpu_write(NEXT, 5).unwrap();
    assert!(!w.is_huge(NEXT));
    w.vm.cpu_write(P, 5).unwrap();
    assert!(w.is_huge(P));

    let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
    drop(pool);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 3).unwrap();
    let vm = SoftVm::new(&pool, &memory, right(), REGION).unwrap();
    vm.cpu_write(P, 5).unwrap();
    assert!(!vm.space.entry(P).unwrap().is_huge());
    assert_eq!((vm.cpu_read(P), pool.usage().in_use), (5, 1));

    let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
    let vm = SoftVm::new(&pool, &memory, right(), REGION).unwrap();
    let vm = vm.with_base_pages();
    vm.cpu_write(P, 5).unwrap();
    assert!(!vm.space.entry(P).unwrap().is_huge());
}

#[test]
fn fork_shares_a_region_as_one_and_a_write_breaks_one_page() {
    let w = huge().written();
    let frames: Vec<_> = (0..REGION).map(|n| w.entry(Gfn(n)).pfn()).collect();
    let frozen = w.vm.space.fork().unwrap();
    assert!(w.is_huge(P) && !w.entry(P).is_writable());
    assert!(frozen.entry(P).unwrap().is_huge());
    assert_eq!((w.state(P).maps(), w.state(P).is_exclusive()), (2, false));

    w.vm.cpu_write(Gfn(1), 7).unwrap();
    assert_eq!((w.stats().sharers_moved, w.stats().split), (1, 1));
    w.assert_as_written(&frozen);
    for n in 0..REGION {
        let (entry, is_written) = (w.entry(Gfn(n)), n == 1);
        assert_eq!(
            entry.pfn(),
            frames[n as usize],
            "the guest keeps its frames"
        );
        assert_eq!((entry.is_huge(), entry.is_writable()), (false, is_written));
        assert_eq!(w.state(Gfn(n)).is_exclusive(), is_written);
        assert_eq!(w.state(Gfn(n)).maps(), if is_written { 1 } else { 2 });
    }
    assert!(w.is_huge(NEXT), "its neighbour is as it was");
    drop(frozen);
    w.settle();
}

#[test]
fn a_region_that_cost_enough_small_breaks_is_broken_whole_and_huge_again() {
    let w = huge().written();
    w.vm.space.set_whole_price(2);
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 1).unwrap();
    assert!(!w.is_huge(P) && w.stats().whole == 0);
    w.vm.cpu_write(Gfn(1), 2).unwrap();
    assert!(w.is_huge(P) && w.entry(P).is_writable());
    let stats = w.stats();
    assert_eq!((stats.whole, stats.formed, stats.neighbours), (1, 1, 2));
    assert!((0..REGION).all(|n| w.state(Gfn(n)).is_exclusive() && w.state(Gfn(n)).refs() == 1));
    w.assert_as_written(&frozen);
    drop(frozen);
    w.settle();
}

/// A guest that swept all of its memory, and then writes a page of each region in the same order: what was
/// trusted was not learnt, and what was learnt is put to the proof, one region at a time.
#[test]
fn a_sweep_that_has_become_a_stride_is_broken_by_the_page_soon() {
    const REGIONS: u64 = 32;
    let w = huge_with(REGIONS * REGION, 4 * REGIONS * REGION).written();
    w.vm.space.set_whole_price(2);
    let write = |pages: u64| {
        let before = w.stats().whole;
        let frozen = w.vm.space.fork().unwrap();
        for region in 0..REGIONS {
            for page in 0..pages {
                w.vm.cpu_write(Gfn(region * REGION + page), page).unwrap();
            }
        }
        drop(frozen);
        w.stats().whole - before
    };
    for _ in 0..9 {
        assert_eq!(write(REGION), REGIONS);
    }
    let whole: Vec<u64> = (0..12).map(|_| write(1)).collect();
    assert!(whole.is_sorted_by(|a, b| a >= b), "{whole:?}");
    assert_eq!(whole[9..], [0; 3], "{whole:?}");
    w.settle();
}

/// After the first fork nothing is known of any region: a sweep pays for page by page in a few regions, and
/// the more of them there are, the fewer. A stride, with a region between each two, is not taken for one.
#[test]
fn the_first_sweep_after_a_fork_breaks_most_regions_whole_at_once() {
    const REGIONS: u64 = 32;
    let sweep = |stride: u64, price: u32| {
        let w = huge_with(REGIONS * REGION, 4 * REGIONS * REGION).written();
        w.vm.space.set_whole_price(price);
        let frozen = w.vm.space.fork().unwrap();
        for region in (0..REGIONS).step_by(stride as usize) {
            for page in 0..REGION {
                w.vm.cpu_write(Gfn(region * REGION + page), page).unwrap();
            }
        }
        w.assert_as_written(&frozen);
        let stats = w.stats();
        drop(frozen);
        w.settle();
        (stats.sharers_moved, stats.whole)
    };
    // Two faults where a region proves itself, and one where it is trusted.
    let proofs = [0, 2, 6, 14, 30].len() as u64;
    assert_eq!(sweep(1, 2), (REGIONS + proofs, REGIONS));
    assert_eq!(sweep(2, 2), (REGIONS, REGIONS / 2));
    assert_eq!(sweep(1, 1000), (REGIONS * REGION, 0), "nothing is proved");
}

/// The copy is a folio, too: the snapshot keeps its shape, and costs one mapping to share and to drop.
#[test]
fn a_snapshot_whose_region_is_broken_whole_has_a_folio_of_its_own() {
    let w = huge().written();
    w.vm.space.set_whole_price(0);
    let frozen = w.vm.space.fork().unwrap();
    let (ours, theirs) = (w.entry(P).pfn(), frozen.entry(P).unwrap());
    assert_eq!(theirs.pfn(), ours);
    w.vm.cpu_write(Gfn(1), 1).unwrap();
    assert!(w.is_huge(P) && w.entry(P).is_writable() && w.entry(P).pfn() == ours);
    let theirs = frozen.entry(P).unwrap();
    assert!(theirs.is_huge() && theirs.pfn() != ours);
    let stats = w.stats();
    assert_eq!((stats.copied, stats.neighbours, stats.split), (4, 4, 0));
    assert_eq!(stats.sharers_moved, 1);
    w.assert_as_written(&frozen);
    let in_use = w.pool.usage().in_use;
    drop(frozen);
    assert_eq!(w.pool.usage().in_use, in_use - REGION);
    w.settle();
}

/// Somebody reads a page of the folio: that page's writer moves, and all others' snapshots do.
#[test]
fn a_folio_with_a_reader_is_not_copied_in_one_piece() {
    let w = huge().written();
    w.vm.space.set_whole_price(0);
    let frozen = w.vm.space.fork().unwrap();
    let held = frozen.get(Gfn(1)).unwrap();
    w.vm.cpu_write(P, 1).unwrap();
    assert_eq!(w.vm.read_held(&held), 101);
    assert_ne!(w.entry(Gfn(1)).pfn(), held.pfn());
    w.vm.cpu_write(Gfn(1), 2).unwrap();
    assert_eq!(w.vm.read_held(&held), 101);
    w.assert_as_written(&frozen);
    drop((held, frozen));
    w.settle();
}

/// What was broken whole the last time is broken whole at its first fault; once in a while it is put to the
/// proof.
#[test]
fn a_region_that_is_always_broken_whole_stays_huge() {
    let w = huge().written();
    w.vm.space.set_whole_price(2);
    let mut splits = vec![];
    for round in 0..20 {
        let frozen = w.vm.space.fork().unwrap();
        let before = w.stats().split;
        for n in 0..REGION {
            w.vm.cpu_write(Gfn(n), 1000 * round + n).unwrap();
        }
        splits.push(w.stats().split - before);
        assert!(w.is_huge(P) && w.entry(P).is_writable());
        let last = 1000 * round.saturating_sub(1);
        let expected = if round == 0 { 100 } else { last };
        assert!((0..REGION).all(|n| w.read(&frozen, Gfn(n)) == expected + n));
    }
    assert_eq!(splits[..9], [1, 0, 0, 0, 0, 0, 0, 1, 0]);
    // One write a fork, from the next proof on, is a small break again.
    for round in 0..10 {
        let frozen = w.vm.space.fork().unwrap();
        w.vm.cpu_write(P, round).unwrap();
        drop(frozen);
    }
    let before = w.stats();
    let _frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 5).unwrap();
    assert_eq!(w.stats().whole, before.whole);
    drop(_frozen);
    w.settle();
}

/// Nothing is learnt from what was written while nobody shared it.
#[test]
fn a_snapshot_that_is_gone_at_once_unteaches_nothing() {
    let w = huge().written();
    w.vm.space.set_whole_price(2);
    for round in 0..3 {
        let frozen = w.vm.space.fork().unwrap();
        let before = w.stats().split;
        w.vm.cpu_write(P, round).unwrap();
        w.vm.cpu_write(Gfn(1), round).unwrap();
        assert_eq!(w.stats().split - before, u64::from(round == 0));
        drop(frozen);
        drop(w.vm.space.fork().unwrap());
        w.vm.cpu_write(P, round).unwrap();
    }
    w.settle();
}

#[test]
fn a_region_nobody_shares_any_more_is_written_without_a_copy() {
    let w = huge().written();
    drop(w.vm.space.fork().unwrap());
    assert_eq!(w.vm.space.write_fault(Gfn(1)).unwrap(), Resolution::Reused);
    assert!(w.is_huge(Gfn(1)) && w.entry(P).is_writable());
    assert_eq!((w.stats().sharers_moved, w.stats().split), (0, 0));
    w.settle();
}

/// F4: a device holds a page of a folio that is split and protected, and the guest writes it. Says whether
/// they still have the same page.
fn stays_together(policy: AnyPolicy) -> bool {
    let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
    let vm = SoftVm::new(&pool, &memory, policy, REGION).unwrap();
    vm.cpu_write(P, 1).unwrap();
    let pin = vm.space.pin(Gfn(2), Access::Write).unwrap();
    vm.space.take_dirty().unwrap();
    let is_exclusive = |n| {
        let entry = vm.space.entry(Gfn(n)).unwrap();
        assert!(!entry.is_huge() && !entry.is_writable());
        pool.state(entry.pfn()).is_exclusive()
    };
    assert!(is_exclusive(1), "nobody holds it");
    let kept = is_exclusive(2);
    vm.cpu_write(Gfn(2), 7).unwrap();
    let together = vm.dma_read(&pin) == 7;
    assert_eq!(vm.space.stats().writer_moved, u64::from(!together));
    assert_eq!(kept, together);
    together
}

#[test]
fn a_split_that_counts_references_anew_loses_a_pin() {
    assert!(stays_together(right()) && stays_together(Box::new(Seed)));
    assert!(!stays_together(Box::new(SeedRecompute)));
}

/// D7, and better than the kernel: of a folio of which one page is pinned, that page is copied, and the rest
/// shared.
#[test]
fn fork_copies_the_pinned_pages_of_a_folio_and_no_others() {
    let w = huge().written();
    let pin = w.vm.space.pin(Gfn(2), Access::Write).unwrap();
    assert!(w.is_huge(Gfn(2)), "a pin splits nothing");
    assert_eq!((w.state(Gfn(2)).pins(), w.state(Gfn(1)).pins()), (1, 0));
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!(w.stats().eager_copied, 1);
    for n in 0..REGION {
        let shares = frozen.frame(Gfn(n)).unwrap() == w.entry(Gfn(n)).pfn();
        assert_eq!(shares, n != 2, "page {n}");
    }
    assert!(
        w.entry(Gfn(2)).is_writable(),
        "the pinned page's entry is not touched"
    );
    w.vm.dma_write(&pin, 7);
    assert_eq!(w.vm.cpu_read(Gfn(2)), 7);
    w.vm.cpu_write(Gfn(2), 8).unwrap();
    assert_eq!(w.vm.dma_read(&pin), 8);
    w.assert_as_written(&frozen);

    // What stayed writable changed without a fault: the next snapshot must have it.
    let next = w.vm.space.fork().unwrap();
    assert_eq!((w.read(&next, Gfn(2)), w.read(&next, P)), (8, 100));
    drop((pin, frozen, next));
    w.settle();
}

/// Pins survive both ways, since no frame moves: where the kernel's collapse, which moves all, must refuse
/// (F10).
#[test]
fn pins_survive_splits_and_the_making_of_huge_entries() {
    let w = huge().written();
    w.vm.space.set_whole_price(1);
    let pin = w.vm.space.pin(Gfn(2), Access::Write).unwrap();
    for round in 0..3 {
        let frozen = w.vm.space.fork().unwrap();
        assert!(!w.is_huge(P), "split for the pinned page");
        w.vm.cpu_write(P, round).unwrap();
        assert!(w.is_huge(P), "huge again");
        assert_eq!(
            (w.entry(Gfn(2)).pfn(), w.state(Gfn(2)).pins()),
            (pin.pfn(), 1)
        );
        w.vm.dma_write(&pin, round + 50);
        assert_eq!(w.vm.cpu_read(Gfn(2)), round + 50);
        drop(frozen);
    }
    assert_eq!(w.stats().eager_copied, 3);
    drop(pin);
    drop(w.vm.space.fork().unwrap());
    assert_eq!(w.stats().eager_copied, 3, "and shared as one after");
    assert!(w.is_huge(P));
    w.settle();
}

#[test]
fn a_reading_pin_unshares_one_page() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    let pin = w.vm.space.pin(Gfn(1), Access::Read).unwrap();
    assert!(!w.entry(Gfn(1)).is_writable(), "never writable (I11)");
    assert!(w.state(Gfn(1)).is_exclusive() && !w.state(P).is_exclusive());
    w.vm.cpu_write(Gfn(1), 7).unwrap();
    assert_eq!(w.vm.dma_read(&pin), 7);
    w.assert_as_written(&frozen);
    drop((pin, frozen));
    w.settle();
}

#[test]
fn a_reading_pin_of_untouched_memory_gets_a_read_only_folio() {
    let w = huge();
    let pin = w.vm.space.pin(Gfn(1), Access::Read).unwrap();
    assert!(w.is_huge(P) && !w.entry(P).is_writable() && w.state(P).is_exclusive());
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::Reused);
    w.vm.cpu_write(Gfn(1), 7).unwrap();
    assert_eq!((w.vm.dma_read(&pin), w.is_huge(P)), (7, true));
    drop(pin);
    w.settle();
}

#[test]
fn a_readers_hold_on_a_page_keeps_writers_off_that_page() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    let hold = frozen.get(Gfn(1)).unwrap();
    drop(frozen);
    // Nobody else maps the folio, but somebody holds a page of it.
    w.vm.cpu_write(Gfn(1), 7).unwrap();
    assert_eq!((w.vm.read_held(&hold), w.vm.cpu_read(Gfn(1))), (101, 7));
    assert_ne!(hold.pfn(), w.entry(Gfn(1)).pfn());
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::Reused);
    drop(hold);
    w.settle();
}

#[test]
fn a_break_of_a_whole_region_moves_the_writer_off_a_page_that_is_held() {
    let w = huge().written();
    w.vm.space.set_whole_price(1);
    let frozen = w.vm.space.fork().unwrap();
    let hold = frozen.get(Gfn(1)).unwrap();
    w.vm.cpu_write(P, 7).unwrap();
    assert!((0..REGION).all(|n| w.entry(Gfn(n)).is_writable()));
    assert!(!w.is_huge(P), "a page is elsewhere");
    w.vm.cpu_write(Gfn(1), 8).unwrap();
    assert_eq!(w.vm.read_held(&hold), 101);
    w.assert_as_written(&frozen);
    drop((hold, frozen));
    w.settle();
}

#[test]
fn snapshots_have_in_common_what_did_not_change_between_them() {
    let w = huge().written();
    let (a, b) = (w.vm.space.fork().unwrap(), w.vm.space.fork().unwrap());
    assert_eq!(a.region_address(P), b.region_address(P));
    w.vm.cpu_write(P, 7).unwrap();
    let c = w.vm.space.fork().unwrap();
    assert_ne!(b.region_address(P), c.region_address(P));
    assert_eq!(b.region_address(NEXT), c.region_address(NEXT));
    assert_eq!((w.read(&a, P), w.read(&b, P), w.read(&c, P)), (100, 100, 7));
    // One break moves what two snapshots have in common.
    w.vm.cpu_write(NEXT, 8).unwrap();
    for frozen in [&a, &b, &c] {
        assert_eq!(w.read(frozen, NEXT), 104);
    }
    assert_eq!(w.stats().sharers_moved, 2);
    // In whatever order they go.
    drop((b, a));
    assert_eq!((w.read(&c, P), w.read(&c, NEXT)), (7, 104));
    drop(c);
    w.settle();
}

/// What is kept for the next fork is nobody's, and must not cost a copy.
#[test]
fn snapshots_that_are_gone_cost_no_copy() {
    let w = huge().written();
    w.vm.space.set_whole_price(1);
    for _ in 0..3 {
        drop(w.vm.space.fork().unwrap());
    }
    let in_use = w.pool.usage().in_use;
    for n in 0..2 * REGION {
        w.vm.cpu_write(Gfn(n), n).unwrap();
    }
    let stats = w.stats();
    assert_eq!(
        (stats.sharers_moved, stats.writer_moved, stats.neighbours),
        (0, 0, 0)
    );
    assert_eq!(w.pool.usage().in_use, in_use);
    w.settle();
}

#[test]
fn a_clone_shares_folios_and_moves_to_its_own() {
    let w = huge().written();
    w.vm.space.set_whole_price(2);
    let frozen = w.vm.space.fork().unwrap();
    let clone = SoftVm::clone_of(&frozen, &w.memory, right()).unwrap();
    // Two that move the writer.
    clone.space.set_whole_price(3);
    let entry = |gfn| clone.space.entry(gfn).unwrap();
    assert!(entry(P).is_huge() && entry(P).pfn() == w.entry(P).pfn());
    assert_eq!(
        w.state(P).maps(),
        2,
        "the snapshot's stands for the clone's"
    );

    clone.cpu_write(P, 7).unwrap();
    assert_eq!(clone.space.stats().writer_moved, 1);
    assert!(
        !entry(P).is_huge() && w.is_huge(P),
        "each table has its own kind of entry"
    );
    assert_eq!(w.state(Gfn(1)).maps(), 3);
    clone.cpu_write(Gfn(2), 9).unwrap();
    assert!(
        entry(P).is_huge() && entry(P).is_writable(),
        "all of it is at home"
    );
    w.vm.cpu_write(Gfn(1), 8).unwrap();
    let read = |vm: &SoftVm<AnyPolicy>| [0, 1, 2, 3].map(|n| vm.cpu_read(Gfn(n)));
    assert_eq!(read(&clone), [7, 101, 9, 103]);
    assert_eq!(read(&w.vm), [100, 8, 102, 103]);
    w.assert_as_written(&frozen);

    // A clone's own snapshots.
    let second = clone.space.fork().unwrap();
    clone.cpu_write(NEXT, 1).unwrap();
    assert_eq!((w.read(&second, NEXT), w.read(&second, P)), (104, 7));
    drop((frozen, second, clone));
    w.settle();
}

/// [`Exclusive`], but what a reader holds is not shared.
struct NotWhatIsHeld;

impl CowPolicy for NotWhatIsHeld {
    fn name(&self) -> &'static str {
        "not what is held"
    }

    fn goes_by_the_bit(&self) -> bool {
        true
    }

    fn may_share(&self, frame: FrameState) -> bool {
        Exclusive.may_share(frame) && frame.gets() == 0
    }
    fn may_reuse(&self, frame: FrameState) -> bool {
        Exclusive.may_reuse(frame)
    }
    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        Exclusive.may_pin(frame, access)
    }
}

/// Its own snapshots take over what it shares with the one it was made of, and no region in which a page is
/// its own.
#[test]
fn a_clone_that_was_given_a_copy_of_a_page_forks_that_region_anew() {
    for is_huge in [true, false] {
        let w = huge().written();
        let mut frozen = w.vm.space.fork().unwrap();
        if !is_huge {
            // Small entries.
            w.vm.cpu_write(P, 100).unwrap();
            w.vm.cpu_write(NEXT, 104).unwrap();
            frozen = w.vm.space.fork().unwrap();
        }
        assert_eq!(frozen.entry(P).unwrap().is_huge(), is_huge);
        let held = frozen.get(Gfn(1)).unwrap();
        let clone = SoftVm::clone_of(&frozen, &w.memory, NotWhatIsHeld).unwrap();
        for n in 0..2 * REGION {
            let shares = clone.space.entry(Gfn(n)).unwrap().pfn() == frozen.frame(Gfn(n)).unwrap();
            assert_eq!((shares, clone.cpu_read(Gfn(n))), (n != 1, 100 + n));
        }
        assert_eq!(clone.space.kept(P), None);
        let kept = clone.space.kept(NEXT).unwrap();
        assert_eq!(kept, (frozen.holder(NEXT), frozen.frame(NEXT).unwrap()));
        drop(held);
        let second = clone.space.fork().unwrap();
        assert_ne!(second.region_address(P), frozen.region_address(P));
        assert_eq!(second.region_address(NEXT), frozen.region_address(NEXT));
        w.assert_as_written(&second);
        drop((second, clone, frozen));
        w.settle();
    }
}

#[test]
fn a_clones_region_that_is_broken_whole_moves_with_one_mapping() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    let clone = SoftVm::clone_of(&frozen, &w.memory, right()).unwrap();
    clone.space.set_whole_price(1);
    clone.cpu_write(P, 1).unwrap();
    drop(clone.space.fork().unwrap());
    clone.cpu_write(NEXT, 2).unwrap();
    assert!((0..2 * REGION).all(|n| clone.space.entry(Gfn(n)).unwrap().is_huge()));
    assert!((0..2 * REGION).all(|n| w.vm.cpu_read(Gfn(n)) == 100 + n));
    assert_eq!((clone.cpu_read(Gfn(1)), clone.cpu_read(Gfn(5))), (101, 105));
    drop((frozen, clone));
    w.settle();
}

/// Nobody but snapshots could be given the copy, so the writer moves: in one piece, if its home is free.
#[test]
fn a_clone_moves_to_its_home_with_one_call() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    let (inner, refusals) = (SoftMmu::new(2 * REGION), Arc::<Refusals>::default());
    let mmu = RefusingMmu {
        inner: Arc::clone(&inner),
        refusals: Arc::clone(&refusals),
    };
    let clone = AddressSpace::from_frozen(&frozen, right(), Box::new(mmu)).unwrap();
    let clone = SoftVm::over(clone, inner, &w.memory);
    clone.space.set_whole_price(0);
    refusals.never();
    let fault = clone.space.resolve_write(Gfn(1)).unwrap();
    assert_eq!(
        (fault.resolution, fault.is_whole, refusals.calls()),
        (Resolution::WriterMoved, true, 1)
    );
    let entry = clone.space.entry(P).unwrap();
    assert!(entry.is_huge() && entry.is_writable(), "{entry:?}");
    assert_ne!(entry.pfn(), w.entry(P).pfn());
    clone.cpu_write(Gfn(1), 1).unwrap();
    let reads = |n| (clone.cpu_read(Gfn(n)), w.vm.cpu_read(Gfn(n)));
    assert_eq!([0, 1, 2].map(reads), [(100, 100), (1, 101), (102, 102)]);
    let stats = clone.space.stats();
    assert_eq!((stats.whole, stats.copied), (1, REGION));
    w.assert_as_written(&frozen);
    drop((frozen, clone));
    w.settle();
}

/// Without a folio to copy to, the snapshots are given single frames, and the guest's folio stays together
/// all the same.
#[test]
fn snapshots_are_given_single_frames_if_there_is_no_folio_for_them() {
    // The zero frame and three more, the home, and one too few for another.
    let w = huge_with(REGION, 3 * REGION - 1).written();
    w.vm.space.set_whole_price(0);
    let head = w.entry(P);
    let frozen = w.vm.space.fork().unwrap();
    let fault = w.vm.space.resolve_write(Gfn(1)).unwrap();
    assert_eq!(
        (fault.resolution, fault.is_whole),
        (Resolution::SharersMoved, true)
    );
    assert_eq!(w.entry(P), head);
    let stats = w.stats();
    assert_eq!((stats.split, stats.formed, stats.copied), (0, 0, REGION));
    w.vm.cpu_write(Gfn(1), 1).unwrap();
    w.assert_as_written(&frozen);
    assert!(!frozen.entry(P).unwrap().is_huge());
    drop(frozen);
    w.settle();
}

/// A snapshot is not moved where that frees nobody: a running clone has the folio, too.
#[test]
fn a_snapshot_stays_in_a_folio_that_others_run_on() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    let clone = SoftVm::clone_of(&frozen, &w.memory, right()).unwrap();
    w.vm.space.set_whole_price(0);
    w.vm.cpu_write(P, 1).unwrap();
    for n in (0..REGION).map(Gfn) {
        assert_eq!(
            frozen.frame(n).unwrap(),
            clone.space.entry(n).unwrap().pfn()
        );
        assert_ne!(frozen.frame(n).unwrap(), w.entry(n).pfn());
    }
    assert_eq!(w.stats().copied, REGION, "the writer's");
    w.assert_as_written(&frozen);
    drop((frozen, clone));
    w.settle();
}

/// T7: the last holder of a folio has all of it back, and to unshare it is not to write it (I11).
#[test]
fn a_folio_that_is_unshared_stays_read_only() {
    let w = huge().written();
    drop(w.vm.space.fork().unwrap());
    let pin = w.vm.space.pin(Gfn(1), Access::Read).unwrap();
    let entry = w.entry(P);
    assert!(entry.is_huge() && !entry.is_writable(), "{entry:?}");
    assert_eq!(w.vm.mmu.page(P), (entry.pfn(), Protection::ReadOnly));
    assert!(w.state(P).is_exclusive());
    drop(pin);
    // Nothing was broken: neither by that nor by a write that finds it its own.
    w.vm.cpu_write(NEXT, 1).unwrap();
    assert!(w.is_huge(NEXT));
    assert_eq!((w.stats().whole, w.stats().copied), (0, 0));
    w.settle();
}

/// F5: what takes a page out of its frame splits the region, and is refused for the pages that are held.
#[test]
fn operations_on_a_page_split_its_region() {
    let w = huge().written();
    let pin = w.vm.space.pin(Gfn(1), Access::Write).unwrap();
    assert!(matches!(
        w.vm.space.migrate(Gfn(1)),
        Err(RearrangeError::Busy { .. })
    ));
    assert!(matches!(
        w.vm.space.discard(P, REGION),
        Err(RearrangeError::Busy { gfn: Gfn(1), .. })
    ));
    let moved = w.vm.space.migrate(Gfn(2)).unwrap();
    assert_eq!((w.entry(Gfn(2)).pfn(), w.vm.cpu_read(Gfn(2))), (moved, 102));
    w.vm.cpu_write(P, 103).unwrap();
    w.vm.space.merge(P, &w.vm.space, Gfn(3)).unwrap();
    assert_eq!(w.entry(P).pfn(), w.entry(Gfn(3)).pfn());
    w.vm.space
        .force_write(NEXT, 0, &7u64.to_le_bytes())
        .unwrap();
    assert_eq!(
        (w.vm.cpu_read(NEXT), w.is_huge(NEXT)),
        (7, true),
        "it was writable"
    );
    assert_eq!(w.vm.space.discard(NEXT, REGION).unwrap(), REGION);
    assert!((0..REGION).all(|n| w.vm.cpu_read(Gfn(NEXT.0 + n)) == 0));
    assert_eq!(
        (w.vm.cpu_read(Gfn(1)), w.entry(Gfn(1)).pfn()),
        (101, pin.pfn())
    );
    drop(pin);
    w.settle();
}

#[test]
fn answers_of_dirty_tracking_are_by_page_from_the_first_on() {
    let w = huge().written();
    let pages = |set: PageSet| set.iter().map(|gfn| gfn.0).collect::<Vec<_>>();
    let all: Vec<_> = (0..2 * REGION).collect();
    assert_eq!(pages(w.vm.space.take_dirty().unwrap()), all);
    assert_eq!(pages(w.vm.space.take_dirty().unwrap()), [0; 0]);
    w.vm.cpu_write(Gfn(2), 5).unwrap();
    let pin = w.vm.space.pin(Gfn(5), Access::Write).unwrap();
    assert_eq!(pages(w.vm.space.take_dirty().unwrap()), [2, 5]);
    assert_eq!(pages(w.vm.space.take_dirty().unwrap()), [5], "held still");
    drop(pin);
    w.settle();
}

/// What a clone was given is clean, and huge still when somebody asks. From then on a write is told by page.
#[test]
fn a_write_to_a_clean_folio_is_of_one_page_while_somebody_asks() {
    let Huge { pool, memory, vm } = huge().written();
    let frozen = vm.space.fork().unwrap();
    let clone = SoftVm::clone_of(&frozen, &memory, right()).unwrap();
    drop((vm, frozen));
    assert!(clone.space.take_dirty().unwrap().is_empty());
    // The clone is the last holder of all: a write could have all of it at no cost.
    clone.cpu_write(Gfn(1), 1).unwrap();
    let dirty = clone.space.take_dirty().unwrap();
    assert_eq!(dirty.iter().collect::<Vec<_>>(), [Gfn(1)]);
    // To unshare is not to write: nothing is told apart by it.
    drop(clone.space.pin(NEXT, Access::Read).unwrap());
    assert!(clone.space.entry(NEXT).unwrap().is_huge());
    assert!(clone.space.take_dirty().unwrap().is_empty());
    drop(clone);
    assert_eq!(pool.usage().in_use, 0);
}

#[test]
fn a_restore_puts_a_region_back_in_place_and_passes_over_what_did_not_change() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    let younger = w.vm.space.fork().unwrap();
    let frames: Vec<_> = (0..REGION).map(|n| w.entry(Gfn(n)).pfn()).collect();
    w.vm.space.set_whole_price(1);
    for n in 0..REGION {
        w.vm.cpu_write(Gfn(n), n).unwrap();
    }
    let last = w.vm.space.fork().unwrap();
    w.vm.space.restore(&frozen).unwrap();
    for n in 0..2 * REGION {
        assert_eq!(w.vm.cpu_read(Gfn(n)), 100 + n);
    }
    assert!((0..REGION).all(|n| w.entry(Gfn(n)).pfn() == frames[n as usize]));
    assert!(w.is_huge(P) && w.is_huge(NEXT));
    assert!(!w.state(NEXT).is_exclusive(), "not looked at");
    assert!((0..REGION).all(|n| w.read(&last, Gfn(n)) == n));
    w.assert_as_written(&younger);
    drop((frozen, younger, last));
    w.settle();
}

#[test]
fn a_restore_to_before_a_region_was_touched_makes_it_zeros() {
    let w = huge();
    w.vm.cpu_write(P, 5).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(NEXT, 6).unwrap();
    w.vm.space.restore(&frozen).unwrap();
    assert_eq!((w.vm.cpu_read(P), w.vm.cpu_read(NEXT)), (5, 0));
    drop(frozen);
    w.settle();
}

/// An orphan goes with its last holder, and the rest of its folio does not wait for it.
#[test]
fn a_pinned_page_outlives_its_folio() {
    let w = huge().written();
    let pin = w.vm.space.pin(Gfn(1), Access::Write).unwrap();
    let Huge { pool, vm, memory } = w;
    drop(vm);
    assert_eq!((pool.usage().in_use, pool.state(pin.pfn()).pins()), (1, 1));
    assert_eq!(memory.load(pin.pfn()), 101);
    drop(pin);
    assert_eq!(pool.leftovers(9), []);
    assert_eq!(pool.usage().in_use, 0);
}

/// D13 of a folio: nothing is lost, whichever page there is no memory for.
#[test]
fn a_fork_without_memory_for_a_pinned_page_changes_nothing() {
    let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
    drop(pool);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 2 * REGION + 1).unwrap();
    let vm = SoftVm::new(&pool, &memory, right(), 2 * REGION).unwrap();
    let w = Huge { pool, memory, vm }.written();
    let pins = [1, 5].map(|n| w.vm.space.pin(Gfn(n), Access::Write).unwrap());
    let error = w.vm.space.fork().unwrap_err();
    assert!(
        matches!(error, ForkError::EagerCopy { gfn: Gfn(5), .. }),
        "{error}"
    );
    assert_eq!(w.pool.usage().in_use, 2 * REGION);
    for n in 0..2 * REGION {
        assert_eq!(
            (w.state(Gfn(n)).maps(), w.vm.cpu_read(Gfn(n))),
            (1, 100 + n)
        );
        w.vm.cpu_write(Gfn(n), n).unwrap();
    }
    assert_eq!(w.vm.dma_read(&pins[0]), 1);
    drop(pins);
    let frozen = w.vm.space.fork().unwrap();
    assert!((0..2 * REGION).all(|n| w.read(&frozen, Gfn(n)) == n));
    drop(frozen);
    w.settle();
}

#[test]
fn a_break_of_a_whole_region_that_runs_out_of_memory_leaves_the_rest() {
    let (pool, memory) = soft_pool_of(Order::new(2), 64).unwrap();
    drop(pool);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, REGION + 2).unwrap();
    let vm = SoftVm::new(&pool, &memory, right(), REGION).unwrap();
    let w = Huge { pool, memory, vm }.written();
    w.vm.space.set_whole_price(1);
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 1).unwrap();
    assert!(w.entry(P).is_writable() && w.entry(Gfn(1)).is_writable());
    assert!(!w.entry(Gfn(2)).is_writable());
    assert!(w.vm.cpu_write(Gfn(2), 1).is_err(), "no memory for the copy");
    w.assert_as_written(&frozen);
    drop(frozen);
    w.vm.cpu_write(Gfn(2), 1).unwrap();
    w.settle();
}

#[test]
fn a_folio_that_formed_again_is_shared_as_one() {
    let w = huge().written();
    w.vm.space.set_whole_price(1);
    let first = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 1).unwrap();
    assert!(w.is_huge(P));
    let second = w.vm.space.fork().unwrap();
    assert!(second.entry(P).unwrap().is_huge() && !first.entry(P).unwrap().is_huge());
    drop(first);
    drop(second);
    w.settle();
}

/// A VM whose first region is in small entries, one of them writable: it was written after its first fork.
fn with_a_cold_page() -> Huge {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 1).unwrap();
    drop(frozen);
    assert!(!w.is_huge(P) && w.entry(P).is_writable());
    w
}

#[test]
fn to_prepare_a_fork_is_to_fork_what_has_changed() {
    let w = with_a_cold_page();
    w.vm.space.prepare_fork();
    assert!((0..2 * REGION).all(|n| !w.entry(Gfn(n)).is_writable()));
    let prepared = w.vm.space.kept(P).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!(frozen.holder(P), prepared.0, "taken over as it is");
    assert_eq!(w.read(&frozen, P), 1);
    w.vm.cpu_write(P, 2).unwrap();
    assert_eq!(w.read(&frozen, P), 1);
    drop(frozen);
    w.settle();
}

/// Two chunks change before every fork: as many are left to it as it may have. Not what is huge, or changes
/// now and then.
#[test]
fn what_is_soon_done_is_left_to_the_fork() {
    let w = huge_with(4 * REGION, 64).written();
    let (other, rare) = (Gfn(2 * REGION), Gfn(3 * REGION));
    for n in 0..3 {
        let frozen = w.vm.space.fork().unwrap();
        for page in [P, other] {
            w.vm.cpu_write(page, n).unwrap();
        }
        if n == 2 {
            w.vm.cpu_write(rare, n).unwrap();
        }
        drop(frozen);
        w.vm.cpu_write(NEXT, n).unwrap();
    }
    assert!(w.is_huge(NEXT) && !w.is_huge(rare));
    let writable = || [P, NEXT, other, rare].map(|page| w.entry(page).is_writable());
    assert_eq!(writable(), [true; 4]);
    for (left, expected) in [
        (2, [true, false, true, false]),
        (1, [false, false, true, false]),
        (0, [false; 4]),
    ] {
        w.vm.space.leave_to_fork(left);
        w.vm.space.prepare_fork();
        assert_eq!(writable(), expected, "{left} left");
    }
    w.settle();
}

/// What lies between two regions that are prepared is writable still, for the guest as for the table.
#[test]
fn what_is_not_prepared_stays_writable() {
    let w = huge_with(3 * REGION, 64).written();
    let frozen = w.vm.space.fork().unwrap();
    for page in [P, Gfn(2 * REGION)] {
        w.vm.cpu_write(page, 1).unwrap();
    }
    drop(frozen);
    w.vm.space.set_whole_price(0);
    w.vm.cpu_write(NEXT, 1).unwrap();
    assert!(w.is_huge(NEXT));
    let held = w.vm.space.pin(NEXT, Access::Write).unwrap();
    w.vm.space.prepare_fork();
    for (page, protection) in [
        (P, Protection::ReadOnly),
        (NEXT, Protection::ReadWrite),
        (Gfn(2 * REGION), Protection::ReadOnly),
    ] {
        let entry = w.entry(page);
        assert_eq!(entry.protection(), protection, "{page:?}");
        assert_eq!(w.vm.mmu.page(page), (entry.pfn(), protection), "{page:?}");
    }
    drop(held);
    // Regions that are huge are prepared, too.
    w.vm.space.prepare_fork();
    assert!(w.is_huge(NEXT) && !w.entry(NEXT).is_writable());
    w.vm.cpu_write(NEXT, 2).unwrap();
    assert!(w.is_huge(NEXT) && w.entry(NEXT).is_writable());
    w.settle();
}

#[test]
fn what_is_written_after_a_fork_was_prepared_costs_no_copy_and_is_in_the_fork() {
    let w = with_a_cold_page();
    let copied = w.stats().copied;
    w.vm.space.prepare_fork();
    w.vm.cpu_write(P, 2).unwrap();
    w.vm.cpu_write(Gfn(1), 3).unwrap();
    assert_eq!((w.stats().copied, w.stats().reused), (copied, 2));
    // Again, for what was written meanwhile.
    w.vm.space.prepare_fork();
    assert!(!w.entry(P).is_writable());
    w.vm.cpu_write(P, 2).unwrap();
    assert_eq!(w.stats().copied, copied);
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!((w.read(&frozen, P), w.read(&frozen, Gfn(1))), (2, 3));
    drop(frozen);
    w.settle();
}

#[test]
fn what_is_written_between_preparation_and_fork_is_left_to_the_fork() {
    let w = with_a_cold_page();
    let mut prepared = vec![];
    for fork in 2..=17 {
        w.vm.space.prepare_fork();
        if !w.entry(P).is_writable() {
            prepared.push(fork);
            w.vm.cpu_write(P, fork).unwrap();
        }
        drop(w.vm.space.fork().unwrap());
        w.vm.cpu_write(P, fork).unwrap();
    }
    // Twice in vain, and then less and less.
    assert_eq!(prepared, [2, 3, 4, 8, 16]);
    w.settle();
}

/// Of a region in small entries a fork has to do with what has changed, and takes the rest over.
#[test]
fn regions_have_in_common_what_did_not_change_in_them() {
    let w = huge().written();
    let older = w.vm.space.fork().unwrap();
    // The first break splits the region, and the snapshot's.
    w.vm.cpu_write(P, 1).unwrap();
    let younger = w.vm.space.fork().unwrap();
    assert_ne!(older.region_address(P), younger.region_address(P));
    assert_ne!(older.holder(P), younger.holder(P));
    for page in [Gfn(2), Gfn(3)] {
        assert_eq!(older.holder(page), younger.holder(page));
        assert_eq!(
            w.state(page).maps(),
            2,
            "by the guest and by both snapshots"
        );
    }
    // Once more, in the other half.
    w.vm.cpu_write(Gfn(3), 2).unwrap();
    let youngest = w.vm.space.fork().unwrap();
    assert_eq!(younger.holder(P), youngest.holder(P));
    assert_ne!(younger.holder(Gfn(3)), youngest.holder(Gfn(3)));
    // One break moves both of those that have it in common, once.
    let moved = w.stats().sharers_moved;
    w.vm.cpu_write(Gfn(1), 3).unwrap();
    assert_eq!(
        (w.stats().sharers_moved, w.stats().writer_moved),
        (moved + 1, 0)
    );
    for (frozen, pages) in [
        (&older, [100, 101, 102, 103]),
        (&younger, [1, 101, 102, 103]),
        (&youngest, [1, 101, 102, 2]),
    ] {
        let seen: Vec<_> = (0..REGION).map(|n| w.read(frozen, Gfn(n))).collect();
        assert_eq!(seen, pages);
    }
    drop((older, youngest, younger));
    w.settle();
}

/// What is kept of a region for the next fork is nobody's, and must not cost a copy.
#[test]
fn chunks_that_no_snapshot_has_any_more_cost_no_copy() {
    let w = with_a_cold_page();
    drop(w.vm.space.fork().unwrap());
    let copied = w.stats().copied;
    w.vm.cpu_write(P, 2).unwrap();
    assert!(w.vm.space.kept(P).is_none(), "it has changed");
    assert!(w.vm.space.kept(Gfn(2)).is_some(), "it has not");
    assert_eq!(w.state(Gfn(2)).maps(), 2);
    w.vm.cpu_write(Gfn(2), 3).unwrap();
    assert!(w.vm.space.kept(Gfn(2)).is_none());
    assert_eq!(w.stats().copied, copied);
    w.settle();
}

/// A device holds a page of a region for ever: what it does not hold is taken over all the same.
#[test]
fn what_is_not_held_of_a_region_is_taken_over() {
    let w = huge().written();
    let pin = w.vm.space.pin(P, Access::Write).unwrap();
    let older = w.vm.space.fork().unwrap();
    w.vm.dma_write(&pin, 1);
    let younger = w.vm.space.fork().unwrap();
    assert_ne!(older.holder(P), younger.holder(P));
    assert_eq!(older.holder(Gfn(2)), younger.holder(Gfn(2)));
    assert_eq!((w.read(&older, P), w.read(&younger, P)), (100, 1));
    assert_eq!(w.stats().eager_copied, 2);
    drop((pin, older, younger));
    w.settle();
}

#[test]
fn what_is_held_is_left_to_the_fork() {
    for access in [Access::Read, Access::Write] {
        let w = with_a_cold_page();
        let pin = w.vm.space.pin(P, access).unwrap();
        w.vm.space.prepare_fork();
        assert!(w.entry(P).is_writable() && w.stats().eager_copied == 0);
        drop(pin);
        let held = w.vm.space.get(P, access).unwrap();
        w.vm.space.prepare_fork();
        assert!(w.entry(P).is_writable());
        drop(held);
        w.vm.space.prepare_fork();
        assert!(!w.entry(P).is_writable());
        w.settle();
    }
}

fn frames(pins: &[PinnedRun]) -> Vec<Pfn> {
    pins.iter().flat_map(PinnedRun::pfns).collect()
}

#[test]
fn neighbouring_folios_are_pinned_by_one_handle() {
    let w = huge().written();
    let pins = w.vm.space.pin_range(P, 2 * REGION, Access::Write).unwrap();
    assert_eq!(pins.len(), 1);
    let expected: Vec<_> = (0..2 * REGION).map(|n| w.entry(Gfn(n)).pfn()).collect();
    assert_eq!(frames(&pins), expected);
    assert!((0..2 * REGION).all(|n| w.state(Gfn(n)).pins() == 1));
    assert_eq!(w.stats().pins_fast, 2 * REGION);
    drop(pins);
    assert!((0..2 * REGION).all(|n| w.state(Gfn(n)).pins() == 0));
    assert!(w.is_huge(P) && w.is_huge(NEXT));
    w.settle();
}

/// As far as their frames follow each other: pages lie at home as their numbers do.
#[test]
fn neighbouring_small_entries_are_pinned_by_one_handle() {
    let w = world();
    for n in 0..4 {
        w.vm.cpu_write(Gfn(n), n).unwrap();
    }
    let pins = w.vm.space.pin_range(P, 4, Access::Write).unwrap();
    let expected: Vec<_> = (0..4).map(|n| w.entry(Gfn(n)).pfn()).collect();
    assert_eq!((pins.len(), frames(&pins)), (1, expected));
    assert_eq!((w.stats().pins_fast, w.stats().pins_slow), (4, 0));
}

/// Small entries that look alike, of which one is of a frame that snapshots share.
#[test]
fn a_range_has_no_hole_where_a_page_is_shared() {
    let w = world();
    for n in 0..4 {
        w.vm.cpu_write(Gfn(n), n).unwrap();
    }
    let frozen = w.vm.space.fork().unwrap();
    for n in [0, 2, 3] {
        w.vm.space.unshare(Gfn(n)).unwrap();
    }
    let pins = w.vm.space.pin_range(P, 4, Access::Read).unwrap();
    let expected: Vec<_> = (0..4).map(|n| w.entry(Gfn(n)).pfn()).collect();
    assert_eq!(frames(&pins), expected);
    let pinned = |n| (w.state(Gfn(n)).pins(), w.state(Gfn(n)).is_exclusive());
    assert_eq!([0, 1, 2, 3].map(pinned), [(1, true); 4]);
    drop((pins, frozen));
}

#[test]
fn a_range_begins_and_ends_inside_of_folios() {
    let w = huge().written();
    let pins = w.vm.space.pin_range(Gfn(3), 2, Access::Read).unwrap();
    let pinned: Vec<_> = (0..2 * REGION).map(|n| w.state(Gfn(n)).pins()).collect();
    assert_eq!(pinned, [0, 0, 0, 1, 1, 0, 0, 0]);
    drop(pins);
    assert_eq!(w.vm.space.pin_range(P, 0, Access::Read).unwrap().len(), 0);
    w.settle();
}

/// One page in another frame, and one that must be broken first.
#[test]
fn a_range_of_all_sorts_of_pages_is_pinned_in_order() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    // A reader holds the frame: the page is written in another.
    let held = frozen.get(Gfn(1)).unwrap();
    w.vm.cpu_write(Gfn(1), 7).unwrap();
    assert!(!w.is_huge(P) && w.is_huge(NEXT));
    let before = w.stats();
    let pins = w.vm.space.pin_range(P, 2 * REGION, Access::Write).unwrap();
    let now: Vec<_> = (0..2 * REGION).map(|n| w.entry(Gfn(n)).pfn()).collect();
    assert_eq!(frames(&pins), now);
    let runs: Vec<_> = pins.iter().map(|run| run.pfns().count()).collect();
    assert_eq!(runs, [1, 1, 6], "by frames that follow each other");
    for n in 0..2 * REGION {
        let state = w.state(Gfn(n));
        assert_eq!((state.pins(), state.is_exclusive()), (1, true), "page {n}");
    }
    let stats = w.stats();
    let all = stats.pins_fast + stats.pins_slow - before.pins_fast - before.pins_slow;
    assert_eq!(all, 2 * REGION);
    w.assert_as_written(&frozen);
    drop((pins, held, frozen));
    w.settle();
}

#[test]
fn a_range_that_cannot_be_pinned_to_its_end_is_not_pinned() {
    let w = huge_with(2 * REGION, 64);
    w.vm.cpu_write(P, 1).unwrap();
    w.vm.space
        .pin_range(Gfn(1), 2 * REGION, Access::Write)
        .unwrap_err();
    assert_eq!(w.stats().pins_fast, 0, "the end is looked at first");
    // The counter of one page of the folio is full: the pages before it are let go.
    let full: Vec<_> = (0..0xf_ffff)
        .map(|_| w.vm.space.pin(Gfn(2), Access::Write).unwrap())
        .collect();
    let error = w.vm.space.pin_range(P, REGION, Access::Write).unwrap_err();
    assert!(
        matches!(error, PinError::TooMany { gfn: Gfn(2) }),
        "{error}"
    );
    assert_eq!((w.state(P).pins(), w.state(Gfn(1)).pins()), (0, 0));
    drop(full);
    w.settle();
}

#[test]
fn a_run_of_pins_outlives_its_address_space() {
    let Huge { pool, memory, vm } = huge().written();
    let pins = vm.space.pin_range(Gfn(2), 4, Access::Write).unwrap();
    drop(vm);
    assert_eq!(pool.usage().in_use, 4);
    let held: Vec<_> = frames(&pins).iter().map(|&pfn| memory.load(pfn)).collect();
    assert_eq!(held, [102, 103, 104, 105]);
    // On another thread, whose stripe is not this one's.
    std::thread::spawn(move || drop(pins)).join().unwrap();
    assert_eq!(pool.leftovers(9), []);
}

#[test]
fn a_run_of_pins_outlives_its_pool() {
    let Huge { pool, memory, vm } = huge().written();
    let pins = vm.space.pin_range(P, REGION, Access::Write).unwrap();
    let count = Arc::strong_count(&memory);
    drop((pool, vm));
    assert!(Arc::strong_count(&memory) < count, "the others are gone");
    assert!(Arc::strong_count(&memory) > 1, "the pins need it");
    drop(pins);
    assert_eq!(Arc::strong_count(&memory), 1);
}

/// A page that two snapshots share, each by a region of its own: both get the copy, and the guest keeps its
/// frame.
#[test]
fn a_break_moves_the_snapshots_of_before_the_last_as_well() {
    let w = huge().written();
    let older = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 1).unwrap();
    let younger = w.vm.space.fork().unwrap();
    assert_ne!(older.region_address(P), younger.region_address(P));
    let ours = w.entry(Gfn(1)).pfn();
    w.vm.cpu_write(Gfn(1), 2).unwrap();
    assert_eq!(w.entry(Gfn(1)).pfn(), ours);
    assert_eq!((w.stats().sharers_moved, w.stats().writer_moved), (2, 0));
    for frozen in [&older, &younger] {
        assert_eq!(w.read(frozen, Gfn(1)), 101);
    }
    drop((older, younger));
    w.settle();
}

/// Whoever forms a folio says that its pages are held, be it all of them.
#[test]
fn a_folio_all_of_whose_pages_are_held_is_not_shared() {
    let w = huge().written();
    w.vm.space.set_whole_price(1);
    let first = w.vm.space.pin(P, Access::Read).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    assert!(!w.is_huge(P), "split for the pinned page");
    let pins: Vec<_> = (1..REGION)
        .map(|n| w.vm.space.pin(Gfn(n), Access::Read).unwrap())
        .collect();
    for n in 0..REGION {
        w.vm.cpu_write(Gfn(n), n).unwrap();
    }
    assert!(w.is_huge(P), "huge again");
    let copied = w.stats().eager_copied;
    let younger = w.vm.space.fork().unwrap();
    assert_eq!(w.stats().eager_copied, copied + REGION);
    for (n, pin) in (0..REGION).zip([first].into_iter().chain(pins)) {
        w.vm.cpu_write(Gfn(n), 50 + n).unwrap();
        assert_eq!((w.vm.dma_read(&pin), w.read(&younger, Gfn(n))), (50 + n, n));
    }
    drop((frozen, younger));
    w.settle();
}

/// A guest of one region that has written all of it before each of two snapshots, and nothing since.
fn rewindable(frames: u64) -> (Huge, Arc<Frozen>, Arc<Frozen>) {
    let w = huge_with(REGION, frames).written();
    w.vm.space.set_whole_price(0);
    let first = w.vm.space.fork().unwrap();
    for n in 0..REGION {
        w.vm.cpu_write(Gfn(n), 200 + n).unwrap();
    }
    assert!(w.is_huge(P), "it was broken in one piece");
    let second = w.vm.space.fork().unwrap();
    (w, first, second)
}

#[test]
fn a_restore_that_was_prepared_has_no_copies_to_make_for_others() {
    let (w, first, second) = rewindable(64);
    let holds = |w: &Huge| {
        w.assert_as_written(&first);
        assert!((0..REGION).all(|n| w.read(&second, Gfn(n)) == 200 + n));
    };
    let frame = w.entry(P).pfn();
    let copied = w.stats().copied;
    // It is what the second shows: nothing to be done.
    w.vm.space.prepare_restore(&second);
    assert_eq!(
        (w.stats().copied, w.state(P).is_exclusive()),
        (copied, false)
    );
    w.vm.space.prepare_restore(&first);
    assert_eq!(w.stats().copied, copied + REGION);
    assert!(w.state(P).is_exclusive() && !w.entry(P).is_writable());
    assert!((0..REGION).all(|n| w.vm.cpu_read(Gfn(n)) == 200 + n));
    holds(&w);
    // It runs on meanwhile.
    w.vm.cpu_write(P, 7).unwrap();
    holds(&w);
    let before = (w.stats().copied, w.pool.usage().in_use);
    w.vm.space.restore(&first).unwrap();
    assert_eq!((w.stats().copied, w.pool.usage().in_use), before);
    assert!((0..REGION).all(|n| w.vm.cpu_read(Gfn(n)) == 100 + n));
    assert_eq!(w.entry(P).pfn(), frame);
    holds(&w);
    drop((first, second));
    w.settle();
}

#[test]
fn what_cannot_be_prepared_is_left_to_the_restore() {
    // Frame 0 is the zero frame, and two folios are the snapshots' and the guest's: there is none for a third.
    let (w, first, second) = rewindable(3 * REGION);
    w.vm.space.prepare_restore(&first);
    assert!(!w.state(P).is_exclusive());
    assert!(
        w.vm.space.restore(&first).is_err(),
        "nor is there for the restore"
    );
    drop(second);
    w.vm.space.restore(&first).unwrap();
    assert!((0..REGION).all(|n| w.vm.cpu_read(Gfn(n)) == 100 + n));
    let other = huge_with(2 * REGION, 64).written();
    w.vm.space.prepare_restore(&other.vm.space.fork().unwrap());
    w.assert_as_written(&first);
    drop(first);
    w.settle();
}
