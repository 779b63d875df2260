//! Group B: missed COW. A reader's hold on a page that its own process has unmapped sees what the other
//! side writes later.

use super::super::performer::Hold::{GetRead, PinRead};
use super::super::performer::Who::{C, P};
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Leaked as Leak, Ok};
use super::template::{HUGE, PLAIN};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "B1",
        title: "the child holds a page as a reader, unmaps it, and the parent writes",
        about: "CVE-2020-29374 (H1): only mappings are counted, so the parent writes in place and the child \
                reads its secret through a pipe.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
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
            Fork(P, C),
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
        about: "B1 the other way round. Breaking COW for readers (v5.8) does not help: it was taken before \
                the fork.",
        steps: &[
            Write(P, 0),
            Take(P, 0, GetRead),
            Fork(P, C),
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
            Fork(P, C),
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
        about: "H12: as shipped to v5.17, refcount still went by mappings here, and leaked; ours does not. \
                A write fault that cannot prove that all of the folio is its own splits the entry and \
                copies one page.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Fork(P, C),
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
        about: "B1 with a pin: it made the child's page exclusive first, so the child had a copy (T8). The \
                child ends, where PROTOCOL.md has it unmap the page: a pinned page is not discarded here.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Take(C, 0, PinRead),
            Exit(C),
            Write(P, 0),
            HoldReads(0),
        ],
        copies: Some(1),
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..PLAIN
    },
];
