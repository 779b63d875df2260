//! Group A: plain copy-on-write, without anybody that holds a page beside the tables.

use super::super::performer::Who::{C, P};
use super::super::script::Scenario;
use super::super::script::Slot::{RS, WX};
use super::super::script::Step::*;
use super::template::{LRU_BATCH, PLAIN};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "A1",
        title: "fork, then the parent writes",
        about: "Plain COW: the child keeps what was there.",
        steps: &[Write(P, 0), Fork(P, C), Write(P, 0), Read(C, 0), Read(P, 0)],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "A2",
        title: "fork, then the child writes",
        about: "Plain COW the other way round.",
        steps: &[Write(P, 0), Fork(P, C), Write(C, 0), Read(P, 0), Read(C, 0)],
        copies: Some(1),
        ..PLAIN
    },
    Scenario {
        id: "A3",
        title: "fork, the child ends, then the parent writes",
        about: "The last holder writes in place (T4).",
        steps: &[Write(P, 0), Fork(P, C), Exit(C), Write(P, 0), Is(P, 0, WX)],
        copies: Some(0),
        kernel_may: LRU_BATCH,
        ..PLAIN
    },
    Scenario {
        id: "A4",
        title: "fork, write-protect there and back, then the parent writes",
        about: "A page that is possibly shared stays read-only when protection is lifted (T22).",
        steps: &[
            Write(P, 0),
            Fork(P, C),
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
            Fork(P, C),
            Write(P, 0),
            Write(C, 0),
            Read(P, 0),
            Read(C, 0),
        ],
        copies: Some(1),
        kernel_may: LRU_BATCH,
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
            RefuseMmu(1),
            Refused(&Fork(P, C)),
            Read(P, 1),
            Write(P, 0),
            Write(P, 1),
            Write(P, 2),
            Fork(P, C),
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
        steps: &[Fork(P, C), Write(P, 0), Read(C, 0), Write(C, 1), Read(P, 1)],
        copies: Some(0),
        ..PLAIN
    },
];
