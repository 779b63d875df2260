//! The census after an operation, against a plain list of who shows which frame.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::super::*;
use super::{Held, Snapshot, Space};

/// Counts all, and asks of one of the frames why it is in use: the `nth`, in turn.
pub(super) fn check(
    pool: &Arc<FramePool>,
    (spaces, snapshots): (&[Space], &[Snapshot]),
    (pins, gets): (&[Held<Pin>], &[Held<Get>]),
    nth: usize,
) {
    let mut census = Census::new(pool);
    let mut pages = BTreeMap::<u64, Vec<Pfn>>::new();
    let mut shown = BTreeMap::<Pfn, BTreeSet<u64>>::new();
    let mut show = |label: u64, pfn: Pfn| {
        let pages = pages.entry(label).or_default();
        if pfn != Pfn::ZERO {
            pages.push(pfn);
            shown.entry(pfn).or_default().insert(label);
        }
    };
    for (label, space) in (0..).zip(spaces) {
        census.add_space(label, &space.vm.space).unwrap();
        (0..space.shape.pages).for_each(|gfn| show(label, space.entry(Gfn(gfn)).pfn()));
    }
    for (label, snapshot) in (100..).zip(snapshots) {
        census.add_snapshot(label, &snapshot.frozen).unwrap();
        let pages = (0..snapshot.frozen.pages()).map(Gfn);
        pages.for_each(|gfn| show(label, snapshot.frozen.frame(gfn).unwrap()));
    }

    let counts = census.count();
    assert!(counts.adds_up(), "{counts:?}");
    assert_eq!(counts.in_use, pool.usage().in_use);
    let holders = |pfn: &Pfn| shown[pfn].len() as u32;
    for holding in &counts.holders {
        let pages = &pages[&holding.label];
        assert_eq!(holding.pages, pages.len() as u64);
        let mut frames = BTreeMap::<u32, u64>::new();
        for pfn in pages.iter().collect::<BTreeSet<_>>() {
            *frames.entry(holders(pfn)).or_default() += 1;
        }
        assert!(holding.frames.iter().eq(frames), "{counts:?}");
    }
    assert_eq!(counts.frames.total(), shown.len() as u64);
    let held = pins.iter().map(|pin| pin.handle.pfn());
    let held: BTreeSet<_> = held
        .chain(gets.iter().map(|get| get.handle.pfn()))
        .collect();
    let only = |pfn: &&Pfn| **pfn != Pfn::ZERO && !shown.contains_key(pfn);
    assert_eq!(counts.held, held.iter().filter(only).count() as u64);

    let frames: BTreeSet<_> = shown.keys().copied().chain(held).collect();
    let Some(&pfn) = frames.iter().nth(nth % frames.len().max(1)) else {
        return;
    };
    let why = census.why(pfn);
    assert_eq!((why.state, why.others), (pool.state(pfn), 0), "{pfn:?}");
    let shows = |m: &&MappedBy| m.how != How::Kept;
    let labels: BTreeSet<_> = why.mapped.iter().filter(shows).map(|m| m.label).collect();
    assert_eq!(labels, shown.get(&pfn).cloned().unwrap_or_default());
    for MappedBy { label, gfn, how } in why.mapped {
        match how {
            How::Entry => assert_eq!(spaces[label as usize].entry(gfn).pfn(), pfn),
            How::Snapshot => {
                let snapshot = &snapshots[label as usize - 100];
                assert_eq!(snapshot.frozen.frame(gfn).unwrap(), pfn);
            }
            // So a census need not count it.
            How::Kept => assert_eq!(spaces[label as usize].entry(gfn).pfn(), pfn),
        }
    }
    assert_eq!(why.is_in_use, why.state.refs() > 0, "{pfn:?}");
}
