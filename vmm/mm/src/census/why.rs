//! Why a frame is in use: everybody who keeps it alive.

use std::collections::BTreeSet;

use super::super::addr::{Gfn, Pfn};
use super::super::frame_state::FrameState;
use super::Census;

/// By what a holder maps a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// An entry of an address space.
    Entry,
    /// What an address space keeps of its last snapshot, for the next.
    Kept,
    /// A snapshot's table. Snapshots may have the mapping in common, with each other and with what is kept.
    Snapshot,
}

/// A page that shows a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedBy {
    /// The caller's number for the holder.
    pub label: u64,
    /// Its page.
    pub gfn: Gfn,
    /// By what.
    pub how: How,
}

/// Who keeps a frame alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Why {
    /// Its mappings, pins and gets.
    pub state: FrameState,
    /// Whether it is in use. Nobody uses the zero frame.
    pub is_in_use: bool,
    /// The pages of holders that show it.
    pub mapped: Vec<MappedBy>,
    /// Mappings besides, of holders that were not named.
    pub others: u64,
}

impl Census<'_> {
    /// Who keeps a frame alive. Looks at every page of every holder. Beside running machines the answer may
    /// be old, and a break may copy a page that it would not have.
    ///
    /// A frame that the pool does not have is nobody's.
    pub fn why(&self, pfn: Pfn) -> Why {
        let pool = self.pool;
        if pfn == Pfn::ZERO || pfn.0 >= pool.frames().len() {
            return Why {
                state: FrameState::FREE,
                is_in_use: false,
                mapped: Vec::new(),
                others: 0,
            };
        }
        let (mut mapped, mut entries) = (Vec::new(), 0);
        // What several have in common is one mapping.
        let mut common = BTreeSet::new();
        for &(label, holder) in &self.holders {
            let mut look = |leaf: super::holder::Leaf| {
                let count = if leaf.entry.is_huge() {
                    pool.huge().pages()
                } else {
                    1
                };
                let Some(n) = pfn.0.checked_sub(leaf.entry.pfn().0).filter(|&n| n < count) else {
                    return;
                };
                let gfn = Gfn(leaf.first.0 + n);
                match leaf.mapping {
                    None => entries += 1,
                    Some(mapping) => drop(common.insert((mapping, gfn))),
                }
                mapped.push(MappedBy {
                    label,
                    gfn,
                    how: leaf.how,
                });
            };
            holder.entries(&mut look);
            holder.kept(&mut look);
        }
        let state = pool.state(pfn);
        Why {
            state,
            is_in_use: pool.is_in_use(pfn),
            mapped,
            others: state.maps().saturating_sub(entries + common.len() as u64),
        }
    }
}
