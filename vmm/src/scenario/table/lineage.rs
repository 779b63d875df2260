//! Group L, which is ours: address spaces with siblings, and children of children.
//!
//! PROTOCOL.md has a parent and one child throughout. A frame that three share can go wrong in ways that one
//! of two cannot, and clones of virtual machines are many.

use super::super::performer::Hold::{GetRead, PinRead, PinWrite};
use super::super::performer::Who::{C, D, G, P};
use super::super::script::Slot::{RS, RX, WX};
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Diverged as Div, Leaked as Leak, Ok};
use super::template::{HUGE, LRU_BATCH, PLAIN};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "L1",
        title: "a parent and two clones write the same page",
        about: "The first two to write get copies; the last of three is alone with the old page then, and \
                writes in place.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Fork(P, D),
            Write(P, 0),
            Is(C, 0, RS),
            Write(C, 0),
            Is(D, 0, RS),
            Write(D, 0),
            Is(D, 0, WX),
            Read(P, 0),
            Read(C, 0),
            Read(D, 0),
        ],
        copies: Some(2),
        kernel_may: LRU_BATCH,
        ..PLAIN
    },
    Scenario {
        id: "L2",
        title: "parent and child end, then the grandchild writes",
        about: "The last of three takes the frame over without a copy (T4), though it was never its parent's \
                alone.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Fork(C, G),
            Exit(P),
            Exit(C),
            Is(G, 0, RS),
            Write(G, 0),
            Is(G, 0, WX),
        ],
        copies: Some(0),
        kernel_may: LRU_BATCH,
        ..PLAIN
    },
    Scenario {
        id: "L3",
        title: "a clone of a clone, after the one in the middle is gone",
        about: "It shares with its grandparent what nobody wrote, and has what its parent wrote to itself: \
                the first is copied when it is written, the second is not.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Fork(P, C),
            Write(C, 1),
            Fork(C, G),
            Exit(C),
            Write(P, 0),
            Read(G, 0),
            Read(G, 1),
            Write(G, 1),
            Is(G, 1, WX),
            Write(G, 0),
            Is(G, 0, WX),
            Read(P, 0),
            Read(P, 1),
        ],
        // C's of page 1, and P's of page 0.
        copies: Some(2),
        kernel_may: LRU_BATCH,
        ..PLAIN
    },
    Scenario {
        id: "L4",
        title: "a clone's reader holds a page, the clone unmaps it; its sibling writes",
        about: "B1 among the children of a zygote: the parent's write is copied still, because two map the \
                page; the sibling is the only one left by mappings, and its secret is read.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Fork(P, D),
            Take(C, 0, GetRead),
            Discard(C, 0),
            Write(P, 0),
            HoldReads(0),
            Write(D, 0),
            HoldReads(0),
        ],
        copies: Some(2),
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "L5",
        title: "a grandchild's reader holds a page, child and grandchild end, the parent writes",
        about: "B1 over a generation.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Fork(C, G),
            Take(G, 0, GetRead),
            Exit(G),
            Exit(C),
            Write(P, 0),
            HoldReads(0),
        ],
        copies: Some(1),
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "L6",
        title: "a device pins a clone's page, parent and sibling write, the device writes",
        about: "To be pinned for writing, the page was made the clone's own: of those that go on sharing, \
                the first to write gets a copy, and the device reaches nobody but its clone.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Fork(P, D),
            Take(C, 0, PinWrite),
            Is(C, 0, WX),
            Write(D, 0),
            Write(P, 0),
            HoldWrites(0),
            Read(C, 0),
            Write(C, 0),
            HoldReads(0),
            Read(P, 0),
            Read(D, 0),
        ],
        copies: Some(2),
        kernel_may: LRU_BATCH,
        ..PLAIN
    },
    Scenario {
        id: "L7",
        title: "a reading device pins a clone's page, sibling and clone write",
        about: "E1 with a sibling: while others share the page still, the clone writes, and its device must \
                see it.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Fork(P, D),
            Take(C, 0, PinRead),
            Is(C, 0, RX),
            Write(D, 0),
            Write(C, 0),
            HoldReads(0),
            Read(P, 0),
            Read(D, 0),
        ],
        copies: Some(2),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "L8",
        title: "a device holds the parent's page, a child is forked, and its child",
        about: "The first fork copies for the child (T11). The child's page is held by nobody, so the second \
                shares it (T10), and the device reaches neither.",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Fork(P, C),
            Fork(C, G),
            Is(P, 0, WX),
            Is(C, 0, RS),
            Is(G, 0, RS),
            Write(P, 0),
            HoldReads(0),
            HoldWrites(0),
            Read(P, 0),
            Read(C, 0),
            Write(C, 0),
            Read(G, 0),
        ],
        copies: Some(2),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "L9",
        title: "a device holds the parent's page over two forks, and writes in between",
        about: "Each child gets a copy of its own, of its own time, and is alone with it: it writes in \
                place. (The child's page is read-only at first here, where the kernel maps it writable, \
                T11.)",
        steps: &[
            Write(P, 0),
            Take(P, 0, PinWrite),
            Fork(P, C),
            HoldWrites(0),
            Fork(P, D),
            HoldWrites(0),
            Is(P, 0, WX),
            Read(C, 0),
            Read(D, 0),
            Write(C, 0),
            Is(C, 0, WX),
            Write(D, 0),
            Is(D, 0, WX),
            Read(P, 0),
            Read(C, 0),
        ],
        copies: Some(2),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "L10",
        title: "a device pins a child's page, the child forks, and writes",
        about: "D1 and D2 a generation later: the page that the child shared was made its own for the pin, \
                and the fork copies it for the grandchild.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Take(C, 0, PinWrite),
            Fork(C, G),
            Is(C, 0, WX),
            Write(C, 0),
            HoldReads(0),
            HoldWrites(0),
            Read(C, 0),
            Read(G, 0),
            Read(P, 0),
        ],
        copies: Some(2),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "L11",
        title: "parent and child end, a reading device pins the grandchild's page",
        about: "E3 with three: provably the last, and made exclusive in place (T7).",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Fork(C, G),
            Exit(P),
            Exit(C),
            Take(G, 0, PinRead),
            Is(G, 0, RX),
            Write(G, 0),
            HoldReads(0),
        ],
        copies: Some(0),
        expected: Expected::each([Ok, Ok, Div, Div, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "L12",
        title: "a fork of a child that finds no memory for the copy of a pinned page",
        about: "D13 a generation later: the fork fails as a whole, child and pin are unharmed, and the \
                parent sees nothing of it.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Fork(P, C),
            Take(C, 1, PinWrite),
            Write(C, 0),
            ExhaustMemory,
            Refused(&Fork(C, G)),
            FreeMemory,
            Write(C, 0),
            Write(C, 1),
            HoldReads(0),
            HoldWrites(0),
            Read(C, 1),
            Read(P, 0),
            Read(P, 1),
            Fork(C, G),
            HoldWrites(0),
            Read(G, 1),
        ],
        // C's two, and that of the pinned page for G.
        copies: Some(3),
        expected: Expected {
            mapcount: None,
            forced_break: None,
            ..Expected::all(Ok)
        },
        ..PLAIN
    },
    Scenario {
        id: "L13",
        title: "three share a huge folio, the one in the middle writes a page of it",
        about: "Its entry alone is split. When it has ended, the grandchild is the last of three for all of \
                the folio, and takes it over in one piece.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Fork(P, C),
            Fork(C, G),
            IsHuge(G, 0),
            Write(C, 1),
            IsSmall(C, 1),
            Is(C, 0, RS),
            IsHuge(P, 1),
            IsHuge(G, 1),
            Read(P, 1),
            Read(G, 1),
            Exit(P),
            Exit(C),
            Write(G, 1),
            IsHuge(G, 1),
            Is(G, 0, WX),
            Read(G, 0),
        ],
        copies: Some(1),
        kernel_may: LRU_BATCH,
        ..HUGE
    },
    Scenario {
        id: "L14",
        title: "a pinned page of a child's huge folio over a fork of the child",
        about: "D7 a generation later: the parent's entry stays huge, the child's is split, and the pinned \
                page alone is copied for the grandchild.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Fork(P, C),
            Take(C, 1, PinWrite),
            IsHuge(P, 1),
            IsSmall(C, 1),
            Fork(C, G),
            Is(C, 1, WX),
            Is(G, 0, RS),
            Write(C, 1),
            HoldReads(0),
            HoldWrites(0),
            Read(C, 1),
            Read(G, 0),
            Read(G, 1),
            Read(P, 1),
        ],
        copies: Some(2),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..HUGE
    },
];
