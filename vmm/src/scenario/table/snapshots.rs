//! Group S, which is ours: snapshots, and guests that go back to them.

use super::super::performer::Hold::{GetRead, PinRead, PinWrite};
use super::super::performer::Who::{P, S};
use super::super::script::Slot::WX;
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Diverged as Div, Leaked as Leak, Ok};
use super::template::{HUGE, PLAIN};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "S1",
        title: "a snapshot, then the guest writes",
        about: "The snapshot has no vCPUs, so it is given the copy, and the guest keeps its frame \
                (SharersMove).",
        steps: &[
            Write(P, 0),
            Snapshot(P),
            Write(P, 0),
            Read(S, 0),
            Read(P, 0),
        ],
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
            Snapshot(P),
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
            Snapshot(P),
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
            Snapshot(P),
            Write(P, 0),
            Restore(P),
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
            Snapshot(P),
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
        about: "The snapshot is given the copies, so the guest's frames stay where they are and one huge \
                entry maps them again, with the pin on one.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Write(P, 3),
            Take(P, 1, PinWrite),
            Snapshot(P),
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
