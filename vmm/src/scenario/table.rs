//! The scenarios: PROTOCOL.md section 8, groups A to F and H, and a few of our own: with snapshots (S),
//! and of group E on huge folios (E1h, E3h, E5h).
//!
//! Expected verdicts are in the order mapcount, mapcount-forced-break, refcount, seed (and its recomputing
//! variant, if no other is said), exclusive.

use super::living::Disturbance;
use super::performer::Hold::{GetRead, GetWrite, PinRead, PinWrite};
use super::performer::Memory;
use super::performer::Who::{C, P, S};
use super::script::Slot::{RS, RX, WX};
use super::script::Step::*;
use super::script::{Expected, Scenario};
use super::verdict::Verdict;
use super::verdict::Verdict::{
    Broken as Bad, Copied, Diverged as Div, Leaked as Leak, NotRefused as Done, Ok,
};

/// What most scenarios have in common.
const PLAIN: Scenario = Scenario {
    id: "",
    title: "",
    about: "",
    memory: Memory::Base,
    steps: &[],
    copies: None,
    gets_must_follow: false,
    kernels_pin_count: false,
    expected: Expected::all(Ok),
    kernel_races: None,
    kernel_may: None,
};

/// What scenarios on a huge folio have in common.
const HUGE: Scenario = Scenario {
    memory: Memory::Huge,
    ..PLAIN
};

/// The kernel's fork of a folio with a pin.
const COPIES_ALL: Option<(Verdict, &str)> = Some((
    Copied,
    "pins are counted by folio, so all of its pages are copied for the child",
));

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "A1",
        title: "fork, then the parent writes",
        about: "Plain COW: the child keeps what was there.",
        steps: &[Write(P, 0), Fork, Write(P, 0), Read(C, 0), Read(P, 0)],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "A2",
        title: "fork, then the child writes",
        about: "Plain COW the other way round.",
        steps: &[Write(P, 0), Fork, Write(C, 0), Read(P, 0), Read(C, 0)],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "A3",
        title: "fork, the child ends, then the parent writes",
        about: "The last holder writes in place (T4).",
        steps: &[Write(P, 0), Fork, Exit(C), Write(P, 0), Is(P, 0, WX)],
        copies: Some(0),
        kernel_may: Some((
            Copied,
            "a page that is still in another CPU's LRU batch has a reference more (H11)",
        )),
        ..PLAIN
    },
    Scenario {
        id: "A4",
        title: "fork, write-protect there and back, then the parent writes",
        about: "A page that is possibly shared stays read-only when protection is lifted (T22).",
        steps: &[
            Write(P, 0),
            Fork,
            Protect(P),
            Is(P, 0, RS),
            Write(P, 0),
            Read(C, 0),
        ],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "A5",
        title: "fork, then both write",
        about: "The first to write gets a copy, the other keeps the old page: one copy in all.",
        steps: &[
            Write(P, 0),
            Fork,
            Write(P, 0),
            Write(C, 0),
            Read(P, 0),
            Read(C, 0),
        ],
        copies: Some(1),
        kernel_may: Some((
            Copied,
            "a page that is still in another CPU's LRU batch has a reference more (H11)",
        )),
        ..PLAIN
    },
    Scenario {
        id: "A7",
        title: "a fork that fails half-way",
        about: "The machine refuses to map the child's memory: the parent is whole and writes on.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            RefuseMmu(2),
            Refused(&Fork),
            Read(P, 1),
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Fork,
            Write(P, 1),
            Read(C, 1),
        ],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "A8",
        title: "fork with untouched memory, then the parent writes to it",
        about: "The child reads zeros.",
        steps: &[Fork, Write(P, 0), Read(C, 0), Write(C, 1), Read(P, 1)],
        copies: Some(0),
        ..PLAIN
    },
    Scenario {
        id: "B1",
        title: "the child holds a page as a reader, unmaps it, and the parent writes",
        about: "CVE-2020-29374 (H1): only mappings are counted, so the parent writes in place and the child reads \
                its secret through a pipe.",
        steps: &[
            Write(P, 0),
            Fork,
            Take(C, 0, GetRead),
            Discard(C, 0),
            Write(P, 0),
            HoldReads(0),
        ],
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "B2",
        title: "B1, with the parent's memory write-protected in between",
        about: "Protection there and back must not hide that the page is shared.",
        steps: &[
            Write(P, 0),
            Fork,
            Take(C, 0, GetRead),
            Discard(C, 0),
            Protect(P),
            Write(P, 0),
            HoldReads(0),
        ],
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "B3",
        title: "the parent's reader holds a page over a fork, the parent unmaps it, the child writes",
        about: "B1 the other way round. Breaking COW for readers (v5.8) does not help: it was taken before the fork.",
        steps: &[
            Write(P, 0),
            Take(P, 0, GetRead),
            Fork,
            Discard(P, 0),
            Write(C, 0),
            HoldReads(0),
        ],
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "B4",
        title: "fork, the parent's reader takes a page, the parent unmaps it, the child writes",
        about: "B3 with the hold taken after the fork.",
        steps: &[
            Write(P, 0),
            Fork,
            Take(P, 0, GetRead),
            Discard(P, 0),
            Write(C, 0),
            HoldReads(0),
        ],
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "B5",
        title: "B1 on a huge folio",
        about: "H12: as shipped to v5.17, refcount still went by mappings here, and leaked; ours does not. A write fault that cannot prove \
                that all of the folio is its own splits the entry and copies one page.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Fork,
            IsHuge(P, 0),
            IsHuge(C, 0),
            Take(C, 0, GetRead),
            Discard(C, 0),
            Write(P, 0),
            HoldReads(0),
            Read(C, 1),
        ],
        copies: Some(1),
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..HUGE
    },
    Scenario {
        id: "B8",
        title: "the child's device pins a page for reading, the child ends, and the parent writes",
        about: "B1 with a pin: it made the child's page exclusive first, so the child had a copy (T8). The child ends, where \
                PROTOCOL.md has it unmap the page: a pinned page is not discarded here.",
        steps: &[
            Write(P, 0),
            Fork,
            Take(C, 0, PinRead),
            Exit(C),
            Write(P, 0),
            HoldReads(0),
        ],
        copies: Some(1),
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "C1",
        title: "a pinned page is write-protected, then the parent writes",
        about: "H8: the pin is a second reference, so refcount copies, and the device keeps the old page.",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Protect(P),
            Is(P, 0, RX),
            Write(P, 0),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 0),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "C2",
        title: "a read from disk is in flight, the page is write-protected, the parent writes beside it",
        about: "H5: O_DIRECT of old held pages without pinning them; what the disk delivers is lost. The kernel is asked with a read from a real \
                disk, round after round, since no step can have it wait.",
        steps: &[
            Write(P, 0),
            Take(P, 0, GetWrite),
            Protect(P),
            Write(P, 0),
            HoldWrites(0),
            Read(P, 0),
        ],
        copies: Some(0),
        gets_must_follow: true,
        expected: Expected::each([Ok, Ok, Div, Ok, Ok]),
        kernel_races: Some(Disturbance::Protect),
        ..PLAIN
    },
    Scenario {
        id: "C5",
        title: "a pinned page under dirty tracking, round after round",
        about: "Each round write-protects, and the next write lifts it with no copy (T3, T21).",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Protect(P),
            Write(P, 0),
            HoldWrites(0),
            Protect(P),
            Read(P, 0),
            Write(P, 0),
            HoldReads(0),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "C7",
        title: "a pinned page is to be moved to another frame",
        about: "Refused, and nothing has changed (T19, I10).",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Refused(&Migrate(P, 0)),
            Is(P, 0, WX),
            Write(P, 0),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 0),
            Release(0),
            Migrate(P, 0),
            Read(P, 0),
        ],
        copies: Some(0),
        ..PLAIN
    },
    Scenario {
        id: "C8",
        title: "a page that a reader holds is to be moved to another frame",
        about: "Refused, because the references do not add up; it stays exclusive.",
        steps: &[
            Write(P, 0),
            Take(P, 0, GetRead),
            Refused(&Migrate(P, 0)),
            Is(P, 0, WX),
            Write(P, 0),
            HoldReads(0),
        ],
        copies: Some(0),
        gets_must_follow: true,
        ..PLAIN
    },
    Scenario {
        id: "C9",
        title: "a page that a reader holds is write-protected, then written",
        about: "H11: any reference makes refcount copy. Right, and slow.",
        steps: &[Write(P, 0), Take(P, 0, GetRead), Protect(P), Write(P, 0)],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Copied, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "C10",
        title: "a pinned page is to be merged with another of equal content",
        about: "Refused while a device holds it (T23).",
        steps: &[
            Write(P, 0),
            WriteSame(P, 1, 0),
            Take(P, 0, PinWrite),
            Refused(&Merge((P, 0), (P, 1))),
            Refused(&Merge((P, 1), (P, 0))),
            Is(P, 0, WX),
            HoldWrites(0),
            Read(P, 0),
            Read(P, 1),
        ],
        copies: Some(0),
        ..PLAIN
    },
    Scenario {
        id: "C12",
        title: "a page that was pinned once, then a fork",
        about: "Unpinned, it is shared like any other (T24).",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            HoldWrites(0),
            Release(0),
            Fork,
            Read(C, 0),
        ],
        copies: Some(0),
        ..PLAIN
    },
    Scenario {
        id: "C13",
        title: "a pinned page is to be given back to the host",
        about: "Refused here. Linux lets MADV_DONTNEED have its way: the device keeps an orphan, and its contract has ended (T25).",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Refused(&Discard(P, 0)),
            Read(P, 0),
        ],
        copies: Some(0),
        kernel_may: Some((Done, "MADV_DONTNEED of a pinned page is granted")),
        ..PLAIN
    },
    Scenario {
        id: "D1",
        title: "a device holds a page over a fork, the parent writes",
        about: "H3: to v5.8 the parent got the copy, and the device kept the child's page. Now fork copies for the child (T11).",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Fork,
            Is(P, 0, WX),
            Write(P, 0),
            HoldReads(0),
            Read(C, 0),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Div, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "D2",
        title: "a device holds a page over a fork, and writes",
        about: "To v5.8 it wrote into the child, too.",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Fork,
            HoldWrites(0),
            Read(P, 0),
            Read(C, 0),
        ],
        copies: Some(1),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "D3",
        title: "a writer's hold that is no pin, then a fork, the parent writes, the device writes",
        about: "H20: nothing protects FOLL_GET over a fork, by design. The device writes into what is now the child's page.",
        steps: &[
            Write(P, 0),
            Take(P, 0, GetWrite),
            Fork,
            Write(P, 0),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 0),
            Read(C, 0),
        ],
        gets_must_follow: true,
        expected: Expected::all(Leak),
        ..PLAIN
    },
    Scenario {
        id: "D3b",
        title: "D3, but the child ends before the parent writes",
        about: "The page is possibly shared now, and the hold is a second reference: a copy, under all but mapcount.",
        steps: &[
            Write(P, 0),
            Take(P, 0, GetWrite),
            Fork,
            Exit(C),
            Write(P, 0),
            HoldWrites(0),
            Read(P, 0),
        ],
        gets_must_follow: true,
        expected: Expected::each([Ok, Ok, Div, Div, Div]),
        ..PLAIN
    },
    Scenario {
        id: "D4",
        title: "a reading device holds a writable page over a fork, the parent writes",
        about: "D1 with a device that only reads.",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinRead),
            Fork,
            Write(P, 0),
            HoldReads(0),
            Read(C, 0),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Div, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "D4b",
        title: "a reading device holds a read-only exclusive page over a fork, the parent writes",
        about: "Fork copies for the child, but refcount's next write fault sees the pin as a sharer.",
        steps: &[
            Write(P, 0),
            Protect(P),
            Take(P, 0, PinRead),
            Fork,
            Write(P, 0),
            HoldReads(0),
            Read(C, 0),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Div, Div, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "D6",
        title: "1,024 readers of one page, in a process that has pinned another, then a fork",
        about: "Where a pin is 1,024 references, so many readers look like one: a copy too many, and still right.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Take(P, 1, PinWrite),
            Release(0),
            TakeMany(1024, P, 0, GetRead),
            Fork,
            Read(C, 0),
        ],
        copies: Some(0),
        kernels_pin_count: true,
        expected: Expected::each([Ok, Ok, Copied, Copied, Copied]),
        ..PLAIN
    },
    Scenario {
        id: "D6b",
        title: "1,024 readers of one page, in a process that never pinned any, then a fork",
        about: "MMF_HAS_PINNED spares those who never pin.",
        steps: &[Write(P, 0), TakeMany(1024, P, 0, GetRead), Fork, Read(C, 0)],
        copies: Some(0),
        kernels_pin_count: true,
        ..PLAIN
    },
    Scenario {
        id: "D7",
        title: "a pinned page of a huge folio over a fork",
        about: "Fork splits the entry, copies the pinned page for the child and shares the rest. The kernel copies all 512 pages, because it counts \
                pins by folio; PROTOCOL.md expects that, and coherence and isolation do not need it: holds are counted by page here. A \
                split that counts references anew takes the bit from the pinned page, and this very fork shares it.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            IsHuge(P, 1),
            Take(P, 1, PinWrite),
            IsHuge(P, 1),
            Fork,
            IsSmall(P, 1),
            Is(P, 1, WX),
            Is(P, 0, RS),
            Write(P, 1),
            HoldReads(0),
            Write(P, 0),
            Read(C, 0),
            Read(C, 1),
            Read(C, 2),
        ],
        // Of the pinned page by the fork, of the other by the write.
        copies: Some(2),
        expected: Expected::each([Div, Div, Ok, Ok, Ok]).recomputed(Div),
        kernel_may: COPIES_ALL,
        ..HUGE
    },
    Scenario {
        id: "D8",
        title: "D7 with the folio in small entries",
        about: "As D7. The kernel copies every page that is exclusive, because one of their folio is pinned; here only the pinned one.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Protect(P),
            IsSmall(P, 1),
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Take(P, 1, PinWrite),
            Fork,
            Is(P, 1, WX),
            Is(P, 0, RS),
            Is(P, 3, RS),
            Write(P, 1),
            HoldReads(0),
            Read(C, 0),
            Read(C, 1),
            Read(C, 3),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Div, Ok, Ok, Ok]),
        kernel_may: COPIES_ALL,
        ..HUGE
    },
    Scenario {
        id: "D13",
        title: "a fork that finds no memory for the copy of a pinned page",
        about: "The fork fails as a whole; parent and pin are unharmed.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Take(P, 1, PinWrite),
            ExhaustMemory,
            Refused(&Fork),
            FreeMemory,
            Write(P, 0),
            Write(P, 1),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 1),
        ],
        copies: Some(0),
        expected: Expected {
            mapcount: None,
            forced_break: None,
            refcount: Some(Ok),
            seed: Some(Ok),
            recompute: Some(Ok),
            exclusive: Some(Ok),
        },
        ..PLAIN
    },
    Scenario {
        id: "E1",
        title: "fork, the parent's device pins the shared page for reading, the parent writes",
        about: "The page is made the parent's own when it is pinned (unshare, T8), not when it is written.",
        steps: &[
            Write(P, 0),
            Fork,
            Take(P, 0, PinRead),
            Is(P, 0, RX),
            Write(P, 0),
            HoldReads(0),
            Read(C, 0),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "E3",
        title: "E1, but the child has ended",
        about: "Provably the last: made exclusive in place (T7).",
        steps: &[
            Write(P, 0),
            Fork,
            Exit(C),
            Take(P, 0, PinRead),
            Is(P, 0, RX),
            Write(P, 0),
            HoldReads(0),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Div, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "E1h",
        title: "E1 on a huge folio",
        about: "To unshare a page of a shared folio splits the entry and copies that page, not the folio (T8).",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Fork,
            IsHuge(P, 1),
            Take(P, 1, PinRead),
            IsSmall(P, 1),
            Is(P, 1, RX),
            Is(P, 0, RS),
            Write(P, 1),
            HoldReads(0),
            Read(C, 0),
            Read(C, 1),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..HUGE
    },
    Scenario {
        id: "E3h",
        title: "E3 on a huge folio",
        about: "Provably the last holder of all of it: exclusive in place, all of it, and huge still (T7).",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Fork,
            Exit(C),
            Take(P, 1, PinRead),
            IsHuge(P, 1),
            Is(P, 1, RX),
            Is(P, 0, RX),
            Write(P, 1),
            HoldReads(0),
            IsHuge(P, 1),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Div, Ok]),
        ..HUGE
    },
    Scenario {
        id: "E4",
        title: "a write-protected page is pinned for reading, then written",
        about: "Read-only and exclusive: nothing to unshare (T6), and the write copies nothing (T3).",
        steps: &[
            Write(P, 0),
            Protect(P),
            Take(P, 0, PinRead),
            Is(P, 0, RX),
            Write(P, 0),
            HoldReads(0),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "E5",
        title: "untouched memory is pinned for reading, then written",
        about: "H17: the zero frame must not be pinned in the page's place. Linux does it right since v6.2 (84209e87c696).",
        steps: &[Take(P, 0, PinRead), Is(P, 0, RX), Write(P, 0), HoldReads(0)],
        copies: Some(0),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "E5h",
        title: "E5 on memory for a huge folio",
        about: "The first touch gets all of it a folio, read-only and exclusive. (F15 has the kernel's huge zero page, which is none of the \
                page's own either.)",
        steps: &[
            Take(P, 1, PinRead),
            IsHuge(P, 1),
            Is(P, 1, RX),
            Is(P, 0, RX),
            Write(P, 1),
            HoldReads(0),
            IsHuge(P, 1),
        ],
        copies: Some(0),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..HUGE
    },
    Scenario {
        id: "E8",
        title: "fork, a reader takes the shared page, the parent writes",
        about: "FOLL_GET promises no coherence: the reader keeps the old page. That nothing leaks is all it promises.",
        steps: &[
            Write(P, 0),
            Fork,
            Take(P, 0, GetRead),
            Write(P, 0),
            HoldReads(0),
        ],
        gets_must_follow: true,
        expected: Expected::each([Div, Ok, Div, Div, Div]),
        ..PLAIN
    },
    Scenario {
        id: "E9",
        title: "a merged page is pinned for reading, then written",
        about: "Unshare gives it a frame of its own; the other page keeps the merged one.",
        steps: &[
            Write(P, 0),
            WriteSame(P, 1, 0),
            Merge((P, 0), (P, 1)),
            Take(P, 0, PinRead),
            Is(P, 0, RX),
            Write(P, 0),
            HoldReads(0),
            Read(P, 1),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "E10",
        title: "a shared page under dirty tracking is pinned for reading",
        about: "I11: unshare leaves the page protected, and it does not count as written.",
        steps: &[
            Write(P, 0),
            Fork,
            Protect(P),
            Take(P, 0, PinRead),
            Is(P, 0, RX),
            IsClean(P, 0),
        ],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "F1",
        title: "a huge entry is split, then all is written",
        about: "The bit spreads to every page (4.10), so no write copies. PROTOCOL.md has refcount copy, since a folio in small entries has as many \
                references as pages; here it is frames by then, each with a count of its own.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            IsHuge(P, 0),
            Protect(P),
            IsSmall(P, 0),
            Is(P, 0, RX),
            Is(P, 3, RX),
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Is(P, 0, WX),
            Is(P, 3, WX),
        ],
        copies: Some(0),
        ..HUGE
    },
    Scenario {
        id: "F2",
        title: "a shared huge entry is split, then written",
        about: "There is no bit to spread: all pages are possibly shared, and the write copies its own.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Fork,
            IsHuge(P, 0),
            Protect(P),
            IsSmall(P, 0),
            IsHuge(C, 0),
            Is(P, 0, RS),
            Is(P, 3, RS),
            Write(P, 2),
            Is(P, 2, WX),
            Is(P, 1, RS),
            Read(C, 1),
            Read(C, 2),
            Read(P, 2),
        ],
        copies: Some(1),
        ..HUGE
    },
    Scenario {
        id: "F4",
        title: "a huge entry is split under a device's pin",
        about: "The bit must spread as it is. Where it is computed from the reference count, as the sketch has it, the pin counts as a sharer: \
                the page loses the bit that the pin was granted by.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            IsHuge(P, 1),
            Take(P, 1, PinWrite),
            Protect(P),
            IsSmall(P, 1),
            Is(P, 1, RX),
            Is(P, 0, RX),
            Write(P, 1),
            Write(P, 0),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 1),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Ok, Ok]).recomputed(Div),
        ..HUGE
    },
    Scenario {
        id: "F5",
        title: "a folio with a pinned page is taken apart",
        about: "The pinned page is not moved and not given back; the others may be, and the folio is in small entries then (4.11). Nothing that \
                stands for its whole is refused here: it is frames, and the pin is on one of them.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Take(P, 1, PinWrite),
            Refused(&Migrate(P, 1)),
            Refused(&Discard(P, 1)),
            IsSmall(P, 1),
            Is(P, 1, WX),
            Migrate(P, 0),
            Discard(P, 2),
            Refused(&Migrate(P, 1)),
            Read(P, 0),
            Write(P, 1),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 1),
        ],
        copies: Some(0),
        // The refused operation split the folio, and the pin lost its bit.
        expected: Expected::all(Ok).recomputed(Bad),
        ..HUGE
    },
    Scenario {
        id: "F8",
        title: "small pages become a huge folio, then fork",
        about: "The bit of the new huge entry is shared by the fork like any other. Here no page moves, where the kernel copies into a new folio.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Take(P, 1, PinWrite),
            Fork,
            Release(0),
            Exit(C),
            Collapse(P, 0),
            IsHuge(P, 0),
            Is(P, 0, WX),
            Read(P, 2),
            Fork,
            Is(P, 3, RS),
            Write(P, 3),
            Read(C, 0),
            Read(C, 3),
        ],
        ..HUGE
    },
    Scenario {
        id: "F10",
        title: "small pages that are held become a folio",
        about: "The kernel's collapse moves the pages, so it must refuse, and PROTOCOL.md has it so. Here no frame moves: the huge entry is \
                there again, the holds stay what they were, and the next fork splits it and copies the pinned page.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Take(P, 1, PinWrite),
            Fork,
            Exit(C),
            Write(P, 2),
            Take(P, 2, GetRead),
            Collapse(P, 0),
            IsHuge(P, 1),
            Write(P, 1),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 1),
            Write(P, 2),
            HoldReads(1),
            Fork,
            Is(P, 1, WX),
            Write(P, 1),
            HoldReads(0),
            Read(C, 1),
            Read(C, 2),
        ],
        // Of the pinned page, by each fork.
        copies: Some(2),
        expected: Expected::each([Div, Div, Ok, Ok, Ok]).recomputed(Div),
        kernel_may: COPIES_ALL,
        ..HUGE
    },
    Scenario {
        id: "F14a",
        title: "A3 on the last page left of a huge folio",
        about: "No part of the folio that is gone counts: the last holder of the page writes in place. (Linux does so again: reuse of pages of a \
                large folio came with v6.15, and leaves out a folio with one page left.)",
        steps: &[
            Write(P, 1),
            DiscardRest(P, 1),
            IsSmall(P, 1),
            Fork,
            Exit(C),
            Write(P, 1),
            Is(P, 1, WX),
            Read(P, 2),
        ],
        copies: Some(0),
        kernel_may: Some((
            Copied,
            "the last page of a large folio is not reused, so that the folio goes (1da190f4d0a6)",
        )),
        ..HUGE
    },
    Scenario {
        id: "F14b",
        title: "B1 on the last page left of a huge folio",
        about: "As B1.",
        steps: &[
            Write(P, 1),
            DiscardRest(P, 1),
            Fork,
            Take(C, 1, GetRead),
            Discard(C, 1),
            Write(P, 1),
            HoldReads(0),
        ],
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..HUGE
    },
    Scenario {
        id: "F14c",
        title: "C1 on the last page left of a huge folio",
        about: "As C1.",
        steps: &[
            Write(P, 1),
            DiscardRest(P, 1),
            Take(P, 1, PinWrite),
            Protect(P),
            Is(P, 1, RX),
            Write(P, 1),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 1),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Ok, Ok]),
        ..HUGE
    },
    Scenario {
        id: "F14d",
        title: "D1 on the last page left of a huge folio",
        about: "As D1.",
        steps: &[
            Write(P, 1),
            DiscardRest(P, 1),
            Take(P, 1, PinWrite),
            Fork,
            Is(P, 1, WX),
            Write(P, 1),
            HoldReads(0),
            Read(C, 1),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Div, Ok, Ok, Ok]),
        ..HUGE
    },
    Scenario {
        id: "F14e",
        title: "E1 on the last page left of a huge folio",
        about: "As E1.",
        steps: &[
            Write(P, 1),
            DiscardRest(P, 1),
            Fork,
            Take(P, 1, PinRead),
            Is(P, 1, RX),
            Write(P, 1),
            HoldReads(0),
            Read(C, 1),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..HUGE
    },
    Scenario {
        id: "H-a",
        title: "fork, then a debugger writes to the parent's read-only page",
        about: "COW is broken first, the page stays read-only; proof that it may be written is the bit (H18).",
        steps: &[
            Write(P, 0),
            Fork,
            ForceWrite(P, 0),
            Is(P, 0, RX),
            Read(C, 0),
            Read(P, 0),
            Write(P, 0),
        ],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "H-b",
        title: "a shared page is to be moved to another frame",
        about: "Refused: somebody else maps it.",
        steps: &[
            Write(P, 0),
            Fork,
            Refused(&Migrate(P, 0)),
            Is(P, 0, RS),
            Write(P, 0),
            Migrate(P, 0),
            Read(P, 0),
            Read(C, 0),
        ],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "H-c",
        title: "dirty tracking meets a pinned page",
        about: "It is write-protected like any other: Linux 6.1 still skips it, for refcount's sake (H10).",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Protect(P),
            Is(P, 0, RX),
            HoldWrites(0),
            Read(P, 0),
            Write(P, 0),
            HoldReads(0),
            Release(0),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "K1",
        title: "equal pages of parent and child are merged, then both write",
        about: "Merging shares a frame across address spaces; the first to write gets a copy, the last writes in place.",
        steps: &[
            Write(P, 0),
            Fork,
            WriteSame(C, 0, 0),
            Merge((P, 0), (C, 0)),
            Is(P, 0, RS),
            Is(C, 0, RS),
            Write(C, 0),
            Read(P, 0),
            Write(P, 0),
            Read(C, 0),
        ],
        copies: Some(2),
        ..PLAIN
    },
    Scenario {
        id: "S1",
        title: "a snapshot, then the guest writes",
        about: "The snapshot has no vCPUs, so it is given the copy, and the guest keeps its frame (SharersMove).",
        steps: &[Write(P, 0), Snapshot, Write(P, 0), Read(S, 0), Read(P, 0)],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "S2",
        title: "a device holds a page over a snapshot, and writes",
        about: "D2 with a snapshot for a child: what a device writes must not show in the snapshot.",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Snapshot,
            HoldWrites(0),
            Read(P, 0),
            Read(S, 0),
        ],
        copies: Some(1),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "S3",
        title: "a snapshot, a reading device pins the shared page, the guest writes",
        about: "E1 with a snapshot for a child.",
        steps: &[
            Write(P, 0),
            Snapshot,
            Take(P, 0, PinRead),
            Write(P, 0),
            HoldReads(0),
            Read(S, 0),
        ],
        copies: Some(1),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "S4",
        title: "a guest goes back to a snapshot while a device holds its page",
        about: "The device's page is the guest's page, before the restore and after.",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Snapshot,
            Write(P, 0),
            Restore,
            HoldReads(0),
            Write(P, 0),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 0),
            Read(S, 0),
        ],
        copies: Some(1),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "S5",
        title: "a reader holds a page of a snapshot, the snapshot is dropped, the guest writes",
        about: "B1 with a snapshot: the reader must not see what the guest wrote later.",
        steps: &[
            Write(P, 0),
            Snapshot,
            Take(S, 0, GetRead),
            Exit(S),
            Write(P, 0),
            HoldReads(0),
        ],
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "S6",
        title: "a pinned folio, huge again past a snapshot",
        about: "The snapshot is given the copies, so the guest's frames stay where they are and one huge entry maps them again, with the pin on one.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Take(P, 1, PinWrite),
            Snapshot,
            IsSmall(P, 1),
            Is(P, 1, WX),
            Write(P, 0),
            Collapse(P, 2),
            IsHuge(P, 1),
            HoldWrites(0),
            Read(P, 1),
            Write(P, 1),
            HoldReads(0),
            Read(S, 0),
            Read(S, 1),
            Read(S, 2),
            Read(S, 3),
        ],
        copies: Some(4),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]).recomputed(Leak),
        ..HUGE
    },
];

/// Scenarios of PROTOCOL.md section 8 that are not here, and why.
pub const NOT_HERE: &[(&str, &str)] = &[
    (
        "A9, E6",
        "need file-backed private memory: guest memory here is anonymous",
    ),
    (
        "B7",
        "needs hugetlb, whose pages are reused by mapping count to this day",
    ),
    (
        "B6, C3, C3b, C4, D11",
        "need swap: guest memory here is never swapped by the VMM",
    ),
    ("C6", "needs NUMA hinting"),
    ("D5, E2, F7", "are races: model-checked in tests/loom"),
    (
        "D9",
        "needs an event at fork; here a child's pages are always read-only at first",
    ),
    (
        "D10",
        "needs entries that say a migration is going on; here it holds the region's lock",
    ),
    ("D14", "needs memory that forks leave out"),
    (
        "F6, F16",
        "need entries that say a migration is going on, or swap: here a split wants neither",
    ),
    (
        "F11",
        "needs userfaultfd; what is nearest, dirty tracking, leaves regions in small entries",
    ),
    (
        "F15",
        "needs a huge zero page: here untouched memory is in the one zero frame (E5, E5h)",
    ),
    ("E7", "needs short-term pins: ours are all long-term"),
    (
        "E11",
        "needs read-only memory: that unshare makes nothing writable is in E1 and E10",
    ),
    ("H-d", "is checked whenever a pin is given back"),
];

/// The scenario called `id`, whatever the case of its letters.
pub fn find(id: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|s| s.id.eq_ignore_ascii_case(id))
}
