//! Group L, continued: clones that start from a snapshot, and snapshots of clones.

use super::super::performer::Hold::{GetRead, PinWrite};
use super::super::performer::Who::{C, D, P, S};
use super::super::script::Slot::{RS, WX};
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Leaked as Leak, Ok};
use super::template::PLAIN;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "L15",
        title: "a snapshot of a clone stays what it was while parent and clone write",
        about: "What three share is copied for whoever runs and writes; what clone and snapshot share is \
                copied for the snapshot, and the clone keeps its frame (SharersMove). So going back costs no \
                frame.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Write(C, 1),
            Snapshot(C),
            Write(P, 0),
            Write(P, 1),
            Write(C, 0),
            Write(C, 1),
            Read(S, 0),
            Read(S, 1),
            Restore(C),
            Read(C, 0),
            Read(C, 1),
            Write(C, 1),
            Exit(P),
            Read(S, 0),
            Read(S, 1),
            Exit(C),
            Read(S, 0),
            Read(S, 1),
        ],
        copies: Some(3),
        ..PLAIN
    },
    Scenario {
        id: "L16",
        title: "two clones of one snapshot, whose guest has ended",
        about: "A template: nobody runs in it. The first to write a page gets a copy; when the template is \
                dropped, the last to have a page writes in place.",
        steps: &[
            Write(P, 0),
            Write(P, 1),
            Snapshot(P),
            Exit(P),
            Fork(S, C),
            Fork(S, D),
            Is(C, 0, RS),
            Write(C, 0),
            Write(D, 1),
            Read(S, 0),
            Read(S, 1),
            Read(D, 0),
            Read(C, 1),
            Exit(S),
            Write(D, 0),
            Is(D, 0, WX),
            Write(C, 1),
            Is(C, 1, WX),
        ],
        copies: Some(2),
        ..PLAIN
    },
    Scenario {
        id: "L17",
        title: "a clone goes back to its template under a device, its sibling runs on",
        about: "S4 for a clone: the device's page is the clone's, before and after; sibling and template see \
                nothing of either.",
        steps: &[
            Write(P, 0),
            Snapshot(P),
            Fork(S, C),
            Fork(S, D),
            Take(C, 0, PinWrite),
            HoldWrites(0),
            Write(D, 0),
            Write(C, 1),
            Restore(C),
            HoldReads(0),
            Read(C, 1),
            Write(C, 0),
            HoldReads(0),
            HoldWrites(0),
            Read(C, 0),
            Read(D, 0),
            Read(S, 0),
            Read(P, 0),
        ],
        // C's for the pin, and D's.
        copies: Some(2),
        ..PLAIN
    },
    Scenario {
        id: "L18",
        title: "a clone's reader holds a page, clone and template are dropped, the sibling writes",
        about: "B1 among clones: what the sibling writes must not be seen through a hold that was taken \
                before anybody else was gone.",
        steps: &[
            Write(P, 0),
            Snapshot(P),
            Exit(P),
            Fork(S, C),
            Fork(S, D),
            Take(C, 0, GetRead),
            Exit(C),
            Exit(S),
            Write(D, 0),
            HoldReads(0),
        ],
        copies: Some(1),
        expected: Expected::each([Leak, Ok, Ok, Ok, Ok]),
        ..PLAIN
    },
    Scenario {
        id: "L19",
        title: "a device holds a clone's page over a snapshot of the clone, and writes",
        about: "S2 for a clone: neither the snapshot nor another clone of it sees what the device writes.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Take(C, 0, PinWrite),
            Snapshot(C),
            HoldWrites(0),
            Fork(S, D),
            HoldWrites(0),
            Read(C, 0),
            Read(S, 0),
            Read(D, 0),
            Read(P, 0),
        ],
        copies: Some(2),
        expected: Expected::each([Leak, Leak, Ok, Ok, Ok]),
        ..PLAIN
    },
];
