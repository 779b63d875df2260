//! The scenarios: PROTOCOL.md section 8, groups A to E and H, and a few of our own (S) with snapshots.
//!
//! Expected verdicts are in the order mapcount, mapcount-forced-break, refcount, seed, exclusive.

use super::performer::Hold::{GetRead, GetWrite, PinRead, PinWrite};
use super::performer::Who::{C, P, S};
use super::script::Slot::{RS, RX, WX};
use super::script::Step::*;
use super::script::{Expected, Scenario};
use super::verdict::Verdict::{Copied, Diverged as Div, Leaked as Leak, NotRefused as Done, Ok};

/// What most scenarios have in common.
const PLAIN: Scenario = Scenario {
    id: "",
    title: "",
    about: "",
    steps: &[],
    copies: None,
    gets_must_follow: false,
    kernels_pin_count: false,
    expected: Expected::all(Ok),
    kernel_may: None,
};

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
        about: "H5: O_DIRECT of old held pages without pinning them; what the disk delivers is lost.",
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
];

/// Scenarios of PROTOCOL.md section 8 that are not here, and why.
pub const NOT_HERE: &[(&str, &str)] = &[
    (
        "A9, E6",
        "need file-backed private memory: guest memory here is anonymous",
    ),
    ("B5, B7, D7, D8, F1 to F16", "need huge frames"),
    (
        "B6, C3, C3b, C4, D11",
        "need swap: guest memory here is never swapped by the VMM",
    ),
    ("C6", "needs NUMA hinting"),
    ("D5, E2", "are races: model-checked in tests/loom"),
    (
        "D9",
        "needs an event at fork; here a child's pages are always read-only at first",
    ),
    (
        "D10",
        "needs entries that say a migration is going on; here it holds the region's lock",
    ),
    ("D14", "needs memory that forks leave out"),
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
