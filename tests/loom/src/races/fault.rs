//! Faults, against each other and against whoever else may be the last to have the frame.

use super::*;

/// G5, of a page that nobody shares any more.
pub(crate) fn two_write_faults_on_a_page<C: Policy>() {
    let w = world::<C>();
    drop(w.fork());
    two_write_faults(&w);
    w.settle();
}

/// G5, of a page that a snapshot shares.
pub(crate) fn two_write_faults_on_a_shared_page<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    two_write_faults(&w);
    assert_eq!(w.read_frozen(&frozen), OLD, "isolation");
    drop(frozen);
    w.settle();
}

/// G5, of a page that a snapshot shares and a reader holds.
pub(crate) fn two_write_faults_on_a_held_page<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let hold = frozen.get(P).unwrap();
    two_write_faults(&w);
    assert_eq!(w.vm.read_held(&hold), OLD, "isolation");
    assert_eq!(w.read_frozen(&frozen), OLD, "isolation");
    drop((hold, frozen));
    w.settle();
}

/// One copy or one reuse; the loser finds the page writable.
fn two_write_faults<C: Policy>(w: &World<C>) {
    let other = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    w.write(DMA);
    other.join().unwrap();
    let stats = w.vm.space.stats();
    let breaks = stats.reused + stats.sharers_moved + stats.writer_moved;
    assert_eq!(breaks, 1, "once: {stats:?}");
    assert!([NEW, DMA].contains(&w.read()), "lost");
    let state = w.pool.state(w.frame());
    assert!(state.is_exclusive() && state.refs() == 1, "{state:?}");
}

/// G7: the guest becomes the last holder, or not, while the snapshot goes away.
pub(crate) fn break_against_drop_of_the_snapshot<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    // The count of an `Arc` is not loom's: without this it would always fall before the guest runs.
    thread::yield_now();
    drop(frozen);
    guest.join().unwrap();
    assert_eq!(w.read(), NEW, "lost");
    assert_eq!(w.pool.usage().in_use, 1, "once");
    w.settle();
}

/// G7: the guest becomes the last holder, or not, while a clone ends.
pub(crate) fn break_against_end_of_a_clone<C: Policy>() {
    let w = world::<C>();
    let clone = w.clone();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    assert_eq!(clone.cpu_read(P), OLD, "isolation");
    drop(clone);
    guest.join().unwrap();
    assert_eq!(w.read(), NEW, "lost");
    assert_eq!(w.pool.usage().in_use, 1, "once");
    w.settle();
}

/// G7 with two that run: never both writable on one frame, and each sees what it wrote.
pub(crate) fn break_of_a_clone_against_break_of_its_parent<C: Policy>() {
    let w = world::<C>();
    let clone = w.clone();
    let clone = thread::spawn(move || {
        clone.cpu_write(P, CLONES).unwrap();
        clone
    });
    w.write(NEW);
    let clone = clone.join().unwrap();
    assert_eq!((w.read(), clone.cpu_read(P)), (NEW, CLONES), "isolation");
    drop(clone);
    w.settle();
}

/// The guest's other vCPU reads the page while it is broken, and the clone writes as soon as it may.
pub(crate) fn read_after_the_clones_break_against_break<C: Policy>() {
    let w = world::<C>();
    let clone = w.clone();
    let other = w.beside(move |vm| {
        clone.cpu_write(P, CLONES).unwrap();
        let seen = vm.cpu_read(P);
        assert!([OLD, NEW].contains(&seen), "isolation: {seen}");
        clone
    });
    w.write(NEW);
    drop(other.join().unwrap());
    w.settle();
}

/// A checker that reads a snapshot's page under its lock, against the break that moves it.
pub(crate) fn read_of_a_snapshot_against_break<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    assert_eq!(w.read_frozen(&frozen), OLD, "isolation");
    guest.join().unwrap();
    assert_eq!(w.read_frozen(&frozen), OLD, "isolation");
    drop(frozen);
    w.settle();
}

/// The same without the lock: `Frozen::frame` is a hint, and this is what happens to who takes it for more.
pub(crate) fn read_of_a_snapshot_without_its_lock_against_break<C: Policy>() {
    let w = world::<C>();
    let frozen = w.fork();
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    let seen = w.memory.load(frozen.frame(P).unwrap());
    assert_eq!(seen, OLD, "isolation");
    guest.join().unwrap();
    drop(frozen);
    w.settle();
}

/// The copy that two snapshots are given must outlive the older while it is handed round.
pub(crate) fn break_for_two_snapshots_against_drop_of_the_older<C: Policy>() {
    let w = world::<C>();
    let (older, younger) = (w.fork(), w.fork());
    break_for_two_snapshots(w, older, younger);
}

/// The same, with the younger dropped.
pub(crate) fn break_for_two_snapshots_against_drop_of_the_younger<C: Policy>() {
    let w = world::<C>();
    let (older, younger) = (w.fork(), w.fork());
    break_for_two_snapshots(w, younger, older);
}

fn break_for_two_snapshots<C: Policy>(w: World<C>, dropped: Arc<Frozen>, kept: Arc<Frozen>) {
    let guest = w.beside(|vm| vm.cpu_write(P, NEW).unwrap());
    // As above.
    thread::yield_now();
    drop(dropped);
    guest.join().unwrap();
    assert_eq!(w.read(), NEW, "lost");
    assert_eq!(w.read_frozen(&kept), OLD, "isolation");
    assert_eq!(w.pool.usage().in_use, 2, "once");
    drop(kept);
    w.settle();
}
