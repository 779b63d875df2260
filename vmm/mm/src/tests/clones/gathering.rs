//! A region that moves house for a page and is brought together in one piece of memory.

use std::sync::atomic::Ordering;

use super::super::refusing::RefusingMemory;
use super::*;

/// Enough for two pages to be few.
const BIG: u64 = 64;

struct Family {
    host: Host,
    memory: Arc<RefusingMemory>,
    parent: Machine,
    clone: Machine,
}

/// A machine of one region, and a clone that has a page of its own, and breaks whole from now on.
fn family(limit: u64) -> Family {
    let memory = RefusingMemory::new(8 * BIG);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let order = Order::new(BIG.trailing_zeros() as u8);
    let pool = FramePool::with_folios_of(order, bytes, 8 * BIG, limit).unwrap();
    let host = Host {
        pool,
        memory: Arc::clone(&memory.inner),
    };
    let parent = host.machine(BIG);
    let mut clone = host.clone(&parent);
    memory.committed.lock().unwrap().clear();
    clone.write(3, 1);
    assert_eq!(committed(&memory), [(clone.entry(3).pfn().0, 1)]);
    assert!(is_in_pieces(&host, &clone));
    clone.vm.space.set_whole_price(0);
    Family {
        host,
        memory,
        parent,
        clone,
    }
}

fn committed(memory: &RefusingMemory) -> Vec<(u64, u64)> {
    memory.committed.lock().unwrap().clone()
}

fn is_in_pieces(host: &Host, machine: &Machine) -> bool {
    let pfn = machine.entry(3).pfn();
    host.pool.supply().lock().is_in_pieces(pfn)
}

impl Family {
    fn end(self) {
        [&self.parent, &self.clone]
            .into_iter()
            .for_each(Machine::check);
        drop((self.parent, self.clone));
        self.host.settle();
    }
}

#[test]
fn the_rest_and_the_few_that_have_come_are_one_folio_in_one_piece() {
    let mut family = family(8 * BIG);
    let old = family.clone.entry(3).pfn();
    let clone = &mut family.clone;
    clone.mmu.never();
    clone.write(5, 2);
    assert!(clone.are_all_huge() && clone.mappings() == 1);
    // The page that faults is mapped; both are protected; all is mapped.
    assert_eq!(clone.mmu.calls(), 4);
    let stats = clone.vm.space.stats();
    assert_eq!((stats.copied, stats.neighbours), (BIG + 2, BIG - 2));
    assert_eq!((stats.whole, stats.formed), (1, 1));
    let head = clone.entry(0).pfn();
    let run = |pfn: Pfn| pfn.0 / BIG;
    assert_ne!(run(head), run(old));
    assert_eq!(committed(&family.memory).last(), Some(&(head.0, BIG)));
    assert!(!is_in_pieces(&family.host, &family.clone));
    assert_eq!(family.host.pool.usage().in_use, 2 * BIG, "and no more");
    // It is home: a page that leaves comes back there.
    let clone = &mut family.clone;
    let frozen = clone.vm.space.fork().unwrap();
    let held = frozen.get(Gfn(7)).unwrap();
    clone.vm.space.set_whole_price(1000);
    clone.write(7, 3);
    drop((held, frozen));
    let back = clone.vm.space.migrate(Gfn(7)).unwrap();
    assert_eq!(back.0, head.0 + 7);
    family.end();
}

#[test]
fn who_was_cloned_is_gathered_too() {
    let mut family = family(8 * BIG);
    let parent = &mut family.parent;
    parent.write(4, 6);
    // What the clone has left is the parent's where it is, and moves with the rest.
    parent.vm.space.set_whole_price(0);
    parent.write(3, 7);
    let stats = parent.vm.space.stats();
    assert_eq!((stats.writer_moved, stats.reused), (1, 1));
    assert_eq!(stats.copied, 1 + BIG);
    assert!(parent.are_all_huge() && !is_in_pieces(&family.host, &family.parent));
    family.end();
}

/// Somebody holds a page that has come, or more have come than are few: the rest comes to them.
#[test]
fn pages_that_are_held_or_many_stay_and_the_rest_comes() {
    for (what, holds) in [("pin", 0), ("hold", 1), ("many", 2)] {
        let mut family = family(8 * BIG);
        let clone = &mut family.clone;
        let (gfn, old) = (Gfn(3), clone.entry(3).pfn());
        let space = &clone.vm.space;
        let pin = (holds == 0).then(|| space.pin(gfn, Access::Write).unwrap());
        let hold = (holds == 1).then(|| space.get(gfn, Access::Read).unwrap());
        space.set_whole_price(1000);
        if holds == 2 {
            clone.write(9, 8);
        }
        clone.vm.space.set_whole_price(0);
        clone.write(5, 2);
        assert_eq!(clone.entry(3).pfn(), old, "{what}");
        if let Some(pin) = pin {
            assert_eq!(pin.pfn(), old);
            clone.vm.dma_write(&pin, 9);
            clone.pages[3] = 9;
        }
        assert!(clone.are_all_huge(), "{what}: at home, if in small pages");
        drop(hold);
        family.end();
    }
}

/// Where mappings run short a region is gathered whatever is known of it, and all of it counts as written.
#[test]
fn where_mappings_run_short_what_is_gathered_counts_as_written() {
    let mut family = family(8 * BIG);
    let clone = &mut family.clone;
    clone.vm.space.take_dirty().unwrap();
    clone.vm.space.set_whole_price(1000);
    clone.mmu.crowded.store(1, Ordering::Relaxed);
    clone.write(5, 2);
    assert_eq!(clone.vm.space.stats().formed, 1);
    assert!(clone.are_all_huge() && clone.mappings() == 1);
    let dirty = clone.vm.space.take_dirty().unwrap();
    assert!((0..BIG).all(|n| dirty.contains(Gfn(n))));
    family.end();
}

/// No room for another home, or no memory for it, or the host refuses it: the rest comes page by page.
#[test]
fn without_room_or_memory_the_rest_comes_page_by_page() {
    // The host refuses what is for a whole home; what follows is as if nothing had been.
    let mut refused = family(8 * BIG);
    let old = refused.clone.entry(3).pfn();
    // The page that faults has memory of its own.
    refused.memory.refusals.at(1);
    refused.clone.write(5, 2);
    assert_eq!(refused.clone.entry(3).pfn(), old);
    assert!(refused.clone.are_all_huge());
    assert!(is_in_pieces(&refused.host, &refused.clone));
    refused.end();
    // There is memory for the rest of the region, and not for all of it.
    let mut tight = family(2 * BIG);
    let old = tight.clone.entry(3).pfn();
    tight.clone.write(5, 2);
    assert_eq!(tight.clone.entry(3).pfn(), old);
    assert!(tight.clone.are_all_huge());
    tight.end();
}
