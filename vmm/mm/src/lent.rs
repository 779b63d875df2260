//! Loans: what of a snapshot its clones show without having it counted as theirs.
//!
//! A clone's window shows the snapshot's frames from the start, but the clone *adopts* a region, has a
//! mapping of its own counted for each of its frames, only when it first does something with it (`adopt.rs`).
//! Till then it **borrows** the region: the snapshot's own mapping stands for the clone's too. That is right
//! as long as the snapshot stays in these frames, so what is lent is not moved (`fault.rs`): whoever breaks a
//! page of it moves himself.
//!
//! ```text
//!   Node (64 regions of one snapshot or more) ──> Lent {runs} ──> Loan {borrowers of each region, is over}
//!      ├─> region (a huge entry) ──> Leases ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─^      ^
//!      └─> region ──> chunk ──> Leases ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ┘      │
//!   clone ────────────────────────────────────────────────────────────────────┘
//! ```
//! A **loan** is of the regions of one node at once, so that a clone costs little for each node and nothing
//! for a region. Who holds the mappings, a region with a huge entry or a chunk, has a **lease** for each loan
//! that it is part of. What a window is to map, the node's *runs*, is worked out once. It holds for whoever
//! borrows next for as long as nothing has moved: with the first move the loan is *over*, and the next to
//! borrow makes another.
//!
//! A region that is backed (`backed.rs`) is lent, too: who borrows it sees nothing there, so it has no run and may
//! be brought, and move, meanwhile. When it has come, the loan is over for who borrows next.
//!
//! Locks: a loan's is the innermost of all.

use std::sync::{Arc, Weak};

use super::addr::{Gfn, Pfn};
use super::safeguard::{Safeguard, is_left_out};
use super::sync::{Mutex, lock};

/// Regions that a node of a snapshot's tree has, and so a loan.
pub(super) const FAN_OUT: usize = u64::BITS as usize;

/// Some of the regions of a node: bit `n` says whether number `n` is among them.
pub(super) type Slots = u64;

/// Which they are.
pub(super) fn each(slots: Slots) -> impl Iterator<Item = usize> {
    (0..FAN_OUT).filter(move |slot| slots >> slot & 1 != 0)
}

/// Who borrows the regions of a node.
pub(super) struct Loan(Mutex<Borrowers>);

struct Borrowers {
    /// Of each region.
    of: [u32; FAN_OUT],
    /// Whether something of it has moved, so that it is not where the runs say.
    is_over: bool,
}

impl Borrowers {
    fn add(&mut self, slots: Slots) {
        for (slot, count) in self.of.iter_mut().enumerate() {
            *count += (slots >> slot & 1) as u32;
        }
    }
}

impl Loan {
    /// Which node a region is of, and which of it that is.
    pub(super) fn place(index: usize) -> (usize, Slots) {
        (index / FAN_OUT, 1 << (index % FAN_OUT))
    }

    /// Of some regions, to one borrower.
    fn new(slots: Slots) -> Arc<Self> {
        let mut borrowers = Borrowers {
            of: [0; FAN_OUT],
            is_over: false,
        };
        borrowers.add(slots);
        Arc::new(Self(Mutex::new(borrowers)))
    }

    /// Lends some regions to one more. Not if it is over.
    fn try_borrow(&self, slots: Slots) -> bool {
        let mut borrowers = lock(&self.0);
        let may = !borrowers.is_over || is_left_out(Safeguard::LoanEndsWithMove);
        if may {
            borrowers.add(slots);
        }
        may
    }

    /// One who borrowed these regions does not any more.
    pub(super) fn give_back(&self, slots: Slots) {
        let mut borrowers = lock(&self.0);
        for slot in each(slots) {
            debug_assert!(borrowers.of[slot] > 0, "region {slot} is not lent");
            borrowers.of[slot] -= 1;
        }
    }

    /// Ends it for who would borrow next, because a region has come that was backed. Those who borrow that see
    /// nothing of it: it is where they want it wherever it is.
    fn make_over(&self) {
        lock(&self.0).is_over = true;
    }

    /// Ends it, because a region is to move. Not if somebody borrows that.
    fn try_end(&self, slot: usize) -> bool {
        let mut borrowers = lock(&self.0);
        let may = borrowers.of[slot] == 0;
        borrowers.is_over |= may;
        may
    }

    fn is_lent(&self, slot: usize) -> bool {
        lock(&self.0).of[slot] > 0
    }
}

/// The loans that what holds some mappings is part of, and as which region.
#[derive(Default)]
pub(super) struct Leases(Vec<(Weak<Loan>, u8)>);

impl Leases {
    fn add(&mut self, loan: &Arc<Loan>, slot: usize) {
        self.0.retain(|(loan, _)| loan.strong_count() > 0);
        self.0.push((Arc::downgrade(loan), slot as u8));
    }

    /// Whether anybody borrows it.
    pub(super) fn is_lent(&self) -> bool {
        self.loans().any(|(loan, slot)| loan.is_lent(slot))
    }

    /// Ends all loans, because something is to move. `false`, and nothing may, if anybody borrows it.
    pub(super) fn try_end(&mut self) -> bool {
        if is_left_out(Safeguard::LentStays) {
            return true;
        }
        // One that ends here without the others has to be worked out anew, and that is all.
        let may = self.loans().all(|(loan, slot)| loan.try_end(slot));
        if may {
            self.0 = Vec::new();
        }
        may
    }

    /// The region, which was backed, has frames now: what was worked out for it does not hold for who borrows
    /// next.
    pub(super) fn make_over(&mut self) {
        self.loans().for_each(|(loan, _)| loan.make_over());
        self.0 = Vec::new();
    }

    fn loans(&self) -> impl Iterator<Item = (Arc<Loan>, usize)> {
        let loans = self.0.iter();
        loans.filter_map(|(loan, slot)| Some((loan.upgrade()?, usize::from(*slot))))
    }
}

/// Pages that follow each other, in frames that do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) first: Gfn,
    /// That of the first page.
    pub(super) frame: Pfn,
    pub(super) count: u64,
}

/// A loan, and what those who borrow have to map.
pub(super) struct Lent {
    pub(super) loan: Arc<Loan>,
    /// All pages that have a frame, in order.
    pub(super) runs: Vec<Run>,
    /// The regions that are in more than one run, and in how many.
    pub(super) uneven: Vec<(usize, usize)>,
    /// The regions that are backed, and so in none: who borrows them is to see nothing there.
    pub(super) hidden: Slots,
}

impl Lent {
    /// If it is not over, lends some regions to one more.
    pub(super) fn try_borrow(&self, slots: Slots) -> bool {
        self.loan.try_borrow(slots)
    }
}

/// A loan to its first borrower that is being worked out.
pub(super) struct Lending {
    lent: Lent,
    /// The region that is looked at.
    slot: usize,
    /// In how many runs it is so far.
    pieces: usize,
}

impl Lending {
    /// Of some regions.
    pub(super) fn new(slots: Slots) -> Self {
        Self {
            lent: Lent {
                loan: Loan::new(slots),
                runs: Vec::new(),
                uneven: Vec::new(),
                hidden: 0,
            },
            slot: 0,
            pieces: 0,
        }
    }

    /// Goes on with another region.
    pub(super) fn begin(&mut self, slot: usize) {
        self.note_pieces();
        (self.slot, self.pieces) = (slot, 0);
    }

    /// Some pages are part of it: `leases` are theirs, and `show` adds their frames. They cannot move
    /// meanwhile, and do not afterwards.
    pub(super) fn lend(&mut self, leases: &mut Leases, show: impl FnOnce(&mut Self)) {
        leases.add(&self.lent.loan, self.slot);
        show(self);
    }

    /// `count` pages from `first` on are in the frames from `frame` on.
    pub(super) fn push(&mut self, first: Gfn, frame: Pfn, count: u64) {
        let follows = |last: &Run| {
            (last.first.0 + last.count, last.frame.0 + last.count) == (first.0, frame.0)
        };
        match self.lent.runs.last_mut() {
            Some(last) if follows(last) => {
                last.count += count;
                // It may have begun in the region before.
                self.pieces = self.pieces.max(1);
            }
            _ => {
                let run = Run {
                    first,
                    frame,
                    count,
                };
                self.lent.runs.push(run);
                self.pieces += 1;
            }
        }
    }

    /// The region has no frames yet.
    pub(super) fn hide(&mut self) {
        self.lent.hidden |= 1 << self.slot;
    }

    fn note_pieces(&mut self) {
        if self.pieces > 1 {
            self.lent.uneven.push((self.slot, self.pieces));
        }
    }

    pub(super) fn finish(mut self) -> Arc<Lent> {
        self.note_pieces();
        Arc::new(self.lent)
    }
}
