//! Restoring devices: requests are taken again, buffers pinned again, and bad states refused.

use std::sync::Arc;

use guest::abi::{AREA_AVAIL, RequestHeader, RequestKind, STATUS_BAD_REQUEST, STATUS_OK};

use super::*;

#[test]
fn restore_takes_pending_requests_again() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let len = MAX_DATA / 8;
    // Every slot has a buffer of its own.
    let buffer = |slot: u64| rig.heap() + slot * 2 * len;
    let kept = rig.heap() - PAGE_SIZE;
    assert_eq!(driver.register(0, kept, 100).code, STATUS_OK);
    // Positions in the rings are about to wrap.
    for _ in 0..60 {
        driver.stream(RequestKind::ToGuest, &[(buffer(0), 8)]);
    }
    let seqs = [(); 8].map(|()| driver.seq());
    for (slot, &seq) in (0..).zip(&seqs) {
        let head = 4 * slot as u16;
        let data = [(buffer(slot), len as u32)];
        driver.prepare(slot, head, header(RequestKind::ToGuest, seq), &data);
        driver
            .ram
            .write(buffer(slot), &vec![1; len as usize])
            .unwrap();
        driver.post(head);
        if slot == 5 {
            // No chain. It has its place among the pending ones, and never completes.
            driver.post(u16::MAX);
        }
    }
    let stopped = rig.stop_in_the_middle(|| driver.ring(Doorbell::Exit));
    let states = rig.set.capture();
    let frozen = rig.space.fork().unwrap();
    let done_then = driver.used();
    stopped.resume();
    let all_done = driver.posted - 1;
    driver.wait_used(all_done);
    assert_eq!((states[0].in_flight, states[0].pending.len()), (None, 8));
    assert_eq!(states[0].queue.next_avail, driver.posted);
    assert_eq!(done_then, all_done - 7);

    // The guest goes on, and does other things in the same slots.
    let seq = driver.seq();
    let more = rig.heap() - 2 * PAGE_SIZE;
    let registration = RequestHeader {
        buffer: 5,
        gpa: more,
        len: 100,
        ..header(RequestKind::Register, seq)
    };
    driver.prepare(1, 4, registration, &[]);
    driver.post(4);
    driver.ring(Doorbell::Event);
    driver.wait_used(all_done + 1);
    assert_eq!(driver.status(1), ok(seq));
    assert_eq!(rig.set.stats().registered, 2);
    let kept_frame = rig.pfn(kept);

    for round in 0..3 {
        let stopped = rig.stop();
        rig.set.release_streaming().unwrap();
        assert_eq!(rig.pins(kept), 1);
        rig.space.restore(&frozen).unwrap();
        rig.set.restore(&states).unwrap();
        assert_eq!(rig.set.capture(), states);
        assert_eq!(driver.used(), done_then);
        // Held across the restore; released; taken again with their pins.
        assert_eq!((rig.pfn(kept), rig.pins(kept)), (kept_frame, 1));
        assert_eq!(rig.pins(more), 0, "round {round}");
        assert_eq!(rig.pins(buffer(7)), 1);
        assert!(driver.bytes(buffer(7), len).iter().all(|&byte| byte == 1));
        stopped.resume();
        driver.wait_used(all_done);
        for (slot, &seq) in (0..).zip(&seqs) {
            assert_eq!(driver.status(slot), ok(seq));
            let data = driver.bytes(buffer(slot), len);
            assert!(
                data == driver.data(seq, len),
                "slot {slot} in round {round}"
            );
        }
    }
    assert_eq!(rig.set.stats().registered, 1);
    drop(frozen);
    rig.end(driver);
}

#[test]
fn restore_pins_registered_buffers_of_the_snapshot() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let gpa = rig.heap();
    driver.ram.write(gpa, &[7; 64]).unwrap();
    let snapshot = || {
        let stopped = rig.stop();
        let taken = (rig.space.fork().unwrap(), rig.set.capture());
        stopped.resume();
        taken
    };
    let restore = |(memory, states): &(Arc<Frozen>, Vec<DeviceState>)| {
        let stopped = rig.stop();
        rig.set.release_streaming().unwrap();
        rig.space.restore(memory).unwrap();
        rig.set.restore(states).unwrap();
        stopped.resume();
    };
    let without = snapshot();
    let posted_without = driver.posted;
    assert_eq!(driver.register(2, gpa, 64).code, STATUS_OK);
    let with = snapshot();
    let posted_with = driver.posted;

    restore(&without);
    driver.posted = posted_without;
    assert_eq!((rig.pins(gpa), rig.set.stats().registered), (0, 0));
    let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 2);
    assert_eq!(status, answer(seq, STATUS_BAD_REQUEST));

    restore(&with);
    driver.posted = posted_with;
    assert_eq!((rig.pins(gpa), rig.set.stats().registered), (1, 1));
    let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 2);
    assert_eq!(status, ok(seq));
    assert_eq!(driver.bytes(gpa, 64), driver.data(seq, 64));
    // Neither snapshot has seen that.
    for (memory, _) in [&without, &with] {
        assert_eq!(rig.read_frozen(memory, gpa, 64), [7; 64]);
    }
    drop((with, without));
    rig.end(driver);
}

#[test]
fn a_doorbell_rung_just_before_a_snapshot_is_not_lost_in_a_restore() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let stopped = rig.stop();
    let seq = driver.seq();
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &[(rig.heap(), 64)]);
    driver.post(0);
    driver.ring(Doorbell::Event);
    let (memory, states) = (rig.space.fork().unwrap(), rig.set.capture());
    stopped.resume();
    driver.wait_used(1);

    let stopped = rig.stop();
    rig.set.release_streaming().unwrap();
    rig.space.restore(&memory).unwrap();
    rig.set.restore(&states).unwrap();
    assert_eq!(driver.used(), 0);
    stopped.resume();
    driver.wait_used(1);
    assert_eq!(driver.status(0), ok(seq));
    drop(memory);
    rig.end(driver);
}

#[test]
fn states_are_plain_data_and_not_trusted() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    driver.register(1, rig.heap(), 64);
    let good = rig.set.capture();
    let text = serde_json::to_string(&good).unwrap();
    assert_eq!(
        serde_json::from_str::<Vec<DeviceState>>(&text).unwrap(),
        good
    );
    let running = rig.set.restore(&good).unwrap_err();
    assert!(matches!(
        running,
        DeviceRestoreError::NotStopped { device: 0 }
    ));

    let stopped = rig.stop();
    let with = |change: fn(&mut DeviceState)| {
        let mut state = good[0].clone();
        change(&mut state);
        rig.set.restore(&[state]).unwrap_err()
    };
    assert!(matches!(
        with(|s| s.queue.size = 3),
        DeviceRestoreError::Queue(_)
    ));
    assert!(matches!(
        with(|s| s.queue.used_ring = MEMORY - 4),
        DeviceRestoreError::Queue(_)
    ));
    assert!(matches!(
        with(|s| s.queue.desc_table = u64::MAX - 15),
        DeviceRestoreError::Queue(_)
    ));
    assert!(matches!(
        with(|s| s.pending = vec![0; 65]),
        DeviceRestoreError::Pending { pending: 65, .. }
    ));
    assert!(matches!(
        with(|s| s.registered.push(s.registered[0])),
        DeviceRestoreError::Registered { index: 1 }
    ));
    assert!(matches!(
        with(|s| s.registered[0].index = 16),
        DeviceRestoreError::Registered { index: 16 }
    ));
    assert!(matches!(
        with(|s| s.registered[0].gpa = MEMORY),
        DeviceRestoreError::Pin(_)
    ));
    assert!(matches!(
        with(|s| s.registered[0].len = u64::MAX),
        DeviceRestoreError::Registered { .. } | DeviceRestoreError::Pin(_)
    ));
    // A ring that has fewer chains than are pending: there is nothing to take again, and that is that.
    let index = driver.area + AREA_AVAIL + 2;
    for lost in [5, 20] {
        let mut state = good[0].clone();
        state.pending = vec![0; 10];
        driver.write(index, driver.posted.wrapping_sub(lost).to_le_bytes());
        rig.set.restore(&[state]).unwrap();
        let after = &rig.set.capture()[0];
        assert_eq!(after.queue, good[0].queue);
        assert_eq!(after.pending.len(), if lost < 10 { 5 } else { 0 });
    }
    driver.write(index, driver.posted.to_le_bytes());
    // The same index for another buffer.
    let (here, there) = (rig.heap(), rig.heap() + PAGE_SIZE);
    let mut state = good[0].clone();
    state.registered[0].gpa = there;
    rig.set.restore(&[state]).unwrap();
    assert_eq!((rig.pins(here), rig.pins(there)), (0, 1));
    rig.set.restore(&good).unwrap();
    assert_eq!(rig.set.capture(), good);
    stopped.resume();
    let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 1);
    assert_eq!(status, ok(seq));
    rig.end(driver);
}
