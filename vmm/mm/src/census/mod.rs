//! The census: what each machine and each snapshot costs alone, and what it shares.
//!
//! A *holder* is an address space or a snapshot. A frame that one of them alone maps is what would come back
//! if that one went; a frame that several map is shared, and each has its fair share of it: one part in as
//! many as they are. [`Census::count`] says both of each holder, from the tables alone and whoever paid for a
//! frame (that is `account.rs`); [`Census::why`] says of one frame who keeps it alive.
//!
//! **Guarantee.** If nothing changes meanwhile and every holder there is has been named, then
//! ```text
//!   alone of all holders + shared, each frame once + held by pins or gets only  =  frames in use
//! ```
//! to the frame. Everything else that is in use is reported as unexplained: it is some holder's that was not
//! named, or it has leaked. Beside running machines the answer is approximate ([`Counts::adds_up`] says when
//! it cannot be exact), and nothing waits longer than for one region.
//!
//! # Cost
//! Two walks through the tables of all holders and one through the frames in use. A huge entry is one step,
//! as long as nobody maps pages of its folio one by one. Memory: eight bytes for each frame number below the
//! highest in use, as it is met; a bit for each frame and nine bytes for each folio of the pool; and of each
//! holder a number for each different number of holders that its frames have.
//!
//! # Locks
//! A region's lock of one space, or that of one region of a snapshot and then of one of its chunks: the order
//! on [`AddressSpace`], and never two of a kind. The allocator's alone.
//!
//! # What a space keeps for its next fork
//! is no holder: it shows what the space shows (`lineage.rs`), so it keeps no frame alive that the space does
//! not. [`Census::why`] lists its mappings all the same.

mod holder;
mod tally;
mod why;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use self::holder::Holder;
use self::tally::Tally;
use super::addr::Pfn;
use super::frame_state::FrameState;
use super::frozen::Frozen;
use super::policy::CowPolicy;
use super::pool::FramePool;
use super::space::AddressSpace;

pub use self::why::{How, MappedBy, Why};

/// Frames without an explanation that are named.
const MOST_NAMED: usize = 16;

/// Who might have frames of a pool, each with a number of the caller's.
pub struct Census<'a> {
    pool: &'a Arc<FramePool>,
    holders: Vec<(u64, &'a dyn Holder)>,
}

/// A holder's frames are of another pool: their numbers mean other frames there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the frames of holder {label} are of another pool")]
pub struct OtherPool {
    /// The holder.
    pub label: u64,
}

/// How many frames there are with each number of holders.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sharing(BTreeMap<u32, u64>);

/// What one holder has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The caller's number for it.
    pub label: u64,
    /// Pages that have a frame.
    pub pages: u64,
    /// Its frames, by how many holders have them.
    pub frames: Sharing,
}

/// What all holders have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Of each holder, in the order they were named.
    pub holders: Vec<Holding>,
    /// Frames that holders have, each once, by how many have it.
    pub frames: Sharing,
    /// Frames that nothing maps, and pins or gets hold.
    pub held: u64,
    /// Frames in use that nobody accounts for.
    pub unexplained: u64,
    /// The first few of these.
    pub unexplained_frames: Vec<(Pfn, FrameState)>,
    /// Frames in use.
    pub in_use: u64,
}

impl<'a> Census<'a> {
    /// Of nobody yet.
    pub fn new(pool: &'a Arc<FramePool>) -> Self {
        Self {
            pool,
            holders: Vec::new(),
        }
    }

    /// Names an address space.
    ///
    /// # Errors
    /// If its frames are of another pool.
    pub fn add_space<P: CowPolicy>(
        &mut self,
        label: u64,
        space: &'a AddressSpace<P>,
    ) -> Result<(), OtherPool> {
        self.add(label, space.pool(), space)
    }

    /// Names a snapshot.
    ///
    /// # Errors
    /// If its frames are of another pool.
    pub fn add_snapshot(&mut self, label: u64, snapshot: &'a Frozen) -> Result<(), OtherPool> {
        self.add(label, &snapshot.pool, snapshot)
    }

    fn add(
        &mut self,
        label: u64,
        pool: &Arc<FramePool>,
        holder: &'a dyn Holder,
    ) -> Result<(), OtherPool> {
        if !Arc::ptr_eq(pool, self.pool) {
            return Err(OtherPool { label });
        }
        self.holders.push((label, holder));
        Ok(())
    }

    /// What each has, alone and with others.
    pub fn count(&self) -> Counts {
        let pool = self.pool;
        let mut tally = Tally::new(pool.frames().len(), pool.huge());
        for (who, (_, holder)) in (1..).zip(&self.holders) {
            holder.entries(&mut |leaf| tally.meet(who, leaf.entry));
        }
        // The numbers of the second walk follow those of the first.
        let again = self.holders.len() as u32 + 1;
        let holders = (again..)
            .zip(&self.holders)
            .map(|(who, &(label, holder))| {
                let mut holding = Holding {
                    label,
                    pages: 0,
                    frames: Sharing::default(),
                };
                holder.entries(&mut |leaf| {
                    holding.pages += if leaf.entry.is_huge() {
                        pool.huge().pages()
                    } else {
                        1
                    };
                    tally.share(who, leaf.entry, |holders, frames| {
                        holding.frames.add(holders, frames);
                    });
                });
                holding
            })
            .collect();
        let (used, in_use) = pool.frames_in_use();
        let mut counts = Counts {
            holders,
            frames: Sharing::default(),
            held: 0,
            unexplained: 0,
            unexplained_frames: Vec::new(),
            in_use,
        };
        for pfn in used.iter().map(Pfn) {
            counts.explain(pfn, tally.holders(pfn), || pool.state(pfn));
        }
        counts
    }
}

impl Counts {
    /// Frames that one holder alone has, of all holders.
    pub fn alone(&self) -> u64 {
        self.frames.of(1)
    }

    /// Frames that several have, each once.
    pub fn shared(&self) -> u64 {
        self.frames.total() - self.alone()
    }

    /// Whether every frame in use is explained, and what holders have is what there is: to the frame. It is
    /// so whenever nothing changes meanwhile and every holder was named.
    pub fn adds_up(&self) -> bool {
        let mut parts = Sharing::default();
        for (&holders, &frames) in self.holders.iter().flat_map(|h| &h.frames.0) {
            parts.add(holders, frames);
        }
        let whole = |(&holders, &frames): (&u32, &u64)| (holders, u64::from(holders) * frames);
        self.unexplained == 0
            && self.frames.total() + self.held == self.in_use
            && parts.0.into_iter().eq(self.frames.0.iter().map(whole))
    }

    /// Says why a frame is in use that so many `holders` have.
    fn explain(&mut self, pfn: Pfn, holders: u32, state: impl Fn() -> FrameState) {
        if holders > 0 {
            return self.frames.add(holders, 1);
        }
        let state = state();
        if state.maps() == 0 && state.refs() > 0 {
            self.held += 1;
            return;
        }
        self.unexplained += 1;
        if self.unexplained_frames.len() < MOST_NAMED {
            self.unexplained_frames.push((pfn, state));
        }
    }
}

impl Holding {
    /// Frames that it alone has: what comes back when it goes.
    pub fn alone(&self) -> u64 {
        self.frames.of(1)
    }

    /// Frames that others have as well.
    pub fn shared(&self) -> u64 {
        self.frames.total() - self.alone()
    }

    /// Its part of the frames that it shares: of each frame one in as many as have it. The parts of all
    /// holders together are the frames that are shared.
    pub fn fair_share(&self) -> f64 {
        let parts = self.frames.iter().filter(|&(holders, _)| holders > 1);
        parts
            .map(|(holders, frames)| frames as f64 / f64::from(holders))
            .sum()
    }
}

impl Sharing {
    /// How many holders, and how many frames have as many, from the fewest holders to the most.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.0.iter().map(|(&holders, &frames)| (holders, frames))
    }

    /// Frames that have just so many holders.
    pub fn of(&self, holders: u32) -> u64 {
        self.0.get(&holders).copied().unwrap_or(0)
    }

    /// All frames.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    fn add(&mut self, holders: u32, frames: u64) {
        *self.0.entry(holders).or_default() += frames;
    }
}

impl fmt::Debug for Census<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels = self.holders.iter().map(|(label, _)| label);
        f.write_str("Census ")?;
        f.debug_list().entries(labels).finish()
    }
}
