//! Available rings that no right driver would write.

use guest::abi::{AREA_AVAIL, QUEUE_SIZE, RequestKind};

use super::*;

#[test]
fn heads_that_are_no_descriptors_keep_their_place_and_get_no_answer() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    driver.post(u16::MAX);
    driver.ring(Doorbell::Event);
    eventually("the bad request", || rig.set.stats().bad_requests == 1);
    let seq = driver.seq();
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &[(rig.heap(), 64)]);
    driver.post(QUEUE_SIZE);
    driver.post(0);
    driver.ring(Doorbell::Exit);
    driver.wait_used(1);
    assert_eq!(driver.used_entry(0), (0, 64 + 16));
    assert_eq!(rig.set.stats().bad_requests, 2);
    rig.end(driver);
}

#[test]
fn a_ring_that_makes_no_sense_is_left_alone() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let index = driver.area + AREA_AVAIL + 2;
    for (count, doorbell) in [(1, Doorbell::Exit), (2, Doorbell::Event)] {
        driver.write(index, (driver.posted + QUEUE_SIZE + 1).to_le_bytes());
        driver.ring(doorbell);
        eventually("the bad doorbell", || {
            rig.set.stats().bad_doorbells == count
        });
        driver.write(index, driver.posted.to_le_bytes());
        let (seq, status) = driver.stream(RequestKind::ToGuest, &[(rig.heap(), 64)]);
        assert_eq!(status, ok(seq));
    }
    rig.end(driver);
}

#[test]
fn an_overrun_ring_bounds_what_is_outstanding() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let seq = driver.seq();
    let data = [(rig.heap(), MAX_DATA as u32)];
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &data);
    for _ in 0..4 {
        for _ in 0..QUEUE_SIZE / 2 {
            driver.post(0);
        }
        driver.ring(Doorbell::Exit);
        let state = &rig.set.capture()[0];
        let outstanding = state.pending.len() + usize::from(state.in_flight.is_some());
        assert!(outstanding <= usize::from(QUEUE_SIZE));
    }
    // What found no room is taken without another doorbell.
    driver.wait_used(2 * QUEUE_SIZE);
    assert_eq!(rig.set.stats().to_guest, 2 * u64::from(QUEUE_SIZE));
    rig.end(driver);
}
