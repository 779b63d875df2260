//! Merging: two pages of equal content share one frame (KSM; PROTOCOL.md T23, 4.9).
//!
//! ```text
//!   before                        after
//!   ------------------------      --------------------------------
//!   this page   rw  A, exclusive  this page   ro  A, possibly shared
//!   other page  rw  B, exclusive  other page  ro  A, possibly shared   (B is free)
//! ```
//! Whoever writes first breaks COW, as after a fork.

use std::ptr;
use std::slice;
use std::sync::Arc;

use super::addr::Gfn;
use super::entry::Entry;
use super::mapped::Counted;
use super::mapped::table::RegionGuard;
use super::mmu::MmuError;
use super::policy::CowPolicy;
use super::rearrange::RearrangeError;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;

impl<P: CowPolicy> AddressSpace<P> {
    /// Lets page `other_gfn` of `other` share the frame of page `gfn` of this space, if they hold the same
    /// bytes. The two spaces may be one.
    ///
    /// # Errors
    /// If the pages differ; [`RearrangeError::Busy`] if a device or a reader holds either frame; if a page
    /// was never touched; or the MMU refuses. Nothing has changed then.
    pub fn merge(&self, gfn: Gfn, other: &Self, other_gfn: Gfn) -> Result<(), RearrangeError> {
        self.mapped.table.in_range(gfn)?;
        other.mapped.table.in_range(other_gfn)?;
        if !Arc::ptr_eq(&self.pool, &other.pool) {
            return Err(RearrangeError::OtherPool);
        }
        // Both kinds of locks in the order of their addresses, whoever asks for the merge.
        let one_space = ptr::eq(self, other);
        let ((low, low_gfn), (high, high_gfn)) =
            if (ptr::from_ref(self), self.mapped.table.region_of(gfn))
                <= (
                    ptr::from_ref(other),
                    other.mapped.table.region_of(other_gfn),
                )
                || is_left_out(Safeguard::MergeLocksInOrder)
            {
                ((self, gfn), (other, other_gfn))
            } else {
                ((other, other_gfn), (self, gfn))
            };
        let _no_fork = low.mapped.enter()?;
        let _no_other_fork = (!one_space).then(|| high.mapped.enter()).transpose()?;
        let mut first = low.lock_of(low_gfn)?;
        if one_space && first.index() == high.mapped.table.region_of(high_gfn) {
            return self.merge_locked(gfn, other, other_gfn, Guards::One(&mut first));
        }
        let mut second = high.lock_of(high_gfn)?;
        let guards = if ptr::eq(low, self) && low_gfn == gfn {
            Guards::Two(&mut first, &mut second)
        } else {
            Guards::Two(&mut second, &mut first)
        };
        self.merge_locked(gfn, other, other_gfn, guards)
    }

    fn merge_locked(
        &self,
        gfn: Gfn,
        other: &Self,
        other_gfn: Gfn,
        mut guards: Guards<'_, '_>,
    ) -> Result<(), RearrangeError> {
        let (entry, other_entry) = (guards.one().get(gfn), guards.other().get(other_gfn));
        for (gfn, entry) in [(gfn, entry), (other_gfn, other_entry)] {
            if !entry.is_present() {
                return Err(RearrangeError::Untouched { gfn });
            }
        }
        let (kept, freed) = (entry.pfn(), other_entry.pfn());
        if kept == freed {
            return Ok(());
        }
        let (memory, frames) = (self.pool.memory(), self.pool.frames());
        let different = || RearrangeError::Different {
            one: gfn,
            other: other_gfn,
        };
        // A look that costs nothing: most candidates are not equal.
        let looked_equal = memory.equal(kept, freed);
        if !looked_equal {
            return Err(different());
        }
        self.open(guards.one(), gfn);
        self.split(guards.one());
        other.open(guards.other(), other_gfn);
        other.split(guards.other());
        let (entry, other_entry) = (guards.one().get(gfn), guards.other().get(other_gfn));
        // A pin for writing taken without a lock finds the entry changed, or is counted below.
        self.stop_writers(guards.one(), gfn, entry)?;
        if let Err(error) = other.stop_writers(guards.other(), other_gfn, other_entry) {
            self.let_writers(guards.one(), gfn, entry);
            return Err(error.into());
        }

        let merged = frames
            .try_share_idle(kept)
            .map_err(|state| RearrangeError::Busy { gfn, state })
            .and_then(|was_exclusive| {
                let undo = |error| {
                    frames.unshare_idle(kept, was_exclusive);
                    error
                };
                let isolated = self.pool.isolate(freed, |s| s.is_idle()).map_err(|state| {
                    undo(RearrangeError::Busy {
                        gfn: other_gfn,
                        state,
                    })
                })?;
                let equal = if is_left_out(Safeguard::ComparedWhenStill) {
                    looked_equal
                } else {
                    memory.equal(kept, freed)
                };
                let mapped = if equal {
                    let to = other_entry.write_protected().in_frame(kept);
                    other
                        .mapped
                        .map(guards.other(), other_gfn, 1, to, Counted)
                        .map_err(RearrangeError::from)
                } else {
                    Err(different())
                };
                match mapped {
                    Ok(()) => Ok(isolated),
                    Err(error) => {
                        isolated.put_back();
                        Err(undo(error))
                    }
                }
            });
        match merged {
            Ok(isolated) => {
                drop(isolated);
                Ok(())
            }
            Err(error) => {
                other.let_writers(guards.other(), other_gfn, other_entry);
                self.let_writers(guards.one(), gfn, entry);
                Err(error)
            }
        }
    }

    /// Makes a page read-only, if it is not.
    fn stop_writers(
        &self,
        region: &mut RegionGuard<'_>,
        gfn: Gfn,
        entry: Entry,
    ) -> Result<(), MmuError> {
        if !entry.is_writable() {
            return Ok(());
        }
        let region = slice::from_mut(region);
        self.mapped.write_protect(region, gfn..=gfn, |_, _| ())
    }

    /// Makes it writable again, if it was. Should the MMU refuse, it stays read-only, which costs a fault.
    fn let_writers(&self, region: &mut RegionGuard<'_>, gfn: Gfn, entry: Entry) {
        if entry.is_writable() {
            let _ = self.mapped.allow_writes(region, gfn..=gfn);
        }
    }
}

/// The locks of the two pages' regions, which may be one region.
enum Guards<'a, 'b> {
    One(&'a mut RegionGuard<'b>),
    Two(&'a mut RegionGuard<'b>, &'a mut RegionGuard<'b>),
}

impl<'b> Guards<'_, 'b> {
    fn one(&mut self) -> &mut RegionGuard<'b> {
        match self {
            Self::One(guard) | Self::Two(guard, _) => guard,
        }
    }

    fn other(&mut self) -> &mut RegionGuard<'b> {
        match self {
            Self::One(guard) | Self::Two(_, guard) => guard,
        }
    }
}
