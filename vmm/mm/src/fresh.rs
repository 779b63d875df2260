//! Frames between two owners: just allocated, or taken out of their page.

use super::addr::Pfn;
use super::commit::Taken;
use super::frame::Released;
use super::frame_state::FrameState;
use super::hold::Get;
use super::pool_ref::PoolRef;

/// A frame that was allocated and belongs to nobody yet. Dropping it frees it.
pub(super) struct Fresh {
    pool: PoolRef,
    pfn: Pfn,
    is_blank: bool,
    owned_elsewhere: bool,
}

impl Fresh {
    /// Of a frame that was allocated.
    pub(super) fn of_allocated(pool: PoolRef, taken: &Taken) -> Self {
        Self {
            pool,
            pfn: taken.first,
            is_blank: taken.is_blank,
            owned_elsewhere: false,
        }
    }

    /// Fills it with zeros.
    pub(super) fn zero(&self) {
        if !self.is_blank {
            self.pool.memory().zero(self.pfn);
        }
    }

    pub(super) fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Gives it its first mapping, which the caller must put into an entry: exclusive.
    pub(super) fn into_mapped(mut self) -> Pfn {
        self.pool.frames().map_fresh(self.pfn);
        self.owned_elsewhere = true;
        self.pfn
    }

    /// Turns it into a hold, as a reader has one: the frame is freed with the last of its holders.
    pub(super) fn into_held(mut self) -> Get {
        self.pool.frames().hold_fresh(self.pfn);
        self.owned_elsewhere = true;
        Get::of_counted(self.pool.clone(), self.pfn)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if !self.owned_elsewhere {
            self.pool.free(self.pfn);
        }
    }
}

/// A huge folio that was allocated and belongs to nobody yet. Dropping it frees it.
pub(super) struct FreshFolio {
    pool: PoolRef,
    head: Pfn,
    is_blank: bool,
    owned_elsewhere: bool,
}

impl FreshFolio {
    /// Of frames that were allocated.
    pub(super) fn of_allocated(pool: PoolRef, taken: &Taken) -> Self {
        Self {
            pool,
            head: taken.first,
            is_blank: taken.is_blank,
            owned_elsewhere: false,
        }
    }

    /// Fills it with zeros.
    pub(super) fn zero(&self) {
        if !self.is_blank {
            let frames = self.pool.frames().pages_of(self.head);
            frames.for_each(|pfn| self.pool.memory().zero(pfn));
        }
    }

    pub(super) fn head(&self) -> Pfn {
        self.head
    }

    /// Gives it its first mapping, by a huge entry of the caller's: exclusive.
    pub(super) fn into_mapped(mut self) -> Pfn {
        self.pool.frames().map_fresh_huge(self.head);
        self.owned_elsewhere = true;
        self.head
    }
}

impl Drop for FreshFolio {
    fn drop(&mut self) {
        if !self.owned_elsewhere {
            self.pool.free_folio(self.head);
        }
    }
}

/// A frame that was taken out of its page and is not in another yet. Dropping it lets it go.
pub(super) struct Isolated {
    pool: PoolRef,
    pfn: Pfn,
    was_exclusive: bool,
    owned_elsewhere: bool,
}

impl Isolated {
    /// Takes the caller's mapping of `pfn` away if `may` agrees, and holds the frame: nobody can pin or hold
    /// it then if that was its only mapping.
    pub(super) fn try_take(
        pool: PoolRef,
        pfn: Pfn,
        may: impl Fn(FrameState) -> bool,
    ) -> Result<Self, FrameState> {
        let was_exclusive = pool.frames().try_isolate(pfn, may)?;
        Ok(Self {
            pool,
            pfn,
            was_exclusive,
            owned_elsewhere: false,
        })
    }

    /// Maps it again, for the page it was taken out of, as it was.
    pub(super) fn put_back(mut self) {
        self.pool.frames().put_back(self.pfn, self.was_exclusive);
        self.owned_elsewhere = true;
    }

    /// Lets it go. If nobody else has it, it is the caller's to free.
    pub(super) fn into_last(mut self) -> Option<Pfn> {
        self.owned_elsewhere = true;
        (self.pool.frames().put(self.pfn) == Released::Last).then_some(self.pfn)
    }
}

impl Drop for Isolated {
    fn drop(&mut self) {
        if !self.owned_elsewhere && self.pool.frames().put(self.pfn) == Released::Last {
            self.pool.free(self.pfn);
        }
    }
}
