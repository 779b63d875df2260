//! Group K, which is ours: pages that were merged.

use super::super::performer::Who::{C, D, P};
use super::super::script::Scenario;
use super::super::script::Slot::{RS, WX};
use super::super::script::Step::*;
use super::template::PLAIN;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "K1",
        title: "equal pages of parent and child are merged, then both write",
        about: "Merging shares a frame across address spaces; the first to write gets a copy, the last \
                writes in place.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
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
        id: "K2",
        title: "equal pages of parent and two clones are merged, then all write",
        about: "Deduplication across clones that have parted: three share a frame again, and the last of \
                them writes in place.",
        steps: &[
            Write(P, 0),
            Fork(P, C),
            Fork(P, D),
            WriteSame(C, 0, 0),
            WriteSame(D, 0, 0),
            Merge((C, 0), (D, 0)),
            Merge((P, 0), (C, 0)),
            Is(P, 0, RS),
            Is(C, 0, RS),
            Is(D, 0, RS),
            Write(D, 0),
            Write(P, 0),
            Write(C, 0),
            Is(C, 0, WX),
            Read(D, 0),
            Read(P, 0),
        ],
        copies: Some(4),
        ..PLAIN
    },
];
