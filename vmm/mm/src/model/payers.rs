//! Who pays: after each operation, by a list of who paid before it.

use super::super::ledger::AccountNumber;
use super::super::*;
use super::Space;
use super::ops::Op;
use super::shortage::Shortage;

/// The accounts of spaces, as they are made.
pub(super) struct Payers {
    made: u64,
    /// That of the last space that was made.
    last: Option<(Account, Shortage)>,
    /// That of the space that does something now.
    now: Option<AccountNumber>,
    /// Of each frame that is in use.
    paid: Vec<Option<AccountNumber>>,
}

impl Payers {
    pub(super) fn new() -> Self {
        Self {
            made: 0,
            last: None,
            now: None,
            paid: vec![],
        }
    }

    /// The account of a space that is about to be made, and what it may run short of.
    pub(super) fn next(&mut self, pool: &FramePool, all: Shortage) -> (Account, Shortage) {
        let own = all.of_space(self.made);
        self.made += 1;
        let own = own.map(|(shortage, limit)| (pool.open_account(limit), shortage));
        let next = own.or(self.last.take()).expect("the first has its own");
        self.last = Some(next.clone());
        // The space that takes the place of one whose restore has failed pays for nothing of it.
        self.now = self.now.or(Some(next.0.number()));
        next
    }

    /// Notes whose operation it is: of a clone, that of the space that it makes.
    pub(super) fn starts(&mut self, spaces: &[Space], op: &Op) {
        self.now = match *op {
            Op::Write(s, _)
            | Op::WriteCommon(s, _)
            | Op::WriteOn(s, _)
            | Op::ForceWrite(s, _)
            | Op::Unshare(s, _)
            | Op::Pin(s, ..)
            | Op::PinRange(s, ..)
            | Op::Get(s, ..)
            | Op::Fork(s)
            | Op::BreakAhead(s)
            | Op::Restore(s, _)
            | Op::Migrate(s, _) => {
                let account = spaces[s % spaces.len()].vm.space.account();
                Some(account.number())
            }
            _ => None,
        };
    }

    /// That what was allocated since it started is charged to whoever had it allocated, and what was there
    /// already as it was, unless it was free in between.
    pub(super) fn ends(&mut self, pool: &FramePool) {
        let allocator = pool.supply().lock();
        let frames = (0..pool.frames().len()).map(Pfn);
        let paid = frames.map(|pfn| {
            let is_paid = allocator.is_allocated(pfn);
            is_paid.then(|| allocator.ledger().payer(pfn))
        });
        let paid: Vec<_> = paid.collect();
        self.paid.resize(paid.len(), None);
        for (pfn, (before, now)) in self.paid.iter().zip(&paid).enumerate() {
            let is_right = now.is_none() || now == before || *now == self.now;
            assert!(is_right, "frame {pfn}: {before:?}, {now:?}");
        }
        self.paid = paid;
    }

    /// That every account is charged with the frames it pays for, and within its limit.
    pub(super) fn add_up(&self, pool: &FramePool, spaces: &[Space]) {
        for space in spaces {
            let account = space.vm.space.account();
            let usage = account.usage();
            let is_its = |payer: &&Option<AccountNumber>| **payer == Some(account.number());
            assert_eq!(
                usage.charged,
                self.paid.iter().filter(is_its).count() as u64
            );
            assert!(usage.limit.is_none_or(|limit| usage.peak <= limit));
        }
        let (charges, usage) = (pool.charges(), pool.usage());
        assert_eq!(charges.open + charges.closed, usage.in_use);
        assert_eq!(self.paid.iter().flatten().count() as u64, usage.in_use);
    }
}
