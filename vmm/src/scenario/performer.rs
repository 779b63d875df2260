//! Who acts a scenario out: the interface between the engine and what it drives.
//!
//! The engine knows what memory *should* hold; a performer does one step after the other and says what it
//! *does* hold. There are two: [`super::emulated::Emulated`], our own `mm` under any policy, and
//! [`super::living::Living`], the kernel this host runs on, with processes for address spaces.

use palimpsest::mm::{Entry, FrameState, Pfn};

/// An address space of a scenario. P is there from the start; each other one from the step that makes it,
/// which says of whom: C and D are two children of P in one scenario, a child and its child in another. A
/// name is free again when its address space has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Who {
    /// The first. Whoever runs can fork, and end.
    P,
    /// A child. It runs, as its parent does.
    C,
    /// Another child.
    D,
    /// A child of a child, mostly: a grandchild.
    G,
    /// The snapshot. It does not run, so it can only be read, cloned, gone back to, and dropped.
    S,
}

impl Who {
    /// Whether there is a CPU in it.
    pub const fn runs(self) -> bool {
        !matches!(self, Self::S)
    }
}

/// Number of a page of a scenario: 0 to [`PAGES`] - 1.
pub type Page = u64;

/// Pages that every address space of a scenario has.
pub const PAGES: Page = 4;

/// What the pages of a scenario are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// Each page in a frame of its own.
    Base,
    /// All pages in one huge folio, which one huge entry maps at first.
    Huge,
}

/// Number of a hold of a scenario, in the order they are taken, from 0 on.
pub type HoldId = usize;

/// Ways to hold a page from outside the page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hold {
    /// `FOLL_GET`: a transient reader.
    GetRead,
    /// `FOLL_GET | FOLL_WRITE`: what `O_DIRECT` was before it pinned.
    GetWrite,
    /// `FOLL_PIN | FOLL_LONGTERM`: a device that reads memory.
    PinRead,
    /// `FOLL_PIN | FOLL_LONGTERM | FOLL_WRITE`: a device that writes memory, and may read it.
    PinWrite,
}

impl Hold {
    /// Whether the page stays the page of its address space while it is held.
    pub const fn is_pin(self) -> bool {
        matches!(self, Self::PinRead | Self::PinWrite)
    }
}

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
pub enum NotDone {
    /// The operation refused, as operations do: nothing has changed.
    #[error("refused: {0}")]
    Refused(String),
    /// This performer has no means to be asked for it.
    #[error("cannot be asked: {0}")]
    CannotAsk(&'static str),
    /// It should have worked. The scenario says nothing then.
    #[error("failed: {0}")]
    Failed(String),
}

/// What is known about a page of an address space at one instant. For people, and to count copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageView {
    /// The frame it is in, `None` for memory that was never touched; in any
    /// numbering that tells frames apart.
    pub frame: Option<Pfn>,
    /// Its entry and the state of its frame, where the performer can see them.
    pub inside: Option<(Entry, FrameState)>,
}

/// Does the steps of a scenario. Memory is zero at first; a page is written and read as
/// one 64-bit word, its first.
///
/// A method for an address space that is not there, or that makes one that is there, or for a hold that was
/// released, is a mistake in the scenario: [`NotDone::Failed`].
pub trait Performer {
    /// A CPU of `who` writes.
    fn write(&mut self, who: Who, page: Page, value: u64) -> Result<(), NotDone>;

    /// A CPU of `who` reads. The snapshot has none and is read from outside.
    fn read(&mut self, who: Who, page: Page) -> Result<u64, NotDone>;

    /// `parent` forks: `child`, which runs, is there from now on. The snapshot's child is a clone that starts
    /// from it.
    fn fork(&mut self, parent: Who, child: Who) -> Result<(), NotDone>;

    /// A snapshot of `who` is taken: S is there from now on.
    fn snapshot(&mut self, who: Who) -> Result<(), NotDone>;

    /// `who` goes back to S.
    fn restore(&mut self, who: Who) -> Result<(), NotDone>;

    /// `who` ends, with all of its memory. Holds taken through it stay.
    fn exit(&mut self, who: Who) -> Result<(), NotDone>;

    /// Takes hold number `id` of a page through `who`.
    fn take(&mut self, id: HoldId, who: Who, page: Page, hold: Hold) -> Result<(), NotDone>;

    /// Takes `count` holds of one page, numbered from `first` on.
    fn take_many(
        &mut self,
        first: HoldId,
        count: u64,
        who: Who,
        page: Page,
        hold: Hold,
    ) -> Result<(), NotDone> {
        (first..)
            .take(count as usize)
            .try_for_each(|id| self.take(id, who, page, hold))
    }

    /// What is read through a hold.
    fn read_hold(&mut self, id: HoldId) -> Result<u64, NotDone>;

    /// A device writes through a hold.
    fn write_hold(&mut self, id: HoldId, value: u64) -> Result<(), NotDone>;

    /// Gives a hold back.
    fn release(&mut self, id: HoldId) -> Result<(), NotDone>;

    /// Write-protects all pages of `who` without intent to copy: dirty tracking, `mprotect` there and back.
    fn protect(&mut self, who: Who) -> Result<(), NotDone>;

    /// Gives a page back: it reads as zeros (`MADV_DONTNEED`, a balloon).
    fn discard(&mut self, who: Who, page: Page) -> Result<(), NotDone>;

    /// Gives all of the folio back that page `page` is in, but the page.
    fn discard_rest(&mut self, who: Who, page: Page) -> Result<(), NotDone>;

    /// Has the folio that page `page` is in mapped by a huge entry again. Refused if it cannot be: it may
    /// have become writable then.
    fn collapse(&mut self, who: Who, page: Page) -> Result<(), NotDone>;

    /// Moves a page to another frame (compaction, migration).
    fn migrate(&mut self, who: Who, page: Page) -> Result<(), NotDone>;

    /// Merges two pages of equal content into one frame (KSM).
    fn merge(&mut self, one: (Who, Page), other: (Who, Page)) -> Result<(), NotDone>;

    /// A debugger writes, whatever the page's protection (`FOLL_FORCE`, `PTRACE_POKEDATA`).
    fn force_write(&mut self, who: Who, page: Page, value: u64) -> Result<(), NotDone>;

    /// From now on there is no memory for a copy.
    fn exhaust_memory(&mut self) -> Result<(), NotDone>;

    /// There is memory again.
    fn free_memory(&mut self) -> Result<(), NotDone>;

    /// The next change of page tables but `after` is refused by the machine, once.
    fn refuse_mmu(&mut self, after: u64) -> Result<(), NotDone>;

    /// What is known about a page, `None` if nothing can be.
    fn view(&mut self, who: Who, page: Page) -> Option<PageView>;
}
