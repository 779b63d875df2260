//! Group D: forks of memory that devices have pinned.

use super::super::performer::Hold::{GetRead, GetWrite, PinRead, PinWrite};
use super::super::performer::Who::{C, P};
use super::super::script::Slot::{RS, WX};
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Copied, Diverged as Div, Leaked as Leak, Ok};
use super::template::{COPIES_ALL, HUGE, PLAIN};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "D1",
        title: "a device holds a page over a fork, the parent writes",
        about: "H3: to v5.8 the parent got the copy, and the device kept the child's page. Now fork copies \
                for the child (T11).",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Fork(P, C),
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
            Fork(P, C),
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
        about: "H20: nothing protects FOLL_GET over a fork, by design. The device writes into what is now \
                the child's page.",
        steps: &[
            Write(P, 0),
            Take(P, 0, GetWrite),
            Fork(P, C),
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
        about: "The page is possibly shared now, and the hold is a second reference: a copy, under all but \
                mapcount.",
        steps: &[
            Write(P, 0),
            Take(P, 0, GetWrite),
            Fork(P, C),
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
            Fork(P, C),
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
            Fork(P, C),
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
        about: "Where a pin is 1,024 references, so many readers look like one: a copy too many, and still \
                right.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Take(P, 1, PinWrite),
            Release(0),
            TakeMany(1024, P, 0, GetRead),
            Fork(P, C),
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
        steps: &[
            Write(P, 0),
            TakeMany(1024, P, 0, GetRead),
            Fork(P, C),
            Read(C, 0),
        ],
        copies: Some(0),
        kernels_pin_count: true,
        ..PLAIN
    },
    Scenario {
        id: "D7",
        title: "a pinned page of a huge folio over a fork",
        about: "Fork splits the entry, copies the pinned page for the child and shares the rest. The kernel \
                copies all 512 pages, because it counts pins by folio; PROTOCOL.md expects that, and \
                coherence and isolation do not need it: holds are counted by page here. A split that counts \
                references anew takes the bit from the pinned page, and this very fork shares it.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            IsHuge(P, 1),
            Take(P, 1, PinWrite),
            IsHuge(P, 1),
            Fork(P, C),
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
        about: "As D7. The kernel copies every page that is exclusive, because one of their folio is \
                pinned; here only the pinned one.",
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
            Fork(P, C),
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
            Refused(&Fork(P, C)),
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
];
