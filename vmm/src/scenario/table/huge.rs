//! Group F: huge entries that are split and made anew.

use super::super::performer::Hold::{GetRead, PinRead, PinWrite};
use super::super::performer::Who::{C, P};
use super::super::script::Slot::{RS, RX, WX};
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Broken as Bad, Copied, Diverged as Div, Leaked as Leak, Ok};
use super::template::{COPIES_ALL, HUGE};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "F1",
        title: "a huge entry is split, then all is written",
        about: "The bit spreads to every page (4.10), so no write copies. PROTOCOL.md has refcount copy, \
                since a folio in small entries has as many references as pages; here it is frames by then, \
                each with a count of its own.",
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
            Fork(P, C),
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
        about: "The bit must spread as it is. Where it is computed from the reference count, as the sketch \
                has it, the pin counts as a sharer: the page loses the bit that the pin was granted by.",
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
        about: "The pinned page is not moved and not given back; the others may be, and the folio is in \
                small entries then (4.11). Nothing that stands for its whole is refused here: it is frames, \
                and the pin is on one of them.",
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
        about: "The bit of the new huge entry is shared by the fork like any other. Here no page moves, \
                where the kernel copies into a new folio.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Take(P, 1, PinWrite),
            Fork(P, C),
            Release(0),
            Exit(C),
            Collapse(P, 0),
            IsHuge(P, 0),
            Is(P, 0, WX),
            Read(P, 2),
            Fork(P, C),
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
        about: "The kernel's collapse moves the pages, so it must refuse, and PROTOCOL.md has it so. Here \
                no frame moves: the huge entry is there again, the holds stay what they were, and the next \
                fork splits it and copies the pinned page.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Take(P, 1, PinWrite),
            Fork(P, C),
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
            Fork(P, C),
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
        about: "No part of the folio that is gone counts: the last holder of the page writes in place. \
                (Linux does so again: reuse of pages of a large folio came with v6.15, and leaves out a \
                folio with one page left.)",
        steps: &[
            Write(P, 1),
            DiscardRest(P, 1),
            IsSmall(P, 1),
            Fork(P, C),
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
            Fork(P, C),
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
            Fork(P, C),
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
            Fork(P, C),
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
];
