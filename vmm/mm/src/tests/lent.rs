//! What a snapshot lends to its clones: who counts it, who moves, and when it becomes theirs.

use super::folio::{Huge, NEXT, REGION, huge, huge_with};
use super::refusing::Manner;
use super::*;

impl Huge {
    fn clone_of(&self, frozen: &Frozen) -> SoftVm<AnyPolicy> {
        SoftVm::clone_of(frozen, &self.memory, right()).unwrap()
    }

    /// Every page of it in a small entry, and the first snapshot that has them so.
    fn in_small_entries(&self) -> Arc<Frozen> {
        let older = self.vm.space.fork().unwrap();
        for n in (0..self.vm.space.pages()).step_by(REGION as usize) {
            self.vm.cpu_write(Gfn(n), 100 + n).unwrap();
        }
        drop(older);
        let frozen = self.vm.space.fork().unwrap();
        assert!(!frozen.entry(P).unwrap().is_huge());
        frozen
    }
}

fn maps(w: &Huge, pfn: Pfn) -> u64 {
    w.pool.state(pfn).maps()
}

/// All that nobody but a clone's vCPUs sees costs nothing: its window shows the snapshot's frames, and no
/// count says so.
#[test]
fn a_clone_is_counted_when_it_first_does_something() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    let before: Vec<_> = (0..64).map(|n| w.pool.state(Pfn(n))).collect();
    let clone = w.clone_of(&frozen);
    for n in 0..2 * REGION {
        let (entry, theirs) = (clone.space.entry(Gfn(n)).unwrap(), frozen.entry(Gfn(n)));
        assert_eq!((entry, clone.cpu_read(Gfn(n))), (theirs.unwrap(), 100 + n));
    }
    // To look is not to do.
    let held = clone.space.get(Gfn(1), Access::Read).unwrap();
    assert_eq!(
        (clone.read_held(&held), held.pfn()),
        (101, frozen.frame(Gfn(1)).unwrap())
    );
    drop(held);
    assert!(clone.space.take_dirty().unwrap().is_empty());
    let its = clone.space.fork().unwrap();
    assert_eq!(its.region_address(P), frozen.region_address(P));
    clone.space.restore(&frozen).unwrap();
    let now: Vec<_> = (0..64).map(|n| w.pool.state(Pfn(n))).collect();
    assert_eq!(now, before);
    assert!(clone.space.is_borrowed(P) && clone.space.is_borrowed(NEXT));

    // One of its two regions.
    clone.cpu_write(Gfn(1), 7).unwrap();
    assert!(!clone.space.is_borrowed(P) && clone.space.is_borrowed(NEXT));
    assert_eq!(
        (
            maps(&w, frozen.frame(P).unwrap()),
            maps(&w, frozen.frame(NEXT).unwrap())
        ),
        (3, 2)
    );
    drop(clone);
    assert_eq!(maps(&w, frozen.frame(P).unwrap()), 2);
    w.assert_as_written(&frozen);
    w.assert_as_written(&its);
    drop((frozen, its));
    w.settle();
}

/// What is lent stays where it is, so a writer moves; what is lent no more moves, and the writer stays.
#[test]
fn a_snapshot_moves_unless_it_is_lent() {
    for is_whole in [false, true] {
        let w = huge().written();
        if is_whole {
            w.vm.space.set_whole_price(0);
        }
        let frozen = w.vm.space.fork().unwrap();
        let clone = w.clone_of(&frozen);
        w.vm.cpu_write(P, 1).unwrap();
        assert_eq!((w.stats().writer_moved, w.stats().sharers_moved), (1, 0));
        // The clone is somebody who runs on in the region's home: it moves to another.
        assert_eq!(w.is_huge(P), is_whole);
        assert_eq!(frozen.frame(P), clone.space.entry(P).map(Entry::pfn));

        drop(clone);
        w.vm.cpu_write(NEXT, 2).unwrap();
        assert_eq!((w.stats().writer_moved, w.stats().sharers_moved), (1, 1));
        // What was worked out for the first clone does not hold any more.
        let clone = w.clone_of(&frozen);
        assert_eq!([0, REGION].map(|n| clone.cpu_read(Gfn(n))), [100, 104]);
        assert_eq!(frozen.frame(NEXT), clone.space.entry(NEXT).map(Entry::pfn));
        w.assert_as_written(&frozen);
        drop((frozen, clone));
        w.settle();
    }
}

/// A region that a clone has made its own, and left, is lent to nobody, though its neighbour is.
#[test]
fn a_region_moves_again_once_its_last_borrower_has_left_it() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    let clone = w.clone_of(&frozen);
    clone.space.set_whole_price(0);
    clone.cpu_write(P, 7).unwrap();
    assert!(clone.space.is_borrowed(NEXT));
    w.vm.cpu_write(P, 1).unwrap();
    assert_eq!(w.stats().sharers_moved, 1);
    w.vm.cpu_write(NEXT, 2).unwrap();
    assert_eq!((w.stats().sharers_moved, w.stats().writer_moved), (1, 1));
    w.assert_as_written(&frozen);
    drop((frozen, clone));
    w.settle();
}

/// Two snapshots may have a page in common, by a chunk of it: to move it for one is to move it for both.
#[test]
fn what_another_snapshot_has_in_common_with_a_lent_one_stays_too() {
    let w = huge().written();
    let frozen = w.in_small_entries();
    w.vm.cpu_write(P, 1).unwrap();
    let other = w.vm.space.fork().unwrap();
    assert_eq!(frozen.holder(Gfn(2)), other.holder(Gfn(2)));
    assert_ne!(frozen.region_address(P), other.region_address(P));
    let clone = w.clone_of(&frozen);
    w.vm.cpu_write(Gfn(2), 3).unwrap();
    assert_eq!((clone.cpu_read(Gfn(2)), w.vm.cpu_read(Gfn(2))), (102, 3));
    assert_eq!(clone.mmu.page(Gfn(2)).0, other.frame(Gfn(2)).unwrap());
    // The chunk of page 0 is the other's alone.
    let moved = w.stats().sharers_moved;
    w.vm.cpu_write(P, 4).unwrap();
    assert_eq!((w.stats().sharers_moved, w.read(&other, P)), (moved + 1, 1));
    drop((clone, other));
    w.assert_as_written(&frozen);
    drop(frozen);
    w.settle();
}

/// A node that nobody shares is changed in place: what was lent of it before is not what is lent of it then.
#[test]
fn what_was_lent_of_a_node_is_forgotten_when_it_changes() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    drop(w.clone_of(&frozen));
    drop(frozen);
    w.vm.cpu_write(P, 100).unwrap();
    // A fork by itself makes another node.
    w.vm.space.prepare_fork();
    let frozen = w.vm.space.fork().unwrap();
    let clone = w.clone_of(&frozen);
    w.vm.cpu_write(P, 1).unwrap();
    assert_eq!((w.stats().writer_moved, w.stats().sharers_moved), (1, 0));
    assert_eq!((clone.cpu_read(P), w.vm.cpu_read(P)), (100, 1));
    drop((frozen, clone));
    w.settle();
}

/// T4: nobody is left but the clone, which has counted nothing so far.
#[test]
fn the_last_to_borrow_writes_without_a_copy() {
    for is_huge in [true, false] {
        let w = huge().written();
        let frozen = if is_huge {
            w.vm.space.fork().unwrap()
        } else {
            w.in_small_entries()
        };
        let [one, other] = [(); 2].map(|()| w.clone_of(&frozen));
        let Huge { pool, vm, .. } = w;
        drop((vm, frozen));
        one.cpu_write(P, 1).unwrap();
        assert_eq!(
            (one.space.stats().reused, one.space.stats().writer_moved),
            (0, 1)
        );
        other.cpu_write(P, 2).unwrap();
        assert_eq!(
            (other.space.stats().reused, other.space.stats().copied),
            (1, 0)
        );
        drop(one);
        other.cpu_write(NEXT, 3).unwrap();
        assert_eq!(
            (other.space.stats().reused, other.space.stats().copied),
            (2, 0)
        );
        assert_eq!([0, 1, REGION].map(|n| other.cpu_read(Gfn(n))), [2, 101, 3]);
        drop(other);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
    }
}

/// A clone of a clone borrows what that one borrows; whoever goes first takes nothing from the others.
#[test]
fn clones_of_clones_borrow_of_the_first_snapshot() {
    for last in 0..4 {
        let w = huge().written();
        let frozen = w.vm.space.fork().unwrap();
        let child = w.clone_of(&frozen);
        child.cpu_write(P, 7).unwrap();
        let second = child.space.fork().unwrap();
        assert_eq!(second.region_address(NEXT), frozen.region_address(NEXT));
        let grandchild = w.clone_of(&second);
        assert!(grandchild.space.is_borrowed(NEXT) && child.space.is_borrowed(NEXT));
        assert_eq!(maps(&w, frozen.frame(NEXT).unwrap()), 2);
        let Huge { pool, memory, vm } = w;
        type Shares = (Option<SoftVm<AnyPolicy>>, Option<Arc<Frozen>>);
        let mut all: Vec<Shares> = vec![
            (Some(vm), None),
            (Some(child), Some(frozen)),
            (Some(grandchild), None),
            (None, Some(second)),
        ];
        let kept = all.swap_remove(last);
        drop(all);
        let reads = |n| match &kept {
            (Some(vm), _) => vm.cpu_read(Gfn(n)),
            (None, Some(frozen)) => frozen.with_frame(Gfn(n), |pfn| memory.load(pfn)).unwrap(),
            (None, None) => unreachable!("each has one"),
        };
        let first = if last == 0 { 100 } else { 7 };
        assert_eq!([0, 1, REGION].map(reads), [first, 101, 104], "{last}");
        if let (Some(vm), _) = &kept {
            vm.cpu_write(NEXT, 9).unwrap();
            assert_eq!((vm.cpu_read(NEXT), vm.cpu_read(Gfn(5))), (9, 105));
        }
        drop(kept);
        assert_eq!(pool.leftovers(9), []);
        assert_eq!(pool.usage().in_use, 0);
    }
}

/// What was worked out for a node serves every clone, of each snapshot that has the node, till something of
/// it moves.
#[test]
fn what_is_lent_is_worked_out_once() {
    // Two nodes.
    let pages = 65 * REGION;
    let w = huge_with(pages, 8 * pages).written();
    let lent = |frozen: &Frozen, node| {
        let lent = frozen.table.lend(node, frozen.table.slots(node)).unwrap();
        lent.loan.give_back(frozen.table.slots(node));
        lent
    };
    let frozen = w.vm.space.fork().unwrap();
    let first = [0, 1].map(|node| lent(&frozen, node));
    assert_eq!(
        first[0].runs.len() + first[1].runs.len(),
        2,
        "{:?}",
        first[0].runs
    );
    let clone = w.clone_of(&frozen);
    w.vm.cpu_write(P, 1).unwrap();
    let next = w.vm.space.fork().unwrap();
    let is_same = |one: &Frozen, node| Arc::ptr_eq(&lent(one, node), &first[node]);
    assert_eq!([0, 1].map(|node| is_same(&frozen, node)), [true, true]);
    assert_eq!([0, 1].map(|node| is_same(&next, node)), [false, true]);
    drop(clone);
    w.vm.cpu_write(Gfn(64 * REGION), 1).unwrap();
    assert_eq!([0, 1].map(|node| is_same(&frozen, node)), [true, false]);
    w.assert_as_written(&frozen);
    drop((first, frozen, next));
    w.settle();
}

/// Refused at any of its calls, a clone leaves nothing: not even a loan.
#[test]
fn a_clone_that_is_refused_gives_back_what_it_borrowed() {
    for manner in [Manner::Clean, Manner::All] {
        for nth in 0.. {
            let w = huge().written();
            let frozen = w.in_small_entries();
            // In several runs.
            w.vm.cpu_write(Gfn(2), 1).unwrap();
            let (inner, refusals) = (SoftMmu::new(2 * REGION), Arc::<Refusals>::default());
            let mmu = RefusingMmu {
                inner,
                refusals: Arc::clone(&refusals),
            };
            refusals.refuse(manner, nth, 1);
            let before: Vec<_> = (0..64).map(|n| w.pool.state(Pfn(n))).collect();
            let refused = AddressSpace::from_frozen(&frozen, right(), Box::new(mmu));
            let is_refused = refused.is_err();
            drop(refused);
            let now: Vec<_> = (0..64).map(|n| w.pool.state(Pfn(n))).collect();
            assert_eq!(now, before);
            let moved = w.stats().sharers_moved;
            w.vm.cpu_write(Gfn(3), 1).unwrap();
            assert_eq!(w.stats().sharers_moved, moved + 1, "not lent any more");
            w.assert_as_written(&frozen);
            drop(frozen);
            w.settle();
            if !is_refused {
                assert!(nth > 1, "one call for each run");
                break;
            }
        }
    }
}

/// What is scattered is copied, and not lent: here to a folio of the clone's own, since mappings are short.
#[test]
fn a_scattered_region_is_not_borrowed() {
    let w = huge().written();
    let frozen = w.in_small_entries();
    // The snapshot's page is elsewhere from now on.
    w.vm.cpu_write(Gfn(2), 1).unwrap();
    let (inner, refusals) = (SoftMmu::new(2 * REGION), Arc::<Refusals>::default());
    refusals
        .crowded
        .store(1, std::sync::atomic::Ordering::Relaxed);
    let mmu = RefusingMmu {
        inner: Arc::clone(&inner),
        refusals,
    };
    let clone = AddressSpace::from_frozen(&frozen, right(), Box::new(mmu)).unwrap();
    let clone = SoftVm::over(clone, inner, &w.memory);
    assert!(!clone.space.is_borrowed(P));
    assert!(clone.space.entry(P).unwrap().is_huge());
    assert!((0..2 * REGION).all(|n| clone.cpu_read(Gfn(n)) == 100 + n));
    let moved = w.stats().sharers_moved;
    w.vm.cpu_write(Gfn(3), 1).unwrap();
    assert_eq!(w.stats().sharers_moved, moved + 1, "it is lent to nobody");
    let its = clone.space.fork().unwrap();
    w.assert_as_written(&its);
    drop((frozen, clone, its));
    w.settle();
}

/// A policy that looks who holds a page before it is shared is asked about each page.
#[test]
fn under_a_policy_that_does_not_share_all_nothing_is_borrowed() {
    let w = huge().written();
    let frozen = w.vm.space.fork().unwrap();
    for (policy, borrows) in [
        (Box::new(Refcount) as AnyPolicy, false),
        (Box::new(Mapcount), true),
        (Box::new(Seed), true),
        (Box::new(Biased::new(Exclusive)), true),
    ] {
        let name = policy.name();
        let clone = SoftVm::clone_of(&frozen, &w.memory, policy).unwrap();
        assert_eq!(clone.space.is_borrowed(P), borrows, "{name}");
        assert_eq!(w.state(P).maps(), if borrows { 2 } else { 3 }, "{name}");
    }
    drop(frozen);
    w.settle();
}

/// A frame with as many mappings as can be counted: whatever would make the region the clone's own is
/// refused, with everything as it was, and looks go on.
#[test]
fn what_cannot_be_counted_stays_borrowed() {
    for is_huge in [true, false] {
        let w = huge().written();
        let frozen = if is_huge {
            w.vm.space.fork().unwrap()
        } else {
            w.in_small_entries()
        };
        let clone = w.clone_of(&frozen);
        // Not the first page, so that some are counted before it.
        let full = frozen.frame(Gfn(2)).unwrap();
        let frames = w.pool.frames();
        let (maps, own) = (frames.folio_state(full).maps(), frames.own_state(full));
        if is_huge {
            frames.set_folio_maps(full, FrameState::FULL.maps());
        } else {
            frames.set_own(full, FrameState::FULL);
        }
        let before: Vec<_> = (0..64).map(|n| w.pool.state(Pfn(n))).collect();
        let space = &clone.space;
        let is_full = |error: &FaultError| matches!(error, FaultError::TooManyMappings(_));
        let is_busy = |error: &RearrangeError| matches!(error, RearrangeError::TooManyMappings(_));
        assert!(is_full(&space.write_fault(P).unwrap_err()));
        assert!(is_full(&space.unshare(P).unwrap_err()));
        assert!(is_full(&space.get(P, Access::Write).unwrap_err()));
        assert!(is_full(&space.force_write(P, 0, &[1]).unwrap_err()));
        for access in [Access::Read, Access::Write] {
            let refused = space.pin(P, access).unwrap_err();
            assert!(matches!(refused, PinError::Fault(error) if is_full(&error)));
        }
        assert!(is_busy(&space.migrate(P).unwrap_err()));
        assert!(is_busy(&space.discard(P, 2 * REGION).unwrap_err()));
        assert!(is_busy(&space.merge(P, space, NEXT).unwrap_err()));
        drop(space.get(P, Access::Read).unwrap());
        drop(space.fork().unwrap());
        let now: Vec<_> = (0..64).map(|n| w.pool.state(Pfn(n))).collect();
        assert_eq!(now, before);
        assert!(space.is_borrowed(P));
        assert!((0..2 * REGION).all(|n| clone.cpu_read(Gfn(n)) == 100 + n));

        if is_huge {
            frames.set_folio_maps(full, maps);
        } else {
            frames.set_own(full, own);
        }
        clone.cpu_write(P, 7).unwrap();
        assert_eq!((clone.cpu_read(P), w.vm.cpu_read(P)), (7, 100));
        w.assert_as_written(&frozen);
        drop((frozen, clone));
        w.settle();
    }
}
