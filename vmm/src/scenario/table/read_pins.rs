//! Group E: pins for reading of pages that are shared or read-only.
//!
//! E1h, E3h and E5h are ours: the same on huge folios.

use super::super::performer::Hold::{GetRead, PinRead};
use super::super::performer::Who::{C, P};
use super::super::script::Slot::{RS, RX};
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Diverged as Div, Ok};
use super::template::{HUGE, PLAIN};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "E1",
        title: "fork, the parent's device pins the shared page for reading, the parent writes",
        about: "The page is made the parent's own when it is pinned (unshare, T8), not when it is written.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
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
            Fork(P, C),
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
        about: "To unshare a page of a shared folio splits the entry and copies that page, not the folio \
                (T8).",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Fork(P, C),
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
            Fork(P, C),
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
        about: "H17: the zero frame must not be pinned in the page's place. Linux does it right since v6.2 \
                (84209e87c696).",
        steps: &[Take(P, 0, PinRead), Is(P, 0, RX), Write(P, 0), HoldReads(0)],
        copies: Some(0),
        expected: Expected::each([Div, Ok, Div, Div, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "E5h",
        title: "E5 on memory for a huge folio",
        about: "The first touch gets all of it a folio, read-only and exclusive. (F15 has the kernel's huge \
                zero page, which is none of the page's own either.)",
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
        about: "FOLL_GET promises no coherence: the reader keeps the old page. That nothing leaks is all it \
                promises.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
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
            Fork(P, C),
            Protect(P),
            Take(P, 0, PinRead),
            Is(P, 0, RX),
            IsClean(P, 0),
        ],
        copies: Some(1),
        ..PLAIN
    },
];
