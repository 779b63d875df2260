//! Requests that make no sense, for device 0.

use core::hint::spin_loop;

use crate::abi::{
    AREA_AVAIL, AREA_BUFFERS, AREA_DESC, AREA_HEADERS, AREA_STATUS, DATA_LEN, DEVICE_STRIDE,
    Layout, MAX_REGISTERED, PORT_DOORBELL_EVENT, PORT_DOORBELL_EXIT, QUEUE_SIZE, RequestKind,
};
use crate::area::Area;
use crate::{console, port};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Bytes of a request header and of a status.
const HEADER: u64 = 32;
const STATUS: u64 = 16;
const _: () = assert!(HEADER == size_of::<crate::abi::RequestHeader>() as u64);
const _: () = assert!(STATUS == size_of::<crate::abi::Status>() as u64);

/// How often each of them is posted.
const PASSES: u64 = 4;
/// Turns of a loop to wait after a doorbell.
const POLLS: u64 = 20_000;

/// Posts each of the requests a few times, ringing both doorbells for each, and waits a little.
pub fn post(layout: &Layout) {
    if layout.devices == 0 {
        console::print(format_args!(
            "misbehave: there is no device to send garbage to"
        ));
        return;
    }
    let mut queue = Queue {
        // SAFETY: the area of a device, which nothing else in this program touches.
        area: unsafe { Area::new(layout.device_area(0)) },
        memory: layout.memory,
        posted: 0,
    };
    for _ in 0..PASSES {
        queue.post_wrong_heads();
        queue.post_wrong_chains();
        queue.post_wrong_addresses();
        queue.post_wrong_shapes();
        queue.post_wrong_headers();
        queue.post_data_over_descriptors();
    }
    let posted = queue.posted;
    queue.post_beyond_the_ring();
    console::print(format_args!(
        "misbehave: posted {posted} requests that make no sense"
    ));
}

struct Queue {
    area: Area<DEVICE_STRIDE>,
    memory: u64,
    posted: u16,
}

/// A descriptor: gpa, length, flags. The next one is the one behind it.
type Descriptor = (u64, u64, u16);

impl Queue {
    fn post_wrong_heads(&mut self) {
        for head in [QUEUE_SIZE, QUEUE_SIZE + 1, u16::MAX] {
            self.post(head);
        }
    }

    fn post_wrong_chains(&mut self) {
        // To itself, round in a circle, out of the table, and on to nothing.
        for (last, next) in [(0, 0), (3, 0), (2, QUEUE_SIZE), (1, u16::MAX), (3, 40)] {
            self.write_header(RequestKind::ToGuest as u32, 0, 0, 0);
            self.write_chain(&[
                self.header(),
                (self.buffer(), 4096, NEXT | WRITE),
                (self.buffer() + 4096, DATA_LEN - 4096, NEXT | WRITE),
                (self.status().0, STATUS, NEXT | WRITE),
            ]);
            self.write_descriptor(40, (0, 0, 0), 0);
            self.area.write(AREA_DESC + 16 * last + 14, next);
            self.post(0);
        }
    }

    fn post_wrong_addresses(&mut self) {
        let kinds = [(RequestKind::ToGuest, WRITE), (RequestKind::FromGuest, 0)];
        for (kind, write) in kinds {
            for (gpa, len) in [
                (self.memory, DATA_LEN),
                (self.memory - 4096, DATA_LEN),
                (self.memory + (1 << 40), DATA_LEN),
                (u64::MAX - 4096, DATA_LEN),
                (u64::MAX, 1),
                (self.buffer(), u64::from(u32::MAX)),
            ] {
                self.write_header(kind as u32, 0, 0, 0);
                self.post_chain(&[self.header(), (gpa, len, NEXT | write), self.status()]);
            }
        }
        for gpa in [self.memory, self.memory - 8, u64::MAX - 8] {
            let data = (self.buffer(), DATA_LEN, NEXT | WRITE);
            self.write_header(RequestKind::ToGuest as u32, 0, 0, 0);
            self.post_chain(&[(gpa, HEADER, NEXT), data, self.status()]);
            self.post_chain(&[self.header(), data, (gpa, STATUS, WRITE)]);
        }
    }

    fn post_wrong_shapes(&mut self) {
        self.write_header(RequestKind::ToGuest as u32, 0, 0, 0);
        let (header, status) = (self.header(), self.status());
        let data = (self.buffer(), DATA_LEN, NEXT | WRITE);
        let shapes: [&[Descriptor]; 13] = [
            &[(0, 0, 0)],
            &[(header.0, HEADER, 0)],
            &[header, status],
            &[header, (data.0, DATA_LEN, WRITE)],
            &[header, data, (status.0, STATUS, 0)],
            &[header, data, (status.0, STATUS - 1, WRITE)],
            &[header, data, (status.0 + 1, STATUS, WRITE)],
            &[(header.0, HEADER - 1, NEXT), data, status],
            &[(header.0, HEADER, NEXT | WRITE), data, status],
            &[header, (data.0, DATA_LEN, NEXT), status],
            &[header, (data.0, 0, NEXT | WRITE), status],
            &[header, (data.0 + 1, DATA_LEN + 7, NEXT | WRITE), status],
            &[(self.memory, 64, INDIRECT)],
        ];
        for shape in shapes {
            self.post_chain(shape);
        }
    }

    fn post_wrong_headers(&mut self) {
        for kind in [0, 6, 77, u32::MAX] {
            self.write_header(kind, 0, 0, 0);
            self.post_chain(&[self.header(), self.status()]);
        }
        let register = RequestKind::Register as u32;
        for (buffer, gpa, len) in [
            (0, self.memory, DATA_LEN),
            (0, self.memory - 4096, DATA_LEN),
            (0, u64::MAX - 4096, 8192),
            (0, self.buffer(), 0),
            (0, self.buffer(), u64::MAX),
            (MAX_REGISTERED as u32, self.buffer(), DATA_LEN),
            (u32::MAX, self.buffer(), DATA_LEN),
        ] {
            self.write_header(register, buffer, gpa, len);
            self.post_chain(&[self.header(), self.status()]);
        }
        for kind in [
            RequestKind::RegisteredToGuest,
            RequestKind::RegisteredFromGuest,
        ] {
            for buffer in [0, MAX_REGISTERED as u32, u32::MAX] {
                self.write_header(kind as u32, buffer, 0, 0);
                self.post_chain(&[self.header(), self.status()]);
            }
        }
    }

    /// A request that is right but for where its data goes: over the descriptors that describe it.
    fn post_data_over_descriptors(&mut self) {
        self.write_header(RequestKind::ToGuest as u32, 0, 0, 0);
        let (table, rest) = (self.area.gpa(AREA_DESC), self.buffer());
        self.post_chain(&[
            self.header(),
            (table, 1024, NEXT | WRITE),
            (rest, DATA_LEN - 1024, NEXT | WRITE),
            self.status(),
        ]);
    }

    /// Claims more requests than the ring has room for.
    fn post_beyond_the_ring(&mut self) {
        self.posted = self.posted.wrapping_add(1000);
        self.post(0);
    }

    fn header(&self) -> Descriptor {
        (self.area.gpa(AREA_HEADERS), HEADER, NEXT)
    }

    fn status(&self) -> Descriptor {
        (self.area.gpa(AREA_STATUS), STATUS, WRITE)
    }

    fn buffer(&self) -> u64 {
        self.area.gpa(AREA_BUFFERS)
    }

    fn write_header(&self, kind: u32, buffer: u32, gpa: u64, len: u64) {
        self.area.write(AREA_HEADERS, kind);
        self.area.write(AREA_HEADERS + 4, buffer);
        self.area.write(AREA_HEADERS + 8, u64::from(self.posted));
        self.area.write(AREA_HEADERS + 16, gpa);
        self.area.write(AREA_HEADERS + 24, len);
    }

    fn write_descriptor(&self, place: u64, (gpa, len, flags): Descriptor, next: u16) {
        let at = AREA_DESC + 16 * place;
        self.area.write(at, gpa);
        self.area.write(at + 8, len as u32);
        self.area.write(at + 12, flags);
        self.area.write(at + 14, next);
    }

    fn write_chain(&self, chain: &[Descriptor]) {
        for (place, &descriptor) in (0..).zip(chain) {
            self.write_descriptor(place, descriptor, place as u16 + 1);
        }
    }

    fn post_chain(&mut self, chain: &[Descriptor]) {
        self.write_chain(chain);
        self.post(0);
    }

    /// Puts `head` in the available ring, rings both ways, and waits a little.
    fn post(&mut self, head: u16) {
        let entry = AREA_AVAIL + 4 + 2 * u64::from(self.posted % QUEUE_SIZE);
        self.area.write(entry, head);
        self.posted = self.posted.wrapping_add(1);
        self.area.write(AREA_AVAIL + 2, self.posted);
        port::out(PORT_DOORBELL_EXIT, 0);
        port::out(PORT_DOORBELL_EVENT, 0);
        for _ in 0..POLLS {
            spin_loop();
        }
    }
}
