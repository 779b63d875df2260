//! What a scenario is made of: data, and nothing that knows the outcome of a step.

use super::living::Disturbance;
use super::performer::{Hold, HoldId, Memory, Page, Who};
use super::verdict::Verdict;
use crate::policy::Policy;

/// One of the kernel's bugs, or of the rules that keep it away, as a sequence of steps.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name in PROTOCOL.md section 8. Groups K, L and S are ours, and E1h, E3h and E5h.
    pub id: &'static str,
    /// What happens, in one line.
    pub title: &'static str,
    /// Why it is worth a look: the bug it was, the rule that covers it.
    pub about: &'static str,
    /// What its pages are in.
    pub memory: Memory,
    /// What is done.
    pub steps: &'static [Step],
    /// How many pages must be copied at most. More is an unnecessary copy.
    pub copies: Option<u64>,
    /// Whether holds that promise no coherence (`FOLL_GET`) are nevertheless held to it,
    /// to show that they do not.
    pub gets_must_follow: bool,
    /// Whether pins are counted as the kernel does it for small folios, so that 1,024
    /// references look like one.
    pub kernels_pin_count: bool,
    /// What is to come of it.
    pub expected: Expected,
    /// What is done on the living kernel instead of the steps, where a step can't wait for a
    /// device: a race with `O_DIRECT`.
    pub kernel_races: Option<Disturbance>,
    /// What the living kernel may come to instead of what our `exclusive` does, and why.
    pub kernel_may: Option<(Verdict, &'static str)>,
}

impl Scenario {
    /// Whether it shows something that no policy promises: that a hold which is no pin follows its page.
    pub fn is_beyond_promise(&self) -> bool {
        self.gets_must_follow && self.expected.exclusive != Some(Verdict::Ok)
    }

    /// Whether the living kernel may come to `verdict`.
    pub fn kernel_agrees(&self, verdict: Verdict) -> bool {
        self.expected.exclusive == Some(verdict) || self.why_kernel_may(verdict).is_some()
    }

    /// Why the living kernel may come to `verdict`, which is not that of our `exclusive`; `None`
    /// if it is, or if it may not.
    pub fn why_kernel_may(&self, verdict: Verdict) -> Option<&'static str> {
        let (may, why) = self.kernel_may?;
        (self.expected.exclusive != Some(verdict) && may == verdict).then_some(why)
    }
}

/// The verdict to be computed under each policy; `None` where the scenario makes no sense.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// [`Policy::Mapcount`].
    pub mapcount: Option<Verdict>,
    /// [`Policy::MapcountForcedBreak`].
    pub forced_break: Option<Verdict>,
    /// [`Policy::Refcount`].
    pub refcount: Option<Verdict>,
    /// [`Policy::Seed`].
    pub seed: Option<Verdict>,
    /// [`Policy::SeedRecompute`].
    pub recompute: Option<Verdict>,
    /// [`Policy::Exclusive`].
    pub exclusive: Option<Verdict>,
}

impl Expected {
    /// The same under every policy.
    pub const fn all(verdict: Verdict) -> Self {
        Self {
            mapcount: Some(verdict),
            forced_break: Some(verdict),
            refcount: Some(verdict),
            seed: Some(verdict),
            recompute: Some(verdict),
            exclusive: Some(verdict),
        }
    }

    /// In the order of [`Policy::ALL`], but that [`Policy::SeedRecompute`] is as [`Policy::Seed`]: they
    /// differ in huge folios only.
    pub const fn each(verdicts: [Verdict; 5]) -> Self {
        let [mapcount, forced_break, refcount, seed, exclusive] = verdicts;
        Self {
            mapcount: Some(mapcount),
            forced_break: Some(forced_break),
            refcount: Some(refcount),
            seed: Some(seed),
            recompute: Some(seed),
            exclusive: Some(exclusive),
        }
    }

    /// The same, but `verdict` under [`Policy::SeedRecompute`].
    pub const fn recomputed(self, verdict: Verdict) -> Self {
        Self {
            recompute: Some(verdict),
            ..self
        }
    }

    /// Under one policy.
    pub const fn under(&self, policy: Policy) -> Option<Verdict> {
        match policy {
            Policy::Mapcount => self.mapcount,
            Policy::MapcountForcedBreak => self.forced_break,
            Policy::Refcount => self.refcount,
            Policy::Seed => self.seed,
            Policy::SeedRecompute => self.recompute,
            Policy::Exclusive => self.exclusive,
        }
    }
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A CPU writes a value that was never written before.
    Write(Who, Page),
    /// A CPU writes to the first page what the second holds.
    WriteSame(Who, Page, Page),
    /// A CPU reads, and must see what its address space holds.
    Read(Who, Page),
    /// The first forks the second, which is there from then on. S forks nothing: a clone starts from it.
    Fork(Who, Who),
    /// A snapshot S is taken.
    Snapshot(Who),
    /// An address space goes back to S.
    Restore(Who),
    /// An address space ends.
    Exit(Who),
    /// A hold is taken. Holds are numbered from 0 on.
    Take(Who, Page, Hold),
    /// So many holds are taken.
    TakeMany(u64, Who, Page, Hold),
    /// Somebody reads through a hold, and must see what it promises.
    HoldReads(HoldId),
    /// A device writes through a hold.
    HoldWrites(HoldId),
    /// A hold is given back.
    Release(HoldId),
    /// All pages are write-protected without intent to copy.
    Protect(Who),
    /// A page is given back to the host.
    Discard(Who, Page),
    /// All of a huge folio is given back, but this page.
    DiscardRest(Who, Page),
    /// The folio of a page is mapped by a huge entry again, if that can be. Nobody may see a difference.
    Collapse(Who, Page),
    /// A page is moved to another frame.
    Migrate(Who, Page),
    /// Two pages of equal content are merged.
    Merge((Who, Page), (Who, Page)),
    /// A debugger writes.
    ForceWrite(Who, Page),
    /// There is no memory for copies any more.
    ExhaustMemory,
    /// There is again.
    FreeMemory,
    /// The machine refuses a change of page tables, after so many that it grants.
    RefuseMmu(u64),
    /// The step must be refused, and change nothing.
    Refused(&'static Step),
    /// Under a policy that goes by the bit: entry and bit are in this state.
    Is(Who, Page, Slot),
    /// Under a policy that goes by the bit: a huge entry maps the page.
    IsHuge(Who, Page),
    /// Under a policy that goes by the bit: the page has an entry of its own.
    IsSmall(Who, Page),
    /// Under a policy that goes by the bit: dirty tracking has nothing to report of the page.
    IsClean(Who, Page),
}

/// Entry and bit of a page (PROTOCOL.md 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Never touched.
    Zero,
    /// Writable, exclusive.
    WX,
    /// Read-only, exclusive.
    RX,
    /// Read-only, possibly shared.
    RS,
    /// Writable, possibly shared: must never be.
    WS,
}
