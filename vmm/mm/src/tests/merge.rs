//! Merging: two pages, one frame; and whoever writes gets a page of its own again.

use std::sync::mpsc;

use super::*;

/// Long enough for a thread to come to where it waits. If it was not, a test sees nothing wrong.
const WHILE: Duration = Duration::from_millis(50);

/// Two spaces of one pool, and the pages that are merged: of the first space and of the second, or both of
/// the first.
struct Pair {
    worlds: [World; 2],
    one: (usize, Gfn),
    other: (usize, Gfn),
}

impl Pair {
    fn new(one: (usize, Gfn), other: (usize, Gfn)) -> Self {
        let a = world_of(2 * REGION_PAGES, 8 * REGION_PAGES);
        let b = a.neighbour();
        Self {
            worlds: [a, b],
            one,
            other,
        }
    }
    fn world(&self, at: (usize, Gfn)) -> &World {
        &self.worlds[at.0]
    }
    fn write(&self, at: (usize, Gfn), value: u64) {
        self.world(at).vm.cpu_write(at.1, value).unwrap();
    }
    fn read(&self, at: (usize, Gfn)) -> u64 {
        self.world(at).vm.cpu_read(at.1)
    }
    fn slot(&self, at: (usize, Gfn)) -> &'static str {
        self.world(at).slot(at.1)
    }
    fn pfn(&self, at: (usize, Gfn)) -> Pfn {
        self.world(at).entry(at.1).pfn()
    }
    fn merge(&self) -> Result<(), RearrangeError> {
        let (one, other) = (self.world(self.one), self.world(self.other));
        one.vm
            .space
            .merge(self.one.1, &other.vm.space, self.other.1)
    }
    fn picture(&self) -> Picture {
        Picture::of(&self.worlds[0].pool, &[&self.worlds[0], &self.worlds[1]])
    }
    /// The merge fails, and everything is as it was.
    fn refused(&self) -> RearrangeError {
        let before = self.picture();
        let error = self.merge().unwrap_err();
        assert_eq!(self.picture(), before, "{error}");
        error
    }
    fn busy(&self) -> (Gfn, FrameState) {
        match self.refused() {
            RearrangeError::Busy { gfn, state } => (gfn, state),
            other => panic!("busy was expected, not {other:?}"),
        }
    }
}

/// In one region; in two, in both orders; in two spaces, in both orders and any two regions.
fn pairs() -> impl Iterator<Item = Pair> {
    let far = Gfn(REGION_PAGES + 1);
    [
        ((0, P), (0, Q)),
        ((0, Q), (0, P)),
        ((0, P), (0, far)),
        ((0, far), (0, P)),
        ((0, P), (1, P)),
        ((1, P), (0, P)),
        ((0, P), (1, far)),
        ((1, P), (0, far)),
        ((0, far), (1, P)),
        ((1, far), (0, P)),
    ]
    .into_iter()
    .map(|(one, other)| Pair::new(one, other))
}

/// As [`pairs`], with the same content in both pages.
fn equal_pairs() -> impl Iterator<Item = Pair> {
    pairs().inspect(|pair| {
        pair.write(pair.one, 5);
        pair.write(pair.other, 5);
    })
}

#[test]
fn equal_pages_share_one_frame_and_part_when_written() {
    for pair in equal_pairs() {
        let (kept, freed) = (pair.pfn(pair.one), pair.pfn(pair.other));
        let pool = &pair.worlds[0].pool;
        pair.merge().unwrap();
        for at in [pair.one, pair.other] {
            assert_eq!(
                (pair.pfn(at), pair.slot(at), pair.read(at)),
                (kept, "RS", 5)
            );
            let shown = pair.world(at).vm.mmu.page(at.1);
            assert_eq!(shown, (kept, Protection::ReadOnly));
            assert!(pair.world(at).entry(at.1).is_dirty());
        }
        assert_eq!((pool.state(kept).maps(), pool.state(freed).refs()), (2, 0));
        assert_eq!(pool.usage().in_use, 1);
        pair.merge().unwrap();
        assert_eq!(
            (pool.state(kept).maps(), pool.usage().in_use),
            (2, 1),
            "they are merged"
        );

        pair.write(pair.other, 6);
        assert_eq!((pair.read(pair.one), pair.read(pair.other)), (5, 6));
        assert_eq!(pair.pfn(pair.other), freed, "home is free");
        let one = pair.world(pair.one);
        let resolution = one.vm.space.write_fault(pair.one.1).unwrap();
        assert_eq!(resolution, Resolution::Reused, "the last holder");
    }
}

#[test]
fn shared_pages_may_be_merged() {
    for pair in equal_pairs() {
        let frozen = pair.worlds[0].vm.space.fork().unwrap();
        let other = pair.worlds[1].vm.space.fork().unwrap();
        pair.merge().unwrap();
        assert_eq!(pair.pfn(pair.one), pair.pfn(pair.other));
        pair.write(pair.one, 6);
        pair.write(pair.other, 7);
        let snapshots = [&frozen, &other];
        for at in [pair.one, pair.other] {
            let world = pair.world(at);
            assert_eq!(world.vm.read_frozen(snapshots[at.0], at.1), 5);
        }
        assert_eq!((pair.read(pair.one), pair.read(pair.other)), (6, 7));
    }
}

/// The sharing of a frame by two pages must not be taken for that with a snapshot.
#[test]
fn a_break_of_a_merged_page_moves_the_writer() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 5).unwrap();
    w.vm.space.merge(P, &w.vm.space, Q).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!(w.state(P).maps(), 4);
    assert_eq!(w.vm.space.write_fault(P).unwrap(), Resolution::WriterMoved);
    w.vm.cpu_write(P, 6).unwrap();
    assert_eq!((w.vm.cpu_read(Q), w.vm.read_frozen(&frozen, P)), (5, 5));
    w.vm.cpu_write(Q, 7).unwrap();
    assert_eq!(
        (w.vm.read_frozen(&frozen, P), w.vm.read_frozen(&frozen, Q)),
        (5, 5)
    );
}

#[test]
fn a_page_is_merged_with_itself_already() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let pin = w.vm.space.pin(P, Access::Write).unwrap();
    let before = w.picture();
    w.vm.space.merge(P, &w.vm.space, P).unwrap();
    assert_eq!(w.picture(), before);
    drop(pin);
}

#[test]
fn pages_that_differ_are_refused() {
    for pair in pairs() {
        pair.write(pair.one, 5);
        pair.write(pair.other, 6);
        let error = pair.refused();
        let RearrangeError::Different { one, other } = error else {
            panic!("{error:?}");
        };
        assert_eq!((one, other), (pair.one.1, pair.other.1));
    }
}

#[test]
fn untouched_pages_are_refused() {
    for pair in pairs() {
        let is_untouched = |error, at: (usize, Gfn)| match error {
            RearrangeError::Untouched { gfn } => assert_eq!(gfn, at.1),
            other => panic!("{other:?}"),
        };
        is_untouched(pair.refused(), pair.one);
        pair.write(pair.one, 0);
        is_untouched(pair.refused(), pair.other);
        pair.write(pair.other, 0);
        pair.world(pair.one)
            .vm
            .space
            .discard(pair.one.1, 1)
            .unwrap();
        is_untouched(pair.refused(), pair.one);
    }
}

#[test]
fn pages_beyond_the_end_and_of_other_pools_are_refused() {
    let (w, stranger) = (world(), world());
    let other = world_in(Arc::clone(&w.pool), Arc::clone(&w.memory), right(), 3);
    for space in [&w.vm.space, &other.vm.space, &stranger.vm.space] {
        for gfn in [P, Q] {
            let _ = space.write_fault(gfn).unwrap();
        }
    }
    let before = Picture::of(&w.pool, &[&w, &other]);
    let merge = |gfn, with: &World, other| w.vm.space.merge(Gfn(gfn), &with.vm.space, Gfn(other));
    let beyond = |result, gfn, pages| match result {
        Err(RearrangeError::OutOfRange(e)) => assert_eq!(e, OutOfRange { gfn, pages }),
        other => panic!("{other:?}"),
    };
    beyond(merge(4, &other, 0), Gfn(4), 4);
    beyond(merge(0, &other, 3), Gfn(3), 3);
    beyond(merge(0, &w, 4), Gfn(4), 4);
    assert!(matches!(
        merge(0, &stranger, 0),
        Err(RearrangeError::OtherPool)
    ));
    assert_eq!(Picture::of(&w.pool, &[&w, &other]), before);
    merge(0, &other, 0).unwrap();
}

/// C10 of PROTOCOL.md, with holds as well: T23.
#[test]
fn t23_a_page_that_anybody_holds_is_refused() {
    for pair in equal_pairs() {
        for at in [pair.one, pair.other] {
            let space = &pair.world(at).vm.space;
            for access in [Access::Read, Access::Write] {
                let pin = space.pin(at.1, access).unwrap();
                let (gfn, state) = pair.busy();
                assert_eq!((gfn, state.pins(), state.is_exclusive()), (at.1, 1, true));
                drop(pin);
                let get = space.get(at.1, access).unwrap();
                let (gfn, state) = pair.busy();
                assert_eq!((gfn, state.gets()), (at.1, 1));
                drop(get);
            }
        }
        // Neither is it where it was shared before: the undoing must not make it exclusive.
        let frozen = pair.worlds.each_ref().map(|w| w.vm.space.fork().unwrap());
        for at in [pair.one, pair.other] {
            let get = frozen[at.0].get(at.1).unwrap();
            let (gfn, state) = pair.busy();
            assert_eq!((gfn, state.maps(), state.gets()), (at.1, 2, 1));
            drop(get);
        }
        pair.merge().unwrap();
    }
}

#[test]
fn a_merge_that_the_mmu_refuses_changes_nothing() {
    let mmus: [fn(&Pair) -> &Refusals; 2] = [|p| &p.worlds[0].mmu, |p| &p.worlds[1].mmu];
    // Calls: each page that is writable is protected, then the other page is mapped.
    for (index, pair) in pairs().enumerate() {
        let (one, other) = (pair.one, pair.other);
        for writable in [[true, true], [true, false], [false, true], [false, false]] {
            let setup = || {
                let pair = Pair::new(one, other);
                for (at, writable) in [one, other].into_iter().zip(writable) {
                    pair.write(at, 5);
                    if !writable {
                        pair.world(at).protect_without_sharing(at.1);
                    }
                }
                for (at, writable) in [one, other].into_iter().zip(writable) {
                    if writable {
                        pair.world(at).vm.space.write_fault(at.1).unwrap();
                    } else {
                        pair.world(at).vm.space.unshare(at.1).unwrap();
                    }
                }
                pair
            };
            let mut expected = [0, 0];
            expected[one.0] += u64::from(writable[0]);
            expected[other.0] += u64::from(writable[1]) + 1;
            for (mmu, expected) in mmus.into_iter().zip(expected) {
                let failed = refused_at_each_call(setup, mmu, Pair::picture, Pair::merge);
                assert_eq!(failed, expected, "pair {index}, {writable:?}");
            }
        }
    }
}

/// Should even the undoing be refused, the pages are read-only, which costs a fault.
#[test]
fn a_merge_that_cannot_be_undone_leaves_read_only_pages() {
    for refused_from in [1, 2] {
        let w = world();
        w.vm.cpu_write(P, 5).unwrap();
        w.vm.cpu_write(Q, 5).unwrap();
        w.mmu.from(refused_from);
        w.vm.space.merge(P, &w.vm.space, Q).unwrap_err();
        w.mmu.never();
        let slots = if refused_from == 1 {
            ["RX", "WX"]
        } else {
            ["RX", "RX"]
        };
        assert_eq!([w.slot(P), w.slot(Q)], slots);
        for gfn in [P, Q] {
            assert_eq!(
                w.vm.mmu.page(gfn),
                (w.entry(gfn).pfn(), w.entry(gfn).protection())
            );
            assert!(w.entry(gfn).is_dirty());
            w.vm.cpu_write(gfn, gfn.0).unwrap();
        }
        assert_eq!((w.vm.cpu_read(P), w.vm.cpu_read(Q)), (0, 1));
        let reused = slots.iter().filter(|slot| **slot == "RX").count() as u64;
        assert_eq!((w.stats().reused, w.pool.usage().in_use), (reused, 2));
    }
}

/// Both ways at once, beside forks and writes: whoever asks, the locks are taken in one order.
#[test]
fn merges_in_both_directions_do_not_wait_for_each_other() {
    let w = world_of(2 * REGION_PAGES, 1 << 13);
    let other = w.neighbour();
    let far = Gfn(REGION_PAGES);
    for world in [&w, &other] {
        world.vm.cpu_write(P, 5).unwrap();
        world.vm.cpu_write(far, 5).unwrap();
    }
    let (a, b) = (&w.vm.space, &other.vm.space);
    let merges = [(a, P, b, far), (b, far, a, P), (a, far, a, P)];
    std::thread::scope(|scope| {
        for (one, gfn, other, other_gfn) in merges {
            scope.spawn(move || {
                for _ in 0..300 {
                    let _ = one.merge(gfn, other, other_gfn);
                }
            });
        }
        scope.spawn(|| (0..300).for_each(|_| drop(a.discard(P, 2 * REGION_PAGES))));
        for n in 0..300 {
            w.vm.cpu_write(P, n % 2).unwrap();
            other.vm.cpu_write(far, n % 2).unwrap();
            drop((a.fork().unwrap(), b.fork().unwrap()));
        }
    });
    assert_eq!(other.vm.cpu_read(far), 1);
}

/// As `discard` takes them, which has several at a time as well.
#[test]
fn a_merge_takes_the_lower_of_two_regions_first() {
    let far = Gfn(REGION_PAGES);
    for (gfn, other) in [(P, far), (far, P)] {
        let w = world_of(2 * REGION_PAGES, 4 * REGION_PAGES);
        for gfn in [P, far] {
            w.vm.cpu_write(gfn, 5).unwrap();
        }
        let space = &w.vm.space;
        std::thread::scope(|scope| {
            let lower = space.mapped.table.lock_of(P);
            let merge = scope.spawn(move || space.merge(gfn, space, other));
            std::thread::sleep(WHILE);
            let (locked, answer) = mpsc::channel();
            scope.spawn(move || {
                drop(space.mapped.table.lock_of(far));
                locked.send(())
            });
            let answer = answer.recv_timeout(PATIENCE);
            assert!(answer.is_ok(), "who waits for the lower has the higher");
            drop(lower);
            merge.join().unwrap().unwrap();
        });
    }
}

#[test]
fn a_merge_waits_for_a_fork_of_either_space() {
    for forked in [0, 1] {
        let pair = Pair::new((0, P), (1, P));
        for at in [pair.one, pair.other] {
            pair.write(at, 5);
        }
        std::thread::scope(|scope| {
            let fork = pair.worlds[forked].vm.space.mapped.enter_alone().unwrap();
            let merge = scope.spawn(|| pair.merge());
            std::thread::sleep(WHILE);
            assert!(!merge.is_finished());
            drop(fork);
            merge.join().unwrap().unwrap();
        });
        assert_eq!(pair.pfn(pair.one), pair.pfn(pair.other));
    }
}
