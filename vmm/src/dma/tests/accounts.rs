//! What devices hold, and give back: when memory is short, when a pin leaks, and at the end.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use guest::abi::{RequestKind, STATUS_PENDING};

use super::super::DmaError;
use super::*;

#[test]
fn lack_of_memory_is_an_error_of_the_device_and_not_the_guests() {
    let rig = Rig::with_limit(1, 64);
    let mut driver = rig.driver(0);
    let seq = driver.seq();
    let data = [(rig.heap(), MAX_DATA as u32)];
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &data);
    driver.post(0);
    driver.ring(Doorbell::Exit);
    let error = rig.set.take_error().unwrap();
    assert!(matches!(error, DmaError::Request { device: 0, .. }));
    assert!(rig.set.take_error().is_none());
    thread::sleep(Duration::from_millis(5));
    assert_eq!((driver.used(), driver.status(0).code), (0, STATUS_PENDING));
    assert_eq!(rig.set.stats().bad_requests, 0);
    rig.end(driver);
}

#[test]
fn a_leaked_pin_shows_in_the_accounts() {
    let rig = Rig::new(1);
    rig.set.leak_one_pin().unwrap();
    let Rig {
        pool,
        space,
        ram,
        set,
        ..
    } = rig;
    drop((set, ram, space));
    let left = pool.leftovers(16);
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].1.pins(), 1);
}

#[test]
fn dropping_the_set_releases_everything_whoever_holds_a_device() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    driver.register(0, rig.heap(), 64);
    for slot in 1..9 {
        let seq = driver.seq();
        let data = [(rig.heap(), MAX_DATA as u32)];
        driver.prepare(
            slot,
            4 * slot as u16,
            header(RequestKind::ToGuest, seq),
            &data,
        );
        driver.post(4 * slot as u16);
    }
    driver.ring(Doorbell::Exit);
    let device = Arc::clone(&driver.handle);
    let gpa = rig.heap();
    let frame = rig.pfn(gpa);
    let Rig {
        pool,
        space,
        ram,
        set,
        ..
    } = rig;
    drop(set);
    assert_eq!(pool.state(frame).pins(), 0);
    device.ring_from_vcpu();
    assert_eq!(device.stats().registered, 0);
    drop((ram, space, driver, device));
    assert_eq!(pool.leftovers(16), []);
}
