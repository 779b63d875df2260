//! Registered buffers: their pins over forks, what they are registered for, and their release.

use guest::abi::{RequestKind, STATUS_BAD_REQUEST, STATUS_OK};

use super::*;

#[test]
fn registered_buffer_stays_the_guests_across_forks() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let (gpa, len) = (rig.heap() + 512, 2 * PAGE_SIZE);
    assert_eq!(driver.register(3, gpa, len).code, STATUS_OK);
    assert_eq!(rig.set.stats().registered, 1);
    assert_eq!(rig.pins(gpa), 1);
    let frame = rig.pfn(gpa);

    let mut frozen = Vec::new();
    for _ in 0..3 {
        let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 3);
        assert_eq!(status, ok(seq));
        assert_eq!(driver.bytes(gpa, len), driver.data(seq, len));
        let stopped = rig.stop();
        frozen.push((seq, rig.space.fork().unwrap()));
        stopped.resume();
        assert_eq!(rig.pfn(gpa), frame);
    }
    // What the guest wrote after a fork, the device reads.
    let seq = driver.next_seq + 1;
    driver.ram.write(gpa, &driver.data(seq, len)).unwrap();
    let read = driver.registered(RequestKind::RegisteredFromGuest, 3);
    assert_eq!(read, (seq, ok(seq)));
    for (seq, child) in &frozen {
        assert_ne!(child.frame(Gfn::of_gpa(gpa)).unwrap(), frame);
        assert_eq!(rig.read_frozen(child, gpa, len), driver.data(*seq, len));
    }
    drop(frozen);
    rig.end(driver);
}

/// PROTOCOL.md E1.
#[test]
fn a_buffer_registered_for_reading_while_a_snapshot_shares_it_is_still_the_guests() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let (gpa, len) = (rig.heap() + 512, 2 * PAGE_SIZE);
    driver.ram.write(gpa, &vec![7; len as usize]).unwrap();
    let snapshot = rig.space.fork().unwrap();
    let kind = RequestKind::RegisterForReading;
    assert_eq!(driver.register_for(kind, 3, gpa, len).code, STATUS_OK);

    let seq = driver.next_seq + 1;
    driver.ram.write(gpa, &driver.data(seq, len)).unwrap();
    let read = driver.registered(RequestKind::RegisteredFromGuest, 3);
    assert_eq!(read, (seq, ok(seq)));
    assert_eq!(rig.read_frozen(&snapshot, gpa, len), vec![7; len as usize]);

    // A restore does not forget what it is registered for.
    let stopped = rig.stop();
    let states = rig.set.capture();
    assert!(states[0].registered[0].for_reading);
    rig.set.restore(&states).unwrap();
    stopped.resume();
    let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 3);
    assert_eq!(
        status,
        answer(seq, STATUS_BAD_REQUEST),
        "the device must not write"
    );
    drop(snapshot);
    rig.end(driver);
}

#[test]
fn a_released_buffer_is_held_no_more_and_its_index_is_free() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let gpa = rig.heap();
    for kind in [RequestKind::Register, RequestKind::RegisterForReading] {
        assert_eq!(driver.register_for(kind, 5, gpa, 64).code, STATUS_OK);
        assert_eq!((rig.pins(gpa), rig.set.stats().registered), (1, 1));
        let (seq, status) = driver.registered(RequestKind::Unregister, 5);
        assert_eq!(status, ok(seq));
        assert_eq!((rig.pins(gpa), rig.set.stats().registered), (0, 0));
    }
    let (seq, status) = driver.registered(RequestKind::Unregister, 5);
    assert_eq!(status, answer(seq, STATUS_BAD_REQUEST));
    rig.end(driver);
}
