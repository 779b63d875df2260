//! Memory right after a restore must be the snapshot's.
//!
//! Hammered pages are checked by the guest itself and in the next snapshot. This is for all others: code,
//! data, stacks, page tables, rings and buffers. Of these a guest would not notice what is wrong, or not
//! survive it.

use guest::abi::{Layout, PAGE_SIZE};

use super::view::{Page, View};
use super::violation::{Oracle, Violation};
use crate::run_snapshot::RunSnapshot;
use palimpsest::host::Ram;
use palimpsest::mm::FramePool;

/// Compares what `ram` holds below the hammered memory with `snapshot`, to which it was just set back.
/// Neither vCPUs nor devices run. Says which page differs first.
pub fn restored(
    ram: &Ram,
    snapshot: &RunSnapshot,
    layout: &Layout,
    pool: &FramePool,
) -> Option<Violation> {
    let view = View::new(snapshot.number(), snapshot.memory(), ram.physmap(), pool);
    let mut bytes = vec![0; PAGE_SIZE as usize];
    let mut page = Page::zeros();
    for gfn in 0..layout.hammer_base / PAGE_SIZE {
        ram.read(gfn * PAGE_SIZE, &mut bytes).ok()?;
        view.page(gfn, &mut page);
        let mut words = page.iter().zip(bytes.as_chunks().0).enumerate();
        let wrong = words.find_map(|(word, (&expected, found))| {
            let found = u64::from_le_bytes(*found);
            (expected != found).then_some((word, expected, found))
        });
        if let Some((word, expected, found)) = wrong {
            let mut v = Violation::new(Oracle::Life, "a restore did not set a page back");
            v.snapshot = Some(snapshot.number());
            v.gpa = Some(gfn * PAGE_SIZE + 8 * word as u64);
            v.expected = format!("{expected:#018x} (by the snapshot)");
            v.found = format!("{found:#018x}");
            v.frame = view.describe_frame(gfn);
            return Some(v);
        }
    }
    None
}
