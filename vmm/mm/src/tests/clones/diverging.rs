//! What becomes of frames, homes and mappings when all machines write, and when they go.

use super::*;

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

/// Whoever rewrites all of its memory ends as a fresh machine would, and copies hardly a page twice: the
/// clone, who was cloned, or both by turns.
#[test]
fn dense_rewrites_end_in_huge_entries_and_few_mappings() {
    const REGION: u64 = 64;
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
                    // Once; and once more the few for which a region has moved house.
                    assert!(machine.copied() <= PAGES + 2 * PAGES / REGION, "{why}");
                }
            }
            let alone = writes.len() as u64 == PAGES;
            // Two moves, which count as two each, are few enough to be gathered; of more, the regions that
            // proved themselves lie elsewhere than those that were trusted.
            let most = if price <= 4 { 1 } else { PAGES / REGION };
            let are_few = |m: &Machine| m.mappings() as u64 <= most || !alone;
            assert!(machines.iter().all(are_few), "{who}, price {price}");
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

/// A chain of clones, each with a snapshot, all of which have written: dropped in any order, the middle
/// first, all that is left is as it was, and in the end nothing is left.
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
