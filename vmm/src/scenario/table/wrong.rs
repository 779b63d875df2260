//! Group C: wrong COW inside one process. A page is held and write-protected, and the next write goes to a
//! copy that the holder does not see.

use super::super::living::Disturbance;
use super::super::performer::Hold::{GetRead, GetWrite, PinWrite};
use super::super::performer::Who::{C, P};
use super::super::script::Slot::{RX, WX};
use super::super::script::Step::*;
use super::super::script::{Expected, Scenario};
use super::super::verdict::Verdict::{Copied, Diverged as Div, NotRefused as Done, Ok};
use super::template::PLAIN;

pub(super) const SCENARIOS: &[Scenario] = &[
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
        about: "H5: O_DIRECT of old held pages without pinning them; what the disk delivers is lost. The \
                kernel is asked with a read from a real disk, round after round, since no step can have it \
                wait.",
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
            Fork(P, C),
            Read(C, 0),
        ],
        copies: Some(0),
        ..PLAIN
    },
    Scenario {
        id: "C13",
        title: "a pinned page is to be given back to the host",
        about: "Refused here. Linux lets MADV_DONTNEED have its way: the device keeps an orphan, and its \
                contract has ended (T25).",
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
];
