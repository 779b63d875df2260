//! Room for snapshots: whether there is enough for the next, and which have to go.

use guest::abi::PAGE_SIZE;

use super::Drive;
use crate::session::kept::Keeping;
use crate::session::tracker::Tracker;
use palimpsest::mm::PoolUsage;

impl Drive<'_> {
    /// How often all of the guest's memory could be copied with what frames there are left.
    pub(super) fn room(&self) -> u64 {
        room_for(self.vm.frames().pool().usage(), self.vm.space().pages())
    }

    /// Whether there is room for a snapshot: after it the guest may write all of its memory, and each page of
    /// it is copied once. If there is none, and no snapshot is on its way out already, the oldest has to go.
    pub(super) fn has_room(&mut self) -> bool {
        if self.room() > 0 {
            return true;
        }
        if self.worker.backlog() > 0 {
            return false;
        }
        if !self.kept.is_empty() {
            self.drop_oldest();
            return false;
        }
        // These hold the last one for what can be compared with it.
        self.parent = None;
        self.base = None;
        if let Some(Keeping::Checkpoints(checkpoints, _)) = &mut self.keeping {
            checkpoints.forget();
        }
        self.tracker.iter_mut().for_each(Tracker::forget);
        true
    }

    pub(super) fn drop_oldest(&mut self) {
        self.retire_oldest();
        self.dropped += 1;
        if self.dropped == 1 {
            let limit = self.vm.frames().pool().usage().limit * PAGE_SIZE;
            self.observer.note(&format!(
                "snapshots go early to make room: this run may take {} MiB",
                limit >> 20
            ));
        }
    }

    pub(super) fn retire_oldest(&mut self) {
        self.worker.retire_oldest(&mut self.kept);
    }
}

/// How often `pages` pages could be copied with what frames are left.
pub(super) fn room_for(usage: PoolUsage, pages: u64) -> u64 {
    usage.limit.saturating_sub(usage.in_use) / pages
}
