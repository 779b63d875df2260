//! Stopping devices: between two requests, in the middle of one, and too late for the end of one.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{RequestKind, STATUS_PENDING};

use super::*;

#[test]
fn stopped_devices_leave_doorbells_for_later() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    for doorbell in [Doorbell::Exit, Doorbell::Event] {
        let outer = rig.stop();
        // An idle device is stopped without waiting, and stops may be nested.
        let inner = rig.set.stop(Instant::now());
        assert_eq!(inner.reached(), [true]);
        let seq = driver.seq();
        driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &[(rig.heap(), 64)]);
        driver.post(0);
        driver.ring(doorbell);
        thread::sleep(Duration::from_millis(10));
        inner.resume();
        thread::sleep(Duration::from_millis(10));
        let state = &rig.set.capture()[0];
        assert_eq!(state.queue.next_avail, driver.posted - 1);
        assert_eq!(driver.status(0).code, STATUS_PENDING);
        outer.resume();
        driver.wait_used(driver.posted);
        assert_eq!(driver.status(0), ok(seq));
    }
    rig.end(driver);
}

#[test]
fn a_stop_waits_for_one_request_and_begins_no_other() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let device = Arc::clone(&driver.handle);
    let seq = driver.seq();
    let data = [(rig.heap(), MAX_DATA as u32)];
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &data);
    let held = device.hold_transfers();
    (0..16).for_each(|_| driver.post(0));
    driver.ring(Doorbell::Exit);
    begun(&device);
    // By hand, so that the scheduler does not say which comes first: the stop, or the end of the transfer.
    device.begin_stop();
    thread::scope(|scope| {
        // Longer than anyone waits below: only the end of the transfer is in time.
        let stop = scope.spawn(|| rig.set.stop(Instant::now() + 2 * PATIENCE));
        thread::sleep(Duration::from_millis(20));
        assert!(!stop.is_finished(), "the transfer is held");
        assert_eq!(driver.used(), 0);
        drop(held);
        eventually("the end of the transfer to be noticed", || {
            stop.is_finished()
        });
        let stopped = stop.join().unwrap();
        assert_eq!(stopped.reached(), [true]);
        device.resume();
        thread::sleep(Duration::from_millis(1));
        let state = &rig.set.capture()[0];
        assert_eq!((state.in_flight, state.pending.len()), (None, 15));
        assert_eq!((driver.used(), driver.status(0)), (1, ok(seq)));
        stopped.resume();
    });
    driver.wait_used(driver.posted);
    drop(device);
    rig.end(driver);
}

#[test]
fn a_device_that_stops_too_late_is_in_flight_and_publishes_nothing() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let device = Arc::clone(&driver.handle);
    for is_restored in [false, true, false, true] {
        let seq = driver.seq();
        let (held, stopped) = rig.stop_too_early(&mut driver, &device, seq);
        let state = rig.set.capture().remove(0);
        assert_eq!((state.in_flight, state.pending.len()), (Some(0), 0));
        assert_eq!(state.queue.next_avail, driver.posted);
        // Its memory is the device's until the transfer ends.
        assert!(matches!(
            rig.set.release_streaming(),
            Err(DeviceRestoreError::NotStopped { device: 0 })
        ));
        assert!(rig.pins(rig.heap()) > 0);
        drop(held);
        // The transfer ends, and nothing is said of it.
        eventually("the device to be quiet", || {
            rig.set.release_streaming().is_ok()
        });
        assert_eq!(rig.pins(rig.heap()), 0);
        assert_eq!(driver.used(), driver.posted - 1);
        assert_eq!(driver.status(0).code, STATUS_PENDING);
        // It is done again from the start.
        driver.ram.write(rig.heap(), &[0; 64]).unwrap();
        if is_restored {
            rig.set.restore(std::slice::from_ref(&state)).unwrap();
            // It is in flight until the device begins it again: what is there of its data is no wonder.
            assert_eq!(rig.set.capture(), [state]);
        }
        stopped.resume();
        driver.wait_used(driver.posted);
        assert_eq!(driver.status(0), ok(seq));
        assert_eq!(driver.bytes(rig.heap(), 64), driver.data(seq, 64));
    }
    drop(device);
    rig.end(driver);
}

#[test]
fn what_is_late_is_published_on_resume() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let device = Arc::clone(&driver.handle);
    let seq = driver.seq();
    let (held, stopped) = rig.stop_too_early(&mut driver, &device, seq);
    drop(held);
    eventually("the transfer to end", || device.is_quiet());
    assert_eq!(driver.bytes(rig.heap(), 64), driver.data(seq, 64));
    assert_eq!(rig.set.capture()[0].in_flight, Some(0));
    assert_eq!(driver.used(), 0);
    assert_eq!(driver.status(0).code, STATUS_PENDING);
    // Published as it is, not done again.
    driver.ram.write(rig.heap(), &[0; 64]).unwrap();
    stopped.resume();
    driver.wait_used(1);
    assert_eq!(driver.status(0), ok(seq));
    assert_eq!(driver.bytes(rig.heap(), 64), [0; 64]);
    drop(device);
    rig.end(driver);
}
