//! Where two snapshots differ: what is told is what a look at every page tells.

use super::folio::{REGION, huge_with};
use super::*;

/// Pages of all that there is: more nodes than one, and a region at the end that is short.
const PAGES: u64 = 70 * REGION + 3;

/// What is told of `pages`, and what looks at each of them say.
fn assert_told(a: &Frozen, b: &Frozen, pages: std::ops::Range<u64>) -> usize {
    let told: Vec<_> = a
        .differing(b, Gfn(pages.start)..Gfn(pages.end))
        .flatten()
        .collect();
    let seen: Vec<_> = (pages.start..pages.end.min(a.pages()))
        .map(Gfn)
        .filter(|&gfn| a.frame(gfn).unwrap() != b.frame(gfn).unwrap())
        .collect();
    assert_eq!(told, seen, "{pages:?}");
    told.len()
}

#[test]
fn what_differs_is_told_whoever_moved_and_by_whatever_it_is_mapped() {
    let w = huge_with(PAGES, 8 * PAGES);
    let mut snapshots: Vec<Arc<Frozen>> = vec![w.vm.space.fork().unwrap()];
    // The steps of a linear congruential generator: pages here and there, some regions wholly.
    let mut state = 1_u64;
    let mut told = 0;
    for round in 0..60 {
        for _ in 0..=round % 7 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let gfn = (state >> 33) % PAGES;
            let all = state >> 20 & 3 == 0;
            let first = if all { gfn / REGION * REGION } else { gfn };
            let end = if all { first + REGION } else { gfn + 1 };
            for gfn in first..end.min(PAGES) {
                w.vm.cpu_write(Gfn(gfn), state).unwrap();
            }
        }
        if round % 11 == 10 {
            w.vm.space.discard(Gfn(5 * REGION), REGION).unwrap();
        }
        snapshots.push(w.vm.space.fork().unwrap());
        let newest = &snapshots[snapshots.len() - 1];
        for other in &snapshots[snapshots.len().saturating_sub(5)..] {
            told += assert_told(newest, other, 0..PAGES);
            assert_told(other, newest, 3 * REGION + 1..66 * REGION + 2);
            assert_told(other, newest, PAGES - 2..PAGES + 100);
        }
    }
    assert!(told > 1000, "{told}");
    assert_eq!(assert_told(&snapshots[0], &snapshots[0], 0..PAGES), 0);
    assert_eq!(assert_told(&snapshots[3], &snapshots[9], 7..7), 0);
    drop(snapshots);
    w.settle();
}
