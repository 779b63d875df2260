//! The operations, and how they are chosen.

use proptest::prelude::*;

use super::super::*;

/// What the address spaces are like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Pages of each.
    pub(super) pages: u64,
    /// How large a huge folio is.
    pub(super) huge: Order,
}

impl Shape {
    /// Too small for huge folios.
    pub(super) const BASE: Self = Self {
        pages: 3,
        huge: Order::HUGE,
    };
    /// Three regions that can be huge, and one that is too short.
    pub(super) const HUGE: Self = Self {
        pages: 13,
        huge: Order::new(2),
    };

    /// Which region a page is in.
    pub(super) fn region(self, page: u64) -> u64 {
        page / self.huge.pages()
    }

    /// Whether there can be huge entries.
    pub(super) fn has_huge(self) -> bool {
        self.pages >= self.huge.pages()
    }
}

/// One operation. Numbers say which of the spaces, snapshots, pins or holds there are, modulo how many there
/// are.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// A value that was never written before.
    Write(usize, u64),
    /// A value that other pages may have as well.
    WriteCommon(usize, u64),
    /// New values, from a page on to the end: what rewrites its memory.
    WriteOn(usize, u64),
    ForceWrite(usize, u64),
    Unshare(usize, u64),
    Pin(usize, u64, Access),
    /// At most so many pages.
    PinRange(usize, u64, u64, Access),
    Unpin(usize),
    DmaWrite(usize),
    Get(usize, u64, Access),
    GetFrozen(usize, u64),
    HostWrite(usize),
    Put(usize),
    Fork(usize),
    PrepareFork(usize),
    /// All that there is to do.
    BreakAhead(usize),
    Clone(usize),
    Restore(usize, usize),
    TakeDirty(usize),
    Discard(usize, u64, u64),
    Migrate(usize, u64),
    Merge(usize, u64, usize, u64),
    DropSpace(usize),
    DropFrozen(usize),
}

fn op(pages: u64) -> impl Strategy<Value = Op> {
    let which = || 0..8usize;
    let page = || 0..pages;
    let access = || prop_oneof![Just(Access::Read), Just(Access::Write)];
    let at = || (which(), page());
    prop_oneof![
        6 => at().prop_map(|(s, p)| Op::Write(s, p)),
        2 => at().prop_map(|(s, p)| Op::WriteCommon(s, p)),
        1 => at().prop_map(|(s, p)| Op::ForceWrite(s, p)),
        2 => at().prop_map(|(s, p)| Op::Unshare(s, p)),
        4 => (at(), access()).prop_map(|((s, p), a)| Op::Pin(s, p, a)),
        2 => (at(), 1..=pages, access()).prop_map(|((s, p), n, a)| Op::PinRange(s, p, n, a)),
        4 => which().prop_map(Op::Unpin),
        4 => which().prop_map(Op::DmaWrite),
        2 => (at(), access()).prop_map(|((s, p), a)| Op::Get(s, p, a)),
        2 => at().prop_map(|(s, p)| Op::GetFrozen(s, p)),
        1 => which().prop_map(Op::HostWrite),
        2 => which().prop_map(Op::Put),
        4 => which().prop_map(Op::Fork),
        2 => which().prop_map(Op::PrepareFork),
        2 => which().prop_map(Op::BreakAhead),
        4 => which().prop_map(Op::Clone),
        3 => (which(), page()).prop_map(|(s, p)| Op::WriteOn(s, p)),
        2 => (which(), which()).prop_map(|(s, f)| Op::Restore(s, f)),
        2 => which().prop_map(Op::TakeDirty),
        1 => (at(), 0..=pages).prop_map(|((s, p), n)| Op::Discard(s, p, n)),
        2 => at().prop_map(|(s, p)| Op::Migrate(s, p)),
        3 => (at(), at()).prop_map(|((s, p), (t, q))| Op::Merge(s, p, t, q)),
        1 => which().prop_map(Op::DropSpace),
        3 => which().prop_map(Op::DropFrozen),
    ]
}

/// A run of operations, and in which order everything is dropped after it.
pub(super) fn run(shape: Shape) -> impl Strategy<Value = (Vec<Op>, Vec<u8>)> {
    (
        prop::collection::vec(op(shape.pages), 1..80),
        prop::collection::vec(any::<u8>(), 40),
    )
}
