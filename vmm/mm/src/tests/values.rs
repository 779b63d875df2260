//! Addresses, entries and frame states as values: their arithmetic, and how errors and traces spell them.

use std::sync::atomic::Ordering;

use super::super::frame::FrameTable;
use super::super::page_set::PageSet;
use super::*;

#[test]
fn a_set_of_pages_has_none_beyond_its_end() {
    let mut set = PageSet::new(64);
    set.insert(Gfn(63));
    set.insert(Gfn(63));
    assert_eq!((set.len(), set.is_empty()), (1, false));
    assert!(set.contains(Gfn(63)) && !set.contains(Gfn(62)));
    assert!(!set.contains(Gfn(64)) && !set.contains(Gfn(u64::MAX)));
}

/// Whoever keeps a share of an MMU has the same MMU.
#[test]
fn a_shared_mmu_is_the_mmu() {
    let inner = SoftMmu::new(2);
    let refusing = Arc::new(RefusingMmu {
        inner: Arc::clone(&inner),
        refusals: Arc::default(),
    });
    let shared = Arc::clone(&refusing);
    shared.map(P, Pfn(7), 1, Protection::ReadOnly).unwrap();
    assert_eq!(inner.page(P), (Pfn(7), Protection::ReadOnly));
    shared.protect(P, 1, Protection::ReadWrite).unwrap();
    assert_eq!(inner.page(P), (Pfn(7), Protection::ReadWrite));
    assert_eq!(refusing.refusals.calls(), 2);
    assert!(!shared.is_crowded());
    refusing.refusals.crowded.store(1, Ordering::Relaxed);
    assert!(shared.is_crowded());
}

#[test]
fn a_guest_frame_number_is_an_address_in_pages() {
    for (gpa, gfn) in [
        (0, 0),
        (1, 0),
        (PAGE_SIZE - 1, 0),
        (PAGE_SIZE, 1),
        (5 * PAGE_SIZE + 7, 5),
    ] {
        assert_eq!(Gfn::of_gpa(gpa), Gfn(gfn), "{gpa:#x}");
    }
    assert_eq!([0, 1, 5].map(|n| Gfn(n).gpa()), [0, 0x1000, 0x5000]);
}

#[test]
fn a_frame_number_is_an_offset_in_pages() {
    assert_eq!([0, 1, 5].map(|n| Pfn(n).offset()), [0, 0x1000, 0x5000]);
}

#[test]
fn numbers_are_spelled_in_hexadecimal_with_their_kind() {
    assert_eq!(
        format!("{:?}, {:?}", Gfn(0x1f), Pfn(0x2e)),
        "gfn 0x1f, pfn 0x2e"
    );
}

#[test]
fn an_entry_spells_its_frame_and_its_rights() {
    let entry = Entry::writable(Pfn(0x2e));
    let spelled = [
        Entry::UNTOUCHED,
        Entry::DISCARDED,
        entry,
        entry.write_protected(),
        entry.cleaned(),
    ]
    .map(|entry| format!("{entry:?}"));
    assert_eq!(
        spelled,
        [
            "untouched",
            "untouched",
            "pfn 0x2e rw",
            "pfn 0x2e ro",
            "pfn 0x2e ro clean"
        ]
    );
}

#[test]
fn a_dirty_entry_stays_dirty() {
    let clean = Entry::writable(Pfn(5)).cleaned();
    assert!(!clean.is_dirty() && clean.dirtied().is_dirty());
    assert_eq!(clean.dirtied().dirtied(), clean.dirtied());
    assert_eq!(Entry::DISCARDED.dirtied(), Entry::DISCARDED);
}

/// Who reads that a page is busy is told who is in the way.
#[test]
fn a_frame_spells_its_holders() {
    let (table, pfn) = (FrameTable::new(2, Order::HUGE), Pfn(1));
    assert_eq!(
        format!("{:?}", table.state(pfn)),
        "{maps 0, gets 0, pins 0, possibly shared}"
    );
    table.map_fresh(pfn);
    table.try_get(pfn).unwrap();
    table.try_get(pfn).unwrap();
    for _ in 0..3 {
        table.try_pin(pfn, Access::Read, &Exclusive).unwrap();
    }
    assert_eq!(
        format!("{:?}", table.state(pfn)),
        "{maps 1, gets 2, pins 3, exclusive}"
    );
}

#[test]
fn spaces_and_snapshots_spell_their_size() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let stats = w.stats();
    assert_eq!(
        format!("{:?}", w.vm.space),
        format!("AddressSpace {{ pages: 4, stats: {stats:?} }}")
    );
    let frozen = w.vm.space.fork().unwrap();
    assert_eq!(format!("{frozen:?}"), "Frozen { pages: 4 }");
}

#[test]
fn a_pool_spells_its_usage_and_a_pin_its_frame() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let pin = w.vm.space.pin(P, Access::Read).unwrap();
    let (pool, pin) = (format!("{:?}", w.pool), format!("{pin:?}"));
    assert!(pool.contains("in_use: 1"), "{pool}");
    assert!(pin.contains("PoolRef"), "{pin}");
    assert!(pin.contains(&format!("{:?}", w.entry(P).pfn())), "{pin}");
}
