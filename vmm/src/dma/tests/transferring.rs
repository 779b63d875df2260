//! Transfers: what of guest memory is written and read, down to the byte.

use std::thread;
use std::time::Duration;

use guest::abi::{RequestKind, STATUS_MISMATCH};
use guest::formula::dma_word;

use super::super::Mismatch;
use super::*;

/// Descriptors of uneven lengths, at uneven places and out of order, on pages of their own or shared.
fn uneven(heap: u64) -> Vec<(u64, u32)> {
    vec![
        (heap + 3 * PAGE_SIZE + 5, 1),
        (heap + 3 * PAGE_SIZE + 9, 3),
        (heap + PAGE_SIZE - 4, 9),
        (heap + 8 * PAGE_SIZE - 3, 2 * PAGE_SIZE as u32 + 7),
        (heap + 4 * PAGE_SIZE, 8),
        (heap + 5 * PAGE_SIZE + 1, 1003),
    ]
}

fn total(data: &[(u64, u32)]) -> u64 {
    data.iter().map(|&(_, len)| u64::from(len)).sum()
}

fn gather(driver: &Driver, data: &[(u64, u32)]) -> Vec<u8> {
    data.iter()
        .flat_map(|&(gpa, len)| driver.bytes(gpa, len.into()))
        .collect()
}

fn scatter(driver: &Driver, data: &[(u64, u32)], bytes: &[u8]) {
    let mut done = 0;
    for &(gpa, len) in data {
        let next = done + len as usize;
        driver.ram.write(gpa, &bytes[done..next]).unwrap();
        done = next;
    }
}

#[test]
fn to_guest_writes_the_data_and_nothing_beside_it() {
    let rig = Rig::new(2);
    for device in 0..2 {
        let mut driver = rig.driver(device);
        let (gpa, len) = (rig.heap() + 512, 2 * PAGE_SIZE + 40);
        driver
            .ram
            .write(rig.heap(), &vec![0xee; 4 * PAGE_SIZE as usize])
            .unwrap();
        let (seq, status) = driver.stream(RequestKind::ToGuest, &[(gpa, len as u32)]);
        assert_eq!(status, ok(seq));
        assert_eq!(driver.used_entry(0), (0, len as u32 + 16));
        assert_eq!(driver.bytes(gpa, len), driver.data(seq, len));
        assert!(driver.bytes(rig.heap(), 512).iter().all(|&b| b == 0xee));
        let after = driver.bytes(gpa + len, 4 * PAGE_SIZE - 512 - len);
        assert!(after.iter().all(|&b| b == 0xee));
    }
    let stats = rig.set.stats();
    assert_eq!((stats.to_guest, stats.bytes), (2, 2 * (2 * PAGE_SIZE + 40)));
    rig.end(());
}

#[test]
fn from_guest_finds_the_first_wrong_word() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let (gpa, len) = (rig.heap() + 64, 3 * PAGE_SIZE);
    let data = [(gpa, len as u32)];
    let fill = |driver: &Driver, seq| driver.ram.write(gpa, &driver.data(seq, len)).unwrap();

    fill(&driver, 1);
    assert_eq!(driver.stream(RequestKind::FromGuest, &data), (1, ok(1)));
    assert_eq!(driver.used_entry(0), (0, 16));
    assert_eq!(rig.set.take_mismatches(), []);

    fill(&driver, 2);
    let right = dma_word(SEED, 0, 2, 700);
    driver.write(gpa + 5600, (right ^ 0x100).to_le_bytes());
    driver.write(gpa + 8000, [0xff; 8]);
    let (seq, status) = driver.stream(RequestKind::FromGuest, &data);
    assert_eq!(
        (seq, status.code, status.offset),
        (2, STATUS_MISMATCH, 5600)
    );
    let found = Mismatch {
        device: 0,
        seq: 2,
        offset: 5600,
        gpa: gpa + 5600,
        expected: right,
        found: right ^ 0x100,
    };
    assert_eq!(rig.set.take_mismatches(), [found]);
    assert_eq!(rig.set.take_mismatches(), []);
    let stats = rig.set.stats();
    assert_eq!((stats.from_guest, stats.mismatches), (2, 1));
    rig.end(driver);
}

#[test]
fn words_may_be_cut_anywhere() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let data = uneven(rig.heap());
    let len = total(&data);
    let (seq, status) = driver.stream(RequestKind::ToGuest, &data);
    assert_eq!(status, ok(seq));
    assert_eq!(gather(&driver, &data), driver.data(seq, len));

    // Any single wrong byte is seen, wherever the cuts are.
    for wrong in (0..len).filter(|at| *at < 40 || at % 97 == 0 || len - at < 20) {
        let seq = driver.next_seq + 1;
        let mut bytes = driver.data(seq, len);
        scatter(&driver, &data, &bytes);
        assert_eq!(driver.stream(RequestKind::FromGuest, &data).1, ok(seq));

        let seq = driver.next_seq + 1;
        bytes = driver.data(seq, len);
        bytes[wrong as usize] ^= 0x40;
        scatter(&driver, &data, &bytes);
        let (_, status) = driver.stream(RequestKind::FromGuest, &data);
        let expected = (STATUS_MISMATCH, (wrong / 8 * 8) as u32);
        assert_eq!((status.code, status.offset), expected, "byte {wrong}");
        let mismatch = rig.set.take_mismatches()[0];
        let bit = 0x40 << (8 * (wrong % 8));
        assert_eq!(mismatch.expected ^ mismatch.found, bit, "byte {wrong}");
    }
    rig.end(driver);
}

#[test]
fn both_doorbells_serve_and_the_vcpu_takes_at_once() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    for (doorbell, slot) in [
        (Doorbell::Exit, 0),
        (Doorbell::Event, 1),
        (Doorbell::Exit, 2),
    ] {
        let seq = driver.seq();
        let data = [(rig.heap(), MAX_DATA as u32)];
        let head = 4 * slot as u16;
        driver.prepare(slot, head, header(RequestKind::ToGuest, seq), &data);
        driver.post(head);
        thread::sleep(Duration::from_millis(5));
        assert_eq!(driver.used(), driver.posted - 1, "nobody rang");
        driver.ring(doorbell);
        if let Doorbell::Exit = doorbell {
            assert_eq!(rig.set.capture()[0].queue.next_avail, driver.posted);
        }
        driver.wait_used(driver.posted);
        assert_eq!(driver.status(slot), ok(seq));
    }
    rig.end(driver);
}
