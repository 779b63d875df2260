//! The rules as tables, and what each of them gets wrong.

use super::super::frame::FrameTable;
use super::*;

/// A frame with so many mappings, holds and pins.
fn frame(maps: u64, gets: u64, pins: u64, exclusive: bool) -> FrameState {
    let (table, pfn) = (FrameTable::new(2, Order::HUGE), Pfn(1));
    table.map_fresh(pfn);
    for _ in 0..maps {
        table.try_share_idle(pfn).unwrap();
    }
    let _ = table.unmap(pfn);
    if exclusive {
        table.try_reuse(pfn, &Mapcount).unwrap();
    }
    for _ in 0..gets {
        table.try_get(pfn).unwrap();
    }
    for _ in 0..pins {
        table.try_pin(pfn, Access::Read, &Mapcount).unwrap();
    }
    let state = table.state(pfn);
    assert_eq!(
        (
            state.maps(),
            state.gets(),
            state.pins(),
            state.is_exclusive()
        ),
        (maps, gets, pins, exclusive)
    );
    state
}

/// `may_share`, `may_reuse`, `may_pin` (for reading, which must be as for writing), where they say yes: `s`,
/// `r`, `p`.
fn decisions(policy: &impl CowPolicy, frame: FrameState) -> String {
    let reading = policy.may_pin(frame, Access::Read);
    assert_eq!(reading, policy.may_pin(frame, Access::Write));
    [
        (policy.may_share(frame), 's'),
        (policy.may_reuse(frame), 'r'),
        (reading, 'p'),
    ]
    .into_iter()
    .map(|(may, letter)| if may { letter } else { '-' })
    .collect()
}

#[test]
fn each_rule_is_a_function_of_the_frame() {
    let rows = [
        //                                   mapcount refcount seed   exclusive
        (
            frame(1, 0, 0, true),
            /*         */ ["srp", "srp", "srp", "srp"],
        ),
        (
            frame(1, 0, 0, false),
            /*        */ ["srp", "srp", "srp", "sr-"],
        ),
        (
            frame(1, 1, 0, true),
            /*         */ ["srp", "s-p", "srp", "srp"],
        ),
        (
            frame(1, 1, 0, false),
            /*        */ ["srp", "s-p", "s-p", "s--"],
        ),
        (
            frame(1, 0, 1, true),
            /*         */ ["srp", "--p", "-rp", "-rp"],
        ),
        (
            frame(1, 0, 1, false),
            /*        */ ["srp", "--p", "s-p", "s--"],
        ),
        (
            frame(1, 2, 3, true),
            /*         */ ["srp", "--p", "-rp", "-rp"],
        ),
        (
            frame(2, 0, 0, false),
            /*        */ ["s-p", "s-p", "s-p", "s--"],
        ),
        (
            frame(2, 1, 0, false),
            /*        */ ["s-p", "s-p", "s-p", "s--"],
        ),
        (
            frame(2, 0, 1, false),
            /*        */ ["s-p", "--p", "s-p", "s--"],
        ),
    ];
    for (frame, [mapcount, refcount, seed, exclusive]) in rows {
        assert_eq!(decisions(&Mapcount, frame), mapcount, "mapcount {frame:?}");
        assert_eq!(
            decisions(&MapcountForcedBreak, frame),
            mapcount,
            "forced break {frame:?}"
        );
        assert_eq!(decisions(&Refcount, frame), refcount, "refcount {frame:?}");
        assert_eq!(decisions(&Seed, frame), seed, "seed {frame:?}");
        assert_eq!(
            decisions(&SeedRecompute, frame),
            seed,
            "recompute {frame:?}"
        );
        assert_eq!(
            decisions(&Exclusive, frame),
            exclusive,
            "exclusive {frame:?}"
        );
    }
    // The zero frame.
    let (pool, _) = soft_pool(1).unwrap();
    let zero = pool.state(Pfn::ZERO);
    assert_eq!(decisions(&Mapcount, zero), "s-p");
    assert_eq!(decisions(&Refcount, zero), "s-p");
    assert_eq!(decisions(&Seed, zero), "s-p");
    assert_eq!(decisions(&Exclusive, zero), "s--");
}

#[test]
fn only_the_forced_break_looks_readers_up_as_writers() {
    fn is_plain<R: CowPolicy>(policy: R) -> bool {
        [Access::Read, Access::Write].map(|a| policy.lookup(a)) == [Access::Read, Access::Write]
    }
    assert!(is_plain(Mapcount) && is_plain(Refcount) && is_plain(Seed) && is_plain(Exclusive));
    for access in [Access::Read, Access::Write] {
        assert_eq!(MapcountForcedBreak.lookup(access), Access::Write);
        assert_eq!(
            Biased::new(MapcountForcedBreak).lookup(access),
            Access::Write
        );
        assert_eq!(Biased::new(Exclusive).lookup(access), access);
    }
}

#[test]
fn only_the_recomputing_seed_counts_references_at_a_split() {
    fn spreads<R: CowPolicy>(policy: R) -> bool {
        let pages = [
            frame(1, 0, 0, true),
            frame(1, 0, 1, true),
            frame(1, 0, 0, false),
        ];
        pages.map(|page| policy.is_exclusive_after_split(page)) == [true, true, false]
    }
    assert!(spreads(Mapcount) && spreads(MapcountForcedBreak) && spreads(Refcount));
    assert!(spreads(Seed) && spreads(Exclusive) && spreads(Biased::new(Exclusive)));
    let recompute = Biased::new(SeedRecompute);
    for (page, is_exclusive) in [
        (frame(1, 0, 0, true), true),
        (frame(1, 0, 0, false), true),
        (frame(1, 0, 1, true), false),
        (frame(1, 1, 0, true), false),
    ] {
        assert_eq!(SeedRecompute.is_exclusive_after_split(page), is_exclusive);
        assert_eq!(recompute.is_exclusive_after_split(page), is_exclusive);
    }
}

#[test]
fn policies_have_names_and_say_whether_the_bit_counts() {
    fn about(policy: impl CowPolicy) -> (&'static str, bool) {
        let of_itself = (policy.name(), policy.goes_by_the_bit());
        let chosen: AnyPolicy = Box::new(policy);
        assert_eq!((chosen.name(), chosen.goes_by_the_bit()), of_itself);
        of_itself
    }
    assert_eq!(about(Mapcount), ("mapcount", false));
    assert_eq!(about(MapcountForcedBreak), ("mapcount-forced-break", false));
    assert_eq!(about(Refcount), ("refcount", false));
    assert_eq!(about(Seed).0, "seed");
    assert_eq!(about(SeedRecompute).0, "seed-recompute");
    assert_eq!(about(Exclusive), ("exclusive", true));
    assert_eq!(about(Biased::new(Exclusive)), ("exclusive", true));
    assert_eq!(about(Biased::new(Refcount)), ("refcount", false));
}

/// The flag of `MMF_HAS_PINNED`, and 1,024 references that look like a pin.
#[test]
fn biased_counts_a_pin_as_1024_references_once_something_was_pinned() {
    let biased = Biased::new(Exclusive);
    let (few, many, pinned) = (
        frame(1, 1022, 0, true),
        frame(1, 1023, 0, true),
        frame(1, 0, 1, true),
    );
    assert!(
        [few, many, pinned].into_iter().all(|f| biased.may_share(f)),
        "nothing was pinned"
    );
    let _ = biased.may_pin(few, Access::Read);
    let shared = [few, many, pinned].map(|f| biased.may_share(f));
    assert_eq!(shared, [true, false, false]);
    assert!(biased.may_share(frame(2, 0, 0, false)));
    // Refused pins count too, and reuse and pin are the policy's own.
    let biased = Biased::new(Exclusive);
    assert!(!biased.may_pin(frame(1, 0, 0, false), Access::Write));
    assert!(!biased.may_share(many));
    for frame in [many, pinned, frame(1, 0, 0, false), frame(2, 1, 0, false)] {
        assert_eq!(biased.may_reuse(frame), Exclusive.may_reuse(frame));
        assert_eq!(
            biased.may_pin(frame, Access::Read),
            Exclusive.may_pin(frame, Access::Read)
        );
    }
    assert!(!Biased::<Refcount>::default().may_reuse(frame(1, 1, 0, true)));
    let refcount = Biased::new(Refcount);
    assert!(refcount.may_pin(frame(2, 0, 0, false), Access::Write));
    // A mapping is a reference as well.
    assert!(!refcount.may_share(frame(512, 512, 0, false)));
    assert!(refcount.may_share(frame(511, 512, 0, false)));
}

/// D6 and D6b of PROTOCOL.md: many readers cost a copy where something was ever pinned.
#[test]
fn d6_many_readers_look_like_a_pin_to_a_biased_count() {
    for (pin_first, copies) in [(true, 1), (false, 0)] {
        let w = world_under(Box::new(Biased::new(Exclusive)), 4, 64);
        w.vm.cpu_write(P, 5).unwrap();
        if pin_first {
            drop(w.vm.space.pin(Q, Access::Read).unwrap());
        }
        let gets: Vec<_> = (0..1024)
            .map(|_| w.vm.space.get(P, Access::Read).unwrap())
            .collect();
        let frozen = w.vm.space.fork().unwrap();
        assert_eq!(w.stats().eager_copied, copies);
        assert_eq!(frozen.frame(P).unwrap() != w.entry(P).pfn(), pin_first);
        w.vm.cpu_write(P, 6).unwrap();
        assert_eq!(w.vm.read_frozen(&frozen, P), 5, "correct either way");
        drop(gets);
    }
}

/// What a scenario of PROTOCOL.md 8 ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Ok,
    /// Isolation is broken: somebody sees what another wrote.
    Leak,
    /// Coherence is broken: the device and the guest have different pages.
    Diverged,
}
use Verdict::{Diverged, Leak, Ok as Fine};

/// The scenarios of PROTOCOL.md 8 that tell the policies apart, for base pages, under one of them.
#[derive(Clone, Copy)]
struct Scenarios(fn() -> AnyPolicy);

impl Scenarios {
    fn world(self) -> World {
        world_under(self.0(), 4, 64)
    }

    fn running_clone(self, w: &World, of: &Frozen) -> SoftVm<AnyPolicy> {
        SoftVm::clone_of(of, &w.memory, self.0()).unwrap()
    }

    /// The child reads through a hold, and is gone; the parent writes.
    fn b1(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        let frozen = w.vm.space.fork().unwrap();
        let child = self.running_clone(&w, &frozen);
        let get = child.space.get(P, Access::Read).unwrap();
        drop((child, frozen));
        w.vm.cpu_write(P, 6).unwrap();
        leak_unless(w.vm.read_held(&get) == 5)
    }

    /// The parent holds, forks, and unmaps; the child writes.
    fn b3(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        let get = w.vm.space.get(P, Access::Read).unwrap();
        let frozen = w.vm.space.fork().unwrap();
        let child = self.running_clone(&w, &frozen);
        drop(frozen);
        w.vm.space.discard(P, 1).unwrap();
        child.cpu_write(P, 6).unwrap();
        leak_unless(w.vm.read_held(&get) == 5)
    }

    /// Write-protection without intent to copy, under a device that writes.
    fn c1(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        let pin = w.vm.space.pin(P, Access::Write).unwrap();
        w.vm.space.take_dirty().unwrap();
        w.vm.cpu_write(P, 6).unwrap();
        coherent(&w, &pin)
    }

    /// A device holds the page over a fork, and the parent writes.
    fn d1(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        let pin = w.vm.space.pin(P, Access::Write).unwrap();
        let _frozen = w.vm.space.fork().unwrap();
        w.vm.cpu_write(P, 6).unwrap();
        coherent(&w, &pin)
    }

    /// A device holds the page over a fork, and writes.
    fn d2(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        let pin = w.vm.space.pin(P, Access::Write).unwrap();
        let frozen = w.vm.space.fork().unwrap();
        w.vm.dma_write(&pin, 6);
        leak_unless(w.vm.read_frozen(&frozen, P) == 5)
    }

    /// As D1, with a hold: nobody promises anything.
    fn d3(self) -> Verdict {
        let w = self.world();
        let get = w.vm.space.get(P, Access::Write).unwrap();
        let _frozen = w.vm.space.fork().unwrap();
        w.vm.cpu_write(P, 6).unwrap();
        diverged_unless(w.vm.read_held(&get) == 6)
    }

    /// A device reads a page that was read-only and the parent's own, over a fork.
    fn d4b(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        w.vm.space.take_dirty().unwrap();
        let pin = w.vm.space.pin(P, Access::Read).unwrap();
        let _frozen = w.vm.space.fork().unwrap();
        w.vm.cpu_write(P, 6).unwrap();
        coherent(&w, &pin)
    }

    /// A device reads a shared page.
    fn e1(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        let _frozen = w.vm.space.fork().unwrap();
        let pin = w.vm.space.pin(P, Access::Read).unwrap();
        w.vm.cpu_write(P, 6).unwrap();
        coherent(&w, &pin)
    }

    /// A device reads a page that was shared.
    fn e3(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        drop(w.vm.space.fork().unwrap());
        let pin = w.vm.space.pin(P, Access::Read).unwrap();
        w.vm.cpu_write(P, 6).unwrap();
        coherent(&w, &pin)
    }

    /// A device reads a page that was write-protected without intent to copy.
    fn e4(self) -> Verdict {
        let w = self.world();
        w.vm.cpu_write(P, 5).unwrap();
        w.vm.space.take_dirty().unwrap();
        let pin = w.vm.space.pin(P, Access::Read).unwrap();
        w.vm.cpu_write(P, 6).unwrap();
        coherent(&w, &pin)
    }

    /// A device reads memory that was never touched. The zero frame is not counted, whoever pins it.
    fn e5(self) -> Verdict {
        let w = self.world();
        let pin = w.vm.space.pin(P, Access::Read).unwrap();
        assert_eq!(w.pool.state(Pfn::ZERO).refs(), 0);
        assert_eq!(pin.pfn() == Pfn::ZERO, w.slot(P) == "ZERO");
        assert_eq!(w.pool.usage().in_use, u64::from(pin.pfn() != Pfn::ZERO));
        w.vm.cpu_write(P, 6).unwrap();
        coherent(&w, &pin)
    }

    fn all(self) -> [Verdict; 11] {
        [
            self.b1(),
            self.b3(),
            self.c1(),
            self.d1(),
            self.d2(),
            self.d3(),
            self.d4b(),
            self.e1(),
            self.e3(),
            self.e4(),
            self.e5(),
        ]
    }
}

fn coherent(w: &World, pin: &Pin) -> Verdict {
    diverged_unless(w.vm.dma_read(pin) == w.vm.cpu_read(P))
}

fn diverged_unless(fine: bool) -> Verdict {
    if fine { Fine } else { Diverged }
}

fn leak_unless(fine: bool) -> Verdict {
    if fine { Fine } else { Leak }
}

#[test]
fn each_policy_fails_where_the_kernel_did() {
    let columns = [
        ("mapcount", Scenarios(|| Box::new(Mapcount)).all()),
        (
            "forced break",
            Scenarios(|| Box::new(MapcountForcedBreak)).all(),
        ),
        ("refcount", Scenarios(|| Box::new(Refcount)).all()),
        ("seed", Scenarios(|| Box::new(Seed)).all()),
        ("exclusive", Scenarios(|| Box::new(Exclusive)).all()),
    ];
    let rows = [
        //       mapcount  forced    refcount  seed      exclusive
        ("B1", [Leak, Fine, Fine, Fine, Fine]),
        ("B3", [Leak, Leak, Fine, Fine, Fine]),
        ("C1", [Fine, Fine, Diverged, Fine, Fine]),
        ("D1", [Diverged, Diverged, Fine, Fine, Fine]),
        ("D2", [Leak, Leak, Fine, Fine, Fine]),
        ("D3", [Diverged; 5]),
        ("D4b", [Diverged, Diverged, Diverged, Fine, Fine]),
        ("E1", [Diverged, Fine, Diverged, Diverged, Fine]),
        ("E3", [Fine, Fine, Diverged, Diverged, Fine]),
        ("E4", [Fine, Fine, Diverged, Fine, Fine]),
        ("E5", [Diverged, Fine, Diverged, Diverged, Fine]),
    ];
    for (row, (scenario, expected)) in rows.into_iter().enumerate() {
        for ((policy, verdicts), expected) in columns.into_iter().zip(expected) {
            assert_eq!(verdicts[row], expected, "{scenario} under {policy}");
        }
    }
}
