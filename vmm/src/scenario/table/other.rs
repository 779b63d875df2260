//! Group H: debuggers, moved pages, dirty tracking.

use super::super::performer::Hold::PinWrite;
use super::super::performer::Who::{C, P};
use super::super::script::Slot::{RS, RX};
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Diverged as Div, Ok};
use super::template::PLAIN;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "H-a",
        title: "fork, then a debugger writes to the parent's read-only page",
        about: "COW is broken first, the page stays read-only; proof that it may be written is the bit \
                (H18).",
        steps: &[
            Write(P, 0),
            Fork(P, C),
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
            Fork(P, C),
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
];
