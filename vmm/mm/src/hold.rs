//! Holds: what devices and readers have of frames.
//!
//! A hold outlives the address space it was taken through, and keeps what it needs of the pool.

use super::addr::{Access, Pfn};
use super::entry::Entry;
use super::folio::{Hold, may_pin};
use super::frame::Released;
use super::frame_state::FrameState;
use super::policy::CowPolicy;
use super::pool_ref::PoolRef;

/// A device's hold on a frame (`FOLL_PIN`): the frame stays this page of its address space, whatever forks
/// and faults do, until the handle is dropped.
#[derive(Debug)]
pub struct Pin(PinnedRun);

impl Pin {
    /// Of the one page of `run`.
    pub(super) fn new(run: PinnedRun) -> Self {
        debug_assert_eq!(run.count, 1);
        Self(run)
    }

    /// The pinned frame.
    pub fn pfn(&self) -> Pfn {
        self.0.first
    }
}

/// As [`Pin`], of neighbouring pages that are in neighbouring frames: one handle for all of them.
#[derive(Debug)]
pub struct PinnedRun {
    pool: PoolRef,
    first: Pfn,
    count: u64,
}

impl PinnedRun {
    /// Takes pins, if `policy` grants them, on the page of `entry`, and of a huge entry on pages that follow
    /// in its folio: on `count` in all, or on none. The zero frame's pins are not counted (PROTOCOL.md 4.15).
    #[inline]
    pub(super) fn try_take<P: CowPolicy>(
        pool: PoolRef,
        entry: Entry,
        count: u64,
        access: Access,
        policy: &P,
    ) -> Result<Self, FrameState> {
        let pfn = entry.pfn();
        let may = may_pin(policy, access);
        // Dropping it is the undo.
        let mut run = Self {
            pool,
            first: pfn,
            count: 0,
        };
        if entry.is_huge() {
            run.count = run.pool.frames().hold_pages(pfn, count, Hold::Pin, &may);
            if run.count < count || !run.pool.frames().are_pages_held(pfn, may) {
                return Err(run.pool.frames().state(pfn));
            }
            return Ok(run);
        }
        debug_assert_eq!(count, 1);
        if pfn != Pfn::ZERO {
            run.pool.frames().try_pin(pfn, access, policy)?;
        } else if !may(run.pool.frames().state(pfn)) {
            return Err(run.pool.frames().state(pfn));
        }
        run.count = 1;
        Ok(run)
    }

    /// The pinned frames, in the order of their pages.
    pub fn pfns(&self) -> impl Iterator<Item = Pfn> + use<> {
        self.first.run(self.count)
    }

    /// How many.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Pins the page of a small entry as well, if `policy` grants that; its frame is the next.
    pub(super) fn try_push<P: CowPolicy>(
        &mut self,
        entry: Entry,
        access: Access,
        policy: &P,
    ) -> bool {
        let next = Pfn(self.first.0 + self.count);
        debug_assert!(entry.pfn() == next && !entry.is_huge());
        let granted = self.pool.frames().try_pin(next, access, policy).is_ok();
        self.count += u64::from(granted);
        granted
    }

    /// A handle for each page: for a model, which lets go of them one by one.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn into_pins(mut self) -> Vec<Pin> {
        let of_one = |first| {
            Pin(Self {
                pool: self.pool.clone(),
                first,
                count: 1,
            })
        };
        let pins = self.pfns().map(of_one).collect();
        self.count = 0;
        pins
    }

    /// Takes over the pins of `next`, if its frames are the next; gives it back if not.
    pub(super) fn try_append(&mut self, mut next: Self) -> Result<(), Self> {
        if next.first.0 != self.first.0 + self.count || self.first == Pfn::ZERO {
            return Err(next);
        }
        self.count += std::mem::take(&mut next.count);
        Ok(())
    }

    /// Lets go of all pages but the first `count`.
    #[inline]
    pub(super) fn truncate(&mut self, count: u64) {
        for pfn in self.pfns().skip(count as usize) {
            if pfn != Pfn::ZERO && self.pool.frames().unpin(pfn) == Released::Last {
                self.pool.free(pfn);
            }
        }
        self.count = self.count.min(count);
    }
}

impl Drop for PinnedRun {
    #[inline]
    fn drop(&mut self) {
        self.truncate(0);
    }
}

/// A transient reader's hold on a frame (`FOLL_GET`): the bytes stay those of the address space it was
/// taken through *or older*, never another's. It does not keep the frame in its place.
#[derive(Debug)]
pub struct Get {
    pool: PoolRef,
    pfn: Pfn,
}

impl Get {
    /// Of a frame on which a hold was counted.
    pub(super) fn of_counted(pool: PoolRef, pfn: Pfn) -> Self {
        Self { pool, pfn }
    }

    /// Takes a transient hold on the page of `entry`. The zero frame is held by nobody and always there.
    #[inline]
    pub(super) fn try_take(pool: PoolRef, entry: Entry) -> Result<Self, FrameState> {
        let pfn = entry.pfn();
        let any = |_| true;
        if entry.is_huge() {
            if pool.frames().hold_pages(pfn, 1, Hold::Get, any) == 0 {
                return Err(pool.frames().state(pfn));
            }
        } else if pfn != Pfn::ZERO {
            pool.frames().try_get(pfn)?;
        }
        let get = Self::of_counted(pool, pfn);
        let frames = get.pool.frames();
        if entry.is_huge() && !frames.are_pages_held(pfn, any) {
            return Err(frames.state(pfn));
        }
        Ok(get)
    }

    /// The held frame.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }
}

impl Drop for Get {
    fn drop(&mut self) {
        if self.pfn != Pfn::ZERO && self.pool.frames().put(self.pfn) == Released::Last {
            self.pool.free(self.pfn);
        }
    }
}
