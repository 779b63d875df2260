//! What becomes read-only is told, and nothing else.

use super::refusing::Manner;
use super::*;

fn told(w: &World) -> Vec<u64> {
    let pages = w.vm.space.take_protected().unwrap();
    pages.iter().map(|gfn| gfn.0).collect()
}

fn watched() -> World {
    let w = world();
    w.vm.space.note_protected();
    w
}

#[test]
fn nothing_is_told_before_somebody_asks() {
    let w = world();
    w.vm.cpu_write(P, 5).unwrap();
    let _frozen = w.vm.space.fork().unwrap();
    assert_eq!(w.vm.space.take_protected(), None);
    w.vm.space.note_protected();
    assert_eq!(told(&w), [] as [u64; 0]);
}

#[test]
fn a_fork_tells_what_was_writable_once() {
    let w = watched();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Gfn(2), 6).unwrap();
    w.vm.space.unshare(Q).unwrap();
    let pin = w.vm.space.pin(Gfn(3), Access::Write).unwrap();
    let _first = w.vm.space.fork().unwrap();
    assert_eq!(told(&w), [0, 2], "1 was read-only, 3 is writable");
    drop(pin);
    let _second = w.vm.space.fork().unwrap();
    assert_eq!(told(&w), [3]);
    w.vm.cpu_write(P, 7).unwrap();
    let _third = w.vm.space.fork().unwrap();
    assert_eq!(told(&w), [0]);
    w.vm.space.note_protected();
    assert_eq!(told(&w), [] as [u64; 0]);
}

#[test]
fn dirty_tracking_tells_too() {
    let w = watched();
    w.vm.cpu_write(Q, 5).unwrap();
    assert_eq!(w.vm.space.take_dirty().unwrap().len(), 1);
    assert_eq!(told(&w), [1]);
}

#[test]
fn a_restore_tells_what_it_has_changed_and_is_read_only() {
    let w = watched();
    w.vm.cpu_write(P, 5).unwrap();
    w.vm.cpu_write(Q, 5).unwrap();
    let first = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 6).unwrap();
    let _second = w.vm.space.fork().unwrap();
    w.vm.cpu_write(Gfn(2), 7).unwrap();
    assert_eq!(told(&w), [0, 1]);
    w.vm.space.restore(&first).unwrap();
    assert_eq!(w.vm.cpu_read(P), 5);
    assert_eq!(told(&w), [0], "1 is as it was, 2 is writable");
}

/// The change is refused half-way, and then its undoing: it is finished, and the fork fails.
#[test]
fn what_a_failed_fork_has_left_read_only_is_told() {
    for refused in 1..=3 {
        let w = watched();
        w.vm.cpu_write(P, 5).unwrap();
        w.vm.cpu_write(Q, 5).unwrap();
        w.mmu.refuse(Manner::AllBut(1), 0, refused);
        let failed = w.vm.space.fork();
        assert!(failed.is_err());
        let read_only = [P, Q].map(|gfn| !w.entry(gfn).is_writable());
        assert_eq!(read_only, [refused == 2; 2]);
        let protected = w.vm.space.take_protected().unwrap();
        assert_eq!([P, Q].map(|gfn| protected.contains(gfn)), read_only);
    }
}
