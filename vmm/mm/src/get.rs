//! Transient holds: how the host looks at a page without pinning it (`FOLL_GET`; PROTOCOL.md 5.6).
//!
//! A hold promises less than a pin, and costs less:
//! * what is read through it was this page's content when the hold was taken **or later**, and is never what
//!   another address space wrote since they parted (isolation, I9);
//! * it does *not* follow the page: a fork and a write later, the page may be in another frame. Who
//!   must see the guest's writes, or have the guest see theirs, takes a [`Pin`](super::Pin);
//! * while it lasts nobody takes the frame over, so a page that is shared is copied by whoever writes it.

use std::sync::Arc;

use super::addr::{Access, Gfn};
use super::entry::Entry;
use super::fault::{FaultError, Intent};
use super::frozen::{Frozen, FrozenError};
use super::hold::Get;
use super::policy::CowPolicy;
use super::pool::FramePool;
use super::safeguard::{Safeguard, is_left_out};
use super::space::AddressSpace;

impl<P: CowPolicy> AddressSpace<P> {
    /// Takes a transient hold on the frame of a page. For [`Access::Write`] COW is broken first: what is
    /// written through the hold is seen by the guest **until the next fork**, which does not know of it
    /// (PROTOCOL.md D3).
    ///
    /// # Errors
    /// For reading, only if there is no such page, or it is backed and cannot be brought; for writing as
    /// [`AddressSpace::write_fault`].
    pub fn get(&self, gfn: Gfn, access: Access) -> Result<Get, FaultError> {
        match self.policy.lookup(access) {
            Access::Read => self.get_to_read(gfn),
            Access::Write => self.get_to_write(gfn),
        }
    }

    /// A reader's hold is the same under all policies.
    fn get_to_read(&self, gfn: Gfn) -> Result<Get, FaultError> {
        let table = &self.mapped.table;
        table.in_range(gfn)?;
        let stale = is_left_out(Safeguard::BorrowedBeforeEntry).then(|| table.peek(gfn));
        // A page that has no entry because it is borrowed is not untouched. Once it is not borrowed it has
        // one.
        if let Some(hold) = self.with_borrowed(gfn, |entry| get_locked(&self.pool, entry)) {
            return Ok(hold);
        }
        // A page that is hidden looks untouched as well; once it is not hidden it has an entry.
        let is_hidden = table.is_hidden(table.region_of(gfn));
        let entry = stale.unwrap_or_else(|| table.peek(gfn));
        if !is_hidden
            && let Ok(hold) = self.pool.try_get(entry)
            // The frame may have left this page, and become another's, before it was held.
            && (stale.is_some() || table.peek(gfn) == entry || is_left_out(Safeguard::GetRereadsEntry))
        {
            return Ok(hold);
        }
        let mut region = table.lock_of(gfn);
        // It is borrowed still if it is hidden.
        self.adopt(&mut region)?;
        Ok(get_locked(&self.pool, region.get(gfn)))
    }

    fn get_to_write(&self, gfn: Gfn) -> Result<Get, FaultError> {
        self.mapped.table.in_range(gfn)?;
        let _no_fork = self.mapped.enter()?;
        let mut region = self.mapped.table.lock_of(gfn);
        self.adopt(&mut region)?;
        let resolution = self.resolve(&mut region, gfn, Intent::Write)?;
        self.count(Intent::Write, resolution);
        Ok(get_locked(&self.pool, region.get(gfn)))
    }
}

impl Frozen {
    /// Takes a transient hold on the frame of a page. While it lasts, a running space that shares the frame
    /// cannot keep it for itself.
    ///
    /// # Errors
    /// If there is no such page, or it cannot be brought.
    pub fn get(&self, gfn: Gfn) -> Result<Get, FrozenError> {
        self.with_entry(gfn, |entry| get_locked(&self.pool, entry))
    }
}

/// A hold on the page of `entry`, which cannot change meanwhile.
fn get_locked(pool: &Arc<FramePool>, entry: Entry) -> Get {
    loop {
        // The entry's own mapping keeps the frame: only a full counter can
        // refuse, and 65,535 readers of one frame are about to go away.
        if let Ok(hold) = pool.try_get(entry) {
            return hold;
        }
        std::thread::yield_now();
    }
}
