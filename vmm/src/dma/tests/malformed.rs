//! Chains that are wrong in one way each.

use guest::abi::{
    QUEUE_SIZE, RequestHeader, RequestKind, STATUS_BAD_REQUEST, STATUS_OK, STATUS_PENDING,
};

use super::*;

/// Writes a chain to slot 0 that is wrong in one way. `None`: there is no place for a status.
type Malformed = (&'static str, fn(&mut Driver, u64), Option<u32>);

fn good_chain(driver: &mut Driver, heap: u64) {
    driver.prepare(
        0,
        0,
        header(RequestKind::ToGuest, 9),
        &[(heap, 64), (heap + 64, 64)],
    );
}

fn with_header(driver: &mut Driver, header: RequestHeader) {
    driver.prepare(0, 0, header, &[]);
}

const MALFORMED: &[Malformed] = &[
    (
        "a loop",
        |d, h| {
            good_chain(d, h);
            d.descriptor(2, h, 8, NEXT | WRITE, 1);
        },
        None,
    ),
    (
        "a descriptor that is its own next",
        |d, _| {
            d.descriptor(0, d.header_gpa(0), 32, NEXT, 0);
        },
        None,
    ),
    (
        "a next that is no descriptor",
        |d, h| {
            good_chain(d, h);
            d.descriptor(2, h, 8, NEXT | WRITE, QUEUE_SIZE);
        },
        None,
    ),
    (
        "no status",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, d.status_gpa(0), 16, 0, 0);
        },
        None,
    ),
    (
        "a short status",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, d.status_gpa(0), 15, WRITE, 0);
        },
        None,
    ),
    (
        "an unaligned status",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, h + PAGE_SIZE - 8, 16, WRITE, 0);
        },
        None,
    ),
    (
        "a status beyond memory",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, MEMORY, 16, WRITE, 0);
        },
        None,
    ),
    (
        "a status at the end of all addresses",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, u64::MAX - 15, 16, WRITE, 0);
        },
        None,
    ),
    (
        "nothing but a status",
        |d, _| {
            d.clear_status(0);
            d.descriptor(0, d.status_gpa(0), 16, WRITE, 0);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "data beyond memory",
        |d, h| {
            good_chain(d, h);
            d.descriptor(2, MEMORY - 8, 16, NEXT | WRITE, 3);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "data at the end of all addresses",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, u64::MAX - 99, 100, NEXT | WRITE, 2);
            d.descriptor(2, u64::MAX, 100, NEXT | WRITE, 3);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "data of no length",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, h, 0, NEXT | WRITE, 2);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "no data",
        |d, _| {
            with_header(d, header(RequestKind::ToGuest, 9));
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "too much data",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, h, MAX_DATA as u32 - 63, NEXT | WRITE, 2);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "more than 2^32 bytes",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, h, u32::MAX, NEXT | WRITE, 2);
            d.descriptor(2, h, u32::MAX, NEXT | WRITE, 3);
        },
        None,
    ),
    (
        "data for the wrong direction",
        |d, h| {
            good_chain(d, h);
            d.descriptor(2, h, 8, NEXT, 3);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a header that is writable",
        |d, h| {
            good_chain(d, h);
            d.descriptor(0, d.header_gpa(0), 32, NEXT | WRITE, 1);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a short header",
        |d, h| {
            good_chain(d, h);
            d.descriptor(0, d.header_gpa(0), 31, NEXT, 1);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a header beyond memory",
        |d, h| {
            good_chain(d, h);
            d.descriptor(0, MEMORY - 16, 32, NEXT, 1);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "an unknown kind",
        |d, h| {
            good_chain(d, h);
            d.write(d.header_gpa(0), 77u32.to_le_bytes());
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "data where there should be none",
        |d, h| {
            good_chain(d, h);
            d.write(
                d.header_gpa(0),
                (RequestKind::RegisteredToGuest as u32).to_le_bytes(),
            );
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a buffer that is not registered",
        |d, _| {
            with_header(d, header(RequestKind::RegisteredFromGuest, 9));
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a registration with too high an index",
        |d, h| {
            let header = RequestHeader {
                buffer: 16,
                gpa: h,
                len: 64,
                ..header(RequestKind::Register, 9)
            };
            with_header(d, header);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a registration of nothing",
        |d, h| {
            with_header(
                d,
                RequestHeader {
                    gpa: h,
                    ..header(RequestKind::Register, 9)
                },
            );
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a registration of all addresses",
        |d, h| {
            with_header(
                d,
                RequestHeader {
                    gpa: h,
                    len: u64::MAX,
                    ..header(RequestKind::Register, 9)
                },
            );
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a registration beyond memory",
        |d, _| {
            let header = RequestHeader {
                gpa: u64::MAX - 4,
                len: 64,
                ..header(RequestKind::Register, 9)
            };
            with_header(d, header);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a second registration",
        |d, h| {
            assert_eq!(d.register(7, h, 64).code, STATUS_OK);
            let header = RequestHeader {
                buffer: 7,
                gpa: h,
                len: 64,
                ..header(RequestKind::Register, 9)
            };
            with_header(d, header);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "an indirect table beyond memory",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, MEMORY - 16, 64, NEXT | INDIRECT, 2);
        },
        None,
    ),
    (
        "an indirect table longer than the ring",
        |d, h| {
            d.write_header(0, header(RequestKind::FromGuest, 9));
            let (header, status) = (d.header_gpa(0), d.status_gpa(0));
            write_descriptor(&d.ram, h, 0, header, 32, NEXT, 1);
            for index in 1..999 {
                write_descriptor(&d.ram, h, index, h, 1, NEXT, index + 1);
            }
            write_descriptor(&d.ram, h, 999, status, 16, WRITE, 0);
            d.descriptor(0, h, 16 * 1000, INDIRECT, 0);
        },
        None,
    ),
    (
        "a status that is not the last",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, d.status_gpa(0), 16, NEXT | WRITE, QUEUE_SIZE);
        },
        None,
    ),
];

#[test]
fn malformed_chains_are_answered_and_nothing_is_held() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    for (count, &(what, write, expected)) in (1..).zip(MALFORMED) {
        for doorbell in [Doorbell::Exit, Doorbell::Event] {
            if what == "a second registration" && matches!(doorbell, Doorbell::Event) {
                continue;
            }
            driver.clear_status(0);
            write(&mut driver, rig.heap());
            let before = rig.set.stats().bad_requests;
            driver.post(0);
            driver.ring(doorbell);
            driver.wait_used(driver.posted);
            let (head, len) = driver.used_entry(driver.posted - 1);
            assert_eq!(head, 0, "{what}");
            assert_eq!(len, if expected.is_some() { 16 } else { 0 }, "{what}");
            let code = driver.status(0).code;
            assert_eq!(code, expected.unwrap_or(STATUS_PENDING), "{what}");
            assert_eq!(rig.set.stats().bad_requests, before + 1, "{what}");
            let (seq, status) = driver.stream(RequestKind::ToGuest, &[(rig.heap(), 64)]);
            assert_eq!(status, ok(seq), "after {what}, chain {count}");
        }
    }
    assert_eq!(rig.set.stats().bad_doorbells, 0);
    rig.end(driver);
}
