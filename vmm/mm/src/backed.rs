//! Backed memory: regions of a snapshot whose bytes are somewhere else still.
//!
//! A snapshot that comes from outside need not be read before anybody runs in it. A region of it that is
//! **backed** has no frames; who wants its bytes *brings* it:
//! ```text
//!   who wants them                                       what happens
//!   --------------------------------------------------   -----------------------------------------------------
//!   a vCPU: the page is *hidden* from it in every         the region is adopted (`adopt.rs`), which brings it
//!     space that has borrowed the region                   and shows it in that space
//!   a pin, a hold, an operation on the page               the same
//!   who reads a snapshot, or restores one                 it is brought, and shown to nobody
//!   a fork, a clone                                       nothing: the child has the region in common, backed
//!   nobody                                                it is never brought
//! ```
//! It is brought **once**, whoever wants it and however many spaces and snapshots have it: under a lock of its
//! own, into frames that nobody else has, and only when all of it is there and the backing says that it is
//! right does anybody see them. If not nothing has changed, and the next to want it tries again.
//!
//! Locks: a region that is being brought keeps those out who want the same bytes, and nobody else. It comes after
//! the lock of a space's region, before that of the snapshot's region.

use std::error::Error;
use std::sync::Arc;

use super::account::Account;
use super::addr::{Gfn, Pfn};
use super::commit::AllocError;
use super::fresh::{Fresh, FreshFolio};
use super::home::Home;
use super::pool::FramePool;
use super::sync::Mutex;

/// Who wants bytes that are not there yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Toucher {
    /// A vCPU reads, writes or executes them.
    Vcpu,
    /// Host code that holds or pins the page: a device, most often.
    Host,
    /// Somebody who reads the snapshot itself, or restores it.
    Reader,
    /// Nobody yet.
    Prefetch,
}

/// Why a [`Backing`] could not give what it has: its own words.
pub type BackingError = Box<dyn Error + Send + Sync>;

/// Where the bytes of pages are that have no frame yet.
pub trait Backing: Send + Sync {
    /// Fills `frames` with all bytes of the pages of region number `region`, in order: as many as the region has,
    /// which nobody else reads or writes, with anything in them. It is called by one thread at a time for one
    /// region, by any number for different ones, and may wait.
    ///
    /// When it says that it has done so, the bytes in the frames are right: what was read is checked **where it
    /// is**, so that nothing that changes elsewhere meanwhile can make them wrong.
    ///
    /// # Errors
    /// If the bytes cannot be had, or are not right. Anything may be in the frames then, and nobody sees it.
    fn bring(&self, region: usize, frames: &[Pfn], toucher: Toucher) -> Result<(), BackingError>;
}

/// Why a region could not be brought. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum BringError {
    /// Its bytes cannot be had, or are wrong.
    #[error("cannot bring the memory at {:#x}", first.gpa())]
    Backing {
        /// The first page of the region.
        first: Gfn,
        /// The backing's word.
        source: BackingError,
    },
    /// There are no frames for it.
    #[error("no memory for what is brought to {:#x}", first.gpa())]
    Alloc {
        /// The first page of the region.
        first: Gfn,
        /// Why.
        source: AllocError,
    },
}

/// What the backed regions of a snapshot have in common.
pub(super) struct Source {
    pub(super) backing: Arc<dyn Backing>,
    /// Who pays for what is brought.
    pub(super) account: Account,
    pub(super) uses_huge: bool,
}

/// A region that was not brought yet.
pub(super) struct Backed {
    pub(super) source: Arc<Source>,
    /// Its frames, so that neighbours are neighbours in the physmap, too. None if there was no room for a home.
    pub(super) home: Option<Home>,
    /// Its number, its first page and how many it has.
    pub(super) index: usize,
    pub(super) first: Gfn,
    pub(super) pages: u64,
    /// Held by who brings it.
    pub(super) turn: Mutex<()>,
}

/// Frames of a region that was brought, each of which has one mapping, possibly shared.
pub(super) enum Brought {
    /// Those of a folio.
    Huge(Pfn),
    /// One by one, [`Pfn::ZERO`] for a page of zeros.
    Small(Vec<Pfn>),
}

impl Backed {
    /// Brings it into frames of `pool`. The caller has the turn.
    pub(super) fn bring(&self, pool: &FramePool, toucher: Toucher) -> Result<Brought, BringError> {
        let no_memory = |source| BringError::Alloc {
            first: self.first,
            source,
        };
        if let Some(folio) = self.allocate_folio(pool).map_err(no_memory)? {
            let frames: Vec<Pfn> = folio.head().run(self.pages).collect();
            self.fill(&frames, toucher)?;
            return Ok(Brought::Huge(pool.share_fresh_folio(folio)));
        }
        let fresh = (0..self.pages).map(|index| self.allocate_page(pool, index));
        let fresh: Vec<Fresh> = fresh.collect::<Result<_, _>>().map_err(no_memory)?;
        let frames: Vec<Pfn> = fresh.iter().map(Fresh::pfn).collect();
        self.fill(&frames, toucher)?;
        let shared = fresh.into_iter().map(|fresh| {
            if pool.memory().equal(fresh.pfn(), Pfn::ZERO) {
                Pfn::ZERO
            } else {
                pool.share_fresh(fresh)
            }
        });
        Ok(Brought::Small(shared.collect()))
    }

    fn fill(&self, frames: &[Pfn], toucher: Toucher) -> Result<(), BringError> {
        let filled = self.source.backing.bring(self.index, frames, toucher);
        filled.map_err(|source| BringError::Backing {
            first: self.first,
            source,
        })
    }

    fn allocate_folio(&self, pool: &FramePool) -> Result<Option<FreshFolio>, AllocError> {
        let Source {
            account, uses_huge, ..
        } = &*self.source;
        if !uses_huge || self.pages != pool.huge().pages() {
            return Ok(None);
        }
        let at_home = self.home.as_ref();
        let at_home = at_home.map(|home| pool.allocate_huge(account, home, 0));
        match at_home.transpose()?.flatten() {
            Some(folio) => Ok(Some(folio)),
            None => pool.allocate_folio(account),
        }
    }

    fn allocate_page(&self, pool: &FramePool, index: u64) -> Result<Fresh, AllocError> {
        let account = &self.source.account;
        match &self.home {
            Some(home) => pool.allocate_near(account, home, index),
            None => pool.allocate(account),
        }
    }
}
