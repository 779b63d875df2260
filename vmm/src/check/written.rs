//! Which pages a vCPU wrote between two snapshots, by the formula.

use guest::formula::Schedule;

/// Which slots a vCPU wrote between two snapshots, the older of which had done `from` operations.
pub(super) struct WrittenSlots<'a> {
    schedule: &'a Schedule,
    from: u64,
    to: u64,
    /// How many slots the vCPU has.
    count: u64,
    /// Those that were written, in order, where there are fewer operations than slots.
    marked: Option<Vec<u64>>,
    /// Slots whose operation was being done at one of the two snapshots: their page may be either way.
    edges: [u64; 2],
}

/// When a slot was written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// Not between the two snapshots.
    Never,
    /// At one of the two, perhaps.
    Edge,
    /// Between them.
    Between,
}

impl<'a> WrittenSlots<'a> {
    /// `None` if the two are not of one course of events.
    pub(super) fn between(schedule: &'a Schedule, slots: u64, from: u64, to: u64) -> Option<Self> {
        let count = to.checked_sub(from)?;
        let marked = (count < slots).then(|| {
            let mut marked: Vec<_> = (from..to).map(|op| schedule.slot_of(op)).collect();
            marked.sort_unstable();
            marked.dedup();
            marked
        });
        Some(Self {
            schedule,
            from,
            to,
            count: slots,
            marked,
            edges: [schedule.slot_of(from), schedule.slot_of(to)],
        })
    }

    /// Calls `look` with each slot that was written, or may have been: no other was.
    pub(super) fn each(&self, mut look: impl FnMut(u64)) {
        let Some(marked) = &self.marked else {
            return (0..self.count).for_each(look);
        };
        marked.iter().for_each(|&slot| look(slot));
        let [first, last] = self.edges;
        let edges = [Some(first), (last != first).then_some(last)];
        for edge in edges.into_iter().flatten() {
            if marked.binary_search(&edge).is_err() {
                look(edge);
            }
        }
    }

    /// When a slot was written.
    pub(super) fn when(&self, slot: u64) -> When {
        let written = match &self.marked {
            Some(marked) => marked.binary_search(&slot).is_ok(),
            None => self
                .schedule
                .last_writer(slot, self.to)
                .is_some_and(|op| op >= self.from),
        };
        // An edge that was written once more in between is none.
        let last_is_first =
            slot == self.edges[0] && self.schedule.last_writer(slot, self.to) == Some(self.from);
        if !written {
            if self.edges.contains(&slot) {
                When::Edge
            } else {
                When::Never
            }
        } else if last_is_first || slot == self.edges[1] {
            When::Edge
        } else {
            When::Between
        }
    }
}
