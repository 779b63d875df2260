//! Who pays for which frame.
//!
//! **Invariant.** Each frame that is in use is charged to just one account, from when it is claimed to when
//! it is free again: what all accounts are charged with, closed ones included, is what is in use.
//!
//! Beside each frame there is the number of the account that pays for it, written when it is claimed and read
//! when it is freed, so it does not matter who frees it. All of it is behind the allocator's lock, which is
//! taken at both moments anyway: nothing can happen between a charge and the claim it is for.
//!
//! An account is *closed* when nobody can allocate for it any more. Frames charged to it may live on: a clone
//! uses what its parent allocated. Its number is given to another only when the last of them is free, or what
//! is refunded for them would be the other's.

use super::addr::Pfn;

/// Which account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AccountNumber(u32);

/// What an account is charged with, in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccountUsage {
    /// Frames that are in use now and were allocated for it, whoever uses them.
    pub charged: u64,
    /// The same at the worst moment.
    pub peak: u64,
    /// The most it may be charged with; none if there is no limit. May be less than it is charged with: it
    /// gets nothing more then.
    pub limit: Option<u64>,
}

/// What all accounts of a pool are charged with, in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charges {
    /// To accounts that somebody has.
    pub open: u64,
    /// To accounts of those who are gone: what others still use of what they allocated.
    pub closed: u64,
}

/// An account that is beyond its limit with one frame more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exhausted {
    pub(super) limit: u64,
}

/// The accounts, and what each pays for.
pub(super) struct Ledger {
    /// For each frame the number of who pays, or paid last. What was never used of it costs no memory.
    payers: Vec<u32>,
    accounts: Vec<Record>,
    /// Numbers that are nobody's.
    vacant: Vec<AccountNumber>,
    charges: Charges,
}

struct Record {
    charged: u64,
    peak: u64,
    /// `u64::MAX` if there is none.
    limit: u64,
    is_open: bool,
}

impl Ledger {
    /// Of `frames` frames, none of which anybody pays for.
    pub(super) fn new(frames: u64) -> Self {
        Self {
            // The memory comes from the kernel untouched.
            payers: vec![0; frames as usize],
            accounts: Vec::new(),
            vacant: Vec::new(),
            charges: Charges::default(),
        }
    }

    pub(super) fn charges(&self) -> Charges {
        self.charges
    }

    /// An account that is charged with nothing.
    pub(super) fn open(&mut self, limit: Option<u64>) -> AccountNumber {
        let record = Record {
            charged: 0,
            peak: 0,
            limit: limit.unwrap_or(u64::MAX),
            is_open: true,
        };
        if let Some(number) = self.vacant.pop() {
            self.accounts[number.index()] = record;
            return number;
        }
        self.accounts.push(record);
        AccountNumber(self.accounts.len() as u32 - 1)
    }

    /// Nobody allocates for it any more. Its number is another's when nothing is charged to it.
    pub(super) fn close(&mut self, account: AccountNumber) {
        let record = &mut self.accounts[account.index()];
        record.is_open = false;
        self.charges.open -= record.charged;
        self.charges.closed += record.charged;
        if record.charged == 0 {
            self.vacant.push(account);
        }
    }

    pub(super) fn usage(&self, account: AccountNumber) -> AccountUsage {
        let record = &self.accounts[account.index()];
        AccountUsage {
            charged: record.charged,
            peak: record.peak,
            limit: (record.limit != u64::MAX).then_some(record.limit),
        }
    }

    pub(super) fn set_limit(&mut self, account: AccountNumber, limit: Option<u64>) {
        self.accounts[account.index()].limit = limit.unwrap_or(u64::MAX);
    }

    /// Who pays for a frame that is in use.
    #[cfg(test)]
    pub(super) fn payer(&self, pfn: Pfn) -> AccountNumber {
        AccountNumber(self.payers[pfn.0 as usize])
    }

    /// Whether an account may be charged with `count` frames more.
    pub(super) fn may_take(&self, account: AccountNumber, count: u64) -> Result<(), Exhausted> {
        let Record { charged, limit, .. } = self.accounts[account.index()];
        if charged + count <= limit {
            Ok(())
        } else {
            Err(Exhausted { limit })
        }
    }

    /// Charges an account that is open with `count` frames from `first` on, for which nobody pays.
    pub(super) fn charge(&mut self, account: AccountNumber, first: Pfn, count: u64) {
        let record = &mut self.accounts[account.index()];
        debug_assert!(record.is_open, "who allocates has the account");
        record.charged += count;
        self.charges.open += count;
        let frames = first.0 as usize..(first.0 + count) as usize;
        self.payers[frames].fill(account.0);
    }

    /// What an account was charged with last is its for certain: it counts for its worst moment.
    pub(super) fn settle(&mut self, account: AccountNumber) {
        let record = &mut self.accounts[account.index()];
        record.peak = record.peak.max(record.charged);
    }

    /// `count` frames from `first` on are in use no more.
    pub(super) fn refund(&mut self, first: Pfn, count: u64) {
        let frames = &self.payers[first.0 as usize..(first.0 + count) as usize];
        let mut at = 0;
        // One payer for all of them, nearly always, and one frame most of the time.
        while at < frames.len() {
            let payer = frames[at];
            let run = frames[at..].iter().take_while(|&&p| p == payer).count();
            at += run;
            let record = &mut self.accounts[payer as usize];
            debug_assert!(record.charged >= run as u64, "{first:?} was not charged");
            record.charged -= run as u64;
            if record.is_open {
                self.charges.open -= run as u64;
                continue;
            }
            self.charges.closed -= run as u64;
            if record.charged == 0 {
                self.vacant.push(AccountNumber(payer));
            }
        }
    }
}

impl AccountNumber {
    fn index(self) -> usize {
        self.0 as usize
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_closed_account_is_nobody_elses_while_it_pays() {
        let mut ledger = Ledger::new(16);
        let parent = ledger.open(None);
        ledger.charge(parent, Pfn(1), 2);
        ledger.close(parent);
        let other = ledger.open(Some(3));
        assert_ne!(parent, other);
        ledger.charge(other, Pfn(3), 1);
        let charges = |open, closed| Charges { open, closed };
        assert_eq!(ledger.charges(), charges(1, 2));
        // Of both, in one piece.
        ledger.refund(Pfn(2), 2);
        assert_eq!(
            (ledger.charges(), ledger.usage(other).charged),
            (charges(0, 1), 0)
        );
        assert_ne!(ledger.open(None), parent);
        ledger.refund(Pfn(1), 1);
        assert_eq!(
            (ledger.charges(), ledger.open(None)),
            (charges(0, 0), parent)
        );
        assert_eq!(
            ledger.usage(parent),
            AccountUsage {
                charged: 0,
                peak: 0,
                limit: None
            }
        );
    }

    #[test]
    fn an_account_that_was_closed_twice_over_is_two_accounts() {
        let mut ledger = Ledger::new(4);
        let (a, b) = (ledger.open(None), ledger.open(None));
        ledger.close(a);
        ledger.close(b);
        let again = [ledger.open(None), ledger.open(None)];
        assert_ne!(again[0], again[1]);
        assert_eq!(ledger.accounts.len(), 2);
    }

    #[test]
    fn a_limit_below_the_charge_takes_nothing_away() {
        let mut ledger = Ledger::new(16);
        let account = ledger.open(Some(4));
        assert_eq!(ledger.may_take(account, 4), Ok(()));
        assert_eq!(ledger.may_take(account, 5), Err(Exhausted { limit: 4 }));
        ledger.charge(account, Pfn(1), 4);
        ledger.settle(account);
        ledger.set_limit(account, Some(2));
        assert_eq!(ledger.may_take(account, 1), Err(Exhausted { limit: 2 }));
        ledger.refund(Pfn(1), 3);
        let usage = AccountUsage {
            charged: 1,
            peak: 4,
            limit: Some(2),
        };
        assert_eq!(
            (ledger.usage(account), ledger.may_take(account, 1)),
            (usage, Ok(()))
        );
        ledger.set_limit(account, None);
        assert_eq!(ledger.may_take(account, 1 << 40), Ok(()));
    }
}
